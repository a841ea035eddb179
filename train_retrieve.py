"""Stage 1: trains the retriever and ranks every example's passages with it.

    accelerate launch --config_file accelerate_configs/cpu.yaml train_retrieve.py --output_dir outputs/retrieve

Without data flags it trains a small encoder from scratch on the embedded data set. The run folder then holds a
sentence-transformers model and `retrieved.train.jsonl` and `retrieved.validation.jsonl`, the hand-over to stage 2.
"""

from dataclasses import dataclass

from utils.arguments import DataArguments, TrainingArguments, UsageError, check_at_least, check_choice, flag, parse


@dataclass
class RetrieveArguments(TrainingArguments, DataArguments):
    output_dir: str = flag("outputs/retrieve", "the run folder: arguments, metrics, hand-over files and the model")
    model_name_or_path: str | None = flag(
        None, "a sentence-transformers or plain encoder checkpoint [a small encoder from scratch]"
    )
    max_seq_length: int | None = flag(None, "tokens of a query or passage that are read [the model's own]")
    attention_dropout: float | None = flag(
        None, "dropout of attention weights [the model's own]; 0 is several times faster on a processor"
    )
    temperature: float = flag(0.05, "divides the similarities in the contrastive loss")
    num_hard_negatives: int = flag(3, "passages of the same document, ranked high by BM25, as negatives of each query")
    negatives_pool: int = flag(20, "the best BM25 passages without evidence, from which hard negatives are drawn")
    group_by_document: bool = flag(
        False, "fill batches with queries of the same document, whose passages are then each other's negatives"
    )
    oracle_passages: int = flag(5, "positives that the ROUGE oracle chooses at most, for examples without evidence")
    ranking: str = flag("dense", "how the hand-over files are ranked: dense, or hybrid (fused with BM25)")
    top_k: int = flag(100, "passages ranked for each example in the hand-over files")

    def __post_init__(self):
        super().__post_init__()
        check_choice("--ranking", self.ranking, ("dense", "hybrid"))
        check_at_least(1, self, "top_k", "negatives_pool", "oracle_passages", "max_seq_length")
        check_at_least(0, self, "num_hard_negatives", "attention_dropout")
        if not self.temperature > 0:
            raise UsageError(f"--temperature {self.temperature}: more than 0 is wanted")


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a mistyped flag answer at once
    arguments = parse(RetrieveArguments, __doc__)

import itertools
import time

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch.profiler import record_function
from torch.utils.data import DataLoader
from transformers import get_scheduler

from utils.batching import StepBatches, plan_epoch
from utils.contrastive import contrastive_loss
from utils.data import load_splits, write_retrieved
from utils.retriever import build_small_encoder, encode, load_retriever, pad, tokenize
from utils.search import bm25_rankings, dense_rankings, greedy_rouge_oracle, reciprocal_rank_fusion
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


def main():
    args = arguments

    # ------------------------------------------------------------------------------------------------------------------
    # set-up

    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # BERT's pooler takes no part in the embedding
    accelerator = Accelerator(kwargs_handlers=[unused])
    check_launch(accelerator)
    run_folder = prepare_run_folder(accelerator, args)
    log = RunLog(accelerator, run_folder, args.log_format)
    set_seed(args.seed)
    train, validation = load_splits(args, run_folder / "rejected.jsonl" if accelerator.is_main_process else None)

    # ------------------------------------------------------------------------------------------------------------------
    # model

    if args.model_name_or_path:
        retriever = load_retriever(args.model_name_or_path, args.attention_dropout)
    else:
        documents = {id(example.document): example.document for example in train}.values()
        texts = [text for document in documents for text in document.passages]
        retriever = build_small_encoder([*texts, *(example.query for example in train)])
    if args.max_seq_length:
        retriever.max_seq_length = args.max_seq_length
    log.say(
        f"{sum(p.numel() for p in retriever.parameters()):,} parameters on {accelerator.num_processes} process(es), "
        f"{accelerator.device}, mixed precision {accelerator.mixed_precision}"
    )

    # ------------------------------------------------------------------------------------------------------------------
    # supervision: a positive is a passage of the evidence; hard negatives rank high in BM25 and are no evidence

    def positives(example) -> list[int]:
        if example.evidence is not None:
            return example.evidence
        return greedy_rouge_oracle(example.document.passages, example.summaries, args.oracle_passages)

    documents = list({id(example.document): example.document for example in train}.values())
    first_key = dict(
        zip(map(id, documents), np.cumsum([0, *(len(d.passages) for d in documents)]).tolist(), strict=False)
    )  # passages are numbered through all documents, and each is tokenized once
    passage_tokens = tokenize(retriever, [text for document in documents for text in document.passages], "passage")
    query_tokens = tokenize(retriever, [example.query for example in train], "query")
    pairs = []
    for example, tokens, ranking in zip(train, query_tokens, bm25_rankings(train), strict=True):
        evidence = positives(example)
        if not evidence:
            continue
        negatives = [passage for passage, _ in ranking if passage not in set(evidence)][: args.negatives_pool]
        offset = first_key[id(example.document)]
        pairs.append({
            "number": len(pairs),
            "query": tokens,
            "evidence": [offset + passage for passage in evidence],
            "negatives": [offset + passage for passage in negatives],
            "document": offset,
        })  # fmt: skip
    log.say(
        f"{len(train)} training examples, {len(validation)} for validation; {len(pairs)} with positives "
        f"({sum(example.evidence is not None for example in train)} from evidence, the others from the ROUGE oracle)"
    )
    if not pairs:
        raise UsageError("no training example has evidence or shares a word with its summary: nothing to train on")

    def collate(examples: list[dict], dummy: bool, epoch: int) -> dict:
        """Draws a positive and hard negatives for each example, anew in each epoch; positives come first."""
        keys, negatives = [], []
        for example in examples:  # by its own number: the draw does not depend on how a step is split into batches
            rng = np.random.default_rng([args.seed, epoch, example["number"]])
            keys.append(rng.choice(example["evidence"]))
            count = min(args.num_hard_negatives, len(example["negatives"]))
            negatives += rng.choice(example["negatives"], count, replace=False).tolist() if count else []
        keys += negatives
        evidence = [torch.tensor(example["evidence"]) for example in examples]
        return {
            "queries": pad([example["query"] for example in examples], retriever.tokenizer.pad_token_id),
            "passages": pad([passage_tokens[key] for key in keys], retriever.tokenizer.pad_token_id),
            "passage_keys": torch.full((len(keys),), -2) if dummy else torch.tensor(keys),
            "evidence_keys": torch.full((len(examples), 1), -1)
            if dummy
            else torch.nn.utils.rnn.pad_sequence(evidence, batch_first=True, padding_value=-1),
        }

    # ------------------------------------------------------------------------------------------------------------------
    # batches, optimizer, schedule

    lengths = [
        [len(pair["query"]), int(np.mean([len(passage_tokens[key]) for key in pair["evidence"]]))] for pair in pairs
    ]

    def plan(epoch: int) -> list:
        return plan_epoch(
            lengths,
            seed=args.seed,
            epoch=epoch,
            num_processes=accelerator.num_processes,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            batch_size=args.per_device_train_batch_size,
            max_tokens=args.max_tokens,
            groups=[pair["document"] for pair in pairs] if args.group_by_document else None,
        )

    epochs = range(args.num_train_epochs) if args.num_train_epochs else itertools.count()
    max_steps = args.max_train_steps or sum(len(plan(epoch)) for epoch in epochs)
    optimizer = torch.optim.AdamW(
        parameter_groups(retriever, args.weight_decay),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, min(args.num_warmup_steps, max_steps // 10), max_steps
    )  # not prepared: it steps once for each optimizer step, at any number of processes
    model, optimizer = accelerator.prepare(retriever, optimizer)

    # ------------------------------------------------------------------------------------------------------------------
    # validation: the model beside BM25 on the same examples

    def encode_texts(texts: list[str], kind: str) -> np.ndarray:
        return encode(retriever, texts, kind, accelerator=accelerator)

    def rankings(examples: list) -> list:
        dense = dense_rankings(examples, encode_texts)
        if args.ranking == "dense":
            return dense
        return [reciprocal_rank_fusion(both) for both in zip(dense, bm25_rankings(examples), strict=True)]

    def scores(ranked: list) -> dict:
        from utils.metrics import Retrieval  # imports `evaluate`, which takes seconds

        return Retrieval().compute(
            predictions=[[passage for passage, _ in ranking] for ranking in ranked],
            references=gold,
            passage_words=[[len(text.split()) for text in example.document.passages] for example in validation],
            evidence_words=[example.evidence_words for example in validation],
        )

    gold = [example.evidence for example in validation]
    if not any(gold):  # nobody marked any: what the ROUGE oracle chooses stands in
        gold = [sorted(positives(example)) for example in validation]

    bm25_scores = scores(bm25_rankings(validation)) if accelerator.is_main_process else {}

    def validate(step: int, epoch: float) -> dict:
        ranked = rankings(validation)
        if not accelerator.is_main_process:
            return {}
        model_scores = scores(ranked)
        log("validation", step=step, epoch=epoch, **model_scores, bm25=bm25_scores)
        return model_scores

    # ------------------------------------------------------------------------------------------------------------------
    # training

    began, step = time.perf_counter(), 0
    model.train()
    meters = Meters()
    for epoch in epochs:
        batches = StepBatches(pairs, plan(epoch), lambda *a, epoch=epoch, **k: collate(*a, epoch=epoch, **k),
                              accelerator.process_index)  # fmt: skip
        loader = DataLoader(batches, batch_size=None, num_workers=args.dataloader_num_workers)
        for step_in_epoch, micro_batches in enumerate(loader, start=1):
            seed_step(args.seed, step, accelerator.process_index)
            count = sum((batch["evidence_keys"][:, 0] >= 0).sum() for batch in micro_batches).to(accelerator.device)
            global_count = accelerator.reduce(count, "sum")

            for number, batch in enumerate(micro_batches, start=1):
                batch = move(batch, accelerator.device)
                with gradient_sync(accelerator, model, is_last=number == len(micro_batches)):
                    with record_function("forward"), accelerator.autocast():
                        loss, right = contrastive_loss(
                            model(batch["queries"])["sentence_embedding"],
                            model(batch["passages"])["sentence_embedding"],
                            passage_keys=batch["passage_keys"],
                            evidence_keys=batch["evidence_keys"],
                            temperature=args.temperature,
                        )
                    with record_function("backward"):
                        # the mean over all pairs of the step; gradients are averaged over processes
                        accelerator.backward(loss * accelerator.num_processes / global_count)
                meters.add(loss=loss.detach(), right=right, **count_tokens(batch))

            gnorm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            meters.add(count=count, examples=count)
            meters.add_step(gnorm.item(), args.max_grad_norm)

            progress = epoch + step_in_epoch / len(loader)
            if step % args.log_steps == 0 or step == max_steps or step_in_epoch == len(loader):
                log("train", step=step, epoch=progress, **meters.read(accelerator, scheduler.get_last_lr()[0]))
            if args.eval_steps and step % args.eval_steps == 0 and step < max_steps:
                validate(step, progress)
            if step == max_steps:
                break
        if step == max_steps or not args.eval_steps:
            last_scores = validate(step, progress)
        if step == max_steps:
            break
    log("done", step=step, seconds=time.perf_counter() - began)
    log.say(f"done training in {time.perf_counter() - began:.1f} s")
    if accelerator.is_main_process:
        columns = ("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10", "gold_words@1024")
        log.say(score_table({"BM25": bm25_scores, "retriever": last_scores}, columns))

    # ------------------------------------------------------------------------------------------------------------------
    # the model, and the hand-over to stage 2

    if accelerator.is_main_process:
        retriever.save_pretrained(str(run_folder), create_model_card=False)
    for split, examples in {"train": train, "validation": validation}.items():
        ranked = [ranking[: args.top_k] for ranking in rankings(examples)]
        if accelerator.is_main_process:
            write_retrieved(run_folder / f"retrieved.{split}.jsonl", examples, ranked)
            log.say(f"wrote {run_folder / f'retrieved.{split}.jsonl'}")
    end_run(accelerator)


def move(batch, device):
    if isinstance(batch, dict):
        return {name: move(value, device) for name, value in batch.items()}
    return batch.to(device, non_blocking=True)


def count_tokens(batch: dict) -> dict:
    """Tokens of a micro-batch without padding, and with it (`slots`)."""
    masks = [batch[side]["attention_mask"] for side in ("queries", "passages")]
    return {"tokens": sum(mask.sum() for mask in masks), "slots": sum(mask.numel() for mask in masks)}


if __name__ == "__main__":
    run_script(main)
