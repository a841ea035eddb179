"""Retrieves, summarizes, retrieves again with that draft and summarizes again: a file of examples, or one document.

    accelerate launch retrieve_and_summarize.py --retriever outputs/retrieve --summarizer outputs/summarize
    python retrieve_and_summarize.py --document meeting.txt --query "What did they decide?"
    python retrieve_and_summarize.py --corpus_file corpus.jsonl --query "Why do mills need rivers?"

Without --input_file, --document or --query it reads the validation examples of the embedded data set. Every hop's
passages, scores and draft are in `predictions.<split>.jsonl`, which both training scripts read as examples; for one
document or question the summary goes to standard output and what led to it to standard error.
"""

from dataclasses import dataclass, fields

from utils.cli.arguments import (
    LanguageArguments,
    RankingOverrides,
    RerankerArguments,
    RunArguments,
    SearchArguments,
    flag,
    parse,
)
from utils.errors import UsageError, refuse


@dataclass
class HopArguments(LanguageArguments, SearchArguments, RerankerArguments, RankingOverrides, RunArguments):
    """The hops."""

    output_dir: str = flag("outputs/hops", "the run folder")
    input_file: str | None = flag(
        None, "examples, as the training scripts read them; summaries may be absent (default: the embedded data set)"
    )
    split: str = flag("validation", "split to read from a folder, Hub or embedded data; also names the output files")
    qrels_file: str | None = flag(None, "evidence of the examples in the corpus, in BEIR's or TREC's format")
    max_examples: int | None = flag(None, "use only the first N examples", at_least=1)
    document: str | None = flag(None, "summarize one document: a text file, or - for standard input")
    query: str = flag("", "the question about --document, or one question to --corpus_file")
    json: bool = flag(False, "for one document or question: print its record as JSON, and nothing else")
    retriever: str = flag("outputs/retrieve", "what searches: a folder of train_retrieve.py, a Hub name, or bm25")
    summarizer: str = flag(
        "outputs/summarize",
        "what writes: a folder of train_summarize.py, a Hub name, or extract (copies sentences)",
    )
    drafter: str | None = flag(
        None, "what writes the drafts: extract, or a retriever that scores sentences (default: the summarizer)"
    )
    draft_words: int | None = flag(None, "maximum words of an extracted draft (default: 30)", at_least=1)
    hop_weight: float | None = flag(
        None, "share of a later hop in the fused scores (default: the retriever's, else 0.5)", at_least=0, at_most=1
    )
    num_hops: int = flag(2, "maximum hops; the search stops early if a hop finds no new passage to read", at_least=1)
    top_k: int | None = flag(
        None, "passages read at each hop (default: the summarizer's setting, likewise below)", at_least=1
    )
    fusion: str | None = flag(None, "concat or fid", choices=("concat", "fid"))
    passage_order: str | None = flag(None, "order of the passages in the source", choices=("document", "rank"))
    max_source_length: int | None = flag(None, "maximum source tokens; with fid, per passage", at_least=16)
    per_device_eval_batch_size: int = flag(32, "examples per device and batch", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        others = [name for name in ("input_file", "corpus_file") if getattr(self, name)]
        if self.document and others:
            raise UsageError(f"--document and --{others[0]}: give only one of them")
        if self.query and (self.input_file or not (self.document or self.corpus_file)):
            raise UsageError("--query is only for --document or --corpus_file; examples have their own queries")
        if self.json and not (self.document or self.query):
            raise UsageError("--json prints one record: give --document, or one --query to --corpus_file")
        if self.corpus_file and not (self.input_file or self.query.strip()):
            raise UsageError("--corpus_file needs --input_file, whose queries search it, or one --query")
        if self.qrels_file and not (self.corpus_file and self.input_file):
            raise UsageError("--qrels_file needs --corpus_file, whose passages it names, and --input_file")
        if self.index != "flat" and (self.retriever == "bm25" or not self.corpus_file):
            raise UsageError(f"--index {self.index} needs a --corpus_file, and a --retriever other than bm25")
        if self.passage_order == "document" and self.corpus_file:
            raise UsageError("--passage_order document cannot be used with --corpus_file: its passages have no order")
        self.refuse_reading("without --input_file", where=not self.input_file)
        refuse(self, ("passage_words",), "without a text", where=not (self.input_file or self.document))
        refuse(self, ("max_examples", "split"), "with one document or question", where=self.document or self.query)
        reads = ("fusion", "passage_order", "max_source_length", *(of.name for of in fields(LanguageArguments)))
        refuse(self, reads, "with --summarizer extract", where=self.summarizer == "extract")
        writes_drafts = self.summarizer != "extract" and self.drafter in (None, "summarizer")
        refuse(self, ("draft_words",), "unless drafts are extracts (--drafter extract)", where=writes_drafts)
        refuse(self, ("hop_weight",), "with --num_hops 1", where=self.num_hops == 1)
        if "/" in self.split:
            raise UsageError(f"--split {self.split}: must not contain /")


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a mistyped flag answer at once
    arguments = parse(HopArguments, __doc__)

import json
import sys
import time
from collections import Counter
from functools import partial

from accelerate import Accelerator

from utils.cli.script import end_run, precision, record_run, run_script, start
from utils.data.examples import Hop
from utils.data.hand_over import hops_record
from utils.data.kept import content_key
from utils.data.loading import load_input
from utils.data.parts import read_parts, write_parts
from utils.evaluation.hops import score_hop
from utils.files import digest, write_jsonl
from utils.models.encoder import encode, load_retriever, weights_key
from utils.models.generation import describe_generation
from utils.models.settings import check_made, place, saved_settings
from utils.models.sources import Sources, collate, count_generated, decode
from utils.models.summarizer import default_source_length, load_model_and_tokenizer, set_up, sources_for, wrap
from utils.progress import progress, write
from utils.reporting.report import write_report
from utils.reporting.terminal import show
from utils.retrieval.bm25 import check_language, say_unmatched, unmatched
from utils.retrieval.corpus_search import make_search
from utils.retrieval.dense import remember_passages
from utils.retrieval.drafts import extract_drafts
from utils.retrieval.ranking import cut_ranking, fuse_hops, search_text
from utils.retrieval.reranking import describe_cost, load_scorer, rank_passages
from utils.tables import code_key
from utils.training.batching import eval_batches
from utils.training.log import score_table
from utils.training.signals import Signals

# ---- what searches and what writes


@dataclass
class Models:
    """What searches and what writes, with the settings that they were trained with."""

    retriever: object | None  # None: BM25
    reranker: object | None  # makes a scorer (see `load_scorer`)
    ranking: dict  # how the retriever ranks, and the reranker
    summarizer: object | None  # None: summaries are extracts
    sources: Sources | None
    top_k: int
    sentence_scorer: object | None  # a retriever that extracts drafts; None: the summarizer writes them

    def key(self) -> list:
        """What is another if weights or settings are."""
        weights = [weights_key(m) for m in (self.retriever, self.summarizer, self.sentence_scorer) if m is not None]
        writing = []
        if sources := self.sources:
            writing = [sources.rules(), self.summarizer.model.generation_config.to_diff_dict()]
        return [weights, self.ranking, writing, self.top_k]


def load_models(args, accelerator) -> Models:
    """The models that the flags name; a flag that is not set is what the summarizer was trained with."""
    check_made("--retriever", args.retriever, "train_retrieve.py")
    check_made("--summarizer", args.summarizer, "train_summarize.py")
    load = partial(load_retriever, trust_remote_code=args.trust_remote_code)
    is_trained = args.retriever != "bm25"
    ranking = args.ranking_settings(saved_settings(args.retriever) if is_trained else None)
    check_language(args.language, args.retriever, ranking if is_trained else {})
    if args.corpus_file and ranking["smooth_window"]:
        raise UsageError("--smooth_window cannot be used with --corpus_file, which has no neighbours; set it to 0")
    retriever = place(load(args.retriever, truncate_dim=args.truncate_dim), accelerator) if is_trained else None
    saved = saved_settings(args.summarizer) if args.summarizer != "extract" else {}
    settings = {"fusion": "concat", "max_source_length": None, "passage_order": "document", "top_k": 5,
                "prompt_template": None, "source_prefix": None, "source_lang": None, "target_lang": None}  # fmt: skip
    for name, default in settings.items():
        settings[name] = saved.get(name, default) if getattr(args, name) is None else getattr(args, name)
    summarizer = sources = scorer = None
    if args.summarizer != "extract":
        model, tokenizer = load_model_and_tokenizer(args.summarizer, None, "--summarizer", args.trust_remote_code)
        if settings["max_source_length"] is None:  # a model that was not trained here
            settings["max_source_length"] = default_source_length(model, args.max_new_tokens or 128)
        set_up(model, tokenizer, {**settings, **args.generation(), "max_target_length": 0})
        summarizer = place(wrap(model), accelerator).eval()
        sources = sources_for(summarizer, tokenizer, settings)
    drafter = args.drafter or ("extract" if summarizer is None else "summarizer")
    if drafter == "extract":
        if retriever is None:
            raise UsageError("--retriever bm25 cannot choose sentences: name a --drafter, or a --summarizer")
        scorer = retriever
    elif drafter != "summarizer":
        scorer = place(load(drafter), accelerator)
    elif summarizer is None:
        raise UsageError("--drafter summarizer needs a --summarizer")
    make_scorer, of_reranker = load_scorer(args, accelerator=accelerator)
    ranking = (ranking if is_trained else {"hop_weight": ranking["hop_weight"]}) | of_reranker
    return Models(retriever, make_scorer, ranking, summarizer, sources, settings["top_k"], scorer)


# ---- the hops of some examples, on one process


def write_summaries(examples: list, read: list[list[int]], models: Models, spent: Counter, *, batch_size: int,
                    accelerator, poll) -> tuple[list[str], list[list[int]]]:  # fmt: skip
    """Summaries of the passages in `read`, and which of them fit into the source; adds what it costs to `spent`."""
    sources, tokenizer, summaries = models.sources, models.sources.tokenizer, [""] * len(examples)
    built = [sources.build(e.query, e.document, passages) for e, passages in zip(examples, read, strict=True)]
    batches = eval_batches([sum(map(len, source)) for source, _ in built], batch_size=batch_size)
    for group in progress(batches, "generated", "summaries", total=len(built), size=len, is_own=True):
        poll()
        batch = collate([built[i][0] for i in group], [[]] * len(group), tokenizer.pad_token_id).to(accelerator.device)
        del batch["labels"]
        with accelerator.autocast():
            ids = models.summarizer.generate(**batch)
        spent["source_tokens"] += int(batch["attention_mask"].sum())
        spent["generated_tokens"] += count_generated(ids, models.summarizer.model.generation_config.eos_token_id)
        for i, text in zip(group, decode(tokenizer, ids), strict=True):
            summaries[i] = text
    return summaries, [[i for i in r if i in fit] for r, (_, fit) in zip(read, built, strict=True)]


def run_hops(examples: list, models: Models, search, *, args, accelerator, poll) -> tuple[list[dict], list[dict]]:
    """What was spent at each hop, and the record of each example: its hops and its summary."""
    spent = Counter()  # tokens, examples and seconds of this hop
    write = partial(write_summaries, models=models, spent=spent, batch_size=args.per_device_eval_batch_size,
                    accelerator=accelerator, poll=poll)  # fmt: skip
    encode_with = partial(encode, accelerator=accelerator, alone=True, poll=poll, cost=spent)
    encode_once = models.retriever and search.remember(partial(encode_with, models.retriever))
    score = models.reranker and models.reranker(poll=poll, alone=True, cost=spent)
    score_sentences = remember_passages(partial(encode_with, models.sentence_scorer))
    rankings: list[list] = [[] for _ in examples]  # each hop's own
    offered: list[set] = [set() for _ in examples]  # passages for the last draft
    hops: list[list[Hop]] = [[] for _ in examples]
    costs, searching = [], list(range(len(examples)))
    while searching and len(costs) < args.num_hops:
        began = time.perf_counter()
        asking = [examples[i] for i in searching]
        searches = [search_text(examples[i].query, hops[i][-1].draft if hops[i] else "") for i in searching]
        ranked = rank_passages(search, asking, encode_once, models.ranking, searches, score=score)
        spent["examples"] += len(searching)

        fused = {}
        for i, ranking in zip(searching, ranked, strict=True):
            rankings[i].append(ranking)
            fused[i] = fuse_hops(rankings[i], models.ranking["hop_weight"])
            best = {passage for passage, _ in fused[i][: models.top_k]}
            if hops[i] and best == offered[i]:
                del fused[i]  # this hop brings nothing new: the search is over
            offered[i] = best
        searching = list(fused)

        asking = [examples[i] for i in searching]
        read = [[passage for passage, _ in ranking[: models.top_k]] for ranking in fused.values()]
        if models.sentence_scorer is None:
            drafts, read = write(asking, read)
        else:
            drafts = extract_drafts(asking, read, score_sentences, args.draft_words or 30)
        for i, passages, draft in zip(searching, read, drafts, strict=True):
            hops[i].append(Hop(draft, passages, cut_ranking(fused[i], examples[i].document, models.top_k)))
        is_last = not searching or len(costs) + 1 == args.num_hops
        if models.summarizer and models.sentence_scorer and is_last:
            summaries, _ = write(examples, [of_example[-1].read for of_example in hops])
        spent["seconds"] += time.perf_counter() - began
        costs.append(dict(spent))
        spent.clear()
    if not (models.summarizer and models.sentence_scorer):
        summaries = [of_example[-1].draft for of_example in hops]
    return costs, list(map(hops_record, examples, hops, summaries))


# ---- all examples


def main():
    args = arguments
    saved = [saved_settings(name) for name in (args.retriever, args.summarizer) if name not in ("bm25", "extract")]
    is_pretrained = any(not settings or settings.get("model_name_or_path") for settings in saved)
    accelerator = Accelerator(mixed_precision=precision(args, is_pretrained))
    run_folder = start(accelerator, args)
    poll = Signals().poll
    is_one = bool(args.document or args.query)  # which is shown

    def say(text: str) -> None:
        if accelerator.is_main_process:
            write(text, sys.stderr if is_one else sys.stdout)

    examples, split = load_input(args, run_folder / "rejected.jsonl" if accelerator.is_main_process else None)
    models = load_models(args, accelerator)
    if models.summarizer:
        say(describe_generation(models.summarizer.model, models.sources.source_prefix))
    record_run(accelerator, args, run_folder)  # only now it is accepted
    language = args.language if models.retriever is None else models.ranking.get("language")
    search = make_search([examples[0].document], models.retriever, index=args.index, folder=run_folder / "embeddings",
                         top_k=max(models.top_k, models.ranking.get("rerank_top_k", 0)), language=language, say=say,
                         accelerator=accelerator, alone=True, trained_in=args.retriever)  # fmt: skip
    if models.retriever is not None:
        search.prepare(partial(encode, models.retriever, accelerator=accelerator, poll=poll))
    decide_nothing = ("output_dir", "cache_dir", "deterministic", "json")
    key = digest([
        sorted((name, value) for name, value in vars(args).items() if name not in decide_nothing),
        [*models.key(), accelerator.mixed_precision, content_key(examples), code_key(__file__)],
    ])  # fmt: skip
    blocks, parts = search.blocks(examples, args.per_device_eval_batch_size), run_folder / f"parts.{split}.{key}"
    poll_within = poll if accelerator.num_processes == 1 else lambda: None  # several agree between two blocks only
    work = partial(run_hops, models=models, search=search, args=args, accelerator=accelerator, poll=poll_within)
    write_parts(parts, examples, blocks, work, say=say, accelerator=accelerator, poll=poll)

    if accelerator.is_main_process:
        records, costs = read_parts(parts, blocks, args.num_hops)
        write_jsonl(run_folder / f"predictions.{split}.jsonl", progress(records, "wrote", "predictions"))
        if args.retriever == "bm25":
            first = [[(0, best["score"]) for best in record["hops"][0]["retrieved"][:1]] for record in records]
            first = search.bm25_rankings(examples, 1) if models.reranker else first  # its scores are others
            say_unmatched(unmatched(examples, first), len(examples), args.language, say)
        if is_one:
            show(records[0], as_json=args.json)
        else:
            of_hops = [{"hop": hop, **score_hop(records, hop), **dict(cost)}
                       for hop, cost in enumerate(costs, 1) if cost]  # fmt: skip
            (run_folder / f"hops.{split}.json").write_text(json.dumps(of_hops, indent=2) + "\n", encoding="utf-8")
            if scored := of_hops[0].get("with_reference"):
                say(f"ROUGE is of the {scored} of {len(examples)} examples that have a reference")
            columns = tuple(name for name in SHOWN if any(name in row for row in of_hops))
            say(score_table({f"hop {row['hop']}": row for row in of_hops}, columns))
            if models.reranker:
                say(describe_cost(of_hops))
        if cuts := models.sources and models.sources.cuts(0):
            say(cuts if accelerator.num_processes == 1 else f"of what process 0 read: {cuts}")
        say(f"wrote {run_folder / f'predictions.{split}.jsonl'}")
        write_report(accelerator, run_folder, say)
    end_run(accelerator)


SHOWN = ("recall@5", "new_evidence", "gold_words@1024", "rouge2", "rougeL", "examples", "encoder_tokens",
         "source_tokens", "seconds")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
