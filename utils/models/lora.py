"""LoRA: small adapters beside frozen linear layers, through `peft` (Hu et al., 2021, arXiv:2106.09685).

Adapters are put into the model itself, which stays a plain model of Transformers. `peft` is imported only where it is
used, because that takes seconds. A model's `save_pretrained` is replaced, so that saving a summarizer or a retriever
needs no case of its own.

Leans on these internals of peft: an adapted layer has `base_layer`, `fan_in_fan_out` and, by the adapter's name
"default", `scaling`, `lora_A` and `lora_B`; a model with adapters has `peft_config`. And of Transformers: a model that
loaded adapters has `_hf_peft_config_loaded` and their `_weight_conversions`.
"""

import copy
import json
import os
import warnings
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, find_adapter_config_file

from utils.errors import UsageError, in_one_line
from utils.fast.cpu import use_fast_layers
from utils.files import size_and_digest, write_json

NAME = "default"  # of the adapter; it is in no file
BASE_FILE = "adapter_base.json"  # the checksums of a local base model
LINEAR = (nn.Linear, Conv1D)  # the second is GPT-2's


def add_adapters(module: nn.Module, args, accelerator) -> None:
    """Freezes a summarizer or retriever and puts adapters beside its linear layers, as the flags `--lora_*` say.

    The model's own `save_pretrained` is then `save_adapters`. Without `--lora_rank`, adapters that the model was loaded
    with are added to its weights, and all weights are trained. Raises UsageError if the model cannot have the adapters.
    """
    model = next(part for part in module.modules() if isinstance(part, PreTrainedModel))
    if not args.lora_rank:
        _merge(model)
        return
    if _adapted_layers(model):
        raise UsageError(
            f"--lora_rank: {args.model_name_or_path} holds adapters already; name their base model, or start their run "
            "again with --merge_lora"
        )
    base = _whole_name(model)
    if Path(base) == Path(args.output_dir).resolve():
        raise UsageError(f"--output_dir {args.output_dir}: holds the base model, which adapters need; choose another")
    from peft import LoraConfig, inject_adapter_in_model

    is_all = args.lora_target_modules == "all-linear"
    targets = args.lora_target_modules if is_all else _targets(model, args.lora_target_modules)
    config = LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_alpha or 2 * args.lora_rank, lora_dropout=args.lora_dropout,
        target_modules=targets, base_model_name_or_path=base, task_type=_task(model),
    )  # fmt: skip
    module.requires_grad_(False)
    try:
        with warnings.catch_warnings(action="ignore"):  # peft warns that GPT-2's layers are transposed
            inject_adapter_in_model(config, model, NAME)
    except ValueError as error:
        raise UsageError(f"--lora_target_modules {args.lora_target_modules}: {in_one_line(error)}") from error
    config.target_modules = sorted(config.target_modules)  # a set, whose order changes from run to run
    use_fast_layers(model)
    if accelerator.mixed_precision == "bf16" and accelerator.distributed_type != DistributedType.FSDP:
        _hold_in_bfloat16(model)
    model.save_pretrained = partial(save_adapters, model, merge=args.merge_lora)


def _adapted_layers(model) -> dict[str, nn.Module]:
    """The layers with adapters, by their names; {} without importing peft if there are none."""
    if not getattr(model, "peft_config", None):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


def _whole_name(model) -> str:
    """The base model's name on the Hub, or its absolute path. Raises UsageError if Transformers could not load it."""
    name = model.name_or_path
    if not holds(name, "config.json"):  # an older sentence-transformers model has it in a folder of its own
        raise UsageError(f"--lora_rank: {name} holds no config.json; save it again with sentence-transformers")
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def _targets(model, flag: str) -> list[str]:
    """The ends of names in `--lora_target_modules`. Raises UsageError if one names other modules, or none."""
    head = model.get_output_embeddings()
    layers = [name for name, layer in model.named_modules() if isinstance(layer, LINEAR) and layer is not head]
    ends = flag.split(",")
    for end in ends:
        named = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{end}")]
        if not end or not named or not set(named) <= set(layers):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            raise UsageError(
                f"--lora_target_modules {flag}: {end!r} is not how the names of linear layers end (the output layer "
                f"aside); these are {known}"
            )
    return ends


def _task(model) -> str:
    """What peft's classes for whole models are chosen by."""
    if not model.can_generate():
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _hold_in_bfloat16(model) -> None:
    """Holds frozen matrices of linear layers as bfloat16 autocast would cast them at each use: half of the memory.

    Norms, biases and embeddings stay in float32, also where the output layer is an embedding. So does T5's layer `wo`,
    whose inputs T5 casts to its type, so that their gradients would be added up in bfloat16.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, layer in model.named_modules():
        is_frozen = isinstance(layer, LINEAR) and not layer.weight.requires_grad and id(layer.weight) not in embeddings
        if is_frozen and ".wo." not in f"{name}.":
            layer.weight.data = layer.weight.data.to(torch.bfloat16)


@torch.no_grad()
def _merge(model) -> None:
    """Adds adapters that were loaded, if any, to the weights and removes them; all weights can then be trained."""
    layers = _adapted_layers(model)
    if not layers:
        return
    for name, layer in layers.items():
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    vars(model).pop("_weight_conversions", None)  # how adapters are named in files; a whole model is named otherwise
    with torch.device("meta"):
        new = type(model)(model.config)
    for parameter, of_new in zip(model.parameters(), new.parameters(), strict=True):
        parameter.requires_grad_(of_new.requires_grad)  # Pegasus never trains its positions


@torch.no_grad()
def save_adapters(model, folder: str | Path, state_dict: dict | None = None, *, merge: bool, **_) -> None:
    """Writes a folder of adapters that `from_pretrained` of Transformers, sentence-transformers and peft load.

    `state_dict` is the model's, whole where the model is sharded. With `merge` it writes a whole model: the weights of
    the base model in float32, which is loaded again, plus the adapters. Raises UsageError if these have changed.
    """
    weights = model.state_dict() if state_dict is None else state_dict
    config = copy.copy(model.peft_config[NAME])
    if merge:
        whole = type(model).from_pretrained(
            config.base_model_name_or_path, config=copy.deepcopy(model.config), dtype=torch.float32
        )
        for name, layer in _adapted_layers(model).items():
            weight, trained_with = whole.get_submodule(name).weight, weights[f"{name}.base_layer.weight"].cpu()
            if not torch.equal(weight.to(trained_with.dtype), trained_with):
                base = config.base_model_name_or_path
                raise UsageError(f"--merge_lora: {base} holds other weights than when training began; put them back")
            a, b = (weights[f"{name}.lora_{side}.{NAME}.weight"].float().cpu() for side in "AB")
            product = b @ a * layer.scaling[NAME]
            weight += product.T if layer.fan_in_fan_out else product
        if model.can_generate():
            whole.generation_config = model.generation_config
        whole.save_pretrained(folder)
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    adapters = {f"base_model.model.{name.replace(f'.{NAME}.', '.')}": tensor.cpu().contiguous()
                for name, tensor in weights.items() if ".lora_" in name}  # fmt: skip
    save_file(adapters, Path(folder) / "adapter_model.safetensors", {"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(folder))
    write_json(Path(folder) / BASE_FILE, _weight_files(config.base_model_name_or_path))
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _weight_files(folder: str) -> dict[str, dict]:
    """Size and SHA-256 of the weights in a local folder, by file; {} for a model of the Hub, whose name tells them."""
    return {path.name: size_and_digest(path) for path in sorted(Path(folder).glob("*.safetensors"))}


def holds(name_or_path: str | Path, file: str) -> bool:
    """Whether a folder, or a model of the Hub, has this file."""
    return cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False) is not None


def base_model(name_or_path: str | Path, flag: str) -> str:
    """The model that the adapters of a folder or of the Hub belong to; `name_or_path` itself if it is a whole model.

    Raises UsageError, which begins with `flag`, if the adapters cannot be used or their base model is not there.
    """
    file, name = _adapter_config(name_or_path), f"{flag} {name_or_path}".strip()
    if file is None:
        return str(name_or_path)
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        base = str(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{name}: its adapter_config.json cannot be used: {in_one_line(error)}") from error
    unusual = ("modules_to_save", "trainable_token_indices", "layer_replication")
    if config.get("peft_type") != "LORA" or any(config.get(entry) for entry in unusual):
        raise UsageError(f"{name}: only LoRA adapters without {', '.join(unusual)} are supported; merge them first")
    if Path(name_or_path, "config.json").exists():  # beside its base model
        return str(name_or_path)
    if os.path.isabs(base) and not Path(base, "config.json").exists():
        raise UsageError(
            f"{name}: its adapters need their base model in {base}, which is not there; put it back, or write its "
            "place into base_model_name_or_path of adapter_config.json"
        )
    trained_on = Path(name_or_path, BASE_FILE)
    if trained_on.exists() and json.loads(trained_on.read_text(encoding="utf-8")) != _weight_files(base):
        raise UsageError(f"{name}: its adapters were trained beside other weights than {base} holds now; put them back")
    return base


def _adapter_config(name_or_path: str | Path) -> str | None:
    try:
        return find_adapter_config_file(str(name_or_path))
    except (OSError, ValueError):  # no possible name: what loads the model says so
        return None


def check_loaded(model, name_or_path: str | Path, flag: str) -> None:
    """Raises UsageError if the adapters of a folder were not all loaded, which Transformers only warns of."""
    file = _adapter_config(name_or_path)
    file = file and Path(file).with_name("adapter_model.safetensors")
    if not file or not file.exists():
        return
    saved = list(load_file(file).values())
    loaded = [tensor for name, tensor in model.state_dict().items() if ".lora_" in name]
    # by their sums, because Transformers renames the tensors of some models
    of_saved, of_loaded = (sorted(tensor.double().sum().item() for tensor in tensors) for tensors in (saved, loaded))
    if of_saved != of_loaded:
        raise UsageError(f"{flag} {name_or_path}: its adapters do not fit the base model".strip())
