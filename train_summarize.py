"""Stage 2: trains the summarizer on retrieved passages.

    accelerate launch --config_file accelerate_configs/cpu.yaml train_summarize.py --retriever outputs/retrieve

Without data flags it trains a small BART from scratch on the embedded data set. `--retriever` says where passages come
from: bm25, lead, oracle, random, or the run folder of train_retrieve.py. The run folder then holds a model that
Transformers loads, `metrics.jsonl` and `predictions.validation.jsonl` with the passages that were read.
"""

from dataclasses import dataclass

from utils.arguments import DataArguments, TrainingArguments, check_at_least, check_choice, flag, parse


@dataclass
class SummarizeArguments(TrainingArguments, DataArguments):
    output_dir: str = flag("outputs/summarize", "the run folder: arguments, metrics, predictions and the model")
    model_name_or_path: str | None = flag(None, "an encoder-decoder checkpoint [a small BART from scratch]")
    retriever: str | None = flag(
        None,
        "where passages come from: bm25, lead, oracle, random, or a retriever's folder "
        "[the ranking that files of train_retrieve.py hold, else bm25]",
    )
    top_k: int = flag(5, "passages that the summarizer reads")
    fusion: str = flag("concat", "how it reads them: concat (one sequence) or fid (Fusion-in-Decoder)")
    passage_order: str = flag("document", "order of the passages in the source: document or rank")
    max_source_length: int = flag(512, "tokens of a source (concat) or of each passage with the query (fid)")
    dropout: float | None = flag(None, "dropout of the summarizer [a checkpoint's own; 0 from scratch]")
    max_target_length: int = flag(128, "tokens of a reference in training")
    label_smoothing_factor: float = flag(0.1, "share of the target probability spread over the vocabulary")
    num_beams: int = flag(4, "beams in generation; 1: greedy")
    length_penalty: float = flag(1.0, "exponent of the length by which beam scores are divided")
    min_new_tokens: int = flag(0, "tokens generated at least")
    max_new_tokens: int = flag(128, "tokens generated at most")
    no_repeat_ngram_size: int = flag(0, "n-grams of this size are generated once only; 0: no limit")

    def __post_init__(self):
        super().__post_init__()
        check_choice("--fusion", self.fusion, ("concat", "fid"))
        check_choice("--passage_order", self.passage_order, ("document", "rank"))
        check_at_least(1, self, "top_k", "max_target_length", "num_beams", "max_new_tokens")
        check_at_least(16, self, "max_source_length")
        check_at_least(0, self, "label_smoothing_factor", "min_new_tokens", "no_repeat_ngram_size", "dropout")


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a mistyped flag answer at once
    arguments = parse(SummarizeArguments, __doc__)

import itertools
import math
import time

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch.profiler import record_function
from torch.utils.data import DataLoader
from transformers import get_scheduler

from utils.batching import StepBatches, eval_batches, plan_epoch
from utils.data import load_splits, write_jsonl
from utils.retriever import encode, load_retriever
from utils.search import (
    bm25_rankings,
    dense_rankings,
    lead_ranking,
    oracle_ranking,
    random_ranking,
)
from utils.summarizer import (
    Sources,
    Summarizer,
    build_small_bart,
    collate,
    label_smoothed_loss,
    load_model_and_tokenizer,
    save_pretrained,
)
from utils.tokenizer import train_tokenizer
from utils.training import (
    Meters,
    RunLog,
    check_launch,
    end_run,
    gradient_sync,
    parameter_groups,
    prepare_run_folder,
    run_script,
    score_table,
    seed_step,
)

BASELINES = {"lead": lead_ranking, "oracle": oracle_ranking, "random": random_ranking}


def main():
    args = arguments

    # ------------------------------------------------------------------------------------------------------------------
    # set-up

    accelerator = Accelerator()
    check_launch(accelerator)
    run_folder = prepare_run_folder(accelerator, args)
    log = RunLog(accelerator, run_folder, args.log_format)
    set_seed(args.seed)
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
    log.say(
        f"{sum(p.numel() for p in summarizer.parameters()):,} parameters on {accelerator.num_processes} process(es), "
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
        return dense_rankings(examples, lambda texts, kind: encode(retriever, texts, kind, accelerator=accelerator))

    def read(examples: list) -> list[dict]:
        """Each example with its source and the numbers of the passages in it."""
        rows = []
        for example, ranking in zip(examples, rank(examples), strict=True):
            chosen = [passage for passage, _ in ranking[: args.top_k]]
            source, passages = sources.build(example.query, example.document, chosen)
            targets = tokenizer(text_target=example.summaries, truncation=True, max_length=args.max_target_length)
            rows.append({"example": example, "source": source, "passages": passages, "targets": targets["input_ids"]})
        return rows

    if args.retriever and args.retriever not in ("bm25", *BASELINES):
        retriever = load_retriever(args.retriever).to(accelerator.device)
    train_rows, validation_rows = read(train), read(validation)
    retriever = None
    pairs = [(row["source"], target) for row in train_rows for target in row["targets"]]  # one for each reference

    def collate_pairs(pairs: list, dummy: bool) -> dict:
        batch = collate([source for source, _ in pairs], [target for _, target in pairs], tokenizer.pad_token_id)
        if dummy:
            batch["labels"].fill_(-100)
        return batch

    # ------------------------------------------------------------------------------------------------------------------
    # batches, optimizer, schedule

    most_sequences = args.top_k if args.fusion == "fid" else 1
    lengths = [[most_sequences * max(map(len, source)), len(target)] for source, target in pairs]

    def plan(epoch: int) -> list:
        return plan_epoch(
            lengths,
            seed=args.seed,
            epoch=epoch,
            num_processes=accelerator.num_processes,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            batch_size=args.per_device_train_batch_size,
            max_tokens=args.max_tokens,
        )

    epochs = range(args.num_train_epochs) if args.num_train_epochs else itertools.count()
    max_steps = args.max_train_steps or sum(len(plan(epoch)) for epoch in epochs)
    optimizer = torch.optim.AdamW(
        parameter_groups(summarizer, args.weight_decay),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, min(args.num_warmup_steps, max_steps // 10), max_steps
    )  # not prepared: it steps once for each optimizer step, at any number of processes
    model, optimizer = accelerator.prepare(summarizer, optimizer)

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

    def validate(step: int, epoch: float) -> tuple[list[str], dict]:
        """Logs the scores of the validation examples; returns predictions, and ROUGE beside that of the extracts."""
        from utils.metrics import Rouge  # imports `evaluate`, which takes seconds

        model.eval()
        batches = eval_batches([sum(map(len, row["source"])) for row in validation_rows],
                               batch_size=args.per_device_eval_batch_size)  # fmt: skip
        generated, sums = [], []
        for number in range(accelerator.process_index, len(batches), accelerator.num_processes):
            rows = [validation_rows[i] for i in batches[number]]
            batch = collate([row["source"] for row in rows], [row["targets"][0] for row in rows],
                            tokenizer.pad_token_id).to(accelerator.device)  # fmt: skip
            labels = batch["labels"]
            with torch.no_grad(), accelerator.autocast():
                loss, nll = label_smoothed_loss(
                    summarizer(**batch), labels[labels != -100], args.label_smoothing_factor
                )
                del batch["labels"]
                ids = summarizer.generate(**batch, **generation)
            texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
            generated += [(i, text.strip()) for i, text in zip(batches[number], texts, strict=True)]
            sums.append((number, loss.item(), nll.item(), (labels != -100).sum().item()))
        if accelerator.num_processes > 1:  # every process gets all, each example once
            generated, sums = gather_object(generated), gather_object(sums)
        model.train()

        predictions = [text for _, text in sorted(generated)]
        if accelerator.is_main_process:
            rouge, references = Rouge(), [example.summaries for example in validation]
            for name, texts in extracts.items():
                if name not in baselines:
                    baselines[name] = rouge.compute(predictions=texts, references=references)
            # in the batches' order, so that the sum is the same at any number of processes
            loss, nll, tokens = (math.fsum(column) for column in list(zip(*sorted(sums), strict=True))[1:])
            nll /= tokens * math.log(2)
            scores = rouge.compute(predictions=predictions, references=references)
            log("validation", step=step, epoch=epoch, loss=loss / tokens / math.log(2), nll_loss=nll, ppl=2**nll,
                **scores, **baselines)  # fmt: skip
            return predictions, {
                "lead extract": baselines["lead"], "oracle extract": baselines["oracle"], "summarizer": scores
            }  # fmt: skip
        return predictions, {}

    generation = {
        "num_beams": args.num_beams,
        "length_penalty": args.length_penalty,
        "min_new_tokens": args.min_new_tokens,
        "max_new_tokens": args.max_new_tokens,
        "no_repeat_ngram_size": args.no_repeat_ngram_size,
        "do_sample": False,
    }

    # ------------------------------------------------------------------------------------------------------------------
    # training

    began, step = time.perf_counter(), 0
    model.train()
    meters = Meters()
    for epoch in epochs:
        batches = StepBatches(pairs, plan(epoch), collate_pairs, accelerator.process_index)
        loader = DataLoader(batches, batch_size=None, num_workers=args.dataloader_num_workers)
        for step_in_epoch, micro_batches in enumerate(loader, start=1):
            seed_step(args.seed, step, accelerator.process_index)
            target_tokens = sum((batch["labels"] != -100).sum() for batch in micro_batches).to(accelerator.device)
            global_target_tokens = accelerator.reduce(target_tokens, "sum")

            for number, batch in enumerate(micro_batches, start=1):
                batch = batch.to(accelerator.device)
                with gradient_sync(accelerator, model, is_last=number == len(micro_batches)):
                    with record_function("forward"), accelerator.autocast():
                        logits = model(**batch)
                        targets = batch["labels"][batch["labels"] != -100]
                        loss, nll = label_smoothed_loss(logits, targets, args.label_smoothing_factor)
                    with record_function("backward"):
                        # the mean over all target tokens of the step; gradients are averaged over processes
                        accelerator.backward(loss * accelerator.num_processes / global_target_tokens)
                meters.add(loss=loss.detach(), nll=nll, count=targets.numel(), **count_tokens(batch))

            gnorm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            meters.add_step(gnorm.item(), args.max_grad_norm)

            progress = epoch + step_in_epoch / len(loader)
            if step % args.log_steps == 0 or step == max_steps or step_in_epoch == len(loader):
                log("train", step=step, epoch=progress, **meters.read(accelerator, scheduler.get_last_lr()[0]))
            if args.eval_steps and step % args.eval_steps == 0 and step < max_steps:
                validate(step, progress)
            if step == max_steps:
                break
        if step == max_steps or not args.eval_steps:
            predictions, last_scores = validate(step, progress)
        if step == max_steps:
            break
    log("done", step=step, seconds=time.perf_counter() - began)
    log.say(f"done training in {time.perf_counter() - began:.1f} s")
    if accelerator.is_main_process:
        log.say(score_table(last_scores, ("rouge1", "rouge2", "rougeL", "rougeLsum")))

    # ------------------------------------------------------------------------------------------------------------------
    # the model, and the predictions with the passages that were read

    if accelerator.is_main_process:
        save_pretrained(summarizer.model, tokenizer, run_folder)
        write_jsonl(
            run_folder / "predictions.validation.jsonl",
            (
                {
                    "id": row["example"].id,
                    "query": row["example"].query,
                    "prediction": prediction,
                    "summary": row["example"].summaries,
                    "evidence": row["example"].evidence,
                    "passages": [{"passage": i, "text": row["example"].document.passages[i]} for i in row["passages"]],
                }
                for row, prediction in zip(validation_rows, predictions, strict=True)
            ),
        )
        log.say(f"wrote {run_folder / 'predictions.validation.jsonl'}")
    end_run(accelerator)


def first_words(passages: list[str], count: float) -> str:
    """The lead of a document: whole passages until `count` words are reached."""
    lead, words = [], 0
    for passage in passages:
        if words >= count:
            break
        lead.append(passage)
        words += len(passage.split())
    return " ".join(lead)


def count_tokens(batch: dict) -> dict:
    """Examples and tokens of a micro-batch without padding, and tokens with it (`slots`)."""
    real = [batch["attention_mask"] != 0, batch["labels"] != -100]
    return {
        "examples": real[1].any(1).sum(),
        "tokens": sum(mask.sum() for mask in real),
        "slots": sum(mask.numel() for mask in real),
    }


if __name__ == "__main__":
    run_script(main)
