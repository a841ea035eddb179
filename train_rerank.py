"""Trains a reranker, a cross-encoder that reads a query and a passage together, on what a retriever ranks first.

    accelerate launch --config_file accelerate_configs/cpu.yaml train_rerank.py --retriever outputs/retrieve

Without data flags it trains a small reranker from scratch on the embedded data set. The run folder then holds a
CrossEncoder of sentence-transformers, which `--reranker` of the other scripts names, and `retrieved.<split>.jsonl` of
each split: the retriever's rankings, reranked, as the hand-over to stage 2.
"""

from dataclasses import dataclass

from utils.cli.arguments import CorpusArguments, RankingOverrides, TrainingArguments, flag, parse
from utils.errors import UsageError, refuse

SCORES = ("recall@1", "recall@5", "recall@10", "recall@20", "recall@100", "mrr@10", "ndcg@10", "gold_words@1024")


@dataclass
class RerankArguments(TrainingArguments, RankingOverrides, CorpusArguments):
    """The reranker."""

    teacher = guide = None  # flags of train_retrieve.py only
    mine_negatives_every = 0

    output_dir: str = flag("outputs/rerank", "the run folder")
    metric_for_best: str = flag("ndcg@10", "validation score that selects the best checkpoint", choices=SCORES)
    model_name_or_path: str | None = flag(None, "a cross-encoder, or an encoder that becomes one (default: a new one)")
    retriever: str = flag("outputs/retrieve", "what is reranked: a folder of train_retrieve.py, a Hub name, or bm25")
    max_seq_length: int | None = flag(None, "maximum tokens of query with passage (default: the model's)", at_least=1)
    dropout: float | None = flag(None, "hidden dropout (default: the model's, or 0.1)", at_least=0, below=1)
    attention_dropout: float = flag(0.0, "replaces the model's own; 0 is much faster on a CPU", at_least=0, below=1)
    loss: str = flag("listwise", "softmax over a query's candidates, or each by itself", choices=("listwise", "binary"))
    num_positives: int = flag(1, "evidence passages drawn per query", at_least=1)
    num_hard_negatives: int = flag(7, "hard negatives drawn per query", at_least=1)
    negatives_pool: int = flag(50, "hard negatives are drawn from so many of the retriever's best", at_least=1)
    draft_share: float = flag(0.5, "share of queries that search with a draft, as at hop 2", at_least=0, at_most=1)
    drafts_file: str | None = flag(None, "training drafts, of retrieve_and_summarize.py (default: imitations)")
    validation_drafts_file: str | None = flag(None, "drafts for hop 2 in validation (default: imitations)")
    found_weight: float | None = flag(None, "how often evidence the draft used is drawn (missing: 1) [0.5]", at_least=0)
    supervision: str = flag("evidence", "positives: gold evidence, or a ROUGE oracle's", choices=("evidence", "rouge"))
    oracle_passages: int = flag(5, "maximum positives that the ROUGE oracle chooses", at_least=1)
    rerank_top_k: int = flag(50, "best passages of the retriever that are reranked", at_least=2)
    rerank_weight: float = flag(1.0, "weight of the reranker's score (the retriever's: 1)", at_least=0)
    top_k: int = flag(100, "passages per example in the hand-over files", at_least=1)
    trec_run: bool = flag(False, "also write rankings and evidence as TREC run and qrels files")

    def __post_init__(self):
        super().__post_init__()
        refuse(self, ("supervision",), "in a corpus", where=self.corpus_file)
        refuse(self, ("drafts_file", "found_weight"), "with --draft_share 0", where=not self.draft_share)


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a mistyped flag answer at once
    arguments = parse(RerankArguments, __doc__)

import collections
import copy
import itertools
import math
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch.profiler import record_function
from transformers import get_scheduler

from utils.cli.script import end_run, precision, record_run, run_script, start
from utils.data.hand_over import read_drafts, write_hand_over
from utils.data.kept import content_key
from utils.data.loading import describe_splits, load_splits
from utils.evaluation.hops import score_hops
from utils.models import cross_encoder, encoder
from utils.models.lora import add_adapters
from utils.models.settings import check_made, compile_layers, place, saved_settings, settle_packing
from utils.models.tokenizer import describe_cut
from utils.processes import wait_for_all
from utils.reporting import publishing, report, tracking
from utils.retrieval.bm25 import check_language
from utils.retrieval.corpus_search import make_search
from utils.retrieval.drafts import first_drafts, imitations
from utils.retrieval.pairs import Pair, Pairs, gold_passages
from utils.retrieval.reranking import rank_passages, scorer
from utils.retrieval.two_hops import search_hops
from utils.tables import values
from utils.training.batching import batch_shape, plan_epoch, to_device
from utils.training.exchange import average_gradients, exchanging
from utils.training.log import RunLog, score_table
from utils.training.loop_state import schedule_steps, warmup_steps
from utils.training.run import Run
from utils.training.sharding import prepare, whole_weights
from utils.training.step import is_sharded, parameter_groups

# ---- batches: queries with their candidates


def collate_queries(batch: list[Pair], dummy: bool, *, epoch: int, pairs: Pairs, reranker) -> dict:
    """A batch of queries and candidates. Each epoch draws hop, positives and hard negatives of each query anew."""
    rows = []
    for pair in batch:
        search, _, keys = pairs.draw(pair, epoch)
        keys = list(dict.fromkeys(keys))
        passages = [pairs.passage_tokens[key] for key in keys]
        rows.append((search, passages, len(set(keys) & set(pair.evidence))))
    return cross_encoder.collate_pairs(reranker, rows, dummy)


def plan_steps(lengths, args, shape_of, epoch: int, without=(), shape: dict | None = None) -> list:
    """The queries of each step of an epoch. A resumed epoch may have the batch `shape` of an earlier run."""
    shuffle = 0 if args.overfit_one_batch else epoch
    steps = plan_epoch(lengths, seed=args.seed, epoch=shuffle, without=without, **(shape or shape_of(epoch)))
    return [steps[0]] * len(steps) if args.overfit_one_batch else steps


# ---- training and validation


def train_micro_batch(batch: dict, count: int, *, accelerator, model, reranker, args) -> dict:
    """Adds this micro-batch's share of the gradient of the step's mean loss over `count` queries, of all processes."""
    queries, (tokens, slots) = cross_encoder.count_queries(batch), cross_encoder.count_tokens(reranker, batch["pairs"])
    batch = to_device(batch, accelerator.device)
    with record_function("forward"), accelerator.autocast():
        scores = model(batch["pairs"])["scores"][:, 0]
        loss, right = cross_encoder.rerank_loss(scores, batch["candidates"], batch["positives"], args.loss)
    with record_function("backward"), exchanging(model):
        # times the number of processes, because gradients are averaged over them
        accelerator.backward(loss * accelerator.num_processes / count)
    counts = {"count": queries, "examples": queries, "tokens": tokens if queries else 0, "slots": slots}
    return {"loss": loss.detach(), "right": right, **counts}


def make_reranker(documents: list, examples: list, args, accelerator):
    """A checkpoint, or a small cross-encoder with a tokenizer trained on the training text."""
    options = {"attention_dropout": args.attention_dropout, "dropout": args.dropout}
    if args.model_name_or_path:
        if args.lora_rank and not cross_encoder.is_reranker(args.model_name_or_path, args.trust_remote_code):
            raise UsageError(f"--lora_rank: {args.model_name_or_path} scores no pairs yet; train it without adapters")
        reranker = cross_encoder.load_reranker(args.model_name_or_path, "--model_name_or_path", **options,
                                               trust_remote_code=args.trust_remote_code, needs_head=False)  # fmt: skip
    else:
        texts = itertools.chain.from_iterable((*(d.passages for d in documents), values(examples, "query")))
        reranker = cross_encoder.build_small_reranker(texts, **options, key=content_key(examples))
    cross_encoder.set_up(reranker, args)
    return settle_packing(reranker, accelerator, reranker.max_seq_length, is_trained=True)


def load_search(documents: list, args, *, accelerator, run_folder, say) -> tuple:
    """The search for candidates, its `encode` (None: BM25), how it ranks, and a key of all these."""
    is_trained = args.retriever != "bm25"
    if args.index != "flat" and not (is_trained and args.corpus_file):
        raise UsageError(f"--index {args.index} needs a --corpus_file, and a --retriever other than bm25")
    check_made("--retriever", args.retriever, "train_retrieve.py")
    settings = args.ranking_settings(saved_settings(args.retriever) if is_trained else None)
    check_language(args.language, args.retriever, settings if is_trained else {})
    if args.corpus_file and settings["smooth_window"] and is_trained:
        raise UsageError("--smooth_window cannot be used with --corpus_file, which has no neighbours; set it to 0")
    retriever, encode, key = None, None, ["bm25"]
    if is_trained:
        retriever = encoder.load_retriever(
            args.retriever, truncate_dim=args.truncate_dim, trust_remote_code=args.trust_remote_code
        )
        encode = partial(encoder.encode, place(retriever, accelerator), accelerator=accelerator)
        key = [settings, encoder.weights_key(retriever), args.index, accelerator.mixed_precision]
    language = settings.get("language") if is_trained else args.language
    search = make_search(documents, retriever, index=args.index, folder=run_folder / "embeddings",
                         top_k=max(args.top_k, args.rerank_top_k), language=language, say=say,
                         accelerator=accelerator, alone=True, trained_in=args.retriever)  # fmt: skip
    if is_trained:
        search.prepare(encode)
    return search, encode, settings if is_trained else {"hop_weight": settings["hop_weight"]}, key


def validate(examples: list, gold: list, first_scores: dict, search_now, *, poll) -> tuple:
    """Scores of the first hop, the second (if any) as `hop2` and the `retriever`; and texts. Raises Interrupted."""
    hops = list(search_now(examples))
    poll()
    scores = {**score_hops(examples, hops, gold), "retriever": first_scores}
    return scores, tracking.ranking_texts(examples, hops, gold)


def hand_over(run: Run, split: str, hops, examples, search_first) -> dict:
    """Writes what was found for a split, for stage 2. Returns scores of the test split, which nothing else looks at."""
    hops = list(hops) if split == "test" else hops  # made block by block
    if run.accelerator.is_main_process:
        run.log.say(f"wrote {write_hand_over(run.folder, split, examples, hops, run.args.top_k, run.args.trec_run)}")
    collections.deque(hops, maxlen=0)  # every process takes part in the search
    if split != "test":
        return {}
    gold = gold_passages(examples, run.args, required=False)
    first, scores = score_hops(examples, list(search_first(examples)), gold), score_hops(examples, hops, gold)
    run.note_test(scores, scored=scores["examples"], of=len(examples), need="gold passages")
    return {"test: retriever": first, "test: reranked": scores} if scores["examples"] else {}


def between_steps(run: Run, validate_now, args) -> None:
    """Saves if that is due, then validates if that is due."""
    if run.is_checkpoint_due():  # first: an error in validation loses nothing
        run.save()
    if run.is_validation_due():
        with run.interruptible():  # after a signal, the resumed run validates
            scores, texts = validate_now()
            run.note_validation(scores, best_by=scores.get(args.metric_for_best), texts=texts)
            report.write_report(run.accelerator, run.folder)


def main():
    args = arguments

    # ---- set-up, data and models

    accelerator = Accelerator(
        mixed_precision=precision(args, is_pretrained=bool(args.model_name_or_path)), log_with=args.report_to,
        project_dir=args.output_dir,
    )  # fmt: skip
    run_folder = start(accelerator, args)
    log = RunLog(accelerator, run_folder, args.log_format)
    splits = load_splits(args, run_folder / "rejected.jsonl" if accelerator.is_main_process else None)
    train, validation = splits["train"], splits["validation"]
    documents = list(dict.fromkeys(values(train, "document")))  # or the one corpus of all examples
    search, encode_texts, settings, search_key = load_search(documents, args, accelerator=accelerator,
                                                             run_folder=run_folder, say=log.say)  # fmt: skip
    of_reranker = {"rerank_top_k": args.rerank_top_k, "rerank_weight": args.rerank_weight}
    reranker = make_reranker(documents, train, args, accelerator)
    add_adapters(reranker, args, accelerator)
    log.say_model(reranker)
    encode_alone = encode_texts and partial(encode_texts, alone=True)  # of the process that makes the pairs for all
    pairs = Pairs(args, train, documents, reranker, module=cross_encoder, search_key=search_key,
                  search=partial(rank_passages, search, encode=encode_alone, settings=settings),
                  accelerator=accelerator)  # fmt: skip
    log.say(f"{describe_splits(splits)}; {pairs.describe()}")
    gold = gold_passages(validation, args)
    # drafts for the second hop of validation; without them, they are imitations
    given = args.validation_drafts_file and partial(first_drafts, read_drafts(args.validation_drafts_file, validation))

    # ---- optimizer, schedule

    search_tokens, passage_tokens, candidates = pairs.sizes().T
    limit, pair_tokens = cross_encoder.limit_of_texts(reranker), search_tokens + passage_tokens
    log.say(describe_cut("max_seq_length", limit, {"queries with their longest passage": pair_tokens}))
    shape_of = partial(batch_shape, args, accelerator.num_processes)
    plan = partial(plan_steps, candidates * np.minimum(pair_tokens, limit), args, shape_of)
    optimizer = torch.optim.AdamW(parameter_groups(reranker, args.weight_decay), lr=args.learning_rate, fused=True,
                                  betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)  # fmt: skip
    # not prepared: accelerate would step it once for each process
    max_steps = schedule_steps(args, plan, shape_of)
    warmup = warmup_steps(args, max_steps)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, max_steps)
    # FSDP leaves each process a part of the weights: a whole model is kept to be saved
    whole = copy.deepcopy(reranker) if is_sharded(accelerator) and accelerator.is_main_process else reranker
    wait_for_all()  # some may have read data for longer than an exchange of parameters waits
    model, optimizer = prepare(accelerator, compile_layers(reranker, args, accelerator), optimizer)
    run = Run(accelerator, args, run_folder, log, model=model, optimizer=optimizer, scheduler=scheduler,
              max_steps=max_steps, warmup=warmup, plan=plan, shape=shape_of, data=pairs.digest())  # fmt: skip
    record_run(accelerator, args, run_folder, log.say, run.state.step)  # only now it is accepted

    # ---- training

    score = scorer(reranker, accelerator=accelerator, poll=run.poll, say=log.say)
    search_first = partial(search_hops, search, encode_texts, settings)
    search_now = partial(search_hops, search, encode_texts, settings | of_reranker, score=score)
    drafts = given or imitations(validation, args)
    first_scores = score_hops(validation, list(search_first(validation, write_drafts=drafts)), gold)
    encode_once = encode_texts and search.remember(encode_texts)  # the retriever does not change
    validation_search = partial(search_hops, search, encode_once, settings | of_reranker, score=score,
                                write_drafts=drafts)  # fmt: skip
    validate_now = partial(validate, validation, gold, first_scores, validation_search, poll=run.poll)
    model.train()
    micro_step = partial(train_micro_batch, accelerator=accelerator, model=model, reranker=reranker, args=args)
    if run.state.validation_due:  # a signal interrupted it
        between_steps(run, validate_now, args)
    for epoch in itertools.count(run.state.epoch):
        if run.is_over():
            break
        collate_epoch = partial(collate_queries, epoch=epoch, pairs=pairs, reranker=reranker)
        for micro_batches in run.loader(pairs, epoch, collate_epoch):
            count = run.begin_step(sum(map(cross_encoder.count_queries, micro_batches)))  # of all processes
            # forward and backward pass of each micro-batch; if memory runs out, again in halves
            sums = run.try_step(micro_step, micro_batches, count, cross_encoder.halves)
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
            between_steps(run, validate_now, args)
            if run.is_over():
                break
    run.finish()
    if run.received:
        end_run(accelerator, 128 + run.received)

    # ---- the model, and the hand-over to stage 2

    run.load_best()  # with --load_best_model_at_end
    scores = run.scores or validate_now()[0]  # a finished run that is started again has no scores yet
    weights = whole_weights(accelerator, model)
    if accelerator.is_main_process:
        if whole is not reranker:
            whole.load_state_dict(weights)
        run.publish(lambda folder: cross_encoder.save_pretrained(whole, folder, args))
    rows = {"retriever": scores["retriever"], "reranked": scores}
    if "hop2" in scores:
        kind = "given" if given else "imitated"
        rows |= {f"retriever, hop 2, {kind} drafts": scores["retriever"]["hop2"],
                 f"reranked, hop 2, {kind} drafts": scores["hop2"]}  # fmt: skip
    write_drafts = {"train": imitations(train, args), "validation": given}
    for split, examples in splits.items():
        hops = search_now(examples, write_drafts=write_drafts.get(split))
        rows |= hand_over(run, split, hops, examples, search_first)
    log.say(score_table(rows, ("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10", "gold_words@1024")))
    report.write_report(accelerator, run_folder, log.say)
    end_run(accelerator, publishing.present(run, "reranker", splits, scores))


if __name__ == "__main__":
    run_script(main)
