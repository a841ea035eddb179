"""Reads and checks examples: training and validation splits, or the examples of one file."""

import itertools
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from utils.data.corpus import CorpusWords, load_corpus
from utils.data.documents import Documents, Source, is_unordered
from utils.data.examples import Corpus, Document, Example, blocks
from utils.data.fields import number_evidence, read_evidence, read_hops, read_ranking, read_summaries
from utils.data.kept import Examples, Keeper, keeper, kept_examples
from utils.data.layouts import own_layout
from utils.data.passages import split_document
from utils.data.rows import (
    POSITIVES,
    WITHOUT_SUMMARY,
    Row,
    build_all,
    read_identifier,
    read_rows,
    report_problems,
    shown,
    source_name,
)
from utils.data.trec import read_qrels
from utils.errors import BadRecord, DataError
from utils.files import digest, size_and_digest, write_json
from utils.tables import cached, values

PROBLEMS = "problems.json"
logger = logging.getLogger(__name__)


def load_splits(args, rejected_file: str | os.PathLike | None = None) -> dict[str, Examples]:
    """The examples of each split, as selected by `args` (`DataArguments`); without files, the embedded data set.

    The splits are "train", "validation" and, with `test_file`, "test". If `train_file` is a folder or a Hub name, it
    may hold the validation split too. Only test examples may lack a summary. With `corpus_file` all examples share one
    `Corpus`. `rejected_file` is as in `load_examples`.
    """
    for split in ("train", "validation", "test"):
        if getattr(args, f"{split}_qrels_file") and not args.corpus_file:
            raise DataError(f"--{split}_qrels_file needs --corpus_file, whose passages it names")
    for name in ("documents_file", "validation_documents_file", "test_documents_file"):
        if getattr(args, name) and args.corpus_file:
            raise DataError(f"--{name} cannot be used with --corpus_file; leave one of them out")
    for name in ("test_documents_file", "test_qrels_file", "max_test_examples"):
        if getattr(args, name) and not args.test_file:
            raise DataError(f"--{name} needs --test_file")
    if args.corpus_file and not args.train_file:
        raise DataError("--corpus_file needs --train_file, whose queries search it")
    if not args.train_file:
        for name in ("validation_file", "test_file", "documents_file", "validation_documents_file"):
            if getattr(args, name):
                raise DataError(f"--{name} needs --train_file")
        from utils.data.sample import sample_examples

        train = sample_examples("train", args.sample_documents, args.max_train_examples)
        validation = sample_examples("validation", max(1, min(50, args.sample_documents // 10)), args.max_eval_examples)
        return {"train": train, "validation": validation}
    has_splits = Path(args.train_file).is_dir() or not Path(args.train_file).exists()
    if not args.validation_file and not has_splits:
        raise DataError("--train_file needs --validation_file")
    options = args.reading_options() | {"rejected_file": rejected_file}
    of_retriever = ("supervision", "draft_share", "smooth_window")
    options |= {name: getattr(args, name) for name in of_retriever if hasattr(args, name)}
    if args.corpus_file:
        options["corpus"] = load_corpus(
            args.corpus_file, skip_bad_examples=args.skip_bad_examples, rejected_file=rejected_file
        )
    parts = {
        "train": (args.train_file, args.documents_file, args.max_train_examples),
        "validation": (
            args.validation_file or args.train_file,
            args.validation_documents_file or args.documents_file,
            args.max_eval_examples,
        ),
    }
    if args.test_file:
        parts["test"] = (args.test_file, args.test_documents_file or args.documents_file, args.max_test_examples)
    splits = {
        split: load_examples(
            path,
            split=split,
            documents_file=documents_file,
            qrels_file=getattr(args, f"{split}_qrels_file"),
            require_summary=split != "test",
            max_examples=max_examples,
            **options,
        )
        for split, (path, documents_file, max_examples) in parts.items()
    }
    is_main = os.environ.get("RANK", "0") == "0"  # warns once, however many processes were started
    if "test" in splits and is_main and (repeated := count_repeated(splits["train"], splits["test"])):
        logger.warning(
            "%d of %d test examples are training examples too, with the same query and document",
            repeated, len(splits["test"]),
        )  # fmt: skip
    return splits


def load_input(args, rejected_file: str | os.PathLike | None = None) -> tuple[Sequence[Example], str]:
    """The examples of retrieve_and_summarize.py and the name of their split: a file's, one, or the embedded ones.

    The one is about the text of `--document`, or asks `--corpus_file` a `--query`. `rejected_file` is as in
    `load_examples`.
    """
    corpus = None
    if args.corpus_file:
        corpus = load_corpus(args.corpus_file, skip_bad_examples=args.skip_bad_examples, rejected_file=rejected_file)
    if args.input_file:
        examples = load_examples(
            args.input_file, split=args.split, documents_file=args.documents_file, corpus=corpus,
            qrels_file=args.qrels_file, require_summary=False, max_examples=args.max_examples,
            rejected_file=rejected_file, **args.reading_options(),
        )  # fmt: skip
        return examples, args.split
    if corpus is not None:
        return [Example("query", args.query, corpus, [], None, None, None)], "query"
    if not args.document:
        from utils.data.sample import sample_examples

        return sample_examples(args.split, 50, args.max_examples), args.split
    try:
        text = sys.stdin.read() if args.document == "-" else Path(args.document).read_text(encoding="utf-8")
        text = text.removeprefix("\ufeff")  # a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--document {args.document}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(f"--document {args.document}: is empty; there is nothing to summarize")
    document = Document("document", split_document(text, args.passage_words))
    return [Example("document", args.query, document, [], None, None, None)], "document"


def count_repeated(train: Sequence[Example], test: Sequence[Example]) -> int:
    """Number of test examples whose query and document are also those of a training example."""
    documents = dict.fromkeys(itertools.chain(values(train, "document"), values(test, "document")))
    # the text itself: two files may give the same doc_id to different documents
    keys = {doc: doc.id if isinstance(doc, Corpus) else digest(doc.passages) for doc in documents}
    train_pairs, test_pairs = (
        zip(values(examples, "query"), (keys[document] for document in values(examples, "document")), strict=True)
        for examples in (train, test)
    )
    known = set(train_pairs)
    return sum(pair in known for pair in test_pairs)


def describe_splits(splits: dict[str, Sequence[Example]]) -> str:
    """How many examples each split has, for the log."""
    names = {split: "training" if split == "train" else split for split in splits}
    return ", ".join(f"{len(examples)} {names[split]} examples" for split, examples in splits.items())


def load_examples(
    path: str | os.PathLike,
    *,
    split: str = "train",
    documents_file: str | os.PathLike | None = None,
    corpus: Corpus | None = None,
    qrels_file: str | os.PathLike | None = None,
    dataset_config_name: str | None = None,
    id_column: str = "id",
    query_column: str = "query",
    document_column: str = "document",
    passages_column: str = "passages",
    summary_column: str = "summary",
    evidence_column: str = "evidence",
    doc_id_column: str = "doc_id",
    passage_words: int = 100,
    merge_passages: bool = False,
    require_summary: bool = True,
    supervision: str | None = None,
    draft_share: float = 0.0,
    smooth_window: int = 0,
    skip_bad_examples: bool = False,
    rejected_file: str | os.PathLike | None = None,
    max_examples: int | None = None,
) -> Examples:
    """Reads and checks the examples of a file (JSON Lines, JSON, CSV, Parquet), a folder or a Hub data set.

    Each record holds its own `passages` or, without them, a `document`. With `documents_file` records name a document
    of that file by doc_id instead. Examples about the same document share one `Document` object, so that work on a
    document is done once. With a `corpus` records hold no text: they need a query but no summary, and their evidence
    is a list of corpus ids; a record without evidence takes that of `qrels_file` (see `read_qrels`), by its id.

    A record may also have one of the layouts of `own_layout`, with marked positives. It then needs no summary to train
    the retriever, except for the ROUGE oracle and for drafts. `supervision`, `draft_share` and `smooth_window` are
    flags of train_retrieve.py.

    Raises DataError for unusable data. With `skip_bad_examples` bad records are left out and written with the reasons
    to `rejected_file`, which keeps the entries of other files. `split` and `dataset_config_name` matter only for
    folders and Hub names. Reading stops after `max_examples` good examples (None or 0: all).
    """
    if passage_words < 1:
        raise DataError(f"--passage_words is {passage_words}, but a passage needs at least 1 word")
    if corpus is not None and documents_file is not None:
        raise DataError("--documents_file cannot be used with --corpus_file; leave one of them out")
    if corpus is not None and merge_passages:
        raise DataError("--merge_passages cannot be used with --corpus_file, whose passages have ids; leave it out")
    if corpus is None and qrels_file is not None:
        raise DataError(f"{qrels_file}: evidence by the ids of a corpus needs --corpus_file")
    columns = {
        "id": id_column,
        "query": query_column,
        "document": document_column,
        "passages": passages_column,
        "summary": summary_column,
        "evidence": evidence_column,
        "doc_id": doc_id_column,
    }
    rejection = {"skip": skip_bad_examples, "rejected_file": rejected_file}

    def write(folder: Path) -> None:
        with keeper(folder) as keep:
            problems = _read_examples(
                path, keep, columns, split=split, documents_file=documents_file, corpus=corpus, qrels_file=qrels_file,
                config_name=dataset_config_name, passage_words=passage_words, merge_passages=merge_passages,
                require_summary=require_summary, max_examples=max_examples, supervision=supervision,
                draft_share=draft_share, smooth_window=smooth_window, **rejection,
            )  # fmt: skip
        write_json(folder / PROBLEMS, problems)

    # beside the files' content their names, which error messages and rejected records hold
    files = [str(file) for file in (path, documents_file, qrels_file) if file]
    states = [source_state(file, dataset_config_name) for file in files]
    key = [files, states, corpus and corpus.id, split, dataset_config_name, columns, passage_words, merge_passages,
           require_summary, skip_bad_examples, max_examples or 0, supervision, draft_share, smooth_window]  # fmt: skip
    is_new = []
    folder = cached("examples", None if None in states else key, lambda folder: is_new.append(write(folder)))
    if not is_new:  # bad records of an earlier run are reported again
        for file, of_file in json.loads((folder / PROBLEMS).read_text(encoding="utf-8")):
            report_problems(of_file, file, any_good=True, **rejection)
    return kept_examples(folder, corpus)


def source_state(path: str | os.PathLike, config_name: str | None) -> list | None:
    """Values that differ after the content of a file, folder or Hub data set has changed; None if they are unknown."""
    file = Path(path)
    try:
        files = sorted(file.rglob("*")) if file.is_dir() else [file]
        if state := [[str(each), size_and_digest(each)] for each in files if each.is_file()]:
            return state
        if file.exists():
            return None  # a pipe, which can be read once only
    except OSError:
        return None  # reading it, which comes next, reports what is wrong
    try:
        import datasets  # takes seconds

        return [datasets.load_dataset_builder(str(path), config_name).cache_dir]  # its name contains the revision
    except Exception:  # of many classes
        return None


def _read_examples(path, keep: Keeper, columns: dict[str, str], *, split, documents_file, corpus, qrels_file,
                   config_name, passage_words, merge_passages, require_summary, max_examples, supervision, draft_share,
                   smooth_window, **rejection):  # fmt: skip
    """Reads, checks and keeps documents and examples; returns the bad records of each file. See `load_examples`."""
    id_column, query_column, passages_column = columns["id"], columns["query"], columns["passages"]
    list_columns = (passages_column, columns["evidence"], "evidence_words", "retrieved", "hops")
    list_columns += ("positive_passages", "negative_passages")
    text_columns = (columns["summary"], columns["document"], "positive", "negative", "pos", "neg")
    documents = Documents(columns, passage_words, merge_passages, keep.add_document)
    own_text = documents_file is None and corpus is None
    require_summary = require_summary and corpus is None
    positives_suffice = supervision == "evidence" and not draft_share
    numbers: dict[str, int] = {}  # corpus id -> passage number
    qrels: dict[str, dict[str, int]] = {}
    problems = []

    if corpus is not None:
        numbers = {key: number for number, key in enumerate(itertools.chain.from_iterable(blocks(corpus.ids)))}
        whole_corpus = Source(0, CorpusWords(corpus), len(numbers), None)
        if qrels_file is not None:
            qrels = read_qrels(qrels_file, known_passages=numbers, problems=problems, **rejection)
    elif not own_text:
        rows = read_rows(documents_file, split, config_name, list_columns, text_columns)
        used = {field: columns[field] for field in ("doc_id", "document", "passages")}
        required = [("doc_id",), ("document", "passages")]
        documents_name = source_name(documents_file, split)
        _, bad = build_all(rows, documents_name, documents.add, used, required, **rejection)
        problems.append([documents_name, bad])

    first_places: dict[str, str] = {}

    def keep_example(row: Row) -> None:
        record, has_marks = own_layout(row.record, columns) if own_text else (row.record, False)
        if not own_text and "positive_passages" in record:
            flag = "--corpus_file" if documents_file is None else "--documents_file"
            raise DataError(f"{row.place}: 'positive_passages' are passages of the record's own; leave out {flag}")
        if (has_marks or is_unordered(record)) and (merge_passages or smooth_window):
            flag = "--merge_passages" if merge_passages else "--smooth_window"
            raise DataError(f"{row.place}: its passages are not neighbours in a text; leave out {flag}")
        # qrels need true ids: a row number could match one of their ids by chance
        example_id = read_identifier(record, id_column) if qrels or id_column in record else str(row.number)
        if example_id in first_places:
            raise BadRecord(f"'{id_column}' is '{example_id}', like {first_places[example_id]}; it must be unique")
        query = record.get(query_column, "")
        if not isinstance(query, str):
            raise BadRecord(f"'{query_column}' must be a string, not {shown(query)}")
        if has_marks and require_summary and not positives_suffice and columns["summary"] not in record:
            raise BadRecord(f"no '{columns['summary']}'; {WITHOUT_SUMMARY}")
        require_own = require_summary and not (has_marks and positives_suffice)
        summaries = read_summaries(record, columns["summary"], require_own)
        if corpus is not None:
            if not query.strip():
                raise BadRecord(f"no '{query_column}' or an empty one; without a query a corpus cannot be searched")
            source = whole_corpus
            record = number_evidence(record, columns["evidence"], numbers, qrels.get(example_id, {}))
        else:
            own_row = replace(row, record=record)
            source = documents.read(own_row, not has_marks) if own_text else documents.find(record, str(documents_file))
        evidence, evidence_words = read_evidence(record, columns["evidence"], passages_column, source)
        if has_marks and supervision == "evidence" and not evidence and split != "test":
            raise BadRecord("no passage is marked as relevant: a retriever cannot learn from it")
        retrieved = read_ranking(record, passages_column, source)
        hops = read_hops(record, passages_column, source)
        first_places[example_id] = row.place
        example = Example(example_id, query, None, summaries, evidence, evidence_words, retrieved, hops)
        keep.add_example(example, source.number)

    rows = read_rows(path, split, config_name, list_columns, text_columns)
    text_fields = ("document", "passages", *POSITIVES) if own_text else ()
    fields = ("id", "query", "summary", "evidence", "doc_id", *text_fields)
    used = {field: columns.get(field, field) for field in fields}
    required = [text_fields if own_text else ("doc_id",)]
    if corpus is not None:
        del used["doc_id"]
        required = [("query",), ("id",)] if qrels else [("query",)]
    if require_summary and not positives_suffice:
        required.append(("summary",))
    elif not require_summary:
        del used["summary"]  # a file to be summarized may lack the column that was named for the training file
    name = source_name(path, split)
    if split == "test":
        del used["evidence"]  # likewise
    _, bad = build_all(rows, name, keep_example, used, required, max_built=max_examples, **rejection)
    if qrels and not max_examples and not any(key in qrels for key in first_places):
        raise DataError(
            f"{qrels_file}: none of its queries, such as '{next(iter(qrels))}', is among the examples of {path}, such "
            f"as '{next(iter(first_places))}'; name the field of their ids with --id_column"
        )
    return [*problems, [name, bad]]
