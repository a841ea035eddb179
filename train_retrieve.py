"""Stage 1: trains the retriever and ranks every example's passages with it.

    accelerate launch --config_file accelerate_configs/cpu.yaml train_retrieve.py --output_dir outputs/retrieve

Without data flags it trains a small encoder from scratch on the embedded data set. The run folder then holds a
sentence-transformers model and `retrieved.train.jsonl` and `retrieved.validation.jsonl`, the hand-over to stage 2.
"""

from dataclasses import dataclass

from utils.arguments import DataArguments, TrainingArguments, UsageError, check_at_least, check_choice, flag, parse


@dataclass
class RetrieveArguments(TrainingArguments, DataArguments):
    """The retriever."""

    output_dir: str = flag("outputs/retrieve", "the run folder: arguments, metrics, hand-over files and the model")
    metric_for_best: str = flag("ndcg@10", "validation score that decides which checkpoint is best, and patience")
    model_name_or_path: str | None = flag(
        None, "a sentence-transformers or plain encoder checkpoint [a small encoder from scratch]"
    )
    max_seq_length: int | None = flag(None, "tokens of a query or passage that are read [the model's own]")
    attention_dropout: float = flag(
        0.0, "dropout of attention weights, in place of the model's own; 0 is several times faster on a processor"
    )
    gradient_cache_tokens: int = flag(
        0, "tokens whose graph is held at a time, by gradient caching: memory for large batches; 0: all of them"
    )
    temperature: float = flag(0.05, "divides the similarities in the contrastive loss")
    num_positives: int = flag(1, "passages of the evidence that are drawn for each query, by their gold words")
    num_hard_negatives: int = flag(3, "passages that rank high and are no evidence, as negatives of each query")
    negatives_pool: int = flag(20, "the best passages without evidence, from which hard negatives are drawn")
    mine_negatives_every: int = flag(
        0, "epochs between searches for hard negatives with the model as it is then; 0: those of BM25 throughout"
    )
    negatives_margin: float = flag(
        0.05, "mined passages that score within this share of the query's best evidence are no negatives"
    )
    draft_share: float = flag(
        0.5, "share of the training queries that search with a draft, as later hops do; 0: only the first hop's"
    )
    drafts_file: str | None = flag(
        None, "drafts by example id, as retrieve_and_summarize.py writes them, in place of those made of the references"
    )
    validation_drafts_file: str | None = flag(None, "likewise for the validation examples, to score a second hop")
    found_weight: float = flag(0.5, "weight of evidence that a draft was written from, beside 1 for what is missing")
    group_by_document: bool = flag(
        False, "fill batches with queries of the same document, whose passages are then each other's negatives"
    )
    supervision: str = flag("evidence", "where positives come from: evidence (without any: rouge), or rouge, an oracle")
    oracle_passages: int = flag(5, "positives that the ROUGE oracle chooses at most")
    teacher: str | None = flag(
        None, "a summarizer's folder, in place of the ROUGE oracle: how likely each passage makes the reference"
    )
    teacher_candidates: int = flag(20, "passages whose likelihoods the teacher compares, BM25's best")
    teacher_temperature: float = flag(0.1, "divides the teacher's log-likelihoods per token")
    ranking: str = flag(
        "dense",
        "how passages are ranked: dense, or hybrid, with BM25 (by standardized scores; in a corpus by reciprocal rank)",
    )
    bm25_weight: float = flag(0.5, "share of BM25's score in a hybrid ranking, beside 1 for the retriever's")
    smooth_window: int = flag(0, "neighbours on either side that share a passage's score; 0: none")
    smooth_decay: float = flag(0.5, "by which a score fades from a passage to the next, and squared to the one before")
    index: str = flag("flat", "search of a corpus: flat is exact; ivf and hnsw are faster and miss some")
    top_k: int = flag(100, "passages ranked for each example in the hand-over files")
    trec_run: bool = flag(False, "write the rankings and the evidence as TREC run and qrels files, too")

    def __post_init__(self):
        super().__post_init__()
        check_choice("--metric_for_best", self.metric_for_best, (
            "recall@1", "recall@5", "recall@10", "recall@20", "recall@100", "mrr@10", "ndcg@10",
            "gold_words@1024"))  # fmt: skip
        check_choice("--ranking", self.ranking, ("dense", "hybrid"))
        check_choice("--index", self.index, ("flat", "ivf", "hnsw"))
        check_choice("--supervision", self.supervision, ("evidence", "rouge"))
        check_at_least(1, self, "top_k", "num_positives", "negatives_pool", "oracle_passages", "max_seq_length",
                       "teacher_candidates")  # fmt: skip
        check_at_least(0, self, "num_hard_negatives", "smooth_window", "bm25_weight", "mine_negatives_every")
        check_at_least(0, self, "negatives_margin", "smooth_decay", "draft_share", "found_weight")
        if self.draft_share > 1:
            raise UsageError(f"--draft_share {self.draft_share}: 1 at most is wanted")
        for name in ("supervision", "teacher", "drafts_file", "validation_drafts_file"):
            if self.corpus_file and getattr(self, name) not in (None, "evidence"):
                raise UsageError(f"--{name} needs documents; leave it out with --corpus_file")
        if self.corpus_file and self.smooth_window:
            raise UsageError("--smooth_window is for neighbours in a document; leave it out with --corpus_file")
        check_at_least(0, self, "attention_dropout", "gradient_cache_tokens")
        for name in ("temperature", "teacher_temperature"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name} {getattr(self, name)}: more than 0 is wanted")


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a mistyped flag answer at once
    arguments = parse(RetrieveArguments, __doc__)

import copy
import itertools
import math
import signal
import time
from datetime import timedelta
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch.profiler import record_function
from torch.utils.data import DataLoader
from transformers import get_scheduler

from utils import search as document_search
from utils.batching import StepBatches, plan_epoch
from utils.checkpoint import publish
from utils.contrastive import backward_by_chunk, contrastive_loss, embed, embed_without_graph
from utils.corpus import CorpusSearch
from utils.data import load_splits, read_drafts, write_retrieved
from utils.pairs import Pair, Pairs, is_marked, positives
from utils.retriever import build_small_encoder, count_tokens, encode, in_chunks, load_retriever, weights_key
from utils.search import fuse_hops, search_text
from utils.state import Checkpoints, schedule_steps, stop_reason
from utils.training import (
    Interrupted,
    Meters,
    NanDetector,
    RunLog,
    Signals,
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
    together,
)
from utils.trec import write_qrels, write_run


def main():
    args = arguments

    # ------------------------------------------------------------------------------------------------------------------
    # set-up

    accelerator = Accelerator(
        mixed_precision=precision(args, is_pretrained=bool(args.model_name_or_path)), log_with=args.report_to,
        project_dir=args.output_dir,
        # every process holds the same buffers, and one that runs out of memory must not leave another in an exchange
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False),
                         InitProcessGroupKwargs(timeout=timedelta(hours=6))],  # of the one that searches a corpus
    )  # fmt: skip
    run_folder = start(accelerator, args)
    if args.gradient_cache_tokens and is_sharded(accelerator):  # whose processes must run the model equally often
        raise UsageError("--gradient_cache_tokens is not supported with FSDP and DeepSpeed")
    log = RunLog(accelerator, run_folder, args.log_format)
    train, validation = load_splits(args, run_folder / "rejected.jsonl" if accelerator.is_main_process else None)
    documents = list({id(example.document): example.document for example in train}.values())
    corpus = documents[0] if args.corpus_file else None  # the one document of all examples

    # ------------------------------------------------------------------------------------------------------------------
    # model

    if args.model_name_or_path:
        retriever = load_retriever(args.model_name_or_path, args.attention_dropout)
    else:
        texts = itertools.chain(*(document.passages for document in documents), (example.query for example in train))
        retriever = build_small_encoder(texts, attention_dropout=args.attention_dropout)
    if args.max_seq_length:
        retriever.max_seq_length = args.max_seq_length
    parameters = sum(parameter.numel() for parameter in retriever.parameters())
    log.say(
        f"{parameters:,} parameters on {accelerator.num_processes} process(es), "
        f"{accelerator.device}, mixed precision {accelerator.mixed_precision}"
    )

    # ------------------------------------------------------------------------------------------------------------------
    # supervision: a positive is a passage of the evidence; hard negatives rank high in BM25 and are no evidence

    search = document_search
    if corpus:
        search = CorpusSearch(corpus, folder=run_folder / "embeddings", weights_key=partial(weights_key, retriever),
                              index=args.index, accelerator=accelerator, log=log)  # fmt: skip
    pairs = Pairs(args, train, documents, retriever, lexical=search.bm25_rankings, accelerator=accelerator)
    marked = sum(is_marked(pair.example, args.supervision) for pair in pairs.rows)
    log.say(
        f"{len(train)} training examples, {len(validation)} for validation; {len(pairs.rows)} with positives "
        f"({marked} from evidence, the others from the {'teacher' if args.teacher else 'ROUGE oracle'})"
    )
    if not pairs.rows:
        raise UsageError(
            "no training example has evidence" + ("" if corpus else " or shares a word with its summary")
            + ": nothing to train on"
        )  # fmt: skip

    def collate(batch: list[Pair], dummy: bool, epoch: int) -> dict:
        """Draws hop, positives and hard negatives for each pair, anew in each epoch; a passage is there once."""
        queries, weights, drawn = zip(*(pairs.draw(pair, epoch) for pair in batch), strict=True)
        keys = list(dict.fromkeys(itertools.chain(*drawn)))
        evidence = [torch.tensor(pair.evidence) for pair in batch]
        weights = [torch.from_numpy(of_pair) for of_pair in weights]
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return {
            "texts": in_chunks(
                retriever, list(queries), [pairs.passage_tokens[key] for key in keys], args.gradient_cache_tokens
            ),
            "passage_keys": torch.full((len(keys),), -2) if dummy else torch.tensor(keys),
            "evidence_keys": torch.full((len(batch), 1), -1) if dummy else pad(evidence, padding_value=-1),
            "evidence_weights": torch.zeros(len(batch), 1) if dummy else pad(weights),
            "is_distribution": torch.tensor([pair.is_distribution for pair in batch]),
        }

    # ------------------------------------------------------------------------------------------------------------------
    # batches, optimizer, schedule

    lengths, groups = pairs.lengths(), [pair.document for pair in pairs.rows]

    def shape(epoch: int) -> dict:
        """All that decides, beside data, seed and epoch, which examples a step holds."""
        return {
            "num_processes": accelerator.num_processes,
            "gradient_accumulation_steps": args.accumulation(epoch),
            "batch_size": args.per_device_train_batch_size,
            "max_tokens": args.max_tokens,
            "by_length": epoch < args.curriculum_epochs,
            "by_group": args.group_by_document,
        }

    def plan(epoch: int, without=(), **other_shape) -> list:
        steps = plan_epoch(
            lengths,
            seed=args.seed,
            epoch=0 if args.overfit_one_batch else epoch,
            without=without,
            groups=groups,
            **(other_shape or shape(epoch)),
        )
        return [steps[0]] * len(steps) if args.overfit_one_batch else steps

    max_steps = schedule_steps(args, plan)
    optimizer = torch.optim.AdamW(
        parameter_groups(retriever, args.weight_decay),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
    # not prepared: it steps once for each optimizer step, at any number of processes
    warmup_steps = min(args.num_warmup_steps, max_steps // 10) if max_steps else args.num_warmup_steps
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, max_steps)
    # sharding leaves each process a part of the weights: a whole model is kept to be saved
    whole = copy.deepcopy(retriever) if is_sharded(accelerator) else retriever
    model, optimizer = accelerator.prepare(retriever, optimizer)
    signals = Signals()

    # ------------------------------------------------------------------------------------------------------------------
    # validation: the model beside BM25 on the same examples

    def encode_texts(texts: list[str], kind: str) -> np.ndarray:
        return encode(retriever, texts, kind, accelerator=accelerator, poll=lambda: signals.poll(accelerator))

    def rankings(examples: list, queries: list[str] | None = None) -> list:
        """Each example's ranking for its query, or for the search text in `queries`."""
        return search.retriever_rankings(examples, encode_texts, vars(args), queries)

    def scores_of(ranked: list) -> dict:
        from utils.metrics import score_rankings  # imports `evaluate`, which takes seconds

        return score_rankings(validation, ranked, gold)

    gold = [example.evidence for example in validation]
    if not any(gold) and not corpus:  # nobody marked any: what the ROUGE oracle chooses stands in
        gold = [positives(example, args.supervision, args.oracle_passages)[0] for example in validation]

    if not any(gold):
        raise UsageError(
            "no validation example has evidence: nothing to score; "
            + ("give --validation_qrels_file" if corpus else "its summaries share no word with their documents")
        )

    bm25_scores = {}
    if accelerator.is_main_process:
        bm25_scores = scores_of(search.bm25_rankings(validation, args.top_k if corpus else None))

    first_drafts = read_drafts(args.validation_drafts_file, validation) if args.validation_drafts_file else []
    searches = [example.query for example in validation]
    searches += [
        search_text(example.query, drafts[0][0] if drafts else "")
        for example, drafts in zip(validation, first_drafts, strict=False)
    ]

    def validate() -> dict:
        """Scores beside those of BM25, on all processes; Interrupted if a signal came meanwhile."""
        ranked = rankings(validation * (len(searches) // len(validation)), searches)  # each document encoded once
        signals.poll(accelerator)
        found = [{}]
        if accelerator.is_main_process:
            first, second = ranked[: len(validation)], ranked[len(validation) :]
            found = [{**scores_of(first), "bm25": bm25_scores}]
            if second:
                found[0]["hop2"] = scores_of([fuse_hops(hops) for hops in zip(first, second, strict=True)])
        return broadcast_object_list(found)[0]

    # ------------------------------------------------------------------------------------------------------------------
    # checkpoints

    checkpoints = Checkpoints(accelerator, args, run_folder, log, signals, model=model, optimizer=optimizer,
                              scheduler=scheduler, data=pairs.digest(), shape=shape)  # fmt: skip
    state, resumed_from, old_shape = checkpoints.resume()
    if old_shape:  # the epoch goes on with the examples that the other shape had not come to
        state.leave_out(plan(state.epoch, state.done_before, **old_shape))
    if state.negatives:  # mined by a run that this one goes on from
        pairs.set_negatives(state.negatives)
    meters = {name: Meters(accelerator, state.meters.get(name)) for name in ("train", "epoch")}
    log.begin(state.step)
    if resumed_from:
        log("resume", step=state.step, epoch=state.epoch, checkpoint=str(resumed_from))
    scores = None

    def at_boundary(received: int | None) -> int | None:
        """Between two steps: validates and saves where due, sets `state.stop`; returns a signal if one came."""
        nonlocal scores
        lr = scheduler.get_last_lr()[0]
        state.stop = stop_reason(accelerator, args, state, lr)
        is_best = False
        if state.is_validation_due(args):
            state.validation_due = True  # and stays so if a signal comes before it is done
            try:
                signals.poll(accelerator)
                scores = validate()
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

    def train_micro_batch(batch, count: int) -> dict:
        """Adds to the gradients those of the mean loss over all `count` pairs of the step, on all processes."""
        batch = move(batch, accelerator.device)
        states, sides = None, (len(batch["evidence_keys"]), len(batch["passage_keys"]))
        with local_gradients(accelerator, model):
            with record_function("forward"), accelerator.autocast():
                with together(accelerator):  # the loss gathers the passages of all processes
                    if len(batch["texts"]) > 1 and args.gradient_cache_tokens:
                        embeddings, states = embed_without_graph(model, batch["texts"])
                    else:
                        embeddings = embed(model, batch["texts"])
                loss, right = contrastive_loss(
                    *embeddings.split(sides), passage_keys=batch["passage_keys"], evidence_keys=batch["evidence_keys"],
                    evidence_weights=batch["evidence_weights"], is_distribution=batch["is_distribution"],
                    temperature=args.temperature,
                )  # fmt: skip
            with record_function("backward"), together(accelerator):
                # times the processes, because gradients are averaged over them
                accelerator.backward(loss * accelerator.num_processes / count)
                if states:
                    backward_by_chunk(model, batch["texts"], embeddings, states)
        pairs_here = count_pairs(batch)
        tokens, slots = count_tokens(retriever, batch["texts"])
        return {
            "loss": loss.detach(),
            "right": right,
            "count": pairs_here,
            "examples": pairs_here,
            "tokens": tokens if pairs_here else 0,  # a dummy is all padding
            "slots": slots,
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
            every = args.mine_negatives_every
            if every and epoch and epoch % every == 0 and state.mined_in != epoch:
                try:
                    pairs.mine(partial(search.dense_rankings, encode=encode_texts))
                except Interrupted as signalled:
                    received = signalled.number
                    checkpoints.save(state, meters, is_best=False)
                    break
                state.negatives, state.mined_in = pairs.negatives(), epoch
            steps = plan(epoch, state.done_before)
            collate_epoch = partial(collate, epoch=epoch)
            batches = StepBatches(pairs.rows, steps[state.step_in_epoch :], collate_epoch, accelerator.process_index)
            log.start_epoch(epoch, state.step_in_epoch, len(steps))
            for micro_batches in DataLoader(batches, batch_size=None, num_workers=args.dataloader_num_workers):
                step_began = time.perf_counter()
                # over all processes
                count, received = signals.agree(accelerator, sum(map(count_pairs, micro_batches)))

                seed_step(args.seed, state.step, accelerator.process_index)
                failure = None
                try:
                    sums = [train_micro_batch(batch, count) for batch in micro_batches]
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error) or is_sharded(accelerator):
                        raise
                    failure = "memory ran out"
                if not failure:
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
                                    train_micro_batch(batch, count)
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
    # the model, and the hand-over to stage 2

    if args.load_best_model_at_end and checkpoints.load_best(state):
        scores = None
    if scores is None:  # or a finished run was started again
        scores = validate()
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        columns = ("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10", "gold_words@1024")
        rows = {"BM25": bm25_scores, "retriever": scores}
        if "hop2" in scores:
            rows["with drafts"] = scores["hop2"]
        log.say(score_table(rows, columns))
        if whole is not retriever:
            whole.load_state_dict(weights)
        publish(run_folder, lambda folder: whole.save_pretrained(str(folder), create_model_card=False))
    for split, examples in {"train": train, "validation": validation}.items():
        ranked = [ranking[: args.top_k] for ranking in rankings(examples)]
        if accelerator.is_main_process:
            write_retrieved(run_folder / f"retrieved.{split}.jsonl", examples, ranked)
            if args.trec_run:
                write_run(run_folder / f"run.{split}.trec", examples, ranked, tag="train_retrieve")
                write_qrels(run_folder / f"qrels.{split}.trec", examples)
            log.say(f"wrote {run_folder / f'retrieved.{split}.jsonl'}")
    end_run(accelerator)


def move(batch, device):
    if isinstance(batch, dict):
        return {name: move(value, device) for name, value in batch.items()}
    if isinstance(batch, list):
        return [move(value, device) for value in batch]
    return batch.to(device, non_blocking=True)


def count_pairs(batch: dict) -> int:
    return int((batch["evidence_keys"][:, 0] >= 0).sum())


if __name__ == "__main__":
    run_script(main)
