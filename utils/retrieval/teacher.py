"""The retriever's teachers: a summarizer, by how likely each passage makes the reference, or a reranker."""

import numpy as np
import torch
from accelerate.utils import gather_object

from utils.models.cross_encoder import load_reranker
from utils.models.languages import set_languages
from utils.models.settings import place, saved_settings
from utils.models.sources import collate
from utils.models.summarizer import check_positions, load_model_and_tokenizer, sources_for, wrap
from utils.processes import wait_for_all
from utils.progress import progress
from utils.retrieval.ranking import RANKED_AT_ONCE
from utils.retrieval.reranking import scorer


def passage_scores(
    folder, examples, candidates, accelerator, *, trust_remote_code: bool = False
) -> list[np.ndarray]:  # fmt: skip
    """The scores (logits) of a reranker for each example's query with each of its candidates, passage numbers.

    A retriever that learns their softmax is distilled from the reranker (Hofstaetter et al., 2020, arXiv:2010.02666,
    with the KL divergence in place of margins). The processes share the work, and all get the result.
    """
    reranker = place(load_reranker(folder, "--teacher", trust_remote_code=trust_remote_code), accelerator)
    score, found = scorer(reranker, accelerator=accelerator), []
    starts = range(0, len(examples), RANKED_AT_ONCE)
    for first in progress(starts, "labelled", "examples", total=len(examples), size=lambda _: RANKED_AT_ONCE):
        part = slice(first, first + RANKED_AT_ONCE)
        block = list(zip(examples[part], candidates[part], strict=True))
        pairs = [(example.query, example.document.passages[number]) for example, numbers in block for number in numbers]
        ends = np.cumsum([len(numbers) for _, numbers in block])
        found += np.split(score(pairs).astype(np.float64), ends[:-1])
    return found


@torch.no_grad()
def passage_likelihoods(
    folder, examples, candidates, accelerator, *, batch_size: int = 16, trust_remote_code: bool = False
) -> list[np.ndarray]:
    """How likely a trained summarizer finds each example's references, given the query and one candidate.

    A candidate is a passage number, or a list of passage numbers that are read together. Returns for each example
    (candidates,) mean log-likelihoods of a reference token, in nats, averaged over the references. The processes share
    the work, and all get the result.
    """
    pretrained, tokenizer = load_model_and_tokenizer(folder, name="--teacher", trust_remote_code=trust_remote_code)
    saved = saved_settings(folder)
    set_languages(pretrained, tokenizer, saved.get("source_lang"), saved.get("target_lang"), folder)
    summarizer = place(wrap(pretrained), accelerator).eval()
    settings = {"max_source_length": 512, "source_prefix": None, "prompt_template": None}
    settings |= {name: value for name, value in saved.items() if name in settings}
    max_target_length = saved.get("max_target_length", 128)
    if not pretrained.config.is_encoder_decoder:
        check_positions(pretrained, settings["max_source_length"], max_target_length)
    sources = sources_for(summarizer, tokenizer, {**settings, "fusion": "concat", "passage_order": "rank"})
    rows = []  # (example, candidate, source, targets)
    for number, (example, passages) in enumerate(zip(examples, candidates, strict=True)):
        targets = sources.tokenize_targets(example.summaries, max_target_length)
        for candidate, passage in enumerate(passages):
            numbers = passage if isinstance(passage, list) else [passage]
            source = sources.build(example.query, example.document, numbers)[0]
            rows.append((number, candidate, source, targets))
    rows.sort(key=lambda row: (-len(row[2][0]), -max(map(len, row[3]))))  # similar lengths together: less padding
    reads_once = not pretrained.config.is_encoder_decoder and summarizer.is_packed
    if not reads_once:
        rows = [(*row[:3], [target]) for row in rows for target in row[3]]
    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    found = []
    process, processes = accelerator.process_index, accelerator.num_processes
    of_all = {"total": len(rows), "size": lambda batch: len(batch) * processes}
    for batch in progress(batches[process::processes], "scored", "passages with the teacher", **of_all):
        with accelerator.autocast():
            if reads_once:
                likelihoods = summarizer.log_likelihoods([row[2][0] for row in batch], [row[3] for row in batch])
            else:
                inputs = collate([row[2] for row in batch], [row[3][0] for row in batch], tokenizer.pad_token_id)
                likelihoods = _log_likelihoods(summarizer, inputs.to(accelerator.device))
        found += [
            (number, candidate, likelihood)
            for (number, candidate, *_), of_row in zip(batch, likelihoods, strict=True)
            for likelihood in of_row
        ]
    totals = [np.zeros(len(passages)) for passages in candidates]
    wait_for_all()
    # sorted, because the order of the sum must not depend on the number of processes
    for number, candidate, likelihood in sorted(gather_object(found)):
        totals[number][candidate] += likelihood / len(examples[number].summaries)
    return totals


def _log_likelihoods(summarizer, inputs) -> list[list[float]]:
    """Mean log-likelihood of a token of the one target of each source of a batch."""
    real = inputs["labels"] != -100
    log_probabilities = summarizer(**inputs).log_softmax(-1, dtype=torch.float32)
    tokens = torch.zeros(real.shape, device=real.device)
    tokens[real] = log_probabilities.gather(1, inputs["labels"][real][:, None])[:, 0]
    return (tokens.sum(1) / real.sum(1))[:, None].tolist()
