"""A micro-step launches its work and reads nothing back: on a GPU, the host would wait for all that was launched."""

import json
import tempfile
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, alone, run
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    MPNetConfig,
    MPNetModel,
    Qwen2Config,
    Qwen2Model,
)

import train_rerank
import train_retrieve
import train_summarize
from utils.fast import packing
from utils.fast.packing import is_packed
from utils.models import cross_encoder, encoder
from utils.models.settings import settle_packing
from utils.models.sources import collate
from utils.models.summarizer import wrap
from utils.models.tokenizer import train_tokenizer
from utils.training.batching import to_device
from utils.training.log import Meters

HAS_GPU = torch.cuda.is_available()
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
         "bincount", "repeat_interleave"}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class NoReading(TorchDispatchMode):
    """Raises where the host would read a value from a GPU: `item`, `float`, `if`, sizes that depend on values."""

    def __init__(self):
        super().__init__()
        self.of_host = {}  # older versions of Transformers draw there whether a layer is dropped

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name, is_of_host = function.overloadpacket.__name__, any(id(value) in self.of_host for value in arguments)
        reads = name in READS and not (options or {}).get("output_size") and not is_of_host
        by_mask = name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in arguments[1])
        assert not (reads or by_mask), f"the host waits for a GPU in {function}"
        result = function(*arguments, **(options or {}))
        if is_of_host or (name == "rand" and arguments == ([],)):
            self.of_host[id(result)] = result
        return result


def unread(*_, **__):
    raise AssertionError("the host waits for a GPU")


@pytest.fixture
def launch(monkeypatch):
    """Calls a function of this batch, as on a GPU, and what it gives; fails where the host would wait.

    From the moment on when the batch is on the device. Without a GPU, what depends on it is as it would be there.
    """
    mode = NoReading()

    def forbid(batch, device):
        batch = to_device(batch, device)
        if HAS_GPU:
            torch.cuda.set_sync_debug_mode("error")
        else:
            mode.__enter__()
            for name in ("tolist", "cpu", "numpy", "item"):
                monkeypatch.setattr(torch.Tensor, name, unread)
        return batch

    if not HAS_GPU:
        monkeypatch.setattr(packing, "_is_waited_for", lambda device: True)
        monkeypatch.setattr(packing, "LONGEST_KEPT", 0)  # attention on processors reads lengths from tensors
    for script in (train_summarize, train_retrieve, train_rerank):
        monkeypatch.setattr(script, "to_device", forbid)

    def launch(micro_step, *arguments, **options):
        try:
            sums = micro_step(*arguments, **options)
            meters = Meters(options["accelerator"])
            meters.add(**sums)
            meters.add(**sums)
        finally:
            if HAS_GPU:
                torch.cuda.set_sync_debug_mode("default")
            else:
                mode.__exit__(None, None, None)
                monkeypatch.undo()
        return {name: float(value) / 2 for name, value in meters.sums.items()}

    return launch


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=not HAS_GPU, mixed_precision="bf16" if HAS_GPU else "no")


def settle_as_on_a_gpu(model) -> None:
    """What the scripts decide about packing on an H100 in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        settle_packing(model, alone(device=torch.device("cuda"), mixed_precision="bf16"), longest=4, is_trained=True)


def ids(*lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 60, (length,), generator=generator).tolist() for length in lengths]


SIZES = {"vocab_size": 60, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 1,
         "eos_token_id": 2, "decoder_start_token_id": 2, "max_position_embeddings": 64}  # fmt: skip
T5 = {"vocab_size": 60, "d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 2, "d_kv": 16, "pad_token_id": 1,
      "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
LLAMA = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2, "max_position_embeddings": 64,
         "head_dim": 8}  # fmt: skip
GPT2 = {"n_embd": 32, "attn_pdrop": 0.0, **LLAMA}


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize(
    ("kind", "settings", "sequences", "packs"),
    [("bart", SIZES, 1, True), ("bart", SIZES, 2, True), ("bart", SIZES, 2, False), ("pegasus", SIZES, 1, True),
     ("t5", T5, 1, False), ("t5", T5, 2, False),
     ("llama", LLAMA, 1, True), ("llama", LLAMA, 1, False), ("gpt2", GPT2, 1, True),
     ("gemma3_text", {**LLAMA, "sliding_window": 4}, 1, True)],
)  # fmt: skip
def test_a_micro_step_of_a_summarizer_waits_for_nothing(kind, settings, sequences, packs, checkpoints, launch,
                                                        accelerator):  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    summarizer = wrap(auto_class.from_config(config), checkpoints).to(accelerator.device).train()
    settle_as_on_a_gpu(summarizer)
    assert summarizer.is_packed or not packs
    summarizer.is_packed = packs
    sources = [ids(*lengths)[:sequences] for lengths in ((9, 4), (3, 7), (12, 5))]
    batch = dict(collate(sources, ids(4, 2, 6), 1))
    batch["layout"] = summarizer.lay_out(**batch)
    args = SimpleNamespace(label_smoothing_factor=0.1)
    sums = launch(train_summarize.train_micro_batch, batch, 12, accelerator=accelerator, model=summarizer,
                  summarizer=summarizer, args=args)  # fmt: skip
    assert (sums["count"], sums["examples"]) == (12, 3)
    assert sums["tokens"] == 12 + sum(len(text) for source in sources for text in source)
    assert sums["loss"] > 0 and any(p.grad is not None and p.grad.any() for p in summarizer.parameters())


ENCODERS = {
    "bert": lambda **sizes: BertModel(BertConfig(**sizes)),
    "mpnet": lambda **sizes: MPNetModel(MPNetConfig(**sizes)),  # stays padded
    "qwen2": lambda **sizes: Qwen2Model(Qwen2Config(**sizes, num_key_value_heads=2)),
}


def retriever_of(kind: str):
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 48, "pad_token_id": 1}  # fmt: skip
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        ENCODERS[kind](**sizes).save_pretrained(folder)
        train_tokenizer(["a b c d e f g h i j k"], vocab_size=300, max_length=64).save_pretrained(folder)
        return encoder.load_retriever(folder, attention_dropout=0.0)


@pytest.fixture
def small_vocabulary(monkeypatch):
    """Tokenizers may have more tokens than these models have embeddings."""
    monkeypatch.setattr(encoder, "check_vocabulary", lambda *_: None)
    monkeypatch.setattr(encoder, "_check_embeddings", lambda *_: None)


@pytest.mark.parametrize("cache_tokens", [0, 30])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_micro_step_of_the_retriever_waits_for_nothing(kind, cache_tokens, launch, accelerator, small_vocabulary):
    retriever = retriever_of(kind).to(accelerator.device).train()
    assert is_packed(retriever[0]) == (kind != "mpnet")
    retriever[0].is_pooled_packed = False  # on a GPU, outputs are padded again before pooling
    settle_as_on_a_gpu(retriever)
    assert is_packed(retriever[0]) == (kind != "mpnet")
    keys = torch.tensor([4, 7, 9, 7])
    batch = {"texts": encoder.in_chunks(retriever, ids(4, 9), ids(12, 5, 8, 5), cache_tokens), "passage_keys": keys,
             "evidence_keys": torch.tensor([[4, -1], [9, 7]]), "evidence_weights": torch.tensor([[1.0, 0], [0.5, 0.5]]),
             "number": torch.tensor([0, 1]), "is_distribution": torch.tensor([False, False])}  # fmt: skip
    pairs = SimpleNamespace(model=retriever, excluded=lambda batch, keys: keys == torch.tensor([[9], [0]]))
    args = SimpleNamespace(gradient_cache_tokens=cache_tokens, temperature=0.05, matryoshka_dims="")
    sums = launch(train_retrieve.train_micro_batch, batch, 2, accelerator=accelerator, model=retriever, pairs=pairs,
                  args=args)  # fmt: skip
    assert (sums["count"], sums["tokens"]) == (2, 43)
    assert sums["loss"] > 0 and any(p.grad is not None and p.grad.any() for p in retriever.parameters())


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("loss", ["listwise", "binary"])
def test_a_micro_step_of_the_reranker_waits_for_nothing(loss, packs, launch, accelerator):
    reranker = cross_encoder.build_small_reranker(["a b c d e f"], vocab_size=300, hidden_size=32, layers=1)
    reranker.to(accelerator.device).train()
    if not packs:  # attention dropout
        reranker[0].auto_model.config.attention_probs_dropout_prob = 0.1
    settle_as_on_a_gpu(reranker)
    assert is_packed(reranker[0]) == packs
    batch = cross_encoder.collate_pairs(reranker, [(ids(4)[0], ids(5, 9, 3), 1), (ids(6)[0], ids(2, 2), 1)], False)
    sums = launch(train_rerank.train_micro_batch, batch, 2, accelerator=accelerator, model=reranker, reranker=reranker,
                  args=SimpleNamespace(loss=loss))  # fmt: skip
    assert sums["count"] == 2 and sums["slots"] == (sums["tokens"] if packs else 5 * 16)
    assert sums["loss"] > 0 and any(p.grad is not None and p.grad.any() for p in reranker.parameters())


def test_reading_is_noticed():
    """The checks of this file can fail."""
    values = torch.tensor([1.0, 2.0])
    for read in (lambda: values.sum().item(), lambda: float(values[0]), lambda: bool(values[0] > 0),
                 lambda: values[values > 1], lambda: values.nonzero(), lambda: values.unique()):  # fmt: skip
        with pytest.raises(AssertionError, match="waits for a GPU"), NoReading():
            read()


COUNTED = """
import json, linecache, os, runpy, sys
sys.path.insert(0, {root!r})
import utils.training.batching as batching
from torch.utils._python_dispatch import TorchDispatchMode
from utils.fast import packing
from utils.training.run import Run

packing._is_waited_for = lambda device: True  # masks as on a GPU
counts = []

class Count(TorchDispatchMode):
    inside = []
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket.__name__ == "_local_scalar_dense":
            caller = sys._getframe(1)
            while os.sep + "torch" + os.sep in caller.f_code.co_filename:
                caller = caller.f_back
            line = linecache.getline(caller.f_code.co_filename, caller.f_lineno)
            counts[-1] += "layerdrop" not in line  # in older Transformers, a number that the host has drawn
        return function(*arguments, **(options or {{}}))
    def begin():
        Count.inside.append(Count().__enter__())
    def end():
        while Count.inside:
            Count.inside.pop().__exit__(None, None, None)

to_device, try_step, end_step = batching.to_device, Run.try_step, Run.end_step

def begin_counting(*arguments):  # what comes before it reads the host's copy
    batch = to_device(*arguments)
    Count.begin()
    return batch

def counted_step(self, micro_step, *arguments):
    def within(*batch):
        sums = micro_step(*batch)
        Count.end()
        return sums
    counts.append(0)
    sums = try_step(self, within, *arguments)
    Count.begin()
    return sums

def end_counting(self):
    Count.end()
    with open({output!r}, "w") as file:
        json.dump(counts, file)
    return end_step(self)

batching.to_device, Run.try_step, Run.end_step = begin_counting, counted_step, end_counting
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", [pytest.param("train_retrieve.py", marks=pytest.mark.slow),
                                    pytest.param("train_rerank.py", marks=pytest.mark.slow),
                                    "train_summarize.py"])  # fmt: skip
def test_the_host_reads_one_value_of_a_step_its_gradient_norm(script, tmp_path):
    wrapper, output = tmp_path / script, tmp_path / "counts.json"
    wrapper.write_text(COUNTED.format(root=str(ROOT), output=str(output), script=str(ROOT / script)))
    run(wrapper, tmp_path / "run", "--max_train_steps", 3)
    assert json.loads(output.read_text()) == [1, 1, 1]
