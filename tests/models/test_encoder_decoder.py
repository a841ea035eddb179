"""The summarizer against Transformers' own forward, loss and generation; sources; the tokenizer; saving."""

import copy
import itertools
import json
import shutil
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    PegasusConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from utils.data.examples import Corpus, Document, Example
from utils.errors import UsageError
from utils.models.encoder import build_small_encoder, load_retriever, set_max_seq_length
from utils.models.encoder_decoder import EncoderDecoder, build_small_bart
from utils.models.generation import DEFAULTS
from utils.models.losses import label_smoothed_loss, vocabulary_loss
from utils.models.sources import Rows, Sources, collate
from utils.models.summarizer import load_model_and_tokenizer, save_pretrained, set_up
from utils.models.tokenizer import position_limit, train_tokenizer
from utils.retrieval.teacher import passage_likelihoods

TEXTS = [f"The committee {verb} the {noun} in {month}." for verb in ("saw", "sold", "mended", "painted")
         for noun in ("old mill", "green bridge", "town hall") for month in ("May", "June", "July")]  # fmt: skip
VOCABULARY = 60


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 3, vocab_size=400)


@pytest.fixture(params=["bart", "t5", "pegasus"])
def summarizer(request):
    """A tiny model with random weights, in evaluation mode."""
    torch.manual_seed(0)
    tokens = {"pad_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
              "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64, "d_model": 16}  # fmt: skip
    config = {
        "bart": lambda: BartConfig(**tokens, **layers, bos_token_id=0, decoder_start_token_id=2, init_std=0.3,
                                   forced_eos_token_id=2),
        "t5": lambda: T5Config(**tokens, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                               decoder_start_token_id=1, initializer_factor=1.5),
        "pegasus": lambda: PegasusConfig(**tokens, **layers, decoder_start_token_id=1, init_std=0.3),
    }[request.param]()  # fmt: skip
    return EncoderDecoder(AutoModelForSeq2SeqLM.from_config(config)).eval()


def random_ids(count, longest, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def examples(passages=(1, 3, 2), seed=0):
    """Sources with as many sequences as `passages` says, and targets of other lengths."""
    sequences = iter(random_ids(sum(passages), 12, seed))
    return [[next(sequences) for _ in range(count)] for count in passages], random_ids(len(passages), 9, seed + 1)


def encode_each(model, source):
    """Fusion-in-Decoder by hand: each sequence alone, without padding; (1, tokens of the example, hidden)."""
    return torch.cat([model.get_encoder()(input_ids=torch.tensor([s])).last_hidden_state for s in source], dim=1)


def reference_logits(model, source, target):
    """Transformers' own forward for one example; (target tokens, vocabulary)."""
    return model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encode_each(model, source)), labels=torch.tensor([target])
    ).logits[0]


# ---- forward and loss


@torch.no_grad()
def test_one_sequence_for_each_example_equals_the_models_own_forward(summarizer):
    sources, targets = examples((1, 1, 1))
    batch = collate(sources, targets, pad_token_id=1)
    labels = batch["labels"]
    full = summarizer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    logits = summarizer(**batch)
    assert logits.shape == (sum(map(len, targets)), VOCABULARY)
    torch.testing.assert_close(logits, full.logits[labels != -100])  # real positions, in order
    loss, nll = label_smoothed_loss(logits, labels[labels != -100], 0.0)
    assert loss == nll
    assert (loss / (labels != -100).sum()).item() == pytest.approx(full.loss.item(), rel=1e-5)


@torch.no_grad()
def test_several_sequences_equal_encoding_each_alone_and_laying_them_end_to_end(summarizer):
    sources, targets = examples()
    batch = collate(sources, targets, pad_token_id=1)
    logits = summarizer(**batch)
    expected = torch.cat([reference_logits(summarizer.model, *pair) for pair in zip(sources, targets, strict=True)])
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    flat = torch.tensor([token for target in targets for token in target])
    loss, _ = label_smoothed_loss(logits, flat, 0.1)
    smoothed = cross_entropy(expected, flat, label_smoothing=0.1, reduction="sum")
    assert loss.item() == pytest.approx(smoothed.item(), rel=1e-5)


@torch.no_grad()
def test_padding_and_batch_mates_change_no_logits(summarizer):
    sources, targets = examples((2, 1, 4), seed=4)
    targets[1] = targets[1] * 3
    together = summarizer(**collate(sources, targets, pad_token_id=1)).split([len(target) for target in targets])
    for source, target, logits in zip(sources, targets, together, strict=True):
        alone = summarizer(**collate([source], [target], pad_token_id=1))
        torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)


def test_a_dummy_batch_has_a_loss_of_zero_and_zero_gradients_everywhere(summarizer):
    batch = collate(*examples(), pad_token_id=1)
    batch["labels"].fill_(-100)
    loss, nll = label_smoothed_loss(summarizer(**batch), batch["labels"][batch["labels"] != -100], 0.1)
    loss.backward()
    assert loss.item() == nll.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in summarizer.parameters() if p.requires_grad)


def test_layers_that_run_again_in_the_backward_pass_give_the_same_gradients(summarizer):
    sources, targets = examples()
    batch = collate(sources, targets, 1)
    again, gradients, runs = EncoderDecoder(copy.deepcopy(summarizer.model), gradient_checkpointing=True), [], []
    again.is_packed = summarizer.is_packed  # a copy of a packed model is packed
    for module in (summarizer, again):
        for part in module.train().modules():
            part.p = 0.2 if hasattr(part, "p") else None
            if isinstance(getattr(part, "dropout", None), float):
                part.dropout = 0.2
        for stack in (module.model.get_encoder(), module.model.get_decoder()):
            layer = next(part for part in stack.modules() if isinstance(part, GradientCheckpointingLayer))
            part = next(part for part in layer.modules() if list(part.parameters(recurse=False)))
            part.register_forward_pre_hook(lambda *_: runs.append(1))
        torch.manual_seed(5)
        module(**batch, label_smoothing_factor=0.1)[0].backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    assert len(runs) == 2 + 4
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


def test_the_models_output_layer_is_left_as_it_was(summarizer):
    summarizer(**collate(*examples(), pad_token_id=1))
    assert not summarizer.model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("chunk", [1, 1000, 10**6], ids=["a token at a time", "in chunks", "at once"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
def test_the_loss_without_kept_logits_and_its_gradients_are_those_with_them(monkeypatch, chunk, dtype, tolerance):
    monkeypatch.setattr("utils.models.losses._VocabularyLoss.CHUNK", chunk)
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 24).requires_grad_(), torch.randn(101, 24).requires_grad_()
    bias, targets = torch.randn(1, 101), torch.randint(101, (37,))
    results = []
    for fused in (True, False):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            if fused:
                loss, nll = vocabulary_loss(hidden, targets, 0.1, weight, bias)
            else:
                loss, nll = label_smoothed_loss(torch.nn.functional.linear(hidden, weight) + bias, targets, 0.1)
        results.append([loss.detach(), nll, *torch.autograd.grad(loss / 37, (hidden, weight))])
    for ours, plain in zip(*results, strict=True):
        assert torch.linalg.norm(ours - plain) <= tolerance * torch.linalg.norm(plain)
    with torch.no_grad():  # as in validation
        assert vocabulary_loss(hidden, targets, 0.1, weight, bias)[0] == pytest.approx(
            results[0][0].item(), rel=tolerance
        )


def test_a_second_backward_pass_adds_the_same_gradient_again():
    hidden, weight = torch.randn(5, 8).requires_grad_(), torch.randn(11, 8).requires_grad_()
    loss, _ = vocabulary_loss(hidden, torch.randint(11, (5,)), 0.1, weight)
    first = torch.autograd.grad(loss, (hidden, weight), 2 * torch.ones(()), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    for gradient, half in zip(first, second, strict=True):
        torch.testing.assert_close(gradient, 2 * half)


def test_in_fp16_the_gradient_of_well_predicted_tokens_does_not_vanish():
    hidden, weight, targets = (8 * torch.eye(4)).requires_grad_(), (2 * torch.eye(4)).requires_grad_(), torch.arange(4)
    gradients = []
    for dtype in (torch.float16, torch.float32):
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
            loss, _ = vocabulary_loss(hidden, targets, 0.0, weight)
        gradients.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=0)


def test_in_fp16_the_gradient_of_tokens_that_are_frequent_in_a_large_batch_does_not_overflow():
    torch.manual_seed(0)
    hidden, weight = torch.randn(3000, 16) + 1, torch.randn(50, 16).requires_grad_()
    targets = torch.zeros(3000, dtype=torch.long)
    gradients = []
    for dtype in (torch.float16, torch.float32):
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
            loss, _ = vocabulary_loss(hidden, targets, 0.0, weight)
        gradients.append(torch.autograd.grad(loss / 3000, weight)[0])
    assert torch.linalg.norm(gradients[0] - gradients[1]) <= 1e-2 * torch.linalg.norm(gradients[1])


def test_references_have_an_end_token_also_where_the_tokenizer_adds_none(tokenizer):
    silent = copy.deepcopy(tokenizer)  # like Gemma's: a begin token and no end token
    start, end = silent.bos_token, silent.bos_token_id
    silent.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, end)]
    )
    text = "The committee saw the mill."
    assert silent.eos_token_id not in silent(text_target=text)["input_ids"]
    sources = Sources(silent, "concat", 64, "document")
    expected = [*bare(tokenizer, text), tokenizer.eos_token_id]
    assert list(sources.tokenize_targets([text], 40)) == [expected]
    [cut] = sources.tokenize_targets([text], 4)
    assert list(cut) == [*expected[:3], tokenizer.eos_token_id]


def test_the_loss_of_a_batch_is_that_of_its_logits(summarizer):
    sources, targets = [[[4, 5, 6, 7]], [[4, 8]]], [[5, 6, 2], [7, 2]]
    batch = collate(sources, targets, pad_token_id=1)
    if hasattr(summarizer.model, "final_logits_bias"):
        summarizer.model.final_logits_bias.normal_()
    expected = label_smoothed_loss(summarizer(**batch), torch.tensor([5, 6, 2, 7, 2]), 0.1)
    torch.testing.assert_close(summarizer(**batch, label_smoothing_factor=0.1), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothed_loss_and_its_gradient_equal_torchs(smoothing):
    torch.manual_seed(0)
    logits = (5 * torch.randn(37, 101)).requires_grad_()
    targets = torch.randint(0, 101, (37,))
    loss, nll = label_smoothed_loss(logits, targets, smoothing)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(nll, cross_entropy(logits, targets, reduction="sum"))
    torch.testing.assert_close(gradient, expected_gradient)
    assert not nll.requires_grad


# ---- generation

GENERATION = {"max_new_tokens": 12, "min_new_tokens": 4, "do_sample": False}


def without_padding(ids):
    return [[token for token in row if token != 1] for row in ids.tolist()]


@pytest.mark.parametrize("beams", [{"num_beams": 1}, {"num_beams": 3, "length_penalty": 0.8}], ids=["greedy", "beam"])
def test_generation_equals_transformers_with_each_passage_encoded_by_hand(summarizer, beams):
    sources, targets = examples((3, 1, 2))
    batch = collate(sources, targets, pad_token_id=1)
    del batch["labels"]
    generated = without_padding(summarizer.generate(**batch, **GENERATION, **beams))
    with torch.no_grad():
        expected = [
            summarizer.model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=encode_each(summarizer.model, source)),
                **GENERATION,
                **beams,
            )
            for source in sources
        ]
    assert generated == [without_padding(ids[:, 1:])[0] for ids in expected]  # each alone: batch mates change nothing
    assert len(set(map(tuple, generated))) > 1  # and the sources matter
    assert all(len(row) >= 4 for row in generated)


# ---- sources


def whole(tokenizer, text):
    return tokenizer(text)["input_ids"]


def bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def t5_tokenizer():
    """Words as tokens, only EOS at the end and no separator, as T5 has it."""
    words = sorted({word for text in TEXTS for word in text.replace(".", "").split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", "a", *words])}
    wordlevel = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    wordlevel.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wordlevel.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=wordlevel, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


DOCUMENT = Document("d", ["The committee saw the mill", "Old town hall", "green bridge in May", "June July"])


@pytest.mark.parametrize("fusion", ["concat", "fid"])
@pytest.mark.parametrize("kind", ["trained", "t5"])
def test_sources_wrap_query_and_passages_in_the_tokenizers_own_special_tokens(tokenizer, t5_tokenizer, kind, fusion):
    tokenizer, start, end = (tokenizer, [0], [2]) if kind == "trained" else (t5_tokenizer, [], [1])
    assert whole(tokenizer, "The mill") == start + bare(tokenizer, "The mill") + end
    query, passages = bare(tokenizer, "sold in June"), [bare(tokenizer, text) for text in DOCUMENT.passages]
    sequences, numbers = Sources(tokenizer, fusion, 100, "rank").build("sold in June", DOCUMENT, [2, 0])
    assert numbers == [2, 0]
    if fusion == "concat":
        assert sequences == [start + query + end + passages[2] + end + passages[0] + end]
    else:
        assert sequences == [start + query + end + passages[i] + end for i in (2, 0)]


@pytest.mark.parametrize("fusion", ["concat", "fid"])
def test_of_a_corpus_only_the_passages_are_tokenized_that_are_read_in_rank_order(tokenizer, fusion):
    class Passages(list):
        def __getitem__(self, numbers):
            assert numbers == [3, 0, 2]
            return [list.__getitem__(self, number) for number in numbers]

        def __iter__(self):
            raise AssertionError("all passages are read")

    corpus = Corpus("c", Passages(DOCUMENT.passages), list("abcd"))
    by_rank = Sources(tokenizer, fusion, 100, "rank").build("May", DOCUMENT, [3, 0, 2])
    for order in ("rank", "document"):
        sources = Sources(tokenizer, fusion, 100, order)
        assert sources.build("May", corpus, [3, 0, 2]) == by_rank
        assert not sources.passage_tokens


@pytest.mark.parametrize("fusion", ["concat", "fid"])
def test_passages_stand_in_document_or_rank_order(tokenizer, fusion):
    by_rank, ranked = Sources(tokenizer, fusion, 100, "rank").build("May", DOCUMENT, [3, 0, 2])
    by_document, ordered = Sources(tokenizer, fusion, 100, "document").build("May", DOCUMENT, [3, 0, 2])
    assert (ranked, ordered) == ([3, 0, 2], [0, 2, 3])
    # passages that a corpus's rankings left in a file have no other order than that of each ranking
    of_corpus = Document("c", DOCUMENT.passages, is_ordered=False)
    assert Sources(tokenizer, fusion, 100, "document").build("May", of_corpus, [3, 0, 2]) == (by_rank, ranked)
    if fusion == "fid":
        assert by_document == [by_rank[1], by_rank[2], by_rank[0]]
    else:
        assert sorted(by_document[0]) == sorted(by_rank[0])
        assert tokenizer.decode(by_document[0]).index("mill") < tokenizer.decode(by_document[0]).index("June")
        assert tokenizer.decode(by_rank[0]).index("mill") > tokenizer.decode(by_rank[0]).index("June")


@pytest.mark.parametrize("order", ["rank", "document"])
def test_concatenated_passages_fill_the_budget_best_first_and_the_last_is_cut(tokenizer, order):
    lengths = [len(bare(tokenizer, text)) for text in DOCUMENT.passages]
    query = len(bare(tokenizer, "May"))
    for budget in range(12, sum(lengths) + query + 10):
        (sequence,), numbers = Sources(tokenizer, "concat", budget, order).build("May", DOCUMENT, [2, 0, 3, 1])
        needed, kept = 2 + query, []
        for number in (2, 0, 3, 1):
            if needed + 1 >= budget:
                break
            kept.append(number)
            needed = min(budget, needed + 1 + lengths[number])
        assert len(sequence) == needed
        assert numbers == (kept if order == "rank" else sorted(kept))
        assert sequence[0] == 0
        assert sequence[-1] == 2


def test_fused_passages_are_each_cut_and_none_is_left_out(tokenizer):
    long = Document("long", [" ".join(TEXTS), *DOCUMENT.passages])
    sequences, numbers = Sources(tokenizer, "fid", 20, "rank").build("May", long, [1, 0, 2])
    assert numbers == [1, 0, 2]
    assert len(sequences[1]) == 20
    query = bare(tokenizer, "May")
    assert sequences[1] == [0, *query, 2, *bare(tokenizer, long.passages[0])[: 20 - 3 - len(query)], 2]
    assert max(map(len, sequences)) == 20


@pytest.mark.parametrize("fusion", ["concat", "fid"])
def test_a_long_query_takes_half_of_the_source_at_most(tokenizer, fusion):
    query = " ".join(TEXTS)
    sequences, _ = Sources(tokenizer, fusion, 32, "rank").build(query, DOCUMENT, [0])
    assert sequences[0][:17] == [0, *bare(tokenizer, query)[:15], 2]
    assert len(sequences[0]) <= 32
    assert sequences[0][17:-1] == bare(tokenizer, DOCUMENT.passages[0])[: len(sequences[0]) - 18]


def rows_of(sources, query="May", passages=(2, 0, 3, 1), references=(), max_target_length=100):
    """What is read of one example, and its references."""
    example = Example("e", query, DOCUMENT, list(references), None, None, None)
    return Rows([example], [[tuple(passages)]], sources, max_target_length)


@pytest.mark.parametrize("fusion", ["concat", "fid"])
def test_what_is_cut_of_references_and_sources_is_told_and_nothing_where_all_fits(tokenizer, fusion):
    lengths = [len(bare(tokenizer, text)) for text in DOCUMENT.passages]
    query = len(bare(tokenizer, "May"))
    each = [2 + query + 1 + length for length in lengths]  # with query, separator and special tokens
    needed = max(each) if fusion == "fid" else 2 + query + sum(length + 1 for length in lengths)
    references = ["The committee saw the mill.", "Old mill", "May"]
    targets = [whole(tokenizer, text) for text in references]
    longest = max(map(len, targets))

    fits = Sources(tokenizer, fusion, needed, "document")
    assert rows_of(fits, references=references, max_target_length=longest)[0]["targets"] == targets
    assert rows_of(fits)[0]["targets"] == []
    assert fits.cuts(longest) == ""

    cut = Sources(tokenizer, fusion, needed - 1, "document")
    row = rows_of(cut)[0]
    assert max(map(len, row["source"])) == needed - 1 and len(row["passages"]) == 4
    short = Sources(tokenizer, fusion, needed, "document")
    rows_of(short, "May " * 300, [0])
    assert cut.cuts(longest) == (
        f"cut to {needed - 1} tokens by --max_source_length: 1 of 1 sources (100.0%, the longest has {needed}); "
        f"of their 4 passages, 0 are left out and {sum(n == needed for n in each) if fusion == 'fid' else 1} shortened"
    )
    assert short.cuts(longest).endswith("1 queries shortened to half a source")
    options = {"truncation": True, "max_length": longest - 1}
    other = Sources(tokenizer, fusion, needed, "document")
    found = rows_of(other, references=references, max_target_length=longest - 1)[0]["targets"]
    assert found == tokenizer(text_target=references, **options)["input_ids"]
    told = f"cut to {longest - 1} tokens by --max_target_length: 1 of 3 references (33.3%, the longest has {longest})"
    assert other.cuts(longest - 1) == told
    with pytest.raises(UsageError, match="--max_target_length 2: 2 of them are special tokens; raise it"):
        other.tokenize_targets(references, 2)
    if fusion == "concat":
        tight = Sources(tokenizer, fusion, 2 + query + 1 + lengths[2], "document")
        assert rows_of(tight)[0]["passages"] == [2]
        assert "of their 4 passages, 3 are left out and 0 shortened" in tight.cuts(longest)


@pytest.mark.parametrize("fusion", ["concat", "fid"])
def test_lengths_known_before_a_source_is_made_are_those_of_the_source(tokenizer, fusion):
    for query, budget, order, marks in itertools.product(["", "May", "June " * 30], range(16, 60, 7),
                                                         ["rank", "document"], [False, True]):  # fmt: skip
        sources = Sources(tokenizer, fusion, budget, order, marks_query=marks)
        for passages in ([], [3], [2, 0, 3, 1]):
            rows = rows_of(sources, query, passages)
            assert rows.source_lengths.tolist() == [max(map(len, rows[0]["source"]))]
            assert rows[0]["source"] == rows.source_of_hop(0, -1) == sources.build(query, DOCUMENT, passages)[0]


def test_a_document_is_tokenized_once_however_many_its_queries(tokenizer):
    calls = Counter()

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text=(), **options):
            calls.update([text] if isinstance(text, str) else text)
            return tokenizer(text or None, **options)

    sources = Sources(Counting(), "fid", 100, "rank")
    twin = Document("twin", ["Another text"])
    for query in ("May", "June", "July"):
        sources.build(query, DOCUMENT, [0, 1])
        sources.build(query, twin, [0])
    assert [calls[text] for text in (*DOCUMENT.passages, *twin.passages)] == [1] * 5


# ---- tokenizer and files


@pytest.mark.parametrize(
    "text", ["Zürich kostet 5 € – naïve café", "会議は十二時です。", "привет 🙂 a , b .", "two  spaces\nline"]
)
def test_the_trained_tokenizer_loses_no_character(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True).removeprefix(" ") == text


def test_the_small_bart_and_its_tokenizer_load_in_plain_transformers_with_the_same_logits(tokenizer, tmp_path):
    torch.manual_seed(1)
    model = build_small_bart(tokenizer, d_model=32).eval()
    save_pretrained(EncoderDecoder(model), tokenizer, tmp_path, EncoderDecoder(model).state_dict())
    loaded, loaded_tokenizer = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "Das Café and the green bridge in May."
    assert loaded_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    batch = loaded_tokenizer([text, "June"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist() == [len(whole(tokenizer, text)), len(whole(tokenizer, "June"))]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
        for beams in (1, 3):
            assert torch.equal(
                loaded.generate(**inputs, num_beams=beams, max_new_tokens=9),
                model.generate(**inputs, num_beams=beams, max_new_tokens=9),
            )
    state = {**model.state_dict()}
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_the_small_bart_starts_and_ends_with_its_tokenizers_tokens(tokenizer):
    model = build_small_bart(tokenizer, d_model=32)
    assert model.config.vocab_size == len(tokenizer)
    generated = model.generate(torch.tensor([whole(tokenizer, "May")]), max_new_tokens=7, do_sample=False)
    assert generated[0, 0] == tokenizer.eos_token_id  # BART's decoder starts with the end token
    assert generated[0, -1] == tokenizer.eos_token_id


# ---- a teacher for the retriever


def test_passage_likelihoods_are_those_of_plain_transformers(tokenizer, tmp_path):
    from accelerate import Accelerator

    torch.manual_seed(0)
    model = build_small_bart(tokenizer, d_model=32, layers=1, heads=2).eval()
    save_pretrained(
        EncoderDecoder(model), tokenizer, tmp_path, {f"model.{k}": v for k, v in model.state_dict().items()}
    )
    document = Document("d", TEXTS[:4])
    examples = [Example("a", "Who saw it?", document, ["The committee saw it.", "It saw the old mill."], *[None] * 3),
                Example("b", "", document, ["The town hall."], *[None] * 3)]  # fmt: skip
    candidates = [[0, 3], [2]]
    found = passage_likelihoods(tmp_path, examples, candidates, Accelerator(cpu=True), batch_size=2)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    for example, passages, likelihoods in zip(examples, candidates, found, strict=True):
        for passage, likelihood in zip(passages, likelihoods, strict=True):
            parts = [text for text in (example.query, document.passages[passage]) if text]
            source = tokenizer(tokenizer.sep_token.join(parts), return_tensors="pt", return_token_type_ids=False)
            with torch.no_grad():
                losses = [
                    plain(**source, labels=tokenizer(text, return_tensors="pt")["input_ids"]).loss.item()
                    for text in example.summaries
                ]
            assert likelihood == pytest.approx(-sum(losses) / len(losses), rel=1e-4)


def test_an_error_names_the_flag_that_the_model_was_given_by(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"^--summarizer {tmp_path}: "):
        load_model_and_tokenizer(str(tmp_path), dropout=0.1, name="--summarizer")


def test_code_of_a_model_runs_only_if_that_is_allowed(tokenizer, tmp_path):
    build_small_bart(tokenizer, d_model=16, layers=1, heads=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(
        "from transformers import BartConfig, BartForConditionalGeneration\n"
        "class OwnConfig(BartConfig):\n    model_type = 'own_bart'\n"
        "class OwnModel(BartForConditionalGeneration):\n    config_class = OwnConfig\n"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own_bart", "architectures": ["OwnModel"],
               "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForSeq2SeqLM": "own.OwnModel"}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"--summarizer .* --trust_remote_code") as error:
        load_model_and_tokenizer(str(tmp_path), name="--summarizer")
    assert "\n" not in str(error.value)
    model, own_tokenizer = load_model_and_tokenizer(str(tmp_path), trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    summarizer = EncoderDecoder(model)
    save_pretrained(summarizer, own_tokenizer, tmp_path / "saved", summarizer.state_dict())
    again, _ = load_model_and_tokenizer(str(tmp_path / "saved"), trust_remote_code=True)  # its code was saved with it
    assert type(again).__name__ == "OwnModel"


def test_a_reference_keeps_its_beginning_whatever_the_tokenizer_cuts_by_itself(tokenizer, tmp_path):
    build_small_bart(tokenizer, d_model=16, layers=1, heads=2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"truncation_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    _, own_tokenizer = load_model_and_tokenizer(str(tmp_path))
    [ids] = Sources(own_tokenizer, "concat", 64, "document").tokenize_targets(["The committee saw the mill."], 5)
    assert ids == [*whole(tokenizer, "The committee saw the mill.")[:4], tokenizer.eos_token_id]


def test_cut_off_weights_are_refused_in_one_line(tokenizer, tmp_path):
    model = build_small_bart(tokenizer)
    save_pretrained(EncoderDecoder(model), tokenizer, tmp_path, EncoderDecoder(model).state_dict())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    with pytest.raises(UsageError) as caught:
        load_model_and_tokenizer(str(tmp_path))
    assert str(caught.value).startswith(f"--model_name_or_path {tmp_path}: no summarizer could be loaded: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="no retriever could be loaded: "):
        load_retriever(str(tmp_path))


def check_lengths(model, max_source_length, max_target_length, max_new_tokens):
    settings = dict.fromkeys((*DEFAULTS, "source_lang", "target_lang"))
    set_up(model, None, {**settings, "max_source_length": max_source_length, "max_target_length": max_target_length,
                         "max_new_tokens": max_new_tokens})  # fmt: skip


def test_lengths_beyond_the_models_positions_are_refused_by_flag(tokenizer):
    small, bert = build_small_bart(tokenizer), build_small_encoder(TEXTS, vocab_size=300, hidden_size=32, layers=1)
    check_lengths(small, 1024, 1024, 1024)
    set_max_seq_length(bert, 512)
    for lengths, flag in (((1025, 9, 9), "max_source_length"), ((9, 1025, 9), "max_target_length"),
                          ((9, 9, 1025), "max_new_tokens")):  # fmt: skip
        with pytest.raises(UsageError, match=f"--{flag} 1025: the model has positions for 1024 tokens only"):
            check_lengths(small, *lengths)
    with pytest.raises(UsageError, match="--max_seq_length 513: the model has positions for 512 tokens only"):
        set_max_seq_length(bert, 513)
    assert bert.max_seq_length == 512
    ids = torch.full((1, 1024), 5)
    assert small(input_ids=ids, decoder_input_ids=ids).logits.shape[1] == 1024  # the limit can be used
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                                          decoder_start_token_id=0))  # fmt: skip
    check_lengths(t5, 10**5, 10**5, 10**5)  # it computes positions of any distance
    roberta = RobertaModel(RobertaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=16, max_position_embeddings=34))  # fmt: skip
    assert position_limit(roberta) == 32  # the first two are for padding


def test_tokenizers_that_do_not_belong_to_the_model_are_refused(tokenizer, tmp_path):
    model = build_small_bart(tokenizer)
    folder, small = tmp_path / "bart", tmp_path / "small"
    save_pretrained(EncoderDecoder(model), tokenizer, folder, EncoderDecoder(model).state_dict())
    shutil.copytree(folder, small)
    config = BartConfig.from_pretrained(small, vocab_size=20)
    BartForConditionalGeneration(config).save_pretrained(small)
    encoder = tmp_path / "encoder"
    BertModel(BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=16)).save_pretrained(encoder)  # fmt: skip
    tokenizer.save_pretrained(encoder)
    message = f"the tokenizer has {len(tokenizer):,} tokens, but the model has embeddings for 20"
    for load, path in ((load_model_and_tokenizer, small), (load_retriever, encoder)):
        with pytest.raises(UsageError, match=f"{path}: {message}"):
            load(str(path))
    for path in (*folder.glob("token*"), *folder.glob("special*"), *encoder.glob("token*"), *encoder.glob("special*")):
        path.unlink()
    for load, path in ((load_model_and_tokenizer, folder), (load_retriever, encoder)):
        with pytest.raises(UsageError, match=f"{path}: .*tokenizer"):  # a stub, or none at all
            load(str(path))
