"""Label-smoothed cross entropy, from logits or from hidden states without storing all logits."""

import torch

from utils.fast.cpu import Linear, multiply


def label_smoothed_loss(logits, targets, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross entropy with and without label smoothing, in nats; logits (tokens, vocabulary).

    The share `smoothing` is spread over the whole vocabulary (Szegedy et al., 2016, arXiv:1512.00567).
    """
    log_probabilities = logits.log_softmax(-1, dtype=torch.float32)
    nll = -log_probabilities.gather(1, targets[:, None]).sum()
    uniform = -log_probabilities.mean(-1).sum()
    return (1 - smoothing) * nll + smoothing * uniform, nll.detach()


def has_own_logits(model) -> bool:
    """Whether a model computes logits otherwise than `vocabulary_loss` does.

    Its linear layers are those of `use_fast_layers`.
    """
    head, scaled = model.get_output_embeddings(), ("final_logit_softcapping", "logits_scaling", "logit_scale")
    configs = [module.config for module in model.modules() if hasattr(module, "config")]  # of encoder and decoder
    is_scaled = any(getattr(config, name, None) for config in configs for name in scaled)
    return is_scaled or type(head) is not Linear or head.bias is not None


def vocabulary_loss(hidden, targets, smoothing: float, weight, bias=None) -> tuple[torch.Tensor, torch.Tensor]:
    """`label_smoothed_loss` of the logits ``hidden @ weight.T + bias``, of which only a chunk exists at any time.

    The forward pass computes the gradients too, chunk by chunk, so that logits are computed once and never stored (Hsu
    et al., 2024, arXiv:2410.10989). hidden (tokens, width), weight (vocabulary, width), bias (1, vocabulary).
    """
    # needs_input_grad is True under no_grad too, and within the function gradients are always off: hence the argument
    return _VocabularyLoss.apply(hidden, targets, smoothing, weight, bias, torch.is_grad_enabled())


class _VocabularyLoss(torch.autograd.Function):
    CHUNK = 2**25  # most logits in a chunk

    @staticmethod
    def forward(ctx, hidden, targets, smoothing, weight, bias, with_gradient):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        low_hidden, low_weight = hidden.to(dtype), weight.to(dtype)
        nll, uniform = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if with_gradient else None
        is_trained = with_gradient and ctx.needs_input_grad[3]
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if is_trained else None
        scale = 2**10 if dtype == torch.float16 else 1  # in float16 small gradients would become 0
        shrink = 2**-8 if scale > 1 else 1  # and sums over many tokens would overflow
        size = max(1, _VocabularyLoss.CHUNK // len(weight))
        for start in range(0, len(hidden), size):
            rows, labels = low_hidden[start : start + size], targets[start : start + size]
            logits = multiply(rows, low_weight.T)
            if bias is not None:
                logits = logits + bias
            log_probabilities = logits.log_softmax(-1, dtype=torch.float32)
            nll -= log_probabilities.gather(1, labels[:, None]).sum()
            uniform -= log_probabilities.mean(-1).sum()
            if with_gradient:
                gradient = log_probabilities.exp_().sub_(smoothing / len(weight))
                gradient[torch.arange(len(labels), device=labels.device), labels] -= 1 - smoothing
                gradient = gradient.mul_(scale).to(dtype) if scale > 1 else gradient.to(dtype)
                grad_hidden[start : start + size] = multiply(gradient, low_weight)
                if is_trained:
                    grad_weight += multiply(gradient.T, rows * shrink if scale > 1 else rows)
        if is_trained and scale > 1:
            grad_weight /= shrink
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.scale, ctx.dtypes = scale, (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(nll)
        return (1 - smoothing) * nll + smoothing * uniform, nll

    @staticmethod
    def backward(ctx, outer, _):
        for_hidden, for_weight = (
            None if gradient is None else (gradient * (outer / ctx.scale)).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return for_hidden, None, None, for_weight, None, None
