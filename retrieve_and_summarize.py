"""Retrieves, summarizes, retrieves again with that draft and summarizes again: a file of examples, or one document.

    accelerate launch retrieve_and_summarize.py --retriever outputs/retrieve --summarizer outputs/summarize
    python retrieve_and_summarize.py --document meeting.txt --query "What did they decide?"

Without --input_file or --document it reads the validation examples of the embedded data set. Every hop's passages,
scores and draft are in `predictions.<split>.jsonl`, which both training scripts read as examples; for one document the
summary goes to standard output and what led to it to standard error.
"""

from dataclasses import dataclass

from utils.arguments import (
    GenerationArguments,
    ReadingArguments,
    RunArguments,
    UsageError,
    check_at_least,
    check_choice,
    flag,
    parse,
    saved_arguments,
)


@dataclass
class HopArguments(ReadingArguments, RunArguments):
    """The hops."""

    output_dir: str = flag("outputs/hops", "the run folder: predictions with every hop, scores by hop, arguments")
    input_file: str | None = flag(
        None, "examples in any form that the training scripts read; references and evidence are scored where they are"
    )
    split: str = flag("validation", "names the predictions' file, and the part of a folder, Hub or embedded data set")
    max_examples: int | None = flag(None, "read the first N examples only")
    document: str | None = flag(None, "one document: a text file, or - for standard input")
    query: str = flag("", "with --document: the question")
    retriever: str = flag("outputs/retrieve", "what searches: a folder of train_retrieve.py, a Hub name, or bm25")
    summarizer: str = flag(
        "outputs/summarize",
        "what writes: a folder of train_summarize.py, a Hub name, or extract (sentences as they are)",
    )
    drafter: str | None = flag(
        None, "what writes the drafts to search with: extract, or a retriever that scores sentences [the summarizer]"
    )
    draft_words: int = flag(30, "words of an extracted draft at most")
    num_hops: int = flag(2, "rounds of retrieving and summarizing at most; fewer where one brings nothing new")
    top_k: int | None = flag(None, "passages that are read at each hop [those that the summarizer was trained on]")
    fusion: str | None = flag(None, "concat or fid [the summarizer's]")
    passage_order: str | None = flag(None, "order of the passages in the source: document or rank [the summarizer's]")
    max_source_length: int | None = flag(None, "tokens of a source or of each passage [the summarizer's]")
    num_beams: int | None = flag(None, "beams in generation; 1: greedy [as the summarizer was trained]")
    length_penalty: float | None = flag(None, "exponent of the length by which beam scores are divided [likewise]")
    min_new_tokens: int | None = flag(None, "tokens generated at least [likewise]")
    max_new_tokens: int | None = flag(None, "tokens generated at most [likewise]")
    no_repeat_ngram_size: int | None = flag(
        None, "n-grams of this size are generated once only; 0: no limit [likewise]"
    )
    per_device_eval_batch_size: int = flag(32, "examples that are worked on at a time on each device")

    def __post_init__(self):
        super().__post_init__()
        GenerationArguments.check_generation(self)
        check_at_least(1, self, "num_hops", "top_k", "draft_words", "per_device_eval_batch_size", "max_examples",
                       "passage_words")  # fmt: skip
        check_at_least(16, self, "max_source_length")
        for name, choices in {"fusion": ("concat", "fid"), "passage_order": ("document", "rank")}.items():
            if getattr(self, name) is not None:
                check_choice(f"--{name}", getattr(self, name), choices)
        if self.document and self.input_file:
            raise UsageError("--document and --input_file: give one of them")
        if self.query and not self.document:
            raise UsageError("--query is the question about --document; examples have their own")
        if "/" in self.split:
            raise UsageError(f"--split {self.split}: a name without / is wanted")


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a mistyped flag answer at once
    arguments = parse(HopArguments, __doc__)

import itertools
import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from utils.batching import eval_batches
from utils.data import Document, Example, Hop, hops_record, load_examples
from utils.drafts import extract_drafts
from utils.passages import split_document
from utils.retriever import encode, load_retriever, weights_key
from utils.rows import DataError, write_jsonl
from utils.search import bm25_rankings, fuse_hops, remember_passages, retriever_rankings, search_text
from utils.state import digest
from utils.summarizer import Sources, Summarizer, collate, load_model_and_tokenizer
from utils.training import Signals, end_run, precision, run_script, score_table, start

RANKED = 100  # passages of a hop's ranking that are written out


def main():
    args = arguments

    # ------------------------------------------------------------------------------------------------------------------
    # set-up

    of_retriever, of_summarizer = saved_arguments(args.retriever), saved_arguments(args.summarizer)
    models = [saved for name, saved in ((args.retriever, of_retriever), (args.summarizer, of_summarizer))
              if name not in ("bm25", "extract")]  # fmt: skip
    is_pretrained = any(not saved or saved.get("model_name_or_path") for saved in models)
    accelerator = Accelerator(mixed_precision=precision(args, is_pretrained))
    run_folder = start(accelerator, args)
    signals = Signals()

    def say(text: str) -> None:
        if accelerator.is_main_process:
            print(text, file=sys.stderr if args.document else sys.stdout, flush=True)

    if args.document:
        try:
            text = sys.stdin.read() if args.document == "-" else Path(args.document).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--document {args.document}: cannot be read as UTF-8 text: {error}") from error
        if not text.strip():
            raise DataError(f"--document {args.document}: is empty; there is nothing to summarize")
        document = Document("document", split_document(text, args.passage_words))
        examples, split = [Example("document", args.query, document, [], None, None, None)], "document"
    elif args.input_file:
        rejected = run_folder / "rejected.jsonl" if accelerator.is_main_process else None
        examples, split = load_examples(
            args.input_file, split=args.split, documents_file=args.documents_file, require_summary=False,
            max_examples=args.max_examples, rejected_file=rejected, **args.reading_options(),
        ), args.split  # fmt: skip
    else:
        from utils.sample import sample_examples

        examples, split = sample_examples(args.split, 50)[: args.max_examples], args.split

    # ------------------------------------------------------------------------------------------------------------------
    # models, with the settings that they were trained with

    for flag_name, name, script in (("retriever", args.retriever, "train_retrieve.py"),
                                    ("summarizer", args.summarizer, "train_summarize.py")):  # fmt: skip
        if name.startswith("outputs/") and not Path(name).is_dir():  # no name to ask the Hub for
            raise UsageError(f"--{flag_name} {name}: no such folder; {script} makes it, or name another")
    retriever = None if args.retriever == "bm25" else load_retriever(args.retriever).to(accelerator.device)
    summarizer = tokenizer = sentence_scorer = None
    if args.summarizer != "extract":
        model, tokenizer = load_model_and_tokenizer(args.summarizer, name="--summarizer")
        summarizer = Summarizer(model).to(accelerator.device).eval()
    reading = {"fusion": "concat", "max_source_length": 512, "passage_order": "document", "top_k": 5}
    generation = asdict(GenerationArguments())
    for settings in (reading, generation):
        for name, default in settings.items():
            own = getattr(args, name)
            settings[name] = of_summarizer.get(name, default) if own is None else own
    top_k = reading.pop("top_k")
    sources = Sources(tokenizer, **reading) if summarizer else None

    drafter = args.drafter or ("extract" if summarizer is None else "summarizer")
    if drafter == "extract":
        if retriever is None:
            raise UsageError("--retriever bm25 cannot choose sentences: name a --drafter, or a --summarizer")
        sentence_scorer = retriever
    elif drafter != "summarizer":
        sentence_scorer = load_retriever(drafter).to(accelerator.device)
    elif summarizer is None:
        raise UsageError("--drafter summarizer needs a --summarizer")

    # ------------------------------------------------------------------------------------------------------------------
    # hops

    spent = Counter()  # tokens, examples and seconds since it was last emptied

    def poll() -> None:
        if accelerator.num_processes == 1:  # several agree between two blocks
            signals.poll(accelerator)

    def encode_with(model):
        return remember_passages(
            lambda texts, kind: encode(model, texts, kind, accelerator=accelerator, alone=True, poll=poll, cost=spent)
        )

    def write(examples: list, read: list[list[int]]) -> list[str]:
        """A summary of each example from the passages that are read."""
        built = [sources.build(e.query, e.document, passages)[0] for e, passages in zip(examples, read, strict=True)]
        summaries = [""] * len(examples)
        batches = eval_batches([sum(map(len, s)) for s in built], batch_size=args.per_device_eval_batch_size)
        for numbers in batches:
            poll()
            batch = collate([built[i] for i in numbers], [[]] * len(numbers), tokenizer.pad_token_id)
            del batch["labels"]
            with accelerator.autocast():
                ids = summarizer.generate(**batch.to(accelerator.device), **generation, do_sample=False)
            spent["source_tokens"] += int(batch["attention_mask"].sum())
            spent["generated_tokens"] += int((ids[:, 1:] != tokenizer.pad_token_id).sum())
            for i, text in zip(numbers, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
                summaries[i] = text.strip()
        return summaries

    def run_hops(examples: list) -> tuple[list[list[Hop]], list[str], list[dict]]:
        """The hops of each example, its summary, and what was spent at each hop."""
        encode_once, score_sentences = encode_with(retriever), encode_with(sentence_scorer)
        searched: list[list] = [[] for _ in examples]  # each hop's own ranking
        hops: list[list[Hop]] = [[] for _ in examples]
        costs, searching = [], list(range(len(examples)))
        while searching and len(costs) < args.num_hops:
            began = time.perf_counter()
            asking = [examples[i] for i in searching]
            searches = [search_text(examples[i].query, hops[i][-1].draft if hops[i] else "") for i in searching]
            if retriever is None:
                ranked = bm25_rankings(asking, queries=searches)
            else:
                ranked = retriever_rankings(asking, encode_once, of_retriever, searches)
            spent["examples"] += len(searching)

            fused = {}
            for i, ranking in zip(searching, ranked, strict=True):
                searched[i].append(ranking)
                fused[i] = fuse_hops(searched[i])
                if hops[i] and {passage for passage, _ in fused[i][:top_k]} == set(hops[i][-1].read):
                    del fused[i]  # this hop brings nothing new: the search is over
            searching = list(fused)

            asking = [examples[i] for i in searching]
            read = [[passage for passage, _ in ranking[:top_k]] for ranking in fused.values()]
            if drafter == "summarizer":
                drafts = write(asking, read)
            else:
                drafts = extract_drafts(asking, read, score_sentences, args.draft_words)
            for i, passages, draft in zip(searching, read, drafts, strict=True):
                hops[i].append(Hop(draft, passages, fused[i][:RANKED]))
            if summarizer and drafter != "summarizer" and (not searching or len(costs) + 1 == args.num_hops):
                summaries = write(examples, [of_example[-1].read for of_example in hops])
            spent["seconds"] += time.perf_counter() - began
            costs.append(dict(spent))
            spent.clear()
        if not summarizer or drafter == "summarizer":
            summaries = [of_example[-1].draft for of_example in hops]
        return hops, summaries, costs

    # ------------------------------------------------------------------------------------------------------------------
    # blocks of whole documents, divided over the processes; those that are done are not done again

    by_document: dict = {}
    for number, example in enumerate(examples):
        by_document.setdefault(example.document, []).append(number)
    blocks: list[list[int]] = []
    for numbers in by_document.values():
        if not blocks or len(blocks[-1]) >= args.per_device_eval_batch_size:
            blocks.append([])
        blocks[-1] += numbers
    key = digest([
        sorted((name, value) for name, value in vars(args).items() if name not in ("output_dir", "deterministic")),
        [weights_key(model) for model in (retriever, summarizer, sentence_scorer) if model is not None],
        [of_retriever, reading, generation, top_k, accelerator.mixed_precision],
        *([example.id, example.query, example.summaries, example.document.passages] for example in examples),
    ])  # fmt: skip
    parts = run_folder / f"parts.{split}.{key}"
    if accelerator.is_main_process:
        for other in run_folder.glob(f"parts.{split}.*"):  # of other models, flags or examples
            if other != parts:
                shutil.rmtree(other)
        parts.mkdir(exist_ok=True)
    accelerator.wait_for_everyone()
    remaining = [number for number in range(len(blocks)) if not (parts / f"{number}.jsonl").exists()]
    if len(remaining) < len(blocks):
        say(f"{len(blocks) - len(remaining)} of {len(blocks)} parts were done before")
    accelerator.wait_for_everyone()  # before any of them writes another
    processes = accelerator.num_processes
    is_shown = accelerator.is_main_process and sys.stderr.isatty() and not args.document
    for first in tqdm(range(0, len(remaining), processes), disable=not is_shown):
        signals.poll(accelerator)
        if first + accelerator.process_index < len(remaining):
            number = remaining[first + accelerator.process_index]
            of_block = [examples[i] for i in blocks[number]]
            hops, summaries, costs = run_hops(of_block)
            records = map(hops_record, of_block, hops, summaries)
            write_jsonl(parts / f"{number}.jsonl", itertools.chain([{"costs": costs}], records))
    accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------------------------------------------------
    # all of them in the examples' order, and scores by hop

    if accelerator.is_main_process:
        records, costs = [None] * len(examples), [Counter() for _ in range(args.num_hops)]
        for number, numbers in enumerate(blocks):
            with (parts / f"{number}.jsonl").open(encoding="utf-8") as lines:
                for total, cost in zip(costs, json.loads(next(lines))["costs"], strict=False):
                    total.update(cost)
                for i, line in zip(numbers, lines, strict=True):
                    records[i] = json.loads(line)
        write_jsonl(run_folder / f"predictions.{split}.jsonl", records)
        if args.document:
            show(records[0], say)
        else:
            of_hops = [{"hop": hop, **scores_of(examples, records, hop), **dict(cost)}
                       for hop, cost in enumerate(costs, 1) if cost]  # fmt: skip
            (run_folder / f"hops.{split}.json").write_text(json.dumps(of_hops, indent=2) + "\n", encoding="utf-8")
            columns = tuple(name for name in SHOWN if all(name in row for row in of_hops))
            say(score_table({f"hop {row['hop']}": row for row in of_hops}, columns))
        say(f"wrote {run_folder / f'predictions.{split}.jsonl'}")
    end_run(accelerator)


SHOWN = ("recall@5", "ndcg@10", "gold_words@1024", "rouge1", "rouge2", "rougeL", "examples", "encoder_tokens",
         "source_tokens", "generated_tokens", "seconds")  # fmt: skip


def scores_of(examples: list, records: list[dict], number: int) -> dict:
    """What is known after a hop: of the passages found, and of the drafts, where there is evidence or a reference.

    An example whose search ended earlier counts with its last hop.
    """
    from utils.metrics import Rouge, score_rankings  # imports `evaluate`, which takes seconds

    hops = [record["hops"][:number][-1] for record in records]
    found = [[(entry["passage"], entry["score"]) for entry in hop["retrieved"]] for hop in hops]
    evidence = [example.evidence for example in examples]
    scores = score_rankings(examples, found, evidence) if any(evidence) else {}
    scores.pop("examples", None)
    if all(example.summaries for example in examples):
        is_last = all(len(record["hops"]) <= number for record in records)
        texts = [record["prediction"] if is_last else hop["draft"] for record, hop in zip(records, hops, strict=True)]
        scores |= Rouge().compute(predictions=texts, references=[example.summaries for example in examples])
    return scores


def show(record: dict, say) -> None:
    """One document's hops for a person to read, and its summary on standard output."""
    for number, hop in enumerate(record["hops"], 1):
        scores = {entry["passage"]: entry["score"] for entry in hop["retrieved"]}
        say(f"hop {number} read")
        for passage in hop["read"]:
            text = " ".join(record["passages"][passage].split())
            say(f"  {passage:>4}  {scores[passage]:.3f}  {text if len(text) <= 90 else text[:87] + '...'}")
        say(f"  draft: {hop['draft']}")
    print(record["prediction"], flush=True)


if __name__ == "__main__":
    run_script(main)
