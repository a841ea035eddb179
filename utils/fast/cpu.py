"""Faster linear layers and dropout on CPUs.

* Float32 matrix products use oneDNN. PyTorch uses MKL, which ignores AVX-512 on processors that are not Intel's and
  takes twice as long there. On Intel's, MKL stays, because its backward pass is faster.
* In bfloat16, weights that do not change are brought into oneDNN's layout once, not for each product.
* Dropout draws 16 random bits for each element, where PyTorch draws a whole random number.

Leans on these internals of PyTorch: `torch.ops.mkldnn._linear_pointwise`, `_reorder_linear_weight` and
`_is_mkldnn_bf16_supported`; that an `nn.Linear` or `nn.Dropout` may change its class; and that a `TorchFunctionMode`
sees calls of `nn.functional.dropout`. An operation that is not there, or does something else, is not used.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from utils.fast.internals import in_one_line, warn, works

PLAIN = "matrix products on a CPU are PyTorch's own"
PLAIN_BFLOAT16 = "in bfloat16 on a CPU, weights are laid out for each product"


def _onednn(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _sample(dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, weight and bias of a tiny linear layer, whose product is exact."""
    return tuple(torch.arange(1, n + 1, dtype=dtype).view(shape) for n, shape in ((2, (1, 2)), (6, (3, 2)), (3, 3)))


def _has_onednn() -> bool:
    x, weight, bias = _sample(torch.float32)
    expected = nn.functional.linear(x, weight, bias)
    return torch.backends.mkldnn.is_available() and works(
        "torch.ops.mkldnn._linear_pointwise", lambda: _onednn(x, weight, bias), expected, PLAIN
    )


def _has_bfloat16() -> bool:
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
    except Exception as error:  # operations raise errors of many kinds
        warn(f"torch.ops.mkldnn._is_mkldnn_bf16_supported: {in_one_line(error)}", PLAIN_BFLOAT16)
        return False
    x, weight, bias = _sample(torch.bfloat16)
    return works(
        "torch.ops.mkldnn._reorder_linear_weight",
        lambda: _onednn(x, torch.ops.mkldnn._reorder_linear_weight(weight), bias),
        nn.functional.linear(x, weight, bias), PLAIN_BFLOAT16,
    )  # fmt: skip


IS_AVAILABLE = _has_onednn()
HAS_BFLOAT16 = IS_AVAILABLE and _has_bfloat16()
CPUINFO = Path("/proc/cpuinfo")
IS_FASTER = not (torch.backends.mkl.is_available() and CPUINFO.exists() and "GenuineIntel" in CPUINFO.read_text())
FEWEST = 2**21  # multiplications in a product; with fewer, the call costs more than it saves
ROWS_AT_ONCE = 1024  # most rows that are transposed at a time, to fit the cache


def use_fast_layers(model: nn.Module) -> None:
    """Replaces the class of the model's linear and dropout layers by the ones here; saving and loading stay the same.

    A layer computes as before wherever the fast way is impossible or slower.
    """
    for module in model.modules():
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]


# ---- matrix products


class Linear(nn.Linear):
    laid_out = None  # bfloat16 weight and bias, within `laid_out_weights`

    def forward(self, x):
        weight, bias = self.weight, self.bias
        if self.laid_out and torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled():
            return _onednn(x.to(torch.bfloat16), *self.laid_out)
        if not _suits_onednn(x, weight):
            return nn.functional.linear(x, weight, bias)
        return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _onednn(x, weight, bias)


@contextmanager
def laid_out_weights(model: nn.Module):
    """Speeds up inference under bfloat16 autocast on a CPU: weights of linear layers are cast and laid out once.

    The weights must not change within it. It takes no more memory than autocast's own cache.
    """
    layers = []
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16 and HAS_BFLOAT16:
        layers = [module for module in model.modules() if type(module) is Linear and _is_plain(module.weight,
                  (torch.float32, torch.bfloat16))]  # fmt: skip
    try:
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(torch.bfloat16))
            layer.laid_out = weight, None if layer.bias is None else layer.bias.detach().to(torch.bfloat16)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("laid_out", None)


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` of two matrices, without gradients."""
    return _onednn(a, b.T) if _suits_onednn(a, b.T) else a @ b


def _suits_onednn(x, weight) -> bool:
    """Whether oneDNN can compute ``x @ weight.T``, and faster than PyTorch."""
    return (
        IS_AVAILABLE
        and IS_FASTER
        and _is_plain(x)  # first, so that what is compiled for a GPU does not depend on the size
        and _is_plain(weight)
        and x.numel() * len(weight) >= FEWEST
        and x.shape[-1] == weight.shape[-1]  # else PyTorch raises the error
        and not torch.is_autocast_enabled("cpu")
    )


def _is_plain(x, dtypes=(torch.float32,)) -> bool:
    """Whether it is a tensor of these types on a CPU, and neither sharded nor of another subclass."""
    return type(x) in (torch.Tensor, nn.Parameter) and x.dtype in dtypes and x.device.type == "cpu"


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_x = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = _onednn(gradient, weight.T)
        if ctx.needs_input_grad[1]:
            x = x.reshape(-1, x.shape[-1])
            for part, inputs in zip(rows.split(ROWS_AT_ONCE), x.split(ROWS_AT_ONCE), strict=True):
                product = _onednn(part.T, inputs.T)
                for_weight = product if for_weight is None else for_weight.add_(product)
        if ctx.needs_input_grad[2]:
            for_bias = rows.sum(0)
        return for_x, for_weight, for_bias


# ---- dropout


def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """`nn.functional.dropout` with the probability rounded to a multiple of 1 / 65,536, and scaled accordingly."""
    dropped = round(p * 2**16)
    is_ours = training and not inplace and type(x) is torch.Tensor and x.device.type == "cpu"
    if not is_ours or not 0 < dropped < 2**16:
        return nn.functional.dropout(x, p, training, inplace)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = bits[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


class Dropout(nn.Dropout):
    def forward(self, x):
        return dropout(x, self.p, self.training, self.inplace)


class FunctionalDropout(TorchFunctionMode):
    """Within it, `nn.functional.dropout`, which BART-like models call, is `dropout`.

    With activation checkpointing it must be active in the recomputed forward pass too.
    """

    active = 0  # how many contexts are

    def __enter__(self):
        FunctionalDropout.active += 1
        return super().__enter__()

    def __exit__(self, *error):
        FunctionalDropout.active -= 1
        return super().__exit__(*error)

    def __torch_function__(self, function, types, arguments=(), options=None):
        return (dropout if function is nn.functional.dropout else function)(*arguments, **(options or {}))


FAST = {nn.Linear: Linear, nn.Dropout: Dropout}
