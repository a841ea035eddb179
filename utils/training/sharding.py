"""Gathering the tensors of model and optimizer, and restoring them: the same for one process, DDP and FSDP2."""

import dataclasses
import hashlib
import math
import platform
from collections.abc import Iterable, Iterator

import torch
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.errors import UsageError
from utils.training.exchange import Exchange
from utils.training.step import is_sharded


def keep_sums_exact(accelerator) -> None:
    """Makes FSDP2 add up gradients in float32, and stops it from casting a model's outputs to bf16.

    In bf16, which accelerate asks for, gradients and summed losses would be rounded. Call it before `prepare`.
    """
    policy = getattr(getattr(accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
    if hasattr(policy, "output_dtype"):
        exact = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        accelerator.state.fsdp_plugin.mixed_precision_policy = exact


def prepare(accelerator, model, optimizer) -> tuple:
    """`accelerator.prepare`, but with an `Exchange` of gradients in place of DDP.

    With FSDP, the layers of a model of sentence-transformers are sharded one by one, too. Raises UsageError if the
    processes have loaded different models.
    """
    _check_same(accelerator, model)
    if accelerator.num_processes > 1 and not is_sharded(accelerator):
        model = accelerator.prepare_model(model, evaluation_mode=True)  # without DDP
        for tensor in (*model.parameters(), *model.buffers()):
            # new weights may differ in the last bit between machines
            tensor.detach().copy_(broadcast(tensor.detach().contiguous()))
        model.exchange = Exchange(model)
        return model, accelerator.prepare_optimizer(optimizer)
    if is_sharded(accelerator):
        plugin, names = accelerator.state.fsdp_plugin, {type(module).__name__ for module in model.modules()}
        if plugin.transformer_cls_names_to_wrap is None:
            layers = {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}
            plugin.transformer_cls_names_to_wrap = sorted(layers & names)
        if not hasattr(model, "base_model_prefix"):
            # no name of a module: accelerate would take `Normalize` for the last norm and fail to shard it
            model.base_model_prefix = "-"
    return accelerator.prepare(model, optimizer)


def _check_same(accelerator, model) -> None:
    """Raises UsageError if a process has other parameters than the main one, by name, shape or sum."""
    own = {name: (tuple(p.shape), float(p.detach().sum(dtype=torch.float64))) for name, p in model.named_parameters()}
    everywhere = gather_object([(platform.node(), own)]) if accelerator.num_processes > 1 else []
    for number, (machine, found) in enumerate(everywhere):
        first = everywhere[0][1]
        differing = sorted(name for name in first | found if not _is_close(first.get(name), found.get(name)))
        if differing:
            raise UsageError(
                f"process {number} on {machine} has loaded another model than process 0 on {everywhere[0][0]}: "
                f"{len(differing)} parameters differ, such as {differing[0]}; all machines need the same files"
            )


def _is_close(ours: tuple | None, theirs: tuple | None) -> bool:
    if str(ours) == str(theirs):  # also nan
        return True
    is_there = ours is not None and theirs is not None and ours[0] == theirs[0]
    return is_there and math.isclose(ours[1], theirs[1], rel_tol=1e-3, abs_tol=1e-3)


def trained_tensors(accelerator, model, optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """What training changes, as it lies on this process: {"model": {...}, "optimizer": {...}}.

    Tied weights are there once. Optimizer states are named "parameter/entry". Of the parameter groups only the learning
    rates are kept, which schedulers change; the flags have the rest.
    """
    named = _named_tensors(accelerator, model)
    names = {id(tensor): name for name, tensor in named.items()}
    optimizer = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
    states = {
        f"{names[id(parameter)]}/{entry}": _as_tensor(value)
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
        if value is not None
    }
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    states["learning_rates"] = torch.tensor(rates, dtype=torch.float64)
    return {"model": named, "optimizer": states}


def _as_tensor(value) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def gather_tensors(accelerator, model, optimizer, into=None) -> dict[str, dict[str, torch.Tensor]]:
    """Copies `trained_tensors` to the main process's CPU; {} on the others.

    Called on all processes. Training may continue while the copies are written. `into` holds earlier copies whose
    memory is reused.
    """
    gathered = {}
    for group, tensors in trained_tensors(accelerator, model, optimizer).items():
        memory = (into or {}).get(group, {})
        gathered[group] = {name: _gather(accelerator, tensor, memory.get(name)) for name, tensor in tensors.items()}
    return gathered if accelerator.is_main_process else {}


def stream(accelerator, tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor | None]:
    """Gathers sharded tensors one by one: gives each, whole, on the main process's CPU; None on the others.

    Called on all processes, all of which must go to the end. None of them needs memory for more than two at a time.
    """
    for tensor in tensors:
        yield _gather(accelerator, tensor, None)


def whole_weights(accelerator, model) -> dict[str, torch.Tensor]:
    """The model's state dict. Where it is sharded: whole, on the main process's CPU, and {} on the others.

    Called on all processes. Tied weights are one tensor.
    """
    if not is_sharded(accelerator):
        return accelerator.get_state_dict(model)
    everything, whole = accelerator.unwrap_model(model, keep_torch_compile=False).state_dict(keep_vars=True), {}
    for tensor in everything.values():
        if id(tensor) not in whole:
            whole[id(tensor)] = _gather(accelerator, tensor, None)
    return {name: whole[id(tensor)] for name, tensor in everything.items()} if accelerator.is_main_process else {}


def restore_tensors(accelerator, model, optimizer, tensors, *, with_optimizer: bool = True) -> None:
    """Restores gathered tensors, bit for bit. Called on all processes; only the main process needs `tensors`.

    Raises UsageError if they belong to another model.
    """
    named = _named_tensors(accelerator, model)
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    saved = [{name: tuple(tensor.shape) for name, tensor in tensors.get("model", {}).items()}]
    broadcast_object_list(saved)
    if differing := sorted(name for name in shapes | saved[0] if shapes.get(name) != saved[0].get(name)):
        name = differing[0]
        raise UsageError(
            f"the checkpoint belongs to another model: {len(differing)} tensors differ, "
            f"{name} is {saved[0].get(name, 'missing')} there and {shapes.get(name, 'missing')} here"
        )
    with torch.no_grad():
        for name, value in _from_main(accelerator, tensors.get("model", {})):
            named[name].copy_(_laid_out_as(named[name], value))
    if not with_optimizer:
        return

    optimizer = getattr(optimizer, "optimizer", optimizer)
    numbers = {id(p): number for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    states, rates = {}, []
    for key, value in _from_main(accelerator, tensors.get("optimizer", {})):
        if key == "learning_rates":
            rates = value.tolist()
            continue
        name, _, entry = key.rpartition("/")
        is_number = value.ndim == 0 and value.dtype in (torch.float64, torch.int64)
        state = states.setdefault(numbers[id(named[name])], {})
        state[entry] = value.item() if is_number else _laid_out_as(named[name], value.clone())
    # load_state_dict() knows on which device each entry belongs
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _named_tensors(accelerator, model) -> dict[str, torch.Tensor]:
    """Trained parameters and persistent buffers by their names in the unwrapped model; tied ones once."""
    everything = _everything(accelerator, model)
    return {name: tensor for name, tensor in everything.items() if not _is_frozen(tensor)}


def _everything(accelerator, model) -> dict[str, torch.Tensor]:
    """All parameters and persistent buffers, tied ones once."""
    # state_dict() rather than named_parameters(): FSDP then gives the shards that the optimizer holds
    everything = accelerator.unwrap_model(model, keep_torch_compile=False).state_dict(keep_vars=True)
    first_names = {id(tensor): name for name, tensor in reversed(everything.items())}
    return {name: everything[name] for name in everything if first_names[id(everything[name])] == name}


def _is_frozen(tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad


def frozen_digest(accelerator, model) -> str | None:
    """A checksum of the parameters that are not trained, which are in no checkpoint; None without any.

    Called on all processes; the others than the main one get a checksum of nothing.
    """
    frozen = {name: tensor for name, tensor in _everything(accelerator, model).items() if _is_frozen(tensor)}
    total = hashlib.sha256()
    for name, tensor in frozen.items():
        value = _gather(accelerator, tensor, None)
        if value is not None:
            total.update(name.encode() + memoryview(value.view(-1).view(torch.uint8).numpy()))
    return total.hexdigest()[:16] if frozen else None


def _gather(accelerator, value, memory: torch.Tensor | None) -> torch.Tensor | None:
    """A contiguous copy of a tensor (unsharded) on the main process's CPU; None on other processes."""
    if isinstance(value, DTensor):
        value = value.to(value.device_mesh.device_type).full_tensor()  # from the CPU, where parameters are offloaded
    if not accelerator.is_main_process:
        return None
    if memory is None or (memory.shape, memory.dtype) != (value.shape, value.dtype):
        memory = torch.empty(value.shape, dtype=value.dtype)
    return memory.copy_(value.detach())  # reused memory: several times faster than new pages


def _from_main(accelerator, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Sends the main process's tensors to all processes, one by one."""
    if accelerator.num_processes == 1:
        yield from tensors.items()
        return
    kinds = [[(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]]
    broadcast_object_list(kinds)
    for name, shape, dtype in kinds[0]:
        if accelerator.is_main_process:
            tensor = tensors[name].to(accelerator.device)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=accelerator.device)
        yield name, broadcast(tensor)


def _laid_out_as(parameter, value: torch.Tensor) -> torch.Tensor:
    """This process's shard of `value` if it has the shape of a sharded parameter, else `value`."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    # no source rank: every process has the whole value already
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
