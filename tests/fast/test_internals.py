"""What the suite leans on inside the libraries: each is there, and without it the same is computed, with one warning.

A failing test here names what a version of a library no longer has; the scripts then run without that acceleration.
"""

import inspect
import pkgutil
from types import SimpleNamespace

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, GenerationConfig
from transformers.models.bert import modeling_bert

from utils.cli import script
from utils.fast import beam_search, cpu, internals, packing
from utils.fast.internals import INTERNALS, find, has, missing
from utils.models import settings
from utils.models.cross_encoder import build_small_reranker, pairs_of
from utils.models.decoder_only import LanguageModel
from utils.models.encoder import build_small_encoder, in_chunks
from utils.models.encoder_decoder import EncoderDecoder
from utils.models.sources import collate

NAMES = [(part, name) for part, names in INTERNALS.items() for name in names]
# others, and who uses them: no fallback where it is no acceleration
OTHERS = {
    "accelerate.utils.memory.clear_device_cache": "utils.training.exchange",
    "accelerate.utils.memory.should_reduce_batch_size": "utils.training.memory",
    "bm25s.tokenization.Tokenizer.streaming_tokenize": "utils.data.words",
    "peft.tuners.tuners_utils.BaseTunerLayer.get_base_layer": "utils.models.lora",
    "peft.inject_adapter_in_model": "utils.models.lora",
    "rouge_score.tokenizers.Tokenizer": "utils.evaluation.rouge",
    "sentence_transformers.sentence_transformer.model.SentenceTransformer.preprocess": "utils.models.encoder",
    "sentence_transformers.sentence_transformer.modules.Transformer.auto_model": "utils.fast.packing",
    "sentence_transformers.sentence_transformer.modules.Transformer.query_expansion": "utils.models.encoder",
    "torch._foreach_norm": "utils.training.step",
    "torch.cpu._is_avx512_bf16_supported": "utils.cli.script",
    "torch.nn.Module._call_impl": "utils.models.settings, with --torch_compile",
    "torch.nn.Module._compiled_call_impl": "utils.models.settings, with --torch_compile",
    "torch.ops.aten._softmax_backward_data": "utils.fast.packing",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": "utils.fast.cpu",
    "torch.ops.mkldnn._linear_pointwise": "utils.fast.cpu",
    "torch.ops.mkldnn._reorder_linear_weight": "utils.fast.cpu",
    "transformers.PreTrainedModel._no_split_modules": "utils.models.settings, with FSDP",
    "transformers.pytorch_utils.Conv1D": "utils.models.lora",
    "transformers.utils.cached_file": "utils.models.lora",
    "transformers.utils.find_adapter_config_file": "utils.models.lora",
}
SIZES = {"vocab_size": 60, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "bos_token_id": 0}
LIKE_BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "init_std": 0.3,
             "max_position_embeddings": 64, "dropout": 0.0}  # fmt: skip
LIKE_LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.4}  # fmt: skip
SETTINGS = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 3}


@pytest.fixture(autouse=True)
def looks_anew():
    """Nothing of what was found or warned of before is remembered."""

    def forget():
        for remembered in (missing.cache_clear, internals.warn.cache_clear, beam_search._agreed.clear):
            remembered()

    forget()
    yield
    forget()


def batch():
    sources = [[5, 9, 11, 7, 30], [8, 6], [40, 41, 42]]
    return collate([[source] for source in sources], [[3, 4, 5, 2], [9, 2], [12, 14, 2]], 1)


def summarizer():
    torch.manual_seed(0)
    return EncoderDecoder(BartForConditionalGeneration(BartConfig(**SIZES, **LIKE_BART))).train()


def language_model(**more):
    torch.manual_seed(0)
    return LanguageModel(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES, **LIKE_LLAMA, **more)))


def gradients(model, loss) -> dict[str, torch.Tensor]:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def losses() -> dict[str, torch.Tensor]:
    """What a step of both kinds of summarizers computes: its loss and gradients."""
    results = {}
    for name, model in (("summarizer", summarizer()), ("language model", language_model())):
        loss = model(**batch(), label_smoothing_factor=0.1)[0]
        results[f"loss of the {name}"] = loss.detach()
        results |= {f"{name}: {key}": value for key, value in gradients(model, loss).items()}
    return results


def scores() -> dict[str, torch.Tensor]:
    """What a retriever and a reranker compute."""
    results = {}
    torch.manual_seed(0)
    options = {"vocab_size": 100, "hidden_size": 32, "layers": 1, "dropout": 0.0}
    retriever = build_small_encoder(["a b c d"] * 2, **options)
    (chunk,) = in_chunks(retriever, [[5, 6, 7]], [[8], [9, 10, 11, 12, 13]], max_tokens=100)
    chunk.pop("rows")
    results["embeddings"] = retriever(chunk)["sentence_embedding"].detach()
    torch.manual_seed(0)
    reranker = build_small_reranker(["a b c d"] * 2, **options).eval()
    results["scores"] = reranker(pairs_of(reranker, [([5, 6], [7, 8, 9]), ([10], [11])]))["scores"].detach()
    return results


def summaries() -> dict[str, torch.Tensor]:
    """What both kinds of summarizers write."""
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    return {str(type(model)): model.eval().generate(**inputs, **SETTINGS) for model in (summarizer(), language_model())}


@pytest.fixture(scope="module")
def expected():
    return {"losses": losses(), "scores": scores(), "summaries": summaries()}


def check_same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


def the_warning(caplog) -> str:
    """The only one."""
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    return record.getMessage()


# ---- what is leaned on is there


@pytest.mark.parametrize("name", sorted({*OTHERS, *(name for _, name in NAMES)}))
def test_the_installed_versions_have(name):
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        pytest.fail(f"{name} is gone; it is used by {OTHERS.get(name, 'utils.fast')}")


@pytest.mark.parametrize("part", INTERNALS)
def test_functions_take_the_arguments_that_they_get(part):
    assert not missing(part)


def test_nothing_is_left_out_with_the_installed_versions(caplog):
    losses(), scores(), summaries()
    assert not caplog.records
    assert summarizer().is_packed and language_model().is_packed, "packing: attention functions or mask functions"
    for kind in (beam_search.reads_sources, beam_search.reads_prompts):
        assert beam_search.agrees(kind), "search: caches, attention functions, or generate(custom_generate=...)"
    assert torch.backends.mkldnn.is_available() == cpu.IS_AVAILABLE, "torch.ops.mkldnn._linear_pointwise"
    assert packing._softmax_backward is not packing._plain_softmax_backward, "torch.ops.aten._softmax_backward_data"


def test_attributes_of_objects_have_their_names():
    model = summarizer().model
    assert "_attn_implementation_internal" in vars(model.config), "PreTrainedConfig._attn_implementation_internal"
    assert hasattr(GenerationConfig(), "_from_model_config"), "GenerationConfig._from_model_config"
    assert isinstance(getattr(model.get_encoder(), "embed_positions", None), nn.Module), "BartEncoder.embed_positions"
    retriever = build_small_encoder(["a b c d"] * 2, vocab_size=100, hidden_size=32, layers=1)
    assert hasattr(retriever[0], "model_forward_params"), "Transformer.model_forward_params"
    assert retriever[0].modality_config.keys() == {"text"}, "Transformer.modality_config"
    assert retriever[0].is_pooled_packed, "Pooling: cu_seq_lens_q"


def test_models_call_dropout_so_that_a_function_mode_sees_it(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "dropout", lambda x, *_, **__: calls.append(1) or x)
    model = BartForConditionalGeneration(BartConfig(**SIZES, **LIKE_BART | {"dropout": 0.1})).train()
    with cpu.FunctionalDropout():
        assert cpu.FunctionalDropout.active == 1
        model(input_ids=torch.tensor([[3, 4]]), labels=torch.tensor([[3]]))
    assert calls, "torch.overrides.TorchFunctionMode does not see torch.nn.functional.dropout"
    assert cpu.FunctionalDropout.active == 0


# ---- without it


CHANGES = [(name, change) for part, name in NAMES for change in ("gone", "other arguments")
           if part != "kernel" and (change == "gone" or INTERNALS[part][name])]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_without_a_name_the_same_is_computed_with_one_warning(name, change, expected, monkeypatch, caplog):
    other = None if change == "gone" else lambda **changed: None
    monkeypatch.setattr(internals, "find", lambda wanted: other if wanted == name else find(wanted))
    if name in INTERNALS["packing"]:
        check_same(losses(), expected["losses"])
        assert not summarizer().is_packed and not language_model().is_packed
    else:
        monkeypatch.setattr(beam_search, "search", lambda *_, **__: pytest.fail("the search is tried"))
        check_same(summaries(), expected["summaries"])
    text = the_warning(caplog)
    assert text.startswith(name) and "slower" in text and internals.version("transformers") in text


def test_without_packing_retrievers_and_rerankers_compute_the_same_with_one_warning(expected, monkeypatch, caplog):
    monkeypatch.setattr(internals, "find", lambda name: None)
    check_same(scores(), expected["scores"])
    assert "batches are padded" in the_warning(caplog)


@pytest.mark.parametrize("change", ["gone", "other arguments"])
def test_a_gpu_pads_where_its_kernel_is_gone(change, monkeypatch):
    (name,) = INTERNALS["kernel"]
    monkeypatch.setattr(internals, "find", lambda wanted: None if change == "gone" else lambda query: query)
    problem = packing.kernel_problem(torch.device("cuda"), torch.bfloat16, 64, 64)
    assert name in problem and internals.version("torch") in problem


def test_attention_functions_that_get_no_further_arguments_leave_batches_padded(expected, monkeypatch, caplog):
    usual = modeling_bert.ALL_ATTENTION_FUNCTIONS

    def get_interface(name, default):
        attend = usual.get_interface(name, default)
        return lambda *arguments, packing=None, **options: attend(*arguments, **options)

    monkeypatch.setattr(modeling_bert, "ALL_ATTENTION_FUNCTIONS", SimpleNamespace(get_interface=get_interface))
    check_same(scores(), expected["scores"])
    assert the_warning(caplog).startswith("a model of type bert cannot be packed: ")


def test_models_without_the_positions_of_bart_stay_padded(expected, monkeypatch, caplog):
    usual = BartForConditionalGeneration.get_encoder
    monkeypatch.setattr(BartForConditionalGeneration, "get_encoder", lambda self: nn.Module() if (
        inspect.stack()[1].function == "remove_padding_of_both") else usual(self))  # fmt: skip
    assert not summarizer().is_packed
    assert the_warning(caplog).startswith("a model of type bart has no embed_positions")


@pytest.mark.parametrize("function", ["eager_attention_forward", "sdpa_attention_forward"])
def test_a_decoder_whose_padded_batches_would_change_is_not_packed(function, monkeypatch, caplog):
    """They are computed by a function of Transformers, which is looked up by its name."""
    kind = function.partition("_")[0]
    before = language_model(attn_implementation=kind)
    assert before.is_packed

    def changed(*_, **__):
        raise AttributeError(f"no {function}")

    monkeypatch.setitem(packing.AttentionInterface._global_mapping, packing.DECODER[kind], packing.partial(
        packing._attention_of_decoder, changed))  # fmt: skip
    after = language_model(attn_implementation=kind)
    assert not after.is_packed
    check_same(*({"loss": model(**batch(), label_smoothing_factor=0.1)[0].detach()} for model in (after, before)))
    assert function in the_warning(caplog)


@pytest.mark.parametrize("change", ["ignored", "refused"])
def test_pooling_that_knows_no_packed_tokens_gets_padded_ones(change, expected, monkeypatch, caplog):
    usual = Pooling.forward

    def forward(self, features):
        if change == "refused" and "cu_seq_lens_q" in features:
            raise KeyError("cu_seq_lens_q")
        return usual(self, {name: value for name, value in features.items() if name != "cu_seq_lens_q"})

    monkeypatch.setattr(Pooling, "forward", forward)
    check_same(scores(), expected["scores"])
    assert "cu_seq_lens_q" in the_warning(caplog)


def test_a_search_that_fails_is_left_to_transformers(expected, monkeypatch, caplog):
    def fails(*_, **__):
        raise AttributeError("'GenerationConfig' object has no attribute '_eos_token_tensor'")

    monkeypatch.setattr(beam_search, "search", fails)
    check_same(summaries(), expected["summaries"])
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2  # one for each kind of model
    assert all("_eos_token_tensor" in text and "slower" in text for text in warnings)


def test_a_search_that_fails_with_one_kind_of_model_is_left_to_transformers(expected, monkeypatch, caplog):
    for kind in (beam_search.reads_sources, beam_search.reads_prompts):
        assert beam_search.agrees(kind)
    model = summarizer().eval()
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    monkeypatch.setattr(beam_search.Layer, "show", lambda self: self.last_states)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, **SETTINGS), expected["summaries"][str(EncoderDecoder)])
    assert "last_states" in the_warning(caplog)


@pytest.mark.parametrize("change", ["positions", "length penalty"])
def test_a_search_that_writes_other_tokens_is_left_to_transformers(change, expected, monkeypatch, caplog):
    if change == "positions":  # models ask a cache by another method, which counts the slots of all beams
        monkeypatch.setattr(beam_search.Layer, "get_seq_length", lambda self: self.slots)
    else:
        usual = beam_search.advance_beams
        monkeypatch.setattr(beam_search, "advance_beams", lambda state, logits, *rest: usual(state, -logits, *rest))
    check_same(summaries(), expected["summaries"])
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings and all("other tokens than `generate`" in text and "slower" in text for text in warnings)


@pytest.mark.parametrize("change", ["gone", "other arguments", "other numbers"])
@pytest.mark.parametrize("name", ["_linear_pointwise", "_is_mkldnn_bf16_supported", "_reorder_linear_weight"])
def test_an_operation_of_onednn_that_has_changed_is_not_used(name, change, monkeypatch, caplog):
    if not cpu.HAS_BFLOAT16:
        pytest.skip("this PyTorch has no oneDNN")
    usual, of_bfloat16 = getattr(torch.ops.mkldnn, name), name != "_linear_pointwise"

    def other(*arguments, **options):
        if change == "gone":
            raise AttributeError(f"no {name}")
        return usual("new", *arguments) if change == "other arguments" else 2 * usual(*arguments)

    monkeypatch.setattr(torch.ops.mkldnn, name, other)
    is_used = cpu._has_bfloat16() if of_bfloat16 else cpu._has_onednn()
    if (name, change) == ("_is_mkldnn_bf16_supported", "other numbers"):
        assert is_used  # true is true
        return
    assert not is_used
    monkeypatch.setattr(cpu, "HAS_BFLOAT16" if of_bfloat16 else "IS_AVAILABLE", False)
    monkeypatch.setattr(cpu, "IS_FASTER", True)
    layer, x = cpu.Linear(256, 128), torch.randn(128, 256)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=of_bfloat16), cpu.laid_out_weights(layer):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert name in the_warning(caplog)


def test_the_gradient_of_softmax_is_the_same_without_its_operation(expected, monkeypatch):
    monkeypatch.setattr(packing, "_softmax_backward", packing._plain_softmax_backward)
    check_same(losses(), expected["losses"])


def test_without_a_test_of_the_processor_the_precision_is_float32(monkeypatch, caplog):
    monkeypatch.setattr(script, "find", lambda name: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert script.precision(SimpleNamespace(mixed_precision=None), is_pretrained=True) is None
    assert "_is_avx512_bf16_supported" in the_warning(caplog)


def test_layers_that_cannot_be_compiled_one_by_one_are_not(monkeypatch, caplog):
    model = summarizer()
    monkeypatch.delattr(nn.Module, "_compiled_call_impl")
    assert settings.compile_layers(model, SimpleNamespace(torch_compile=True), None) is model
    assert "_compiled_call_impl" in the_warning(caplog)


def test_each_process_of_a_machine_but_the_first_is_silent(monkeypatch, caplog):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(internals, "find", lambda name: None)
    assert not has("packing")
    assert not caplog.records
