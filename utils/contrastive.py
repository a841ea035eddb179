"""The contrastive loss, with the passages of every process as negatives."""

import torch
import torch.distributed as dist


class _AllGather(torch.autograd.Function):
    """Rows of all processes, one below the other; each process gets back the gradient that all losses give its rows."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_gradient(rows: torch.Tensor, fill: float = 0) -> tuple[torch.Tensor, int]:
    """(rows, ...) of each process -> (rows of all processes, ...), and where this process's rows begin.

    Processes may hold different numbers of rows: shorter ones are padded with `fill`. The gradient is exact, that of
    one process which holds all rows, once the processes' gradients are summed.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows, 0
    longest = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    padding = rows.new_full((int(longest) - len(rows), *rows.shape[1:]), fill)
    return _AllGather.apply(torch.cat([rows, padding])), dist.get_rank() * int(longest)


def contrastive_loss(
    queries: torch.Tensor,
    passages: torch.Tensor,
    *,
    passage_keys: torch.Tensor,
    evidence_keys: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed InfoNCE over this process's queries (van den Oord et al., 2018, arXiv:1807.03748), and how many are right.

    Args:
        queries: (queries, hidden). Passage number i is the positive of query i; further passages are negatives.
        passages: (passages, hidden), passages >= queries; those of all other processes are negatives too.
        passage_keys: (passages,) int64, a number for each different passage of the data set.
        evidence_keys: (queries, most evidence) int64, the keys of each query's positives, padded with -1. Positives
            other than the one drawn are left out of a query's negatives. A query whose row holds only -1 counts for
            nothing.
        temperature: divides the similarities.
    """
    all_passages, start = gather_with_gradient(passages)
    all_keys, _ = gather_with_gradient(passage_keys, fill=-2)
    similarities = queries.float() @ all_passages.float().T / temperature
    positives = start + torch.arange(len(queries), device=queries.device)
    excluded = (all_keys[None, :, None] == evidence_keys[:, None, :]).any(-1) | (all_keys == -2)[None]
    excluded[torch.arange(len(queries)), positives] = False
    similarities = similarities.masked_fill(excluded, float("-inf"))
    counts = evidence_keys[:, 0] >= 0
    losses = torch.nn.functional.cross_entropy(similarities, positives, reduction="none")
    return (losses * counts).sum(), ((similarities.argmax(1) == positives) & counts).sum()
