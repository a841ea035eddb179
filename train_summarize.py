"""Stage 2: trains the summarizer on retrieved passages.

    accelerate launch --config_file accelerate_configs/cpu.yaml train_summarize.py --retriever outputs/retrieve

Without data flags it trains a small BART from scratch on the embedded data set. `--retriever` says where passages come
from: bm25, lead, oracle, random, the run folder of train_retrieve.py, or a TREC run that any tool wrote. The run folder
then holds a model that Transformers loads, `metrics.jsonl` and `predictions.validation.jsonl` with the passages that
were read.
"""

from dataclasses import dataclass, fields

from utils.arguments import (
    DataArguments,
    GenerationArguments,
    TrainingArguments,
    UsageError,
    check_at_least,
    check_choice,
    flag,
    parse,
    saved_arguments,
)


@dataclass
class SummarizeArguments(GenerationArguments, TrainingArguments, DataArguments):
    """The summarizer."""

    output_dir: str = flag("outputs/summarize", "the run folder: arguments, metrics, predictions and the model")
    metric_for_best: str = flag("rougeL", "validation score that decides which checkpoint is best, and patience")
    model_name_or_path: str | None = flag(None, "an encoder-decoder checkpoint [a small BART from scratch]")
    retriever: str | None = flag(
        None,
        "where passages come from: bm25, lead, oracle, random, a retriever's folder, or a TREC run of all examples "
        "[the ranking that files of train_retrieve.py hold, else bm25]",
    )
    top_k: int = flag(5, "passages that the summarizer reads")
    fusion: str = flag("concat", "how it reads them: concat (one sequence) or fid (Fusion-in-Decoder)")
    passage_order: str = flag("document", "order of the passages in the source: document or rank")
    max_source_length: int = flag(512, "tokens of a source (concat) or of each passage with the query (fid)")
    dropout: float | None = flag(None, "dropout of the summarizer [a checkpoint's own; 0 from scratch]")
    max_target_length: int = flag(128, "tokens of a reference in training")
    label_smoothing_factor: float = flag(0.1, "share of the target probability spread over the vocabulary")

    def __post_init__(self):
        super().__post_init__()
        check_choice("--metric_for_best", self.metric_for_best, (
            "loss", "nll_loss", "ppl", "rouge1", "rouge2", "rougeL", "rougeLsum"))  # fmt: skip
        check_choice("--fusion", self.fusion, ("concat", "fid"))
        check_choice("--passage_order", self.passage_order, ("document", "rank"))
        self.check_generation()
        check_at_least(1, self, "top_k", "max_target_length")
        check_at_least(16, self, "max_source_length")
        check_at_least(0, self, "label_smoothing_factor", "dropout")
        if self.corpus_file:
            raise UsageError("--corpus_file is for train_retrieve.py, whose hand-over files hold what was found in it")


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a mistyped flag answer at once
    arguments = parse(SummarizeArguments, __doc__)

import itertools
import math
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch.profiler import record_function
from torch.utils.data import DataLoader
from transformers import get_scheduler

from utils.batching import StepBatches, eval_batches, plan_epoch
from utils.checkpoint import publish
from utils.data import load_splits
from utils.rows import write_jsonl
from utils.search import bm25_rankings, lead_ranking, oracle_ranking, random_ranking, retriever_rankings
from utils.state import Checkpoints, digest, schedule_steps, stop_reason
from utils.summarizer import (
    Sources,
    Summarizer,
    build_small_bart,
    collate,
    halves,
    load_model_and_tokenizer,
    save_pretrained,
)
from utils.tokenizer import train_tokenizer
from utils.training import (
    Interrupted,
    Meters,
    NanDetector,
    RunLog,
    Signals,
    any_process,
    average_gradients,
    check_grad_norm,
    check_loss_scale,
    check_weight_norm,
    end_run,
    give_back_memory,
    is_out_of_memory,
    is_sharded,
    local_gradients,
    parameter_groups,
    precision,
    profiler,
    run_script,
    score_table,
    seed_step,
    start,
)
from utils.trec import run_rankings

BASELINES = {"lead": lead_ranking, "oracle": oracle_ranking, "random": random_ranking}


def main():
    args = arguments

    # ------------------------------------------------------------------------------------------------------------------
    # set-up

    accelerator = Accelerator(
        mixed_precision=precision(args, is_pretrained=bool(args.model_name_or_path)), log_with=args.report_to,
        project_dir=args.output_dir,
        # every process holds the same buffers, and one that runs out of memory must not leave another in an exchange
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )  # fmt: skip
    run_folder = start(accelerator, args)
    log = RunLog(accelerator, run_folder, args.log_format)
    train, validation = load_splits(args, run_folder / "rejected.jsonl" if accelerator.is_main_process else None)

    # ------------------------------------------------------------------------------------------------------------------
    # model

    if args.model_name_or_path:
        pretrained, tokenizer = load_model_and_tokenizer(args.model_name_or_path, args.dropout)
    else:
        documents = {id(example.document): example.document for example in train}.values()
        texts = [text for document in documents for text in document.passages]
        texts += [text for example in train for text in (example.query, *example.summaries)]
        tokenizer = train_tokenizer(texts)
        pretrained = build_small_bart(tokenizer, dropout=args.dropout or 0.0)
    summarizer = Summarizer(pretrained)
    runs_twice = getattr(getattr(accelerator.state, "fsdp_plugin", None), "activation_checkpointing", False)
    if runs_twice or pretrained.config.hidden_size < 256:
        # layers that run again in the backward pass would not know the sequences; narrow ones are faster padded
        summarizer.is_packed = False
    parameters = sum(parameter.numel() for parameter in summarizer.parameters())
    log.say(
        f"{parameters:,} parameters on {accelerator.num_processes} process(es), "
        f"{accelerator.device}, mixed precision {accelerator.mixed_precision}"
    )

    # ------------------------------------------------------------------------------------------------------------------
    # sources: the query and the passages retrieved for it

    sources = Sources(tokenizer, args.fusion, args.max_source_length, args.passage_order)

    def rank(examples: list) -> list:
        if args.retriever is None and all(example.retrieved is not None for example in examples):
            return [example.retrieved for example in examples]
        if args.retriever in (None, "bm25"):
            return bm25_rankings(examples)
        if args.retriever in BASELINES:
            return [BASELINES[args.retriever](example) for example in examples]
        if from_run:
            return [from_run[id(example)] for example in examples]
        return retriever_rankings(
            examples, lambda texts, kind: encode(retriever, texts, kind, accelerator=accelerator),
            saved_arguments(args.retriever),
        )  # fmt: skip

    def read(examples: list) -> list[dict]:
        """Each example with its source and the numbers of the passages in it, and the sources of all of its hops."""
        rows = []
        sources.read(example.document for example in examples)
        for example, ranking in zip(examples, rank(examples), strict=True):
            earlier = [hop.retrieved for hop in example.hops[:-1]] if args.retriever is None else []
            of_hops = [
                sources.build(example.query, example.document, [passage for passage, _ in ranked[: args.top_k]])
                for ranked in (*earlier, ranking)
            ]
            source, passages = of_hops[-1]
            targets = tokenizer(text_target=example.summaries, truncation=True, max_length=args.max_target_length)
            rows.append({"example": example, "source": source, "passages": passages, "targets": targets["input_ids"],
                         "sources": [source for source, _ in of_hops]})  # fmt: skip
        return rows

    from_run = {}  # rankings by the example's identity
    needs_no_path = args.retriever in (None, "bm25", *BASELINES)
    if not needs_no_path and Path(args.retriever).is_file():
        both = train + validation  # in one call, which refuses ids that do not tell them apart
        from_run = dict(zip(map(id, both), run_rankings(args.retriever, both), strict=True))
    elif not needs_no_path:
        from utils.retriever import encode, load_retriever  # imports sentence-transformers, which takes seconds

        retriever = load_retriever(args.retriever).to(accelerator.device)
    train_rows, validation_rows = read(train), read(validation)
    retriever = None
    pairs = [(row["sources"], target) for row in train_rows for target in row["targets"]]  # one for each reference
    numbered = [(number, *pair) for number, pair in enumerate(pairs)]

    def collate_pairs(pairs: list, dummy: bool, epoch: int) -> dict:
        """A batch of sources, each of a hop that is drawn anew in each epoch: one summarizer serves all hops."""
        drawn = [
            of_hops[np.random.default_rng([args.seed, epoch, number]).integers(len(of_hops))]
            for number, of_hops, _ in pairs
        ]
        batch = collate(drawn, [target for *_, target in pairs], tokenizer.pad_token_id)
        if dummy:
            batch["labels"].fill_(-100)
        return batch

    # ------------------------------------------------------------------------------------------------------------------
    # batches, optimizer, schedule

    most_sequences = args.top_k if args.fusion == "fid" else 1
    lengths = [
        [most_sequences * max(len(sequence) for source in of_hops for sequence in source), len(target)]
        for of_hops, target in pairs
    ]

    def shape(epoch: int) -> dict:
        """All that decides, beside data, seed and epoch, which examples a step holds."""
        return {
            "num_processes": accelerator.num_processes,
            "gradient_accumulation_steps": args.accumulation(epoch),
            "batch_size": args.per_device_train_batch_size,
            "max_tokens": args.max_tokens,
            "by_length": epoch < args.curriculum_epochs,
        }

    def plan(epoch: int, without=(), **other_shape) -> list:
        steps = plan_epoch(
            lengths,
            seed=args.seed,
            epoch=0 if args.overfit_one_batch else epoch,
            without=without,
            **(other_shape or shape(epoch)),
        )
        return [steps[0]] * len(steps) if args.overfit_one_batch else steps

    max_steps = schedule_steps(args, plan)
    optimizer = torch.optim.AdamW(
        parameter_groups(summarizer, args.weight_decay),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
    # not prepared: it steps once for each optimizer step, at any number of processes
    warmup_steps = min(args.num_warmup_steps, max_steps // 10) if max_steps else args.num_warmup_steps
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, max_steps)
    model, optimizer = accelerator.prepare(summarizer, optimizer)
    signals = Signals()

    # ------------------------------------------------------------------------------------------------------------------
    # validation: loss, and ROUGE of what is generated beside that of two extracts, the lead and the oracle's

    words = [len(text.split()) for example in train for text in example.summaries]
    lead_words = sum(words) / len(words)
    extracts = {
        "lead": [first_words(example.document.passages, lead_words) for example in validation],
        "oracle": [
            " ".join(example.document.passages[passage] for passage, _ in oracle_ranking(example))
            for example in validation
        ],
    }
    baselines = {}
    generation = {field.name: getattr(args, field.name) for field in fields(GenerationArguments)}

    def validate() -> tuple[list[str], dict]:
        """Predictions, and scores beside those of the extracts, on all processes; Interrupted if a signal came."""
        from utils.metrics import Rouge  # imports `evaluate`, which takes seconds

        model.eval()
        batches = eval_batches([sum(map(len, row["source"])) for row in validation_rows],
                               batch_size=args.per_device_eval_batch_size)  # fmt: skip
        generated, sums = [], []
        for first in range(0, len(batches), accelerator.num_processes):
            signals.poll(accelerator)
            number = first + accelerator.process_index
            is_extra = number >= len(batches)
            if is_extra and not is_sharded(accelerator):
                continue
            number = min(number, len(batches) - 1)  # every process must run a sharded model equally often
            rows = [validation_rows[i] for i in batches[number]]
            batch = collate([row["source"] for row in rows], [row["targets"][0] for row in rows],
                            tokenizer.pad_token_id).to(accelerator.device)  # fmt: skip
            labels = batch["labels"]
            with torch.no_grad(), accelerator.autocast():
                loss, nll = summarizer(**batch, label_smoothing_factor=args.label_smoothing_factor)
                del batch["labels"]
                ids = summarizer.generate(**batch, **generation, do_sample=False)
            if is_extra:
                continue
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            generated += [(i, text.strip()) for i, text in zip(batches[number], texts, strict=True)]
            sums.append((number, loss.item(), nll.item(), (labels != -100).sum().item()))
        model.train()
        if accelerator.num_processes > 1:  # every process gets all, each example once
            generated, sums = gather_object(generated), gather_object(sums)

        predictions, scores = [text for _, text in sorted(generated)], [{}]
        if accelerator.is_main_process:
            rouge, references = Rouge(), [example.summaries for example in validation]
            for name, texts in extracts.items():
                if name not in baselines:
                    baselines[name] = rouge.compute(predictions=texts, references=references)
            # in the batches' order, so that the sum is the same at any number of processes
            loss, nll, tokens = (math.fsum(column) for column in list(zip(*sorted(sums), strict=True))[1:])
            nll /= tokens * math.log(2)
            scores = [{
                "loss": loss / tokens / math.log(2), "nll_loss": nll, "ppl": 2**nll,
                **rouge.compute(predictions=predictions, references=references), **baselines,
            }]  # fmt: skip
        return predictions, broadcast_object_list(scores)[0]

    # ------------------------------------------------------------------------------------------------------------------
    # checkpoints

    data = digest(pairs)
    checkpoints = Checkpoints(accelerator, args, run_folder, log, signals, model=model, optimizer=optimizer,
                              scheduler=scheduler, data=data, shape=shape)  # fmt: skip
    state, resumed_from, old_shape = checkpoints.resume()
    if old_shape:  # the epoch goes on with the examples that the other shape had not come to
        state.leave_out(plan(state.epoch, state.done_before, **old_shape))
    meters = {name: Meters(accelerator, state.meters.get(name)) for name in ("train", "epoch")}
    log.begin(state.step)
    if resumed_from:
        log("resume", step=state.step, epoch=state.epoch, checkpoint=str(resumed_from))
    predictions = scores = None

    def at_boundary(received: int | None) -> int | None:
        """Between two steps: validates and saves where due, sets `state.stop`; returns a signal if one came."""
        nonlocal predictions, scores
        lr = scheduler.get_last_lr()[0]
        state.stop = stop_reason(accelerator, args, state, lr)
        is_best = False
        if state.is_validation_due(args):
            state.validation_due = True  # and stays so if a signal comes before it is done
            try:
                signals.poll(accelerator)
                predictions, scores = validate()
                log("validation", step=state.step, epoch=state.epoch, **scores)
                is_best = state.note_validation(args, scores)
                state.stop = stop_reason(accelerator, args, state, lr)
            except Interrupted as signalled:
                received = signalled.number
        if is_best or state.stop or received or state.is_checkpoint_due(args):
            checkpoints.save(state, meters, is_best=is_best)
        return received

    # ------------------------------------------------------------------------------------------------------------------
    # training

    def train_micro_batch(batch, target_tokens: int) -> dict:
        """Adds to the gradients those of the mean loss over all `target_tokens` of the step, on all processes."""
        batch = batch.to(accelerator.device)
        with local_gradients(accelerator, model):
            with record_function("forward"), accelerator.autocast():
                loss, nll = model(**batch, label_smoothing_factor=args.label_smoothing_factor)
            with record_function("backward"):
                # times the processes, because gradients are averaged over them
                accelerator.backward(loss * accelerator.num_processes / target_tokens)
        return {
            "loss": loss.detach(),
            "nll": nll,
            "count": (batch["labels"] != -100).sum(),
            **count_tokens(batch, summarizer.is_packed),
        }

    began = time.perf_counter()
    model.train()
    culprit_named = False
    state.stop = stop_reason(accelerator, args, state, scheduler.get_last_lr()[0])
    if state.stop:
        log.say(f"nothing to train: {state.stop}")
    received = at_boundary(None) if state.validation_due else None
    with profiler(accelerator, args, run_folder) as profile:
        for epoch in itertools.count(state.epoch):
            if state.stop or received:
                break
            steps = plan(epoch, state.done_before)
            collate_epoch = partial(collate_pairs, epoch=epoch)
            batches = StepBatches(numbered, steps[state.step_in_epoch :], collate_epoch, accelerator.process_index)
            log.start_epoch(epoch, state.step_in_epoch, len(steps))
            for micro_batches in DataLoader(batches, batch_size=None, num_workers=args.dataloader_num_workers):
                step_began = time.perf_counter()
                target_tokens = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
                target_tokens, received = signals.agree(accelerator, target_tokens)  # over all processes

                while micro_batches:  # once, or again in halves where memory runs out
                    seed_step(args.seed, state.step, accelerator.process_index)
                    try:
                        sums = [train_micro_batch(batch, target_tokens) for batch in micro_batches]
                        break
                    except (RuntimeError, MemoryError) as error:
                        if not is_out_of_memory(error) or is_sharded(accelerator):
                            raise
                        optimizer.zero_grad()
                        micro_batches = halves(micro_batches)
                failure = None
                if any_process(accelerator, not micro_batches):
                    failure = "memory ran out"
                else:
                    average_gradients(accelerator, model)
                    gnorm = float(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf")))
                    if args.check_grad_norm:
                        check_grad_norm(accelerator, gnorm)
                    if not math.isfinite(gnorm):
                        failure = "the gradient norm is not finite"
                        if args.nan_detector and not culprit_named:
                            culprit_named = True
                            optimizer.zero_grad()
                            seed_step(args.seed, state.step, accelerator.process_index)
                            with NanDetector(accelerator, model) as detector:
                                for batch in micro_batches:
                                    train_micro_batch(batch, target_tokens)
                            failure = detector.culprit

                seconds = time.perf_counter() - step_began
                if failure:
                    state.note_skip(args, log, failure)
                else:
                    state.skipped_in_a_row = 0
                    for meter in meters.values():
                        meter.add_step(gnorm, args.max_grad_norm, seconds)
                        for micro_batch_sums in sums:
                            meter.add(**micro_batch_sums)
                if not failure or accelerator.scaler:  # which lowers its loss scale, and leaves the step out itself
                    optimizer.step()
                    check_loss_scale(accelerator, args)
                scheduler.step()
                optimizer.zero_grad()

                state.advance(len(steps), seconds)
                if state.step % args.log_steps == 0 or state.step_in_epoch == 0:
                    if args.check_grad_norm:
                        check_weight_norm(accelerator, model)
                    log("train", step=state.step, epoch=epoch, lr=scheduler.get_last_lr()[0], skipped=state.skipped,
                        **meters["train"].read(accelerator), wall=state.train_seconds)  # fmt: skip
                if state.step_in_epoch == 0:
                    log("epoch", step=state.step, epoch=state.epoch, **meters["epoch"].read(accelerator))
                log.advance()
                give_back_memory()
                if profile:
                    profile.step()
                received = at_boundary(received)
                if state.stop or received:
                    break
            log.end_epoch()
    checkpoints.wait()
    if received:
        log("stop", step=state.step, reason=f"{signal.Signals(received).name}; the same command goes on from here")
        end_run(accelerator, 128 + received)
    log("stop", step=state.step, reason=state.stop)
    log("done", step=state.step, seconds=time.perf_counter() - began)
    log.say(f"done training in {time.perf_counter() - began:.1f} s")

    # ------------------------------------------------------------------------------------------------------------------
    # the model, and the predictions with the passages that were read

    if args.load_best_model_at_end and checkpoints.load_best(state):
        predictions = None
    if predictions is None:  # or a finished run was started again
        predictions, scores = validate()
    weights = accelerator.get_state_dict(model)  # whole, where it is sharded
    if accelerator.is_main_process:
        rows = {"lead extract": scores["lead"], "oracle extract": scores["oracle"], "summarizer": scores}
        log.say(score_table(rows, ("rouge1", "rouge2", "rougeL", "rougeLsum")))
        publish(run_folder, lambda folder: save_pretrained(summarizer, tokenizer, folder, weights))
        write_predictions(run_folder / "predictions.validation.jsonl", validation_rows, predictions)
        log.say(f"wrote {run_folder / 'predictions.validation.jsonl'}")
    end_run(accelerator)


def write_predictions(path, rows: list[dict], predictions: list[str]) -> None:
    """Writes each prediction with the example and the passages that it was written from."""
    write_jsonl(
        path,
        (
            {
                "id": row["example"].id,
                "query": row["example"].query,
                "prediction": prediction,
                "summary": row["example"].summaries,
                "evidence": row["example"].evidence,
                "passages": [{"passage": i, "text": row["example"].document.passages[i]} for i in row["passages"]],
            }
            for row, prediction in zip(rows, predictions, strict=True)
        ),
    )


def first_words(passages: list[str], count: float) -> str:
    """The lead of a document: whole passages until `count` words are reached."""
    lead, words = [], 0
    for passage in passages:
        if words >= count:
            break
        lead.append(passage)
        words += len(passage.split())
    return " ".join(lead)


def count_tokens(batch: dict, is_packed: bool) -> dict:
    """Examples and tokens of a micro-batch without padding, and tokens as they are computed (`slots`)."""
    real = [batch["attention_mask"] != 0, batch["labels"] != -100]
    examples = int(real[1].any(1).sum())  # 0 if it is a dummy, which is all padding
    tokens = sum(int(mask.sum()) for mask in real) if examples else 0
    return {
        "examples": examples,
        "tokens": tokens,
        "slots": tokens if is_packed and examples else sum(mask.numel() for mask in real),
    }


if __name__ == "__main__":
    run_script(main)
