"""The retriever's contrastive loss with negatives from all processes, and gradient caching for large batches."""

import torch
import torch.distributed as dist
from torch.utils.checkpoint import get_device_states, set_device_states

# ---- loss


def contrastive_loss(
    queries: torch.Tensor,
    passages: torch.Tensor,
    *,
    passage_keys: torch.Tensor,
    evidence_keys: torch.Tensor,
    temperature: float,
    evidence_weights: torch.Tensor | None = None,
    is_distribution: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed InfoNCE loss of this process's queries, and how many of them rank a positive first.

    The positives of a query are its evidence among the passages of all processes. Each positive is compared with all
    passages that are not evidence of this query. The loss of a query is the weighted mean over its positives. A passage
    that occurs several times counts once. InfoNCE: van den Oord et al., 2018, arXiv:1807.03748.

    Args:
        queries: (queries, hidden).
        passages: (passages, hidden). Each query needs at least one positive on some process.
        passage_keys: (passages,) int64, one number for each distinct passage of the data set; -2 for padding.
        evidence_keys: (queries, most evidence) int64, the keys of each query's evidence, padded with -1. A query with
            only -1 is a dummy and counts for nothing.
        temperature: divides the similarities.
        evidence_weights: (queries, most evidence), weights of the positives, 0 or more; None: all equal.
        is_distribution: (queries,) bool, True where the weights are a teacher's distribution over passages. The loss of
            such a query is the cross entropy with this distribution, in which positives compete with each other
            (perplexity distillation, Izacard et al., 2022, arXiv:2208.03299). None: no such query.
    """
    all_passages = _gather_with_gradient(passages)
    all_keys = _gather_with_gradient(passage_keys, fill=-2)
    with torch.autocast(queries.device.type, enabled=False):  # autocast would multiply in half precision
        similarities = queries.float() @ all_passages.float().T / temperature
    is_evidence = all_keys[None, :, None] == evidence_keys[:, None, :]
    weights = (is_evidence * (1.0 if evidence_weights is None else evidence_weights[:, None, :].float())).sum(-1)
    counted = _is_first(all_keys) & (all_keys != -2)
    weights = weights * counted
    weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    is_negative = counted & ~is_evidence.any(-1)
    # not -inf: a query without any negative must not give nan
    negatives = similarities.masked_fill(~is_negative, -1e9).logsumexp(1, keepdim=True)
    log_normalizers = torch.logaddexp(negatives, similarities)
    if is_distribution is not None:
        everything = similarities.masked_fill(~counted, -1e9).logsumexp(1, keepdim=True)
        log_normalizers = torch.where(is_distribution[:, None], everything, log_normalizers)
    losses = (weights * (log_normalizers - similarities)).sum(1)
    best = similarities.masked_fill(~(is_negative | (weights > 0)), float("-inf")).argmax(1, keepdim=True)
    right = (weights.gather(1, best)[:, 0] > 0) & (evidence_keys[:, 0] >= 0)
    return (losses * (evidence_keys[:, 0] >= 0)).sum(), right.sum()


def count_pairs(batch: dict) -> int:
    """Number of queries of a micro-batch that are not dummies."""
    return int((batch["evidence_keys"][:, 0] >= 0).sum())


def _is_first(keys: torch.Tensor) -> torch.Tensor:
    """(passages,) bool, True at the first occurrence of each key."""
    _, inverse = keys.unique(return_inverse=True)
    places = torch.arange(len(keys), device=keys.device)
    first = torch.full_like(places, len(keys)).scatter_reduce(0, inverse, places, "amin")
    return first[inverse] == places


def _gather_with_gradient(rows: torch.Tensor, fill: float = 0) -> torch.Tensor:
    """(rows, ...) of each process -> (rows of all processes, ...), in the order of the processes.

    Processes may hold different numbers of rows: shorter ones are padded with `fill`. The sum of the processes'
    gradients is that of one process which holds all rows.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    longest = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    padding = rows.new_full((int(longest) - len(rows), *rows.shape[1:]), fill)
    return _AllGather.apply(torch.cat([rows, padding]))


class _AllGather(torch.autograd.Function):
    """Concatenates equally many rows of each process. Backward, the gradients of all processes' losses are added."""

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


# ---- embeddings in chunks, and gradient caching (Gao et al., 2021, arXiv:2101.06983)


def embed(model, chunks: list[dict]) -> torch.Tensor:
    """Embeddings (texts, hidden) of the chunks that `in_chunks` made, in the order of the batch."""
    return _in_batch_order([_forward(model, chunk) for chunk in chunks], chunks)


def embed_without_graph(model, chunks: list[dict]) -> tuple[torch.Tensor, list]:
    """First half of gradient caching: embeddings as a leaf tensor, and the random state before each chunk.

    Compute the loss on these embeddings, run its backward pass, then call `backward_by_chunk`. The two must not share
    an autocast context: autocast would reuse the cast weights of this pass, which have no gradient.
    """
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append((torch.get_rng_state(), *get_device_states(chunk["rows"])))
            parts.append(_forward(model, chunk))
    return _in_batch_order(parts, chunks).requires_grad_(), states


def backward_by_chunk(model, chunks: list[dict], embeddings: torch.Tensor, states: list) -> None:
    """Second half of gradient caching: adds the loss's gradients, with the graph of one chunk in memory at a time.

    `embeddings.grad` holds the gradient of the loss. Dropout masks are those of `embed_without_graph`.
    """
    for chunk, (cpu_state, devices, device_states) in zip(chunks, states, strict=True):
        torch.set_rng_state(cpu_state)
        set_device_states(devices, device_states)
        part = _forward(model, chunk)
        part.backward(embeddings.grad[chunk["rows"]].to(part.dtype))


def _forward(model, chunk: dict) -> torch.Tensor:
    return model({name: value for name, value in chunk.items() if name != "rows"})["sentence_embedding"]


def _in_batch_order(parts: list[torch.Tensor], chunks: list[dict]) -> torch.Tensor:
    return torch.cat(parts)[torch.cat([chunk["rows"] for chunk in chunks]).argsort()]
