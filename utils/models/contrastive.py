"""The contrastive loss, with the passages of every process as negatives; embeddings of large batches in chunks."""

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
    evidence_weights: torch.Tensor | None = None,
    is_distribution: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed InfoNCE over this process's queries (van den Oord et al., 2018, arXiv:1807.03748), and how many are right.

    A query's positives are its evidence among the passages of all processes. Each is compared with all passages that
    are none of its evidence, and a query's loss is the mean over its positives by their weights. A passage that several
    processes hold counts once.

    Args:
        queries: (queries, hidden).
        passages: (passages, hidden), at least one of each query's evidence among those of all processes.
        passage_keys: (passages,) int64, a number for each different passage of the data set; -2 for padding.
        evidence_keys: (queries, most evidence) int64, the keys of each query's evidence, padded with -1. A query whose
            row holds only -1 counts for nothing.
        temperature: divides the similarities.
        evidence_weights: (queries, most evidence), 0 or more, of each positive; None: all equal.
        is_distribution: (queries,) whether a query's weights are a distribution for its similarities to match, in which
            passages of the evidence compete as well: perplexity distillation (Izacard et al., 2022, arXiv:2208.03299),
            the divergence from a teacher's distribution less that one's entropy; None: of none.
    """
    all_passages, _ = gather_with_gradient(passages)
    all_keys, _ = gather_with_gradient(passage_keys, fill=-2)
    with torch.autocast(queries.device.type, enabled=False):  # it would multiply in half precision
        similarities = queries.float() @ all_passages.float().T / temperature
    is_evidence = all_keys[None, :, None] == evidence_keys[:, None, :]
    weights = (is_evidence * (1.0 if evidence_weights is None else evidence_weights[:, None, :].float())).sum(-1)
    counted = _first_of_each(all_keys) & (all_keys != -2)
    weights = weights * counted
    weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    is_negative = counted & ~is_evidence.any(-1)
    # of finite size: a row without any negative must not give nan
    negatives = similarities.masked_fill(~is_negative, -1e9).logsumexp(1, keepdim=True)
    rivals = torch.logaddexp(negatives, similarities)
    if is_distribution is not None:
        everything = similarities.masked_fill(~counted, -1e9).logsumexp(1, keepdim=True)
        rivals = torch.where(is_distribution[:, None], everything, rivals)
    losses = (weights * (rivals - similarities)).sum(1)
    best = similarities.masked_fill(~(is_negative | (weights > 0)), float("-inf")).argmax(1, keepdim=True)
    right = (weights.gather(1, best)[:, 0] > 0) & (evidence_keys[:, 0] >= 0)
    return (losses * (evidence_keys[:, 0] >= 0)).sum(), right.sum()


def count_pairs(batch: dict) -> int:
    """Queries of a micro-batch that count; 0 of a dummy."""
    return int((batch["evidence_keys"][:, 0] >= 0).sum())


def _first_of_each(keys: torch.Tensor) -> torch.Tensor:
    """(passages,) true where a key has not come before."""
    _, inverse = keys.unique(return_inverse=True)
    places = torch.arange(len(keys), device=keys.device)
    first = torch.full_like(places, len(keys)).scatter_reduce(0, inverse, places, "amin")
    return first[inverse] == places


def embed(model, chunks: list[dict]) -> torch.Tensor:
    """(texts, hidden), in the order of the batch."""
    parts = [_forward(model, chunk) for chunk in chunks]
    return torch.cat(parts)[torch.cat([chunk["rows"] for chunk in chunks]).argsort()]


def embed_without_graph(model, chunks: list[dict]) -> tuple[torch.Tensor, list]:
    """The first half of gradient caching (Gao et al., 2021, arXiv:2101.06983); `backward_by_chunk` is the second.

    Returns the embeddings as a leaf, for a loss and its backward pass, and the random state before each chunk. Not
    within the autocast of `backward_by_chunk`, which would find weights in its cache that have no gradient.
    """
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_state(chunk["rows"].device))
            parts.append(_forward(model, chunk))
    embeddings = torch.cat(parts)[torch.cat([chunk["rows"] for chunk in chunks]).argsort()]
    return embeddings.requires_grad_(), states


def backward_by_chunk(model, chunks: list[dict], embeddings: torch.Tensor, states: list) -> None:
    """Adds to the gradients those of the loss that left `embeddings.grad`, with one chunk's graph in memory at a time.

    Dropout draws what it drew in `embed_without_graph`.
    """
    for chunk, state in zip(chunks, states, strict=True):
        _set_random_state(state)
        part = _forward(model, chunk)
        part.backward(embeddings.grad[chunk["rows"]].to(part.dtype))


def _forward(model, chunk: dict) -> torch.Tensor:
    return model({name: value for name, value in chunk.items() if name != "rows"})["sentence_embedding"]


def _random_state(device) -> tuple:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
