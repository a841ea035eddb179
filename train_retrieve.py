"""Stage 1: trains the retriever and ranks every example's passages with it.

    accelerate launch --config_file accelerate_configs/cpu.yaml train_retrieve.py --output_dir outputs/retrieve

Without data flags it trains a small encoder from scratch on the embedded data set. The run folder then holds a
sentence-transformers model and `retrieved.<split>.jsonl` of each split, the hand-over to stage 2.
"""

from dataclasses import dataclass

from utils.cli.arguments import CorpusArguments, RankingArguments, RerankerArguments, TrainingArguments, flag, parse
from utils.errors import UsageError, refuse

SCORES = ("recall@1", "recall@5", "recall@10", "recall@20", "recall@100", "mrr@10", "ndcg@10", "gold_words@1024")


@dataclass
class RetrieveArguments(TrainingArguments, RerankerArguments, RankingArguments, CorpusArguments):
    """The retriever."""

    output_dir: str = flag("outputs/retrieve", "the run folder")
    metric_for_best: str = flag("ndcg@10", "validation score that selects the best checkpoint", choices=SCORES)
    model_name_or_path: str | None = flag(None, "a sentence-transformers model or plain encoder (default: a new one)")
    max_seq_length: int | None = flag(None, "maximum tokens of a query or passage (default: the model's)", at_least=1)
    query_prompt: str | None = flag(None, "text before each query, such as 'query: ' (default: the model's prompt)")
    passage_prompt: str | None = flag(None, "text before each passage, likewise")
    dropout: float | None = flag(None, "hidden dropout (default: the model's, or 0.1)", at_least=0, below=1)
    attention_dropout: float = flag(0.0, "replaces the model's own; 0 is much faster on a CPU", at_least=0, below=1)
    gradient_cache_tokens: int = flag(0, "gradient caching: tokens whose graph is kept at a time; 0: off", at_least=0)
    temperature: float = flag(0.05, "temperature of the contrastive loss", above=0)
    matryoshka_dims: str = flag("", "the loss is the mean over embeddings cut to these sizes, such as 384,128 [whole]")
    num_positives: int = flag(1, "evidence passages drawn per query", at_least=1)
    num_hard_negatives: int = flag(3, "hard negatives drawn per query", at_least=0)
    negatives_pool: int = flag(20, "hard negatives are drawn from so many best-ranked passages", at_least=1)
    mine_negatives_every: int = flag(0, "epochs between minings of hard negatives; 0: use BM25's", at_least=0)
    negatives_margin: float = flag(0.05, "mined negatives score this share below the best evidence", at_least=0)
    draft_share: float = flag(0.5, "share of queries that search with a draft, as at hop 2", at_least=0, at_most=1)
    drafts_file: str | None = flag(None, "training drafts, of retrieve_and_summarize.py (default: imitations)")
    validation_drafts_file: str | None = flag(None, "drafts for hop 2 in validation (default: imitations)")
    found_weight: float | None = flag(None, "loss weight of evidence the draft used (missing: 1) [0.5]", at_least=0)
    group_by_document: bool = flag(False, "fill batches with queries about the same document, after any curriculum")
    supervision: str = flag("evidence", "positives: gold evidence, or a ROUGE oracle's", choices=("evidence", "rouge"))
    oracle_passages: int = flag(5, "maximum positives that the ROUGE oracle chooses", at_least=1)
    teacher: str | None = flag(None, "a summarizer that replaces the ROUGE oracle, or a reranker that is learned from")
    teacher_candidates: int = flag(20, "best BM25 passages that the teacher compares", at_least=1)
    teacher_temperature: float | None = flag(None, "the teacher's, of likelihoods [0.1] or scores [1]", above=0)
    guide: str | None = flag(None, "a retriever that excludes negatives it finds as similar to the query as evidence")
    top_k: int = flag(100, "passages per example in the hand-over files", at_least=1)
    trec_run: bool = flag(False, "also write rankings and evidence as TREC run and qrels files")

    def __post_init__(self):
        super().__post_init__()
        refuse(self, ("teacher_temperature", "teacher_candidates"), "without --teacher", where=not self.teacher)
        refuse(self, ("negatives_margin",), "without --mine_negatives_every", where=not self.mine_negatives_every)
        refuse(self, ("drafts_file", "found_weight"), "with --draft_share 0", where=not self.draft_share)
        refuse(self, ("bm25_weight",), "without --ranking hybrid", where=self.ranking != "hybrid")
        refuse(self, ("smooth_decay",), "without --smooth_window", where=not self.smooth_window)
        refuse(self, ("index",), "without --corpus_file", where=not self.corpus_file)
        refuse(self, ("supervision", "smooth_window", "group_by_document"), "in a corpus", where=self.corpus_file)
        if self.group_by_document and 0 < self.num_train_epochs <= self.curriculum_epochs:
            raise UsageError("--group_by_document has no effect in the epochs of --curriculum_epochs, which are all")


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a mistyped flag answer at once
    arguments = parse(RetrieveArguments, __doc__)

import collections
import copy
import itertools
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import record_function
from transformers import get_scheduler

from utils.cli.script import end_run, precision, record_run, run_script, start
from utils.data.hand_over import read_drafts, write_hand_over
from utils.data.kept import content_key
from utils.data.loading import describe_splits, load_splits
from utils.evaluation.hops import score_beside_bm25, score_hops, score_one_hop
from utils.models import contrastive, encoder
from utils.models.lora import add_adapters
from utils.models.settings import compile_layers, settle_packing
from utils.processes import wait_for_all
from utils.reporting import publishing, report, tracking
from utils.retrieval.corpus_search import make_search
from utils.retrieval.drafts import first_drafts, imitations
from utils.retrieval.pairs import Pair, Pairs, gold_passages
from utils.retrieval.reranking import load_scorer, remember_scores
from utils.retrieval.two_hops import search_hops
from utils.tables import values
from utils.training.batching import batch_shape, plan_epoch, to_device
from utils.training.exchange import average_gradients, exchanging
from utils.training.log import RunLog, score_table
from utils.training.loop_state import schedule_steps, warmup_steps
from utils.training.run import Run
from utils.training.sharding import prepare, whole_weights
from utils.training.step import is_sharded, parameter_groups, together

# ---- batches: queries, their positives and hard negatives


def collate_pairs(batch: list[Pair], dummy: bool, *, epoch: int, pairs: Pairs, retriever, max_tokens: int) -> dict:
    """A batch of queries and passages. Each epoch draws hop, positives and hard negatives of each pair anew."""
    queries, weights, drawn = zip(*(pairs.draw(pair, epoch) for pair in batch), strict=True)
    keys = list(dict.fromkeys(itertools.chain(*drawn)))
    evidence = pad_sequence([torch.tensor(pair.evidence) for pair in batch], batch_first=True, padding_value=-1)
    weights = pad_sequence([torch.from_numpy(of_pair) for of_pair in weights], batch_first=True)
    return {
        "texts": encoder.in_chunks(retriever, list(queries), [pairs.passage_tokens[key] for key in keys], max_tokens),
        "passage_keys": torch.full((len(keys),), -2) if dummy else torch.tensor(keys),
        "evidence_keys": torch.full((len(batch), 1), -1) if dummy else evidence,
        "evidence_weights": torch.zeros(len(batch), 1) if dummy else weights,
        **{name: torch.tensor([getattr(pair, name) for pair in batch]) for name in ("number", "is_distribution")},
    }


def plan_steps(lengths: list, groups: list, args, shape_of, epoch: int, without=(), shape: dict | None = None) -> list:
    """The pairs of each step of an epoch. A resumed epoch may have the batch `shape` of an earlier run."""
    shuffle = 0 if args.overfit_one_batch else epoch
    shape = shape or shape_of(epoch)
    steps = plan_epoch(lengths, seed=args.seed, epoch=shuffle, without=without, groups=groups, **shape)
    return [steps[0]] * len(steps) if args.overfit_one_batch else steps


# ---- training and validation


def train_micro_batch(batch: dict, count: int, *, accelerator, model, pairs, args) -> dict:
    """Adds this micro-batch's share of the gradient of the step's mean loss over `count` pairs, of all processes."""
    # counted and compared before the batch is on the GPU, for which the host would have to wait
    real, (tokens, slots) = contrastive.count_pairs(batch), encoder.count_tokens(pairs.model, batch["texts"])
    keys = contrastive.gather_keys(batch["passage_keys"])  # of all processes
    texts = contrastive.as_many_on_all(batch["texts"]) if is_sharded(accelerator) else batch["texts"]
    more = {"texts": texts, "keys": keys, "is_excluded": pairs.excluded(batch, keys)}
    batch = to_device({**batch, **more}, accelerator.device)
    texts, states, sides = batch["texts"], None, (len(batch["evidence_keys"]), len(batch["passage_keys"]))
    # each part is `together`: if memory runs out on one process, none waits for it in an exchange
    with record_function("forward"), accelerator.autocast(), together(accelerator):
        if len(texts) > 1 and args.gradient_cache_tokens:
            embeddings, states = contrastive.embed_without_graph(model, texts)
        else:
            embeddings = contrastive.embed(model, texts)
    queries, passages = embeddings.detach().split(sides)
    passages = contrastive.gather_passages(passages, len(keys))
    with record_function("backward"):
        with together(accelerator):
            with accelerator.autocast():
                loss, right = contrastive.contrastive_loss(
                    queries.requires_grad_(), passages, passage_keys=batch["keys"], temperature=args.temperature,
                    **{name: batch[name] for name in ("evidence_keys", "evidence_weights", "is_distribution",
                                                      "is_excluded")},
                    **encoder.matryoshka(pairs.model, args),
                )  # fmt: skip
            # times the number of processes, because gradients are averaged over them
            accelerator.backward(loss * accelerator.num_processes / count)
        gradient = torch.cat([queries.grad, contrastive.own_gradient(passages.grad, sides[1])])
        with together(accelerator), exchanging(model, overlaps=not states):
            if states:
                contrastive.backward_by_chunk(model, texts, gradient, states)
            else:
                embeddings.backward(gradient)
    counts = {"count": real, "examples": real, "tokens": tokens if real else 0, "slots": slots}  # a dummy has none
    return {"loss": loss.detach(), "right": right, **counts}


def make_retriever(documents: list, examples: list, args, accelerator):
    """A checkpoint, or a small encoder with a tokenizer trained on the training text."""
    options = {"attention_dropout": args.attention_dropout, "dropout": args.dropout}
    if args.model_name_or_path:
        retriever = encoder.load_retriever(args.model_name_or_path, **options, trust_remote_code=args.trust_remote_code)
    else:
        texts = itertools.chain.from_iterable((*(d.passages for d in documents), values(examples, "query")))
        retriever = encoder.build_small_encoder(texts, **options, key=content_key(examples))
    encoder.set_up(retriever, args)
    return settle_packing(retriever, accelerator, retriever.max_seq_length, is_trained=True)


def validate(examples: list, gold: list, bm25_scores: dict, search_now, *, poll) -> tuple:
    """Scores of the first hop, of the second (if any) as `hop2`, and of BM25; and texts. Raises Interrupted."""
    hops = list(search_now(examples))
    poll()
    scores = {**score_hops(examples, hops, gold), "bm25": bm25_scores}
    return scores, tracking.ranking_texts(examples, hops, gold)


def hand_over(run: Run, split: str, hops: Iterable, examples: Sequence, index) -> dict:
    """Writes what was found for a split, for stage 2. Returns scores of the test split, which nothing else looks at."""
    hops = list(hops) if split == "test" else hops  # made block by block
    if run.accelerator.is_main_process:
        run.log.say(f"wrote {write_hand_over(run.folder, split, examples, hops, run.args.top_k, run.args.trec_run)}")
    collections.deque(hops, maxlen=0)  # every process takes part in the search
    if split != "test":
        return {}
    scores = score_beside_bm25(examples, hops, index, run.args)
    run.note_test(scores, scored=scores["examples"], of=len(examples), need="gold passages")
    return {"test: BM25": scores["bm25"], "test: retriever": scores} if scores["examples"] else {}


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

    # ---- set-up, data and model

    accelerator = Accelerator(
        mixed_precision=precision(args, is_pretrained=bool(args.model_name_or_path)), log_with=args.report_to,
        project_dir=args.output_dir,
    )  # fmt: skip
    run_folder = start(accelerator, args)
    log = RunLog(accelerator, run_folder, args.log_format)
    splits = load_splits(args, run_folder / "rejected.jsonl" if accelerator.is_main_process else None)
    train, validation = splits["train"], splits["validation"]
    documents = list(dict.fromkeys(values(train, "document")))  # or the one corpus of all examples
    retriever = make_retriever(documents, train, args, accelerator)
    add_adapters(retriever, args, accelerator)
    log.say_model(retriever)
    make_scorer, of_reranker = load_scorer(args, accelerator=accelerator)
    index = make_search(documents, retriever, index=args.index, folder=run_folder / "embeddings",
                        top_k=max(args.top_k, of_reranker.get("rerank_top_k", 0)), language=args.language, say=log.say,
                        accelerator=accelerator)  # fmt: skip
    pairs = Pairs(args, train, documents, retriever, search=index.bm25_rankings, accelerator=accelerator)
    log.say(f"{describe_splits(splits)}; {pairs.describe()}")
    gold = gold_passages(validation, args)
    bm25_scores = score_one_hop(validation, index.bm25_rankings(validation, index.depth, say=log.say), gold)
    # what writes the drafts of the second hop in validation; None: they are imitations
    given = args.validation_drafts_file and partial(first_drafts, read_drafts(args.validation_drafts_file, validation))

    # ---- optimizer, schedule

    shape_of = partial(batch_shape, args, accelerator.num_processes, by_group=args.group_by_document)
    plan = partial(plan_steps, pairs.lengths(), pairs.first_keys(), args, shape_of)
    optimizer = torch.optim.AdamW(parameter_groups(retriever, args.weight_decay), lr=args.learning_rate, fused=True,
                                  betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon)  # fmt: skip
    # not prepared: accelerate would step it once for each process
    max_steps = schedule_steps(args, plan, shape_of)
    warmup = warmup_steps(args, max_steps)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, max_steps)
    # FSDP leaves each process a part of the weights: a whole model is kept to be saved
    whole = copy.deepcopy(retriever) if is_sharded(accelerator) and accelerator.is_main_process else retriever
    wait_for_all()  # some may have read data for longer than an exchange of parameters waits
    model, optimizer = prepare(accelerator, compile_layers(retriever, args, accelerator), optimizer)
    run = Run(accelerator, args, run_folder, log, model=model, optimizer=optimizer, scheduler=scheduler,
              max_steps=max_steps, warmup=warmup, plan=plan, shape=shape_of, data=pairs.digest())  # fmt: skip
    record_run(accelerator, args, run_folder, log.say, run.state.step)  # only now it is accepted
    if run.state.negatives:  # mined before the run was interrupted
        pairs.set_negatives(run.state.negatives)

    # ---- training

    encode_texts = partial(encoder.encode, retriever, accelerator=accelerator, poll=run.poll)
    score = make_scorer and make_scorer(poll=run.poll, say=log.say)
    search_now = partial(search_hops, index, encode_texts, vars(args) | of_reranker, score=score)
    validation_search = partial(search_now, write_drafts=given or imitations(validation, args),
                                score=score and remember_scores(score))  # fmt: skip
    validate_now = partial(validate, validation, gold, bm25_scores, validation_search, poll=run.poll)
    model.train()
    micro_step = partial(train_micro_batch, accelerator=accelerator, model=model, pairs=pairs, args=args)
    if run.state.validation_due:  # a signal interrupted it
        between_steps(run, validate_now, args)
    for epoch in itertools.count(run.state.epoch):
        if run.is_over():
            break
        if pairs.is_mining_due(epoch, run.state.mined_in):
            with run.interruptible():
                pairs.mine(partial(index.dense_rankings, encode=encode_texts))
                run.state.negatives, run.state.mined_in = pairs.negatives(), epoch
            if run.is_over():
                run.save()
                break
        collate_epoch = partial(collate_pairs, epoch=epoch, pairs=pairs, retriever=retriever,
                                max_tokens=args.gradient_cache_tokens)  # fmt: skip
        for micro_batches in run.loader(pairs, epoch, collate_epoch):
            count = run.begin_step(sum(map(contrastive.count_pairs, micro_batches)))  # of all processes
            sums = run.try_step(micro_step, micro_batches, count)  # forward and backward pass of each
            if sums is None:
                failure = "memory ran out"
            else:
                average_gradients(accelerator, model)
                gnorm = float(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf")))
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
        if whole is not retriever:
            whole.load_state_dict(weights)
        run.publish(lambda folder: encoder.save_pretrained(whole, folder, args))
    rows = {"BM25": scores["bm25"], "retriever, reranked" if score else "retriever": scores}
    rows |= {f"hop 2, {'given' if given else 'imitated'} drafts": scores["hop2"]} if "hop2" in scores else {}
    write_drafts = {"train": imitations(train, args), "validation": given}
    for split, examples in splits.items():
        rows |= hand_over(run, split, search_now(examples, write_drafts=write_drafts.get(split)), examples, index)
    log.say(score_table(rows, ("recall@1", "recall@5", "recall@10", "mrr@10", "ndcg@10", "gold_words@1024")))
    report.write_report(accelerator, run_folder, log.say)
    end_run(accelerator, publishing.present(run, "retriever", splits, scores))


if __name__ == "__main__":
    run_script(main)
