"""The retriever's contrastive loss with negatives from all processes, and gradient caching for large batches."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.nn.functional import normalize, pad
from torch.utils.checkpoint import get_device_states, set_device_states

from utils.processes import gather_padded, is_alone

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
    is_excluded: torch.Tensor | None = None,
    matryoshka_dims: Sequence[int] = (),
    is_unit: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed InfoNCE loss of this process's queries, and how many of them rank a positive first.

    The positives of a query are its evidence among the passages of all processes. Each positive is compared with all
    passages that are not evidence of this query. The loss of a query is the weighted mean over its positives. A passage
    that occurs several times counts once. InfoNCE: van den Oord et al., 2018, arXiv:1807.03748.

    Args:
        queries: (queries, hidden).
        passages: (passages, hidden), those of all processes (see `gather_passages`), with a positive of each query.
        passage_keys: (passages,) int64, one number for each distinct passage of the data set; -2 for padding.
        evidence_keys: (queries, most evidence) int64, the keys of each query's evidence, padded with -1. A query with
            only -1 is a dummy and counts for nothing.
        temperature: divides the similarities.
        evidence_weights: (queries, most evidence), weights of the positives, 0 or more; None: all equal.
        is_distribution: (queries,) bool, True where the weights are a teacher's distribution over passages. The loss of
            such a query is the cross entropy with this distribution, in which positives compete with each other
            (perplexity distillation, Izacard et al., 2022, arXiv:2208.03299). None: no such query.
        is_excluded: (queries, passages) bool, True where a passage is no negative of a query. None: nowhere.
        matryoshka_dims: the loss is the mean over embeddings cut to each of these sizes, the largest first (Kusupati
            et al., 2022, arXiv:2205.13147). None given: whole embeddings.
        is_unit: whether embeddings that were cut get unit length again, as cosine similarity wants it.
    """
    cuts = [(queries.float(), passages.float())]
    if matryoshka_dims:
        cuts = [tuple(side[:, :size] for side in cuts[0]) for size in matryoshka_dims]
        cuts = [tuple(map(normalize, sides)) for sides in cuts] if is_unit else cuts
    with torch.autocast(queries.device.type, enabled=False):  # autocast would multiply in half precision
        similarities = torch.stack([of_queries @ of_passages.T / temperature for of_queries, of_passages in cuts])
    weights = torch.zeros_like(similarities[0])
    is_evidence = torch.zeros_like(similarities[0], dtype=torch.bool)
    for column, keys in enumerate(evidence_keys.T):  # one at a time: memory does not grow with the evidence
        found = keys[:, None] == passage_keys
        is_evidence |= found
        weights += found * (1.0 if evidence_weights is None else evidence_weights[:, column, None].float())
    counted = _is_first(passage_keys) & (passage_keys != -2)
    weights = weights * counted
    weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    if is_excluded is not None:
        counted = counted & (~is_excluded | (weights > 0))
    is_negative = counted & ~is_evidence
    # not -inf: a query without any negative must not give nan
    negatives = similarities.masked_fill(~is_negative, -1e9).logsumexp(2, keepdim=True)
    log_normalizers = torch.logaddexp(negatives, similarities)
    if is_distribution is not None:
        everything = similarities.masked_fill(~counted, -1e9).logsumexp(2, keepdim=True)
        log_normalizers = torch.where(is_distribution[:, None], everything, log_normalizers)
    losses = (weights * (log_normalizers - similarities)).sum(2).mean(0)
    best = similarities[0].masked_fill(~(is_negative | (weights > 0)), float("-inf")).argmax(1, keepdim=True)
    right = (weights.gather(1, best)[:, 0] > 0) & (evidence_keys[:, 0] >= 0)
    return (losses * (evidence_keys[:, 0] >= 0)).sum(), right.sum()


def count_pairs(batch: dict) -> int:
    """Number of queries of a micro-batch that are not dummies."""
    return int((batch["evidence_keys"][:, 0] >= 0).sum())


def _is_first(keys: torch.Tensor) -> torch.Tensor:
    """(passages,) bool, True at the first occurrence of each key. Not by `unique`, for which the host waits."""
    in_order, places = keys.sort(stable=True)
    is_new = torch.ones_like(keys, dtype=torch.bool)
    is_new[1:] = in_order[1:] != in_order[:-1]
    return torch.empty_like(is_new).index_copy(0, places, is_new)


# ---- passages of all processes


def gather_keys(keys: torch.Tensor) -> torch.Tensor:
    """The keys (rows,) of the passages of all processes, in their order; in the host's memory, as `keys` are.

    Processes may hold different numbers of passages: their keys are padded with -2.
    """
    return gather_padded(keys, -2).flatten()


def gather_passages(passages: torch.Tensor, rows: int) -> torch.Tensor:
    """The passages of all processes, (rows, hidden), in the order of the processes, without a graph.

    `rows` is the number of keys that `gather_keys` gave: passages are padded with zeros as their keys are. The result
    is a leaf tensor; `own_gradient` turns its gradient into that of this process's passages.
    """
    passages = passages.detach()
    if is_alone():
        return passages.requires_grad_()
    passages = pad(passages, (0, 0, 0, rows // dist.get_world_size() - len(passages)))
    parts = [torch.empty_like(passages) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, passages.contiguous())
    return torch.cat(parts).requires_grad_()


def own_gradient(gradient: torch.Tensor, count: int) -> torch.Tensor:
    """The gradient of this process's `count` passages, summed over the losses of all processes."""
    if is_alone():
        return gradient
    gradient = gradient.contiguous()
    dist.all_reduce(gradient)
    return gradient.chunk(dist.get_world_size())[dist.get_rank()][:count]


# ---- embeddings in chunks, and gradient caching (Gao et al., 2021, arXiv:2101.06983)


def as_many_on_all(chunks: list[dict]) -> list[dict]:
    """The chunks, and the last one again without `rows` until each process has equally many.

    The processes that share a sharded model must run it equally often.
    """
    most = int(gather_padded(torch.tensor([len(chunks)]), padding=0).max())
    again = {**chunks[-1], "rows": chunks[-1]["rows"][:0]}  # nothing of it is used: its gradient is zero
    return chunks + [again] * (most - len(chunks))


def embed(model, chunks: list[dict]) -> torch.Tensor:
    """Embeddings (texts, hidden) of the chunks that `in_chunks` made, in the order of the batch."""
    return _in_batch_order([_forward(model, chunk) for chunk in chunks], chunks)


def embed_without_graph(model, chunks: list[dict]) -> tuple[torch.Tensor, list]:
    """First half of gradient caching: embeddings, and the random state before each chunk.

    Compute the gradient of the loss with respect to the embeddings, then call `backward_by_chunk`. The two must not
    share an autocast context: autocast would reuse the cast weights of this pass, which have no gradient.
    """
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append((torch.get_rng_state(), *get_device_states(chunk["rows"])))
            parts.append(_forward(model, chunk))
    return _in_batch_order(parts, chunks), states


def backward_by_chunk(model, chunks: list[dict], gradient: torch.Tensor, states: list) -> None:
    """Second half of gradient caching: adds the loss's gradients, with the graph of one chunk in memory at a time.

    `gradient` (texts, hidden) is that of the embeddings. Dropout masks are those of `embed_without_graph`.
    """
    for chunk, (cpu_state, devices, device_states) in zip(chunks, states, strict=True):
        torch.set_rng_state(cpu_state)
        set_device_states(devices, device_states)
        part = _forward(model, chunk)
        part.backward(gradient[chunk["rows"]].to(part.dtype))


def _forward(model, chunk: dict) -> torch.Tensor:
    embeddings = model({name: value for name, value in chunk.items() if name != "rows"})["sentence_embedding"]
    return embeddings[: len(chunk["rows"])]


def _in_batch_order(parts: list[torch.Tensor], chunks: list[dict]) -> torch.Tensor:
    return torch.cat(parts)[torch.cat([chunk["rows"] for chunk in chunks]).argsort()]
