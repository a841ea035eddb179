"""Retrievers of today, tiny, with the files that theirs have on the Hub: embeddings, training, adapters, saving."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

from utils.errors import UsageError
from utils.fast.packing import is_packed
from utils.models import lora
from utils.models.contrastive import embed
from utils.models.encoder import encode, in_chunks, load_retriever, prompt_of, save_pretrained, set_up, tokenize
from utils.models.tokenizer import train_tokenizer

SENTENCE = "The committee agreed on the new budget for the old town hall, after a long discussion. "
TEXTS = ["Who agreed?", SENTENCE * 3, "Zürich: naïve café, 5 €", "budget", "The committee agreed on nothing. " * 4,
         "Who looks after the orchard library, and what did they report?"]  # fmt: skip
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
HIDDEN = 32
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "initializer_range": 0.2, "max_position_embeddings": 512, "attention_dropout": 0.1}  # fmt: skip
DECODER = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"

# model type, its settings, the template of its tokens, pooling, what follows, prompts
HUB = {
    "Qwen3-Embedding": (
        "qwen3", {**DECODER, "architectures": ["Qwen3ForCausalLM"]}, "$A <|endoftext|>", "lasttoken", ["Normalize"],
        {"query": INSTRUCTION, "document": ""}),
    "embeddinggemma": (
        "gemma3_text", {**DECODER, **WINDOWS, "use_bidirectional_attention": True, "sliding_window": 16,
                        "query_pre_attn_scalar": 8},
        "<s> $A </s>", "mean_tokens", ["Dense", "Dense", "Normalize"],
        {"query": "task: search result | query: ", "document": "title: none | text: ",
         "Clustering": "task: clustering | query: "}),
    "e5-mistral": (
        "mistral", {**DECODER, "sliding_window": 12}, "<s> $A </s>", "lasttoken", ["Normalize"],
        {"web_search_query": INSTRUCTION + " "}),
    "bge-multilingual-gemma2": (
        "gemma2", {**DECODER, **WINDOWS, "sliding_window": 12, "attn_logit_softcapping": 5.0,
                   "query_pre_attn_scalar": 8},
        "<s> $A </s>", "lasttoken", ["Normalize"], {"web_search_query": "<instruct>Find.\n<query>"}),
    "bge-m3": ("xlm-roberta", {**SIZES, "attention_probs_dropout_prob": 0.1, "type_vocab_size": 1}, "<s> $A </s>",
               "cls_token", ["Normalize"], {}),
    "multilingual-e5": ("xlm-roberta", {**SIZES, "attention_probs_dropout_prob": 0.1, "type_vocab_size": 1},
                        "<s> $A </s>", "mean_tokens", ["Normalize"], {}),
    "modernbert-embed": ("modernbert", {**SIZES, "local_attention": 16}, "<s> $A </s>", "mean_tokens", ["Normalize"],
                         {"query": "search_query: ", "document": "search_document: "}),
    "gte-modernbert": ("modernbert", {**SIZES, "local_attention": 16}, "<s> $A </s>", "cls_token", [], {}),
}  # fmt: skip
MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
every_kind = pytest.mark.parametrize("kind", HUB)
torch.manual_seed(0)


def write(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def save_plain(folder, kind="Qwen3-Embedding", **tokenizer_options):
    """A folder with the model and its tokenizer, without the files of sentence-transformers."""
    model_type, settings, template, *_ = HUB[kind]
    own = train_tokenizer([*TEXTS, *TEXTS, INSTRUCTION], vocab_size=400).backend_tokenizer
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    if kind == "Qwen3-Embedding":
        own.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "padding_side": "left"}
    elif kind == "e5-mistral":
        special["pad_token"] = "</s>"
    ends = [(token, own.token_to_id(token)) for token in template.split() if token != "$A"]
    own.post_processor = TemplateProcessing(single=template, special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, model_max_length=128, **{**special, **tokenizer_options})
    tokenizer.save_pretrained(folder)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id,
              "cls_token_id": 0, "sep_token_id": 2}  # fmt: skip
    config = AutoConfig.for_model(model_type, **settings, vocab_size=len(tokenizer), **tokens)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    if "architectures" in settings:
        written = json.loads((folder / "config.json").read_text())
        write(folder / "config.json", written | {"architectures": settings["architectures"]})
    return folder


def save_hub(folder, kind, **others):
    """A folder as sentence-transformers wrote it when these models came out."""
    save_plain(folder, kind, chat_template=CHAT if kind == "Qwen3-Embedding" else None)
    *_, pooling, following, prompts = HUB[kind]
    names = ["Transformer", "Pooling", *following]
    paths = ["", *(f"{number}_{name}" for number, name in enumerate(names) if number)]
    write(folder / "modules.json", [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (name, path) in enumerate(zip(names, paths, strict=True))
    ])  # fmt: skip
    write(folder / "1_Pooling/config.json", {"word_embedding_dimension": HIDDEN, "include_prompt": True} | {
        f"pooling_mode_{mode}": mode == pooling for mode in MODES
    })  # fmt: skip
    for path, sizes in zip([path for path in paths if "Dense" in path], [(HIDDEN, 64), (64, HIDDEN)], strict=False):
        write(folder / path / "config.json", {
            "in_features": sizes[0], "out_features": sizes[1], "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        })  # fmt: skip
        save_file({"linear.weight": torch.randn(sizes[::-1]) / 6}, folder / path / "model.safetensors")
    write(folder / "config_sentence_transformers.json", {
        "__version__": {"sentence_transformers": "5.1.0", "transformers": "4.57.0", "pytorch": "2.8.0"},
        "prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine", **others,
    })  # fmt: skip
    if kind != "Qwen3-Embedding":
        write(folder / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False})
    return folder


def embeddings_of(retriever, texts=TEXTS):
    accelerator = Accelerator(cpu=True)
    return [encode(retriever, list(texts), kind, accelerator=accelerator) for kind in ("query", "passage")]


def theirs(model, texts=TEXTS, **options):
    options = {"normalize_embeddings": True, **options}
    return [encode_texts(texts, **options) for encode_texts in (model.encode_query, model.encode_document)]


def assert_equal(ours, expected) -> None:
    for embeddings, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(embeddings, other, atol=1e-5)


def batch_of(retriever, max_tokens=0):
    queries, passages = (tokenize(retriever, TEXTS, kind) for kind in ("query", "passage"))
    return in_chunks(retriever, queries, passages, max_tokens)


def outputs_and_gradients(retriever, max_tokens=0):
    retriever.zero_grad()
    embeddings = embed(retriever, batch_of(retriever, max_tokens))
    weight = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1))
    (embeddings * weight).sum().backward()
    return {"embeddings": embeddings.detach()} | {
        name: p.grad.clone() for name, p in retriever.named_parameters() if p.grad is not None
    }


@every_kind
def test_embeddings_are_those_of_sentence_transformers(kind, tmp_path):
    folder = str(save_hub(tmp_path, kind))
    retriever, plain = load_retriever(folder, 0.0), SentenceTransformer(folder, device="cpu")
    assert is_packed(retriever[0])
    assert plain.tokenizer.padding_side == ("left" if kind == "Qwen3-Embedding" else "right")
    config = retriever[0].auto_model.config
    assert 0.0 in {getattr(config, name, None) for name in ("attention_dropout", "attention_probs_dropout_prob")}
    template = HUB[kind][2].split()
    for text_kind, prompt in (("query", HUB[kind][5].get("query", "")), ("passage", HUB[kind][5].get("document", ""))):
        assert prompt_of(retriever, text_kind) == prompt
        ids = tokenize(retriever, ["budget"], text_kind)[0]
        assert ids[-1] == retriever.tokenizer.convert_tokens_to_ids(template[-1])
    assert_equal(embeddings_of(retriever), theirs(plain))
    assert_equal(theirs(retriever), theirs(plain))  # in batches that sentence-transformers pads, maybe on the left
    assert_equal(embeddings_of(retriever), theirs(plain, batch_size=1))
    assert np.concatenate(theirs(plain)).std(0).min() > 1e-3  # texts differ


@every_kind
def test_without_padding_gradients_are_those_of_padded_batches(kind, tmp_path):
    retriever = load_retriever(str(save_hub(tmp_path, kind))).eval()
    packed, chunked = (outputs_and_gradients(retriever, max_tokens) for max_tokens in (0, 150))
    retriever[0].auto_model.set_attn_implementation("eager" if "gemma2" in kind else "sdpa")
    padded = outputs_and_gradients(retriever)
    assert packed.keys() == padded.keys()
    largest = max(value.norm() for value in padded.values())
    for found in (packed, chunked):
        for name, expected in padded.items():
            assert (found[name] - expected).norm() <= 1e-5 * max(expected.norm(), 1e-2 * largest), name


def train(retriever, steps=3) -> None:
    optimizer = torch.optim.AdamW([p for p in retriever.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        embeddings = embed(retriever.train(), batch_of(retriever))
        queries, passages = embeddings.split(len(TEXTS))
        torch.nn.functional.cross_entropy(queries @ passages.T / 0.05, torch.arange(len(TEXTS))).backward()
        optimizer.step()
        optimizer.zero_grad()
    retriever.eval()


FLAGS = SimpleNamespace(model_name_or_path="base", ranking="dense", bm25_weight=0.5, smooth_window=0, smooth_decay=0.5,
                        hop_weight=0.5, language=None, lora_rank=0, lora_alpha=None, lora_dropout=0.0, merge_lora=False,
                        lora_target_modules="all-linear", output_dir="run", max_seq_length=None, query_prompt=None,
                        passage_prompt=None, gradient_checkpointing=False, matryoshka_dims="")  # fmt: skip


def add_adapters(retriever, rank: int) -> None:
    lora.add_adapters(retriever, SimpleNamespace(**vars(FLAGS) | {"lora_rank": rank}),
                      SimpleNamespace(mixed_precision="no", distributed_type="NO"))  # fmt: skip


@every_kind
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_trained_retriever_is_saved_as_sentence_transformers_loads_it(kind, lora_rank, tmp_path):
    retriever = load_retriever(str(save_hub(tmp_path / "base", kind)), 0.0)
    before = {name: p.clone() for name, p in retriever.named_parameters()}
    add_adapters(retriever, lora_rank)
    trained = {name for name, p in retriever.named_parameters() if p.requires_grad}
    assert {".lora_" in name for name in trained} == {lora_rank > 0}
    if not lora_rank:
        assert {name for name in before if ".linear." in name} <= trained  # the layers after pooling
    train(retriever)
    if not lora_rank:
        assert not any(torch.equal(p, before[name]) for name, p in retriever.named_parameters() if "pooler" not in name)
    ours = embeddings_of(retriever)
    assert abs(ours[0] - theirs(SentenceTransformer(str(tmp_path / "base"), device="cpu"))[0]).max() > 1e-2
    save_pretrained(copy.deepcopy(retriever), tmp_path / "saved", FLAGS)
    assert_equal(ours, theirs(SentenceTransformer(str(tmp_path / "saved"), device="cpu"), normalize_embeddings=False))
    again = load_retriever(str(tmp_path / "saved"))
    assert is_packed(again[0])
    assert_equal(ours, embeddings_of(again))
    cut = SentenceTransformer(str(tmp_path / "saved"), device="cpu", truncate_dim=8)
    assert_equal(embeddings_of(load_retriever(str(tmp_path / "saved"), truncate_dim=8)), theirs(cut))


# ---- plain checkpoints


@pytest.mark.parametrize(("kind", "pooling", "lora_rank"), [
    ("Qwen3-Embedding", "lasttoken", 0), ("Qwen3-Embedding", "lasttoken", 4), ("modernbert-embed", "mean", 0),
])  # fmt: skip
def test_a_plain_checkpoint_reads_texts_as_they_are_and_pools_as_sentence_transformers(
    kind, pooling, lora_rank, tmp_path
):
    save_plain(tmp_path / "plain", kind, chat_template=CHAT, pad_token=None)
    if pooling == "lasttoken":  # with an output layer
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "plain")
    retriever = load_retriever(str(tmp_path / "plain"), 0.0)
    assert retriever[1].pooling_mode == pooling
    assert tokenize(retriever, ["budget"], "query") == retriever.tokenizer(["budget"])["input_ids"]
    add_adapters(retriever, lora_rank)
    train(retriever)
    ours = embeddings_of(retriever)
    save_pretrained(retriever, tmp_path / "saved", FLAGS)
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert plain.tokenizer.chat_template == CHAT and plain.tokenizer.pad_token == plain.tokenizer.eos_token
    assert_equal(ours, theirs(plain, normalize_embeddings=False))
    assert_equal(ours, embeddings_of(load_retriever(str(tmp_path / "saved"))))


# ---- embeddings that are cut


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_cut_embeddings_are_those_of_sentence_transformers(similarity, tmp_path):
    folder = str(save_hub(tmp_path, "gte-modernbert", truncate_dim=24, similarity_fn_name=similarity))
    plain = SentenceTransformer(folder, device="cpu")
    for size, options in ((24, {}), (8, {"truncate_dim": 8})):
        retriever = load_retriever(folder, **options)
        ours = embeddings_of(retriever)
        assert ours[0].shape == (len(TEXTS), size)
        assert_equal(ours, theirs(plain, normalize_embeddings=similarity == "cosine", **options))
        similarities = plain.similarity(*theirs(plain, normalize_embeddings=False, **options))
        np.testing.assert_allclose(ours[0] @ ours[1].T, similarities, rtol=1e-4, atol=1e-4)
        with pytest.raises(UsageError, match=f"base: its embeddings are cut to {size} dimensions"):
            set_up(retriever, FLAGS)
    with pytest.raises(UsageError, match=r"--matryoshka_dims 33,8: the embeddings have 32 dimensions only"):
        set_up(load_retriever(str(save_hub(tmp_path / "b", "bge-m3"))),
               SimpleNamespace(**vars(FLAGS) | {"matryoshka_dims": "33,8"}))  # fmt: skip
    with pytest.raises(UsageError, match=r"--truncate_dim 33: the embeddings of .* have 32 dimensions"):
        load_retriever(folder, truncate_dim=33)
