"""The optimizer step on one or several processes: seeds, averaged gradients, and checks."""

import contextlib
import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import DistributedType, ProfileKwargs, gather_object

from utils.errors import Diverged
from utils.processes import add_up
from utils.training.memory import is_out_of_memory


def seed_step(seed: int, step: int, process: int) -> None:
    """Seeds all generators by (seed, step, process), so that dropout in a step does not depend on what ran before."""
    mixed = int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint32)[0])
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(mixed)


def profiler(accelerator, args, run_folder: Path):
    """With `--profile`, `accelerator.profile()` over five steps, which writes a trace to `run_folder/profile`."""
    if not args.profile:
        return nullcontext()
    activities = ["cpu", "cuda"] if accelerator.device.type == "cuda" else ["cpu"]
    schedule = {"wait": 1, "warmup": 1, "active": 3, "repeat": 1}
    return accelerator.profile(
        ProfileKwargs(activities=activities, schedule_option=schedule, output_trace_dir=str(run_folder / "profile"))
    )


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW: biases and norms (parameters of one dimension) have no weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def is_sharded(accelerator) -> bool:
    """Whether FSDP shards the gradients. Otherwise (one process, DDP) each process holds all of them."""
    return accelerator.distributed_type == DistributedType.FSDP


def any_process(accelerator, condition: bool) -> bool:
    """Whether the condition holds on any process."""
    return condition if accelerator.num_processes == 1 else add_up([condition])[0] > 0


def check_weight_norm(accelerator, model) -> None:
    """Raises Diverged if the norms of the processes' weights differ by more than 1e-6 relative.

    Averaged gradients are equal on all processes even where the weights are not.
    """
    if accelerator.num_processes == 1 or is_sharded(accelerator):
        return
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    norms = torch._foreach_norm(trained)
    norm = torch.stack(norms).double().norm()[None]
    values = accelerator.gather(norm.to(accelerator.device)).tolist()
    if not max(values) - min(values) <= 1e-6 * max(values) and all(map(np.isfinite, values)):
        raise Diverged(f"the processes disagree on the norm of the weights: {values}")


def check_loss_scale(accelerator, args) -> None:
    """Raises Diverged if the loss scale of fp16 is below `--min_loss_scale`."""
    if accelerator.scaler and accelerator.scaler.get_scale() < args.min_loss_scale:
        raise Diverged(f"the loss scale fell under --min_loss_scale {args.min_loss_scale}")


@contextlib.contextmanager
def together(accelerator):
    """A context that raises OutOfMemoryError on every process if memory ran out on any of them.

    All processes leave it together, so that none waits for another in a later exchange.
    """
    error = None
    try:
        yield
    except (RuntimeError, MemoryError) as caught:
        if not is_out_of_memory(caught) or is_sharded(accelerator):  # whose processes exchange parameters all the time
            raise
        error = caught
    if any_process(accelerator, error is not None):
        raise torch.OutOfMemoryError("memory ran out on this process or another") from error


class NanDetector:
    """A context that finds the first module whose output is not finite in a forward pass.

    If all outputs are finite, it finds the first parameter whose gradient is not. `culprit` says what was found.
    """

    def __init__(self, accelerator, model):
        self.accelerator, self.model, self.module = accelerator, accelerator.unwrap_model(model), None

    def __enter__(self):
        # compiled layers would not call the hooks
        is_compiled = any(getattr(module, "_compiled_call_impl", None) for module in self.model.modules())
        self.stance = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
        self.stance.__enter__()
        self.hooks = [module.register_forward_hook(self._look(name)) for name, module in self.model.named_modules()]
        return self

    def __exit__(self, *error):
        self.stance.__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def _look(self, name: str):
        def hook(module, inputs, output):
            tensors = output if isinstance(output, tuple) else (output,)
            if not self.module and any(torch.is_tensor(t) and not torch.isfinite(t).all() for t in tensors):
                self.module = f"the output of {name or 'the model'} ({type(module).__name__}) is not finite"

        return hook

    @property
    def culprit(self) -> str:
        for name, parameter in self.model.named_parameters():
            if not self.module and parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                self.module = f"the gradient of {name} is not finite"
        found = gather_object([self.module]) if self.accelerator.num_processes > 1 else [self.module]
        return next((module for module in found if module), "not seen again")
