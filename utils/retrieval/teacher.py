"""A trained summarizer as teacher: how likely each passage makes the reference."""

import numpy as np
import torch
from accelerate.utils import gather_object

from utils.models.encoder_decoder import Summarizer, load_model_and_tokenizer
from utils.models.settings import saved_arguments
from utils.models.sources import Sources, collate


@torch.no_grad()
def passage_likelihoods(folder, examples, candidates, accelerator, *, batch_size: int = 16) -> list[np.ndarray]:
    """How likely a trained summarizer finds each example's references, given its query and each candidate alone.

    For each example (candidates,) the mean log-likelihood in nats of a reference's token, and of that the mean over
    the references; a candidate is a passage number, or a list of them that are read together. The work is divided over
    the processes, the result on all of them.
    """
    pretrained, tokenizer = load_model_and_tokenizer(folder, name="--teacher")
    summarizer = Summarizer(pretrained).to(accelerator.device).eval()
    saved = saved_arguments(folder)
    sources = Sources(tokenizer, "concat", saved.get("max_source_length", 512), "rank")
    rows = []  # example, candidate, source, target
    for number, (example, passages) in enumerate(zip(examples, candidates, strict=True)):
        targets = tokenizer(text_target=example.summaries, truncation=True,
                            max_length=saved.get("max_target_length", 128))["input_ids"]  # fmt: skip
        for place, passage in enumerate(passages):
            numbers = passage if isinstance(passage, list) else [passage]
            source = sources.build(example.query, example.document, numbers)[0]
            rows += [(number, place, source, target) for target in targets]
    rows.sort(key=lambda row: (-len(row[2][0]), -len(row[3])))
    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    found = []
    for batch in batches[accelerator.process_index :: accelerator.num_processes]:
        inputs = collate([row[2] for row in batch], [row[3] for row in batch], tokenizer.pad_token_id)
        labels = inputs["labels"].to(accelerator.device)
        with accelerator.autocast():
            logits = summarizer(**inputs.to(accelerator.device))
        real = labels != -100
        tokens = torch.zeros(labels.shape, device=labels.device)
        log_probabilities = logits.log_softmax(-1, dtype=torch.float32)
        tokens[real] = log_probabilities.gather(1, labels[real][:, None])[:, 0]
        means = (tokens.sum(1) / real.sum(1)).tolist()
        found += [(number, place, mean) for (number, place, _, _), mean in zip(batch, means, strict=True)]
    if accelerator.num_processes > 1:
        found = gather_object(found)
    totals = [np.zeros(len(passages)) for passages in candidates]
    for number, place, mean in sorted(found):
        totals[number][place] += mean / len(examples[number].summaries)
    return totals
