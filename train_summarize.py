"""Stage 2: trains the summarizer on retrieved passages.

    accelerate launch --config_file accelerate_configs/cpu.yaml train_summarize.py --retriever outputs/retrieve

Without data flags it trains a small BART from scratch on the embedded data set. `--retriever` says where passages come
from: bm25, lead, oracle, random, the run folder of train_retrieve.py, or a TREC run of any tool. The run folder then
holds a model that Transformers loads, `metrics.jsonl`, and `predictions.<split>.jsonl` with the passages read.
"""

from dataclasses import dataclass

from utils.cli.arguments import (
    DataArguments,
    LanguageArguments,
    RankingOverrides,
    RerankerArguments,
    TrainingArguments,
    flag,
    parse,
)


@dataclass
class SummarizeArguments(LanguageArguments, RerankerArguments, RankingOverrides, TrainingArguments, DataArguments):
    """The summarizer."""

    output_dir: str = flag("outputs/summarize", "the run folder")
    metric_for_best: str = flag(
        "rougeL", "validation score that selects the best checkpoint",
        choices=("loss", "nll_loss", "ppl", "rouge1", "rouge2", "rougeL", "rougeLsum"),
    )  # fmt: skip
    model_name_or_path: str | None = flag(None, "an encoder-decoder or language model (default: a small BART)")
    retriever: str | None = flag(
        None,
        "source of the passages: bm25, lead, oracle, random, a retriever's folder, or a TREC run file "
        "(default: the rankings in the examples, else bm25)",
    )
    top_k: int = flag(5, "passages that the summarizer reads per example", at_least=1)
    fusion: str = flag("concat", "concatenated passages, or Fusion-in-Decoder", choices=("concat", "fid"))
    passage_order: str = flag("document", "order of the passages in the source", choices=("document", "rank"))
    max_source_length: int = flag(512, "maximum source tokens; with fid, per passage", at_least=16)
    dropout: float | None = flag(None, "dropout (default: the model's own; 0 for a new one)", at_least=0, below=1)
    attention_dropout: float = flag(0.0, "replaces the model's own; 0 is much faster", at_least=0, below=1)
    max_target_length: int = flag(128, "maximum reference tokens in training", at_least=1)
    label_smoothing_factor: float = flag(0.1, "probability spread over the vocabulary in the loss", at_least=0, below=1)


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a mistyped flag answer at once
    arguments = parse(SummarizeArguments, __doc__)

import itertools
import math
from functools import cache, partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.profiler import record_function
from transformers import get_scheduler

from utils.cli.script import end_run, precision, record_run, run_script, start
from utils.data.hand_over import write_predictions
from utils.data.kept import content_key
from utils.data.loading import describe_splits, load_splits
from utils.evaluation.extracts import score_extracts
from utils.models.encoder_decoder import build_small_bart
from utils.models.generation import describe_generation
from utils.models.lora import add_adapters
from utils.models.settings import compile_layers, settle_packing, write_settings
from utils.models.sources import Rows, Sources, collate, count_targets, count_tokens, decode, halves
from utils.models.summarizer import load_model_and_tokenizer, save_pretrained, set_up, sources_for, wrap
from utils.models.tokenizer import train_tokenizer
from utils.processes import wait_for_all
from utils.reporting import publishing, report, tracking
from utils.retrieval.splits import rank_splits
from utils.tables import lengths, values
from utils.training.batching import batch_shape, eval_batches, plan_epoch, take_turns, to_device
from utils.training.exchange import average_gradients, exchanging
from utils.training.log import RunLog, score_table
from utils.training.loop_state import schedule_steps, warmup_steps
from utils.training.run import Run
from utils.training.sharding import prepare, whole_weights
from utils.training.step import is_sharded, parameter_groups


def make_model(train: list, args, accelerator) -> tuple:
    """The summarizer and its tokenizer: a checkpoint, or a small BART with a tokenizer trained on the training text."""
    if args.model_name_or_path:
        pretrained, tokenizer = load_model_and_tokenizer(
            args.model_name_or_path, args.dropout, trust_remote_code=args.trust_remote_code,
            attention_dropout=args.attention_dropout,
        )  # fmt: skip
    else:
        documents = dict.fromkeys(values(train, "document"))
        texts = itertools.chain(
            itertools.chain.from_iterable(document.passages for document in documents),
            itertools.chain.from_iterable((example.query, *example.summaries) for example in train),
        )
        tokenizer = train_tokenizer(texts, key=content_key(train))
        dropouts = {"dropout": args.dropout or 0.0, "attention_dropout": args.attention_dropout}
        pretrained = build_small_bart(tokenizer, **dropouts)
    set_up(pretrained, tokenizer, vars(args))
    summarizer = wrap(pretrained, args.gradient_checkpointing)
    add_adapters(summarizer, args, accelerator)
    settle_packing(summarizer, accelerator, args.max_source_length + args.max_target_length, is_trained=True)
    runs_twice = getattr(getattr(accelerator.state, "fsdp_plugin", None), "activation_checkpointing", False)
    if runs_twice or pretrained.get_input_embeddings().weight.shape[1] < 256:
        # activation checkpointing runs layers again, without the sequences' lengths; narrow models are faster padded
        summarizer.is_packed = False
    return summarizer, tokenizer


# ---- what is read: the query and the passages retrieved for it


def collate_targets(
    targets: list[int], dummy: bool, *, rows: Rows, epoch: int, seed: int, pad_token_id: int, lay_out
) -> dict:
    """A batch of sources and targets. Each epoch draws a hop for each target: one summarizer serves all hops."""
    numbers = rows.number_of_target[targets].tolist()
    hops = [
        np.random.default_rng([seed, epoch, target]).integers(len(rows.hops[number]))
        for target, number in zip(targets, numbers, strict=True)
    ]
    sources = list(map(rows.source_of_hop, numbers, hops))
    batch = collate(sources, [rows.target_tokens[target] for target in targets], pad_token_id)
    if dummy:
        batch["labels"].fill_(-100)
    return {**batch, "layout": lay_out(**batch)}


def plan_steps(lengths, args, shape_of, epoch: int, without=(), shape: dict | None = None) -> list:
    """The examples of each step of an epoch. A resumed epoch may have the batch `shape` of an earlier run."""
    shuffle = 0 if args.overfit_one_batch else epoch
    steps = plan_epoch(lengths, seed=args.seed, epoch=shuffle, without=without, **(shape or shape_of(epoch)))
    return [steps[0]] * len(steps) if args.overfit_one_batch else steps


# ---- training and validation


def train_micro_batch(batch: dict, target_tokens: int, *, accelerator, model, summarizer, args) -> dict:
    """Adds this micro-batch's share of the gradient of the step's mean loss over `target_tokens`, of all processes."""
    # counted before the batch is on the GPU, for which the host would have to wait
    counts = {"count": count_targets(batch), **count_tokens(batch, summarizer.is_packed)}
    batch = to_device(batch, accelerator.device)
    with record_function("forward"), accelerator.autocast():
        loss, nll = model(**batch, label_smoothing_factor=args.label_smoothing_factor)
    with record_function("backward"), exchanging(model):
        # times the number of processes, because gradients are averaged over them
        accelerator.backward(loss * accelerator.num_processes / target_tokens)
    return {"loss": loss.detach(), "nll": nll, **counts}


def validate(summarizer, sources: Sources, rows: Rows, extract_scores, *, args, accelerator, poll) -> tuple:
    """Predictions, and scores beside those of extracts, on all processes. Raises Interrupted on a signal.

    Examples without a reference are not scored; without any reference, there are no scores.
    """
    from utils.evaluation.rouge import mean_of_each, rouge_of_each  # imports `evaluate`, which takes seconds

    tokenizer = sources.tokenizer
    batches = eval_batches([sum(map(len, row["source"])) for row in rows], batch_size=args.per_device_eval_batch_size)
    generated, sums = [], []
    summarizer.eval()
    for number, is_extra in take_turns(batches, accelerator.process_index, accelerator.num_processes):
        poll()
        if is_extra and not is_sharded(accelerator):
            continue
        own = [rows[i] for i in batches[number]]
        targets = [row["targets"][0] if row["targets"] else [-100] for row in own]
        batch = collate([row["source"] for row in own], targets, tokenizer.pad_token_id)
        batch = batch.to(accelerator.device)
        with torch.no_grad(), accelerator.autocast():
            loss, nll = summarizer(**batch, label_smoothing_factor=args.label_smoothing_factor)
            labels = batch.pop("labels")
            ids = summarizer.generate(**batch)
        if not is_extra:
            texts = decode(tokenizer, ids)
            rouge = rouge_of_each(texts, [row["example"].summaries for row in own])  # each process its own
            generated += zip(batches[number], texts, rouge, strict=True)
            sums.append((number, loss.item(), nll.item(), (labels != -100).sum().item()))
    summarizer.train()

    if accelerator.num_processes > 1:  # every process gets all, each example once
        generated, sums = gather_object(generated), gather_object(sums)
    _, predictions, rouge = zip(*sorted(generated, key=lambda row: row[0]), strict=True)
    if not any(rouge):
        return predictions, {}
    # sorted by batch: the sum is then the same for any number of processes
    loss, nll, tokens = (math.fsum(column) for column in list(zip(*sorted(sums), strict=True))[1:])
    loss, nll = (value / (tokens * math.log(2)) for value in (loss, nll))
    return predictions, {"loss": loss, "nll_loss": nll, "ppl": 2**nll, **mean_of_each(rouge), **extract_scores()}


def save(summarizer, sources: Sources, folder, weights: dict, args) -> None:
    """A folder that Transformers loads, and the settings that reading needs."""
    save_pretrained(summarizer, sources.tokenizer, folder, weights)
    names = ("model_name_or_path", "fusion", "passage_order", "top_k", "max_source_length", "max_target_length",
             "source_prefix", "source_lang", "target_lang")  # fmt: skip
    write_settings(folder, args, names, prompt_template=sources.prompt_template)


def between_steps(run: Run, validate_now, examples, args) -> None:
    """Saves if that is due, then validates if that is due."""
    if run.is_checkpoint_due():  # first: an error in validation loses nothing
        run.save()
    if run.is_validation_due():
        with run.interruptible():  # after a signal, the resumed run validates
            predictions, scores = validate_now()
            run.note_validation(scores, best_by=scores.get(args.metric_for_best), predictions=predictions,
                                texts=tracking.summary_texts(examples, predictions))  # fmt: skip
            report.write_report(run.accelerator, run.folder)


def main():
    args = arguments

    # ---- set-up, data and model

    accelerator = Accelerator(
        mixed_precision=precision(args, is_pretrained=bool(args.model_name_or_path)), log_with=args.report_to,
        project_dir=args.output_dir,
    )  # fmt: skip
    run_folder = start(accelerator, args)
    log = RunLog(accelerator, run_folder, args.log_format)
    splits = load_splits(args, run_folder / "rejected.jsonl" if accelerator.is_main_process else None)

    summarizer, tokenizer = make_model(splits["train"], args, accelerator)
    log.say_model(summarizer)
    log.say(describe_generation(summarizer.model, args.source_prefix))
    sources = sources_for(summarizer, tokenizer, vars(args))
    hops, source = rank_splits(splits, args, accelerator=accelerator, say=log.say)
    log.say(f"{describe_splits(splits)}; passages from {source}")
    rows = {split: Rows(examples, hops[split], sources, args.max_target_length) for split, examples in splits.items()}
    train_rows = rows["train"]
    log.say(sources.cuts(args.max_target_length))

    # ---- batches, optimizer, schedule

    sequences = args.top_k if args.fusion == "fid" else 1
    source_lengths = sequences * train_rows.source_lengths[train_rows.number_of_target]
    side_lengths = np.stack([source_lengths, lengths(train_rows.target_tokens)], axis=1)
    shape_of = partial(batch_shape, args, accelerator.num_processes)
    plan = partial(plan_steps, side_lengths, args, shape_of)
    optimizer = torch.optim.AdamW(parameter_groups(summarizer, args.weight_decay), lr=args.learning_rate, fused=True,
                                  betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)  # fmt: skip
    # not prepared: accelerate would step it once for each process
    max_steps = schedule_steps(args, plan, shape_of)
    warmup = warmup_steps(args, max_steps)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, max_steps)
    wait_for_all()  # some may have read data for longer than an exchange of parameters waits
    model, optimizer = prepare(accelerator, compile_layers(summarizer, args, accelerator), optimizer)
    run = Run(accelerator, args, run_folder, log, model=model, optimizer=optimizer, scheduler=scheduler,
              max_steps=max_steps, warmup=warmup, plan=plan, shape=shape_of, data=train_rows.digest())  # fmt: skip
    record_run(accelerator, args, run_folder, log.say, run.state.step)  # only now it is accepted

    # ---- training

    extract_scores = partial(score_extracts, splits["train"], accelerator=accelerator)
    score = partial(validate, summarizer, sources, args=args, accelerator=accelerator, poll=run.poll)
    validate_now = partial(score, rows["validation"], cache(partial(extract_scores, splits["validation"])))
    model.train()
    targets = range(len(side_lengths))  # one for each reference
    micro_step = partial(train_micro_batch, accelerator=accelerator, model=model, summarizer=summarizer, args=args)
    if run.state.validation_due:  # a signal interrupted it
        between_steps(run, validate_now, splits["validation"], args)
    for epoch in itertools.count(run.state.epoch):
        if run.is_over():
            break
        collate_epoch = partial(collate_targets, rows=train_rows, epoch=epoch, seed=args.seed,
                                pad_token_id=tokenizer.pad_token_id, lay_out=summarizer.lay_out)  # fmt: skip
        for micro_batches in run.loader(targets, epoch, collate_epoch):
            target_tokens = run.begin_step(sum(map(count_targets, micro_batches)))  # of all processes
            # forward and backward pass of each micro-batch; if memory runs out, again in halves
            sums = run.try_step(micro_step, micro_batches, target_tokens, halves)
            if sums is None:
                failure = "memory ran out"
            else:
                average_gradients(accelerator, model)
                gnorm = float(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf))
                failure = run.check_gradients(sums, gnorm)
            if failure:
                run.skip(failure)  # nothing of the step is applied, on any process
            else:
                run.count(sums, gnorm)
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            run.end_step()
            between_steps(run, validate_now, splits["validation"], args)
            if run.is_over():
                break
    run.finish()
    if run.received:
        end_run(accelerator, 128 + run.received)

    # ---- the model, and the predictions with the passages that were read

    run.load_best()  # with --load_best_model_at_end
    # a finished run that is started again has no scores yet
    predictions, scores = (run.predictions, run.scores) if run.scores else validate_now()
    weights = whole_weights(accelerator, model)
    if accelerator.is_main_process:
        run.publish(lambda folder: save(summarizer, sources, folder, weights, args))
        log.say(f"wrote {write_predictions(run_folder, 'validation', rows['validation'], predictions)}")
    table = {"lead extract": scores["lead"], "oracle extract": scores["oracle"], "summarizer": scores}
    if "test" in splits:  # scored once, with the final model
        predictions, of_test = score(rows["test"], partial(extract_scores, splits["test"]))
        if accelerator.is_main_process:
            log.say(f"wrote {write_predictions(run_folder, 'test', rows['test'], predictions)}")
        scored = sum(bool(example.summaries) for example in splits["test"])
        run.note_test(of_test, scored=scored, of=len(predictions), need="a reference")
        if scored:
            table |= {"test: lead extract": of_test["lead"], "test: oracle extract": of_test["oracle"],
                      "test: summarizer": of_test}  # fmt: skip
    log.say(score_table(table, ("rouge1", "rouge2", "rougeL", "rougeLsum")))
    report.write_report(accelerator, run_folder, log.say)
    end_run(accelerator, publishing.present(run, "summarizer", splits, scores))


if __name__ == "__main__":
    run_script(main)
