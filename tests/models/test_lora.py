"""Adapters: what is trained; what is saved computes the same in Transformers, peft and sentence-transformers."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from test_families import EOS, FAMILIES, build, random_batch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from utils.errors import UsageError
from utils.fast.cpu import Dropout, Linear
from utils.models import lora
from utils.models.encoder import build_small_encoder, encode, load_retriever
from utils.models.encoder import save_pretrained as save_retriever
from utils.models.encoder_decoder import EncoderDecoder
from utils.models.generation import DEFAULTS
from utils.models.losses import _VocabularyLoss, vocabulary_loss
from utils.models.summarizer import load_model_and_tokenizer, save_pretrained, set_up
from utils.training.step import parameter_groups

TEXTS = ["The committee saw the old mill in May.", "They sold the green bridge in June.", "Who agreed?"]
SETTINGS = {**dict.fromkeys(DEFAULTS), "source_lang": None, "target_lang": None, "source_prefix": None,
            "prompt_template": None, "fusion": "concat", "max_source_length": 32,
            "max_target_length": 16, "max_new_tokens": 9, "num_beams": 3}  # fmt: skip


QUICK = ("bart", "mt5", "bert to gpt2")  # without T5's layer in float32, with it, and with GPT-2's transposed layers
every_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)


def flags(**changes):
    return SimpleNamespace(**{"lora_rank": 4, "lora_alpha": None, "lora_dropout": 0.0,
                              "lora_target_modules": "all-linear", "merge_lora": False, "output_dir": "run",
                              "model_name_or_path": "base", **changes})  # fmt: skip


def on(precision="no"):
    return SimpleNamespace(mixed_precision=precision, distributed_type="NO")


def save_base(folder, family="bart"):
    """A folder with a model and a tokenizer."""
    words = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *map(str, range(4, 60))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder)  # fmt: skip
    model = build(FAMILIES[family]())
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    return folder


def adapted(base, precision="no", gradient_checkpointing=False, **changes):
    """A summarizer with adapters that are not zero, and its tokenizer."""
    model, tokenizer = load_model_and_tokenizer(base)
    set_up(model, tokenizer, SETTINGS)
    summarizer = EncoderDecoder(model, gradient_checkpointing)
    torch.manual_seed(1)
    lora.add_adapters(summarizer, flags(**changes), on(precision))
    fill(summarizer)
    return summarizer.eval(), tokenizer


def fill(module):
    for name, parameter in module.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)


def loss_and_gradients(summarizer, autocast=False):
    summarizer.zero_grad()
    torch.manual_seed(2)  # some families drop layers
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = summarizer(**random_batch(), label_smoothing_factor=0.1)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in summarizer.named_parameters() if p.grad is not None}


def logits(model):
    ids = random_batch()["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids[:, :5]).logits


@every_family
def test_frozen_matrices_in_bfloat16_change_no_bit_under_autocast(family, tmp_path):
    summarizer, _ = adapted(save_base(tmp_path / "base", family), lora_dropout=0.1)
    held = copy.deepcopy(summarizer)
    lora._hold_in_bfloat16(held.model)
    sizes = [sum(p.nbytes for p in model.parameters()) for model in (summarizer, held)]
    assert sizes[1] < 0.85 * sizes[0]  # the embeddings of so small a model are much of it
    for is_training in (True, False):
        (loss, gradients), (of_held, gradients_of_held) = (
            loss_and_gradients(model.train(is_training), autocast=True) for model in (summarizer, held)
        )
        assert torch.equal(loss, of_held)
        assert gradients and gradients.keys() == gradients_of_held.keys()
        assert all(torch.equal(gradient, gradients_of_held[name]) for name, gradient in gradients.items())
    batch = {name: tensor for name, tensor in random_batch().items() if name != "labels"}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(summarizer.generate(**batch), held.generate(**batch))


@every_family
def test_a_saved_folder_computes_the_same_everywhere(family, tmp_path, monkeypatch):
    base = save_base(tmp_path / "base", family)
    monkeypatch.chdir(tmp_path)
    summarizer, tokenizer = adapted("base")  # a relative path
    expected, plain = logits(summarizer.model), logits(AutoModelForSeq2SeqLM.from_pretrained(base))
    assert (expected - plain).abs().max() > 0.01
    save_pretrained(summarizer, tokenizer, tmp_path / "saved", summarizer.state_dict())
    monkeypatch.chdir("/")
    assert not (tmp_path / "saved/config.json").exists()
    loaded, _ = load_model_and_tokenizer(tmp_path / "saved")
    assert loaded.generation_config.num_beams == 3
    assert loaded.generation_config.to_diff_dict() == summarizer.model.generation_config.to_diff_dict()
    for model in (
        loaded,
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved"),
        PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), tmp_path / "saved"),
    ):
        # PyTorch orders a product in another way if its weight needs no gradient
        assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    batch = {name: tensor for name, tensor in random_batch().items() if name != "labels"}
    ids = summarizer.generate(**batch)
    assert torch.equal(EncoderDecoder(loaded).eval().generate(**batch), ids)
    texts = AutoTokenizer.from_pretrained(tmp_path / "saved").batch_decode(ids)
    assert texts == tokenizer.batch_decode(ids)
    assert GenerationConfig.from_pretrained(tmp_path / "saved").max_new_tokens == 9


@every_family
def test_a_merged_model_is_whole_and_computes_the_same(family, tmp_path):
    base = save_base(tmp_path / "base", family)
    summarizer, tokenizer = adapted(base, "bf16", merge_lora=True)  # weights that are held in bfloat16
    assert any(parameter.dtype == torch.bfloat16 for parameter in summarizer.parameters())
    save_pretrained(summarizer, tokenizer, tmp_path / "merged", summarizer.state_dict())
    assert not list((tmp_path / "merged").glob("adapter*"))
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    exact, _ = adapted(base)  # with the base model's own weights, in float32
    expected = logits(exact.model)
    assert (logits(merged) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert merged.generation_config.num_beams == 3
    other = build(FAMILIES[family](), seed=1)
    other.save_pretrained(base)
    with pytest.raises(UsageError, match=r"--merge_lora: .* holds other weights than when training began"):
        save_pretrained(summarizer, tokenizer, tmp_path / "wrong", summarizer.state_dict())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("merge", [False, True])
def test_a_language_model_with_adapters_is_saved_as_one(kind, merge, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=1, n_positions=64, bos_token_id=0,
                                  eos_token_id=EOS)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora.add_adapters(nn.ModuleDict({"model": model}), flags(merge_lora=merge), on())
    fill(model.eval())
    ids, held, found = random_batch()["input_ids"], copy.deepcopy(model), []
    lora._hold_in_bfloat16(held)
    for each in (model, held):
        with torch.autocast("cpu", torch.bfloat16):
            each(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in each.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found)) and len(found[0]) == 2 * len(lora._adapted_layers(model))
    held.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        expected, ours = model(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    if not merge:
        settings = json.loads((tmp_path / "saved/adapter_config.json").read_text())
        assert (settings["task_type"], settings["base_model_name_or_path"]) == ("CAUSAL_LM", str(tmp_path / "base"))


def test_only_adapters_are_trained_and_the_output_layer_has_none(tmp_path):
    summarizer, _ = adapted(save_base(tmp_path / "base", "mt5"), lora_alpha=6, lora_dropout=0.25)
    names = {name for name, p in summarizer.named_parameters() if p.requires_grad}
    assert names and all(".lora_" in name for name in names)
    _, gradients = loss_and_gradients(summarizer)
    assert gradients.keys() == names
    assert sum(len(group["params"]) for group in parameter_groups(summarizer, 0.1)) == len(names)
    model = summarizer.model
    assert type(model) is type(build(FAMILIES["mt5"]()))
    assert type(model.get_output_embeddings()) is Linear and type(model.get_input_embeddings()) is nn.Embedding
    layers = lora._adapted_layers(model).values()
    assert len(layers) == sum(isinstance(m, nn.Linear) for m in build(FAMILIES["mt5"]()).modules()) - 1
    for layer in layers:
        parts = (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"], layer.lora_dropout["default"])
        assert [type(part) for part in parts] == [Linear, Linear, Linear, Dropout]
        assert layer.scaling["default"] == 6 / 4 and parts[3].p == 0.25


def test_only_the_named_layers_get_adapters(tmp_path):
    summarizer, _ = adapted(save_base(tmp_path / "base"), lora_target_modules="encoder_attn.q_proj,fc2")
    assert {name.partition("layers.")[2][2:] for name in lora._adapted_layers(summarizer.model)} == {
        "encoder_attn.q_proj", "fc2"}  # fmt: skip


@pytest.mark.parametrize("ends", ["nothing", "q_proj,nothing", "q_proj,", "shared", "lm_head", "encoder", "layers.0"])
def test_other_modules_than_linear_layers_are_refused_in_one_line(ends, tmp_path):
    with pytest.raises(UsageError, match=f"--lora_target_modules {ends}: .*these are k_proj, v_proj") as refusal:
        adapted(save_base(tmp_path / "base"), lora_target_modules=ends)
    assert "\n" not in str(refusal.value)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    base = save_base(tmp_path / "base")
    (loss, gradients), (other_loss, others) = (
        loss_and_gradients(adapted(base, gradient_checkpointing=is_on, lora_dropout=0.1)[0].train())
        for is_on in (False, True)
    )
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_a_frozen_output_layer_gets_no_gradient_and_the_states_get_the_same(monkeypatch):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(20, 8), torch.randn(50, 8), torch.randint(50, (20,))
    monkeypatch.setattr(_VocabularyLoss, "CHUNK", 200)  # five chunks
    products = []
    multiply = torch.matmul
    monkeypatch.setattr("utils.models.losses.multiply", lambda a, b: products.append(1) or multiply(a, b))
    found = []
    for is_trained in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(is_trained)
        products.clear()
        vocabulary_loss(h, targets, 0.1, w)[0].backward()
        found.append(h.grad)
        assert len(products) == 5 * (3 if is_trained else 2)
        assert (w.grad is not None) == is_trained
    assert torch.equal(*found)


def test_training_on_from_adapters_trains_all_weights_from_what_they_computed(tmp_path):
    summarizer, tokenizer = adapted(save_base(tmp_path / "base", "pegasus"))
    save_pretrained(summarizer, tokenizer, tmp_path / "saved", summarizer.state_dict())
    model, _ = load_model_and_tokenizer(tmp_path / "saved")
    other = EncoderDecoder(model).eval()
    lora.add_adapters(other, flags(lora_rank=0), on())
    expected = logits(summarizer.model)
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    fresh = build(FAMILIES["pegasus"]())
    trained = {name: p.requires_grad for name, p in fresh.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert not all(trained.values())  # its positions are fixed
    save_pretrained(other, tokenizer, tmp_path / "whole", other.state_dict())
    whole = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(whole), logits(model))


def test_adapters_on_adapters_and_a_base_model_that_would_be_overwritten_are_refused(tmp_path):
    base = save_base(tmp_path / "base")
    summarizer, tokenizer = adapted(base)
    save_pretrained(summarizer, tokenizer, tmp_path / "saved", summarizer.state_dict())
    with pytest.raises(UsageError, match=r"--lora_rank: .*holds adapters already"):
        adapted(tmp_path / "saved")
    adapted_retriever(tmp_path / "retriever")
    retriever = load_retriever(str(tmp_path / "retriever"))
    retriever[0].auto_model.name_or_path = str(tmp_path)  # whose subfolder holds it, as in older models
    with pytest.raises(UsageError, match=r"--lora_rank: .* holds no config.json"):
        lora.add_adapters(retriever, flags(), on())
    with pytest.raises(UsageError, match=r"--output_dir .*: holds the base model"):
        adapted(base, output_dir=str(tmp_path / "base/../base"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: shutil.rmtree(folder / "base"), "its adapters need their base model in .*/base, which is not"),
        (lambda folder: retrain(folder / "base"), "its adapters were trained beside other weights than .*/base holds"),
        (lambda folder: edit(folder, peft_type="IA3"), "only LoRA adapters"),
        (lambda folder: edit(folder, modules_to_save=["shared"]), "only LoRA adapters"),
        (lambda folder: edit(folder, target_modules=["v_proj", "query"]), "its adapters do not fit the base model"),
        (lambda folder: (folder / "saved/adapter_config.json").write_text("{"), "adapter_config.json cannot be used"),
    ],
)
@pytest.mark.parametrize("kind", ["summarizer", "retriever"])
def test_adapters_that_cannot_be_used_are_refused_in_one_line(kind, change, said, tmp_path):
    if kind == "summarizer":
        summarizer, tokenizer = adapted(save_base(tmp_path / "base"))
        save_pretrained(summarizer, tokenizer, tmp_path / "saved", summarizer.state_dict())
        load = load_model_and_tokenizer
    else:
        save_retriever(adapted_retriever(tmp_path / "base"), tmp_path / "saved", ranking_flags())
        load = load_retriever
    change(tmp_path)
    with pytest.raises(UsageError, match=said) as refusal:
        load(str(tmp_path / "saved"))
    assert "\n" not in str(refusal.value) and str(tmp_path / "saved") in str(refusal.value)


def retrain(folder) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def edit(folder, **changes) -> None:
    file = folder / "saved/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- retrievers


def ranking_flags():
    return SimpleNamespace(model_name_or_path="base", ranking="dense", bm25_weight=0.5, smooth_window=0,
                           smooth_decay=0.5, hop_weight=0.5, language=None)  # fmt: skip


def adapted_retriever(base, precision="no", **changes):
    """A retriever with adapters that are not zero, on a base model in the folder `base`."""
    if not base.exists():
        torch.manual_seed(0)
        small = build_small_encoder(TEXTS * 3, vocab_size=100, hidden_size=32, layers=2)
        small.prompts["query"] = "ask: "
        small.save_pretrained(str(base), create_model_card=False)
    retriever = load_retriever(str(base), attention_dropout=0.0, dropout=0.1)
    torch.manual_seed(1)
    lora.add_adapters(retriever, flags(**changes), on(precision))
    fill(retriever)
    return retriever.eval()


@pytest.mark.parametrize("merge", [False, True])
def test_a_saved_retriever_computes_the_same_in_sentence_transformers(merge, tmp_path):
    retriever = adapted_retriever(tmp_path / "base", merge_lora=merge)
    assert {name for name, p in retriever.named_parameters() if p.requires_grad} == {
        name for name, _ in retriever.named_parameters() if ".lora_" in name}  # fmt: skip
    expected = retriever.encode_query(TEXTS)
    base = SentenceTransformer(str(tmp_path / "base"), device="cpu").encode_query(TEXTS)
    assert abs(expected - base).max() > 0.01
    # what FSDP leaves is a copy, which is saved in its place
    save_retriever(copy.deepcopy(retriever), tmp_path / "saved", ranking_flags())
    assert (tmp_path / "saved/config.json").exists() == merge
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    ours = load_retriever(str(tmp_path / "saved"), attention_dropout=0.0, dropout=0.2).eval()
    assert ours[0].auto_model.config.hidden_dropout_prob == 0.2
    for model in (plain, ours):
        assert abs(model.encode_query(TEXTS) - expected).max() <= 1e-6
    accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1,
                                  autocast=lambda: torch.autocast("cpu", torch.bfloat16))  # fmt: skip
    if not merge:  # with weights laid out for bfloat16 products
        held = adapted_retriever(tmp_path / "base", "bf16")
        assert any(p.dtype == torch.bfloat16 for p in held.parameters())
        of_both = [encode(model, TEXTS, "query", accelerator=accelerator) for model in (ours, held)]
        assert (of_both[0] == of_both[1]).all()


def test_a_copy_of_a_model_with_adapters_saves_its_own_weights(tmp_path):
    retriever = adapted_retriever(tmp_path / "base")
    other = copy.deepcopy(retriever)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".lora_" in name:
                parameter.mul_(2)
    save_retriever(other, tmp_path / "saved", ranking_flags())
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert abs(plain.encode_query(TEXTS) - other.encode_query(TEXTS)).max() <= 1e-6
    assert abs(plain.encode_query(TEXTS) - retriever.encode_query(TEXTS)).max() > 0.01
