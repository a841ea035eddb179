"""A tokenizer for models built from scratch, trained on their own text."""

from collections.abc import Iterable

from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 8192, lowercase: bool = False, max_length: int = 1024
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of BART's kind, `<s> text </s>`; the same text gives the same tokenizer."""
    bpe = ByteLevelBPETokenizer(add_prefix_space=True, lowercase=lowercase)
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    bpe.train_from_iterator(
        texts, vocab_size=vocab_size, min_frequency=2, special_tokens=list(special.values()), show_progress=False
    )
    bpe.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, bpe.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, model_max_length=max_length, cls_token="<s>", sep_token="</s>", **special
    )
