"""Reading, checking and writing examples."""

import gzip
import json
import lzma
import os
import sys

import pytest
from conftest import one_hop

from train_retrieve import RetrieveArguments
from train_summarize import SummarizeArguments
from utils.cli.arguments import CorpusArguments
from utils.data.corpus import load_corpus
from utils.data.examples import Corpus, Document, Hop, blocks
from utils.data.hand_over import have_rankings, hops_record, write_retrieved
from utils.data.kept import content_key
from utils.data.loading import load_examples, load_splits
from utils.data.passages import split_document
from utils.data.trec import read_qrels
from utils.errors import DataError
from utils.files import write_jsonl

GOOD = {"id": "a", "query": "why?", "passages": ["One two.", "Three."], "summary": "short", "evidence": [1]}
REMEDY = "fix the lines, or pass --skip_bad_examples to skip them"


def write(path, *lines):
    """Writes lines: dicts as JSON, strings and bytes as they are."""
    with open(path, "wb") as file:
        for line in lines:
            line = json.dumps(line) if isinstance(line, dict | list) else line
            file.write((line.encode() if isinstance(line, str) else line) + b"\n")
    return path


def error_of(path, **options):
    with pytest.raises(DataError) as caught:
        load_examples(path, **options)
    return str(caught.value)


def fields_of(examples):
    return [
        (e.id, e.query, e.document.id, e.document.passages, e.summaries, e.evidence, e.evidence_words) for e in examples
    ]


# ---- good input


def test_fields_are_read_and_defaults_filled_in(tmp_path):
    path = write(
        tmp_path / "d.jsonl", {**GOOD, "id": 7, "evidence": [1, 0, 1]}, "", {"document": "X y.", "summary": ["s", "t"]}
    )
    first, second = load_examples(path)
    assert (first.id, first.query, first.summaries) == ("7", "why?", ["short"])
    assert (first.evidence, first.evidence_words, first.retrieved) == ([0, 1], [2, 1], None)
    assert (second.id, second.query, second.summaries) == ("3", "", ["s", "t"])
    assert (second.evidence, second.evidence_words, second.document.passages) == (None, None, ["X y."])


@pytest.mark.parametrize(
    "ending", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".json", ".array.json", ".csv", ".csv.gz", ".parquet"]
)
def test_every_kind_of_file_gives_the_same_examples(tmp_path, ending):
    records = [GOOD, {**GOOD, "id": "NA", "query": 'a "quoted",\nlonger one', "evidence": None}]
    path = tmp_path / f"data{ending}"
    opener = {"gz": gzip.open, "xz": lzma.open}.get(ending.rsplit(".", 1)[-1], open)
    if "csv" in ending:
        import csv

        with opener(path, "wt", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, GOOD)
            writer.writeheader()
            for record in records:
                lists = {
                    name: json.dumps(record[name]) for name in ("passages", "evidence") if record[name] is not None
                }
                writer.writerow(record | lists)
    elif ending == ".parquet":
        import datasets

        datasets.Dataset.from_list(records).to_parquet(path)
    else:
        with opener(path, "wt", encoding="utf-8") as file:
            file.write(json.dumps(records) if "array" in ending else "\n".join(map(json.dumps, records)))
    first, second = load_examples(path)
    assert fields_of([first])[0][:2] == ("a", "why?") and first.evidence == [1]
    assert (second.id, second.query, second.evidence) == ("NA", 'a "quoted",\nlonger one', None)
    assert first.document is second.document


def test_a_folder_is_read_by_split(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    write(tmp_path / "validation.jsonl", {**GOOD, "id": "v"})
    assert [e.id for e in load_examples(tmp_path, split="validation")] == ["v"]


def test_a_folder_with_another_delimiter_is_named_with_the_remedy(tmp_path):
    write(tmp_path / "train.csv", "document;summary", "x;s", "y;t")
    assert "in a folder the delimiter must be a comma" in error_of(tmp_path)
    assert len(load_examples(tmp_path / "train.csv")) == 2


def test_column_flags_adapt_other_names(tmp_path):
    path = write(tmp_path / "d.jsonl", {"article": "Some text.", "highlights": "h", "key": 1})
    (example,) = load_examples(path, document_column="article", summary_column="highlights", id_column="key")
    assert (example.id, example.document.passages, example.summaries) == ("1", ["Some text."], ["h"])


def test_byte_order_mark_blank_lines_nul_and_nan_are_tolerated(tmp_path):
    lines = [
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
        b"  ",
        b'{"document": "a\\u0000b \\ud83d\\ude00", "summary": "s", "query": NaN}',
    ]
    first, second = load_examples(write(tmp_path / "d.jsonl", *lines))
    assert first.id == "a" and second.query == "" and second.document.passages == ["a\0b \U0001f600"]


def test_repeated_documents_share_one_object_in_the_self_contained_layout(tmp_path):
    text = {"document": "Same text. " * 30, "summary": "s"}
    path = write(tmp_path / "d.jsonl", text, text, GOOD, {**GOOD, "id": "b"}, {**GOOD, "id": "c", "doc_id": "d1"})
    one, two, three, four, five = load_examples(path)
    assert one.document is two.document and three.document is four.document
    assert five.document is not three.document and five.document.id == "d1"
    assert load_examples(path)[0].document.id == one.document.id


def test_a_repeated_document_is_split_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "utils.data.documents.split_document", lambda text, words: calls.append(text) or split_document(text, words)
    )
    load_examples(write(tmp_path / "d.jsonl", *[{"document": "Same text.", "summary": "s"}] * 3))
    assert calls == ["Same text."]


def test_documents_file_is_joined_and_split_once(tmp_path):
    documents = write(
        tmp_path / "docs.jsonl", {"doc_id": 1, "document": "A b. C d."}, {"doc_id": "2", "passages": ["p", "q"]}
    )
    record = {"query": "", "summary": "s"}
    path = write(
        tmp_path / "d.jsonl", *({**record, "doc_id": i} for i in ("1", 1)), {**record, "doc_id": 2, "evidence": [1]}
    )
    one, two, three = load_examples(path, documents_file=documents, passage_words=2)
    assert one.document is two.document and one.document.passages == ["A b.", "C d."]
    assert three.document.id == "2" and three.evidence == [1]


def test_max_examples_does_not_read_bad_lines_beyond(tmp_path):
    path = write(tmp_path / "d.jsonl", GOOD, {**GOOD, "id": "b"}, "broken")
    assert [e.id for e in load_examples(path, max_examples=2)] == ["a", "b"]
    assert "d.jsonl:3" in error_of(path, max_examples=3)


def test_summary_may_be_missing_where_none_is_required(tmp_path):
    path = write(tmp_path / "d.jsonl", {"document": "x"}, {"document": "y", "summary": ""})
    assert [e.summaries for e in load_examples(path, require_summary=False, summary_column="summary")] == [[], []]
    assert len(load_examples(path, require_summary=False, summary_column="highlights")) == 2


def test_evidence_is_renumbered_and_its_words_counted_by_merging(tmp_path):
    path = write(
        tmp_path / "d.jsonl", {**GOOD, "passages": ["a b", "c", "D e f. G h i.", "j"], "evidence": [1, 2, 3, 1]}
    )
    (example,) = load_examples(path, merge_passages=True, passage_words=4)
    assert example.document.passages == ["a b\nc", "D e f.", "G h i.\nj"]
    assert (example.evidence, example.evidence_words) == ([0, 1, 2], [1, 3, 4])


# ---- tables as spreadsheets and scripts write them

TABLE = 'id,query,document,summary\na,"who, why?","One ""two"".\nThree.",s\nb,q,Four.,t\n'


def table_of(path):
    return [(e.id, e.query, "\n".join(e.document.passages), e.summaries) for e in load_examples(path)]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "sep=;", "sep=|"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_delimiter_encoding_and_line_ends_of_a_table_are_recognized(tmp_path, ending, encoding, delimiter, line_end):
    import csv

    path = tmp_path / f"d{ending}"
    with (gzip.open if ending.endswith("gz") else open)(path, "wt", encoding=encoding, newline="") as file:
        file.write(delimiter + line_end if "sep=" in delimiter else "")
        rows = csv.writer(file, delimiter=delimiter[-1], lineterminator=line_end)
        rows.writerows(csv.reader(TABLE.splitlines(keepends=True)))
    assert table_of(path) == [("a", "who, why?", 'One "two".\nThree.', ["s"]), ("b", "q", "Four.", ["t"])]


def test_a_table_may_have_one_column_unnamed_columns_and_cells_of_any_length(tmp_path):
    path = write(tmp_path / "d.csv", "document", '"a, b; c"', "d;e")
    assert [e.document.passages for e in load_examples(path, require_summary=False)] == [["a, b; c"], ["d;e"]]
    path = write(tmp_path / "d.csv", "", ",document,summary,,", "0,x,s,,", "", f"1,{'long ' * 100_000},s,,")
    assert [len(e.document.passages) for e in load_examples(path)] == [1, 1000]


def test_json_lines_in_utf_16_are_read(tmp_path):
    for name, text in (("d.jsonl", json.dumps(GOOD)), ("d.json", json.dumps([GOOD])), ("e.json", json.dumps(GOOD))):
        (tmp_path / name).write_text(f"{text}\r\n", encoding="utf-16")
        assert fields_of(load_examples(tmp_path / name)) == fields_of(load_examples(write(tmp_path / "g.jsonl", GOOD)))
    (tmp_path / "d.jsonl").write_bytes((json.dumps(GOOD) + "\n").encode("utf-16")[:-1])
    assert "d.jsonl: damaged after record 0: 'utf-16" in error_of(tmp_path / "d.jsonl")


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_list_of_references_in_a_cell_is_a_list_and_text_in_brackets_stays_text(tmp_path, ending):
    cells = ['["one", "two"]', "[1] is cited", "[7]", "[laughter]", '[{"a": 1}]', "[applause] Yes."]
    records = [{"document": "x", "summary": cell} for cell in cells]
    path = tmp_path / f"d{ending}"
    if ending == ".parquet":
        import datasets

        datasets.Dataset.from_list(records).to_parquet(path)
    else:
        write(path, "document,summary", *('x,"' + cell.replace('"', '""') + '"' for cell in cells))
    assert [e.summaries for e in load_examples(path)] == [["one", "two"], *([cell] for cell in cells[1:])]


@pytest.mark.parametrize("cell", ["['one', 'two']", "['one'\n 'two']", "[\"it's\" 'two']"])
def test_a_list_that_python_or_numpy_wrote_is_refused(tmp_path, cell):
    quoted = '"' + cell.replace('"', '""') + '"'
    message = error_of(write(tmp_path / "d.csv", "document,summary", "x,s", f"x,{quoted}"))
    assert "d.csv: row 2: 'summary' is a list as text" in message and "JSON list" in message
    message = error_of(write(tmp_path / "d.csv", "document,summary", "x,s", f"{quoted},s"))
    assert "d.csv: row 2: 'document' is a list, " in message and "write it to 'passages', as JSON" in message


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "rows, begin, how",
    [
        (["a,q,x,s", 'b,q,"x,s', "c,q,x,s"], 3, "never ends"),
        (["a,q,x,s", 'b,q,"x,s', 'c,q,"x",s', "d,q,x,s"], 3, "ends in line 4, but its cell does not"),
        (['a,q,"x', 'y","s', "b,q,x,s", 'c,q,"x",s'], 3, "ends in line 5, but its cell does not"),
    ],
)
def test_an_open_quotation_swallows_no_rows(tmp_path, rows, begin, how, skip):
    path = write(tmp_path / "d.csv", "id,query,document,summary", *rows)
    message = error_of(path, skip_bad_examples=skip)
    assert message.startswith(f"{path}:{begin}: the quotation that begins in line {begin} {how}; nothing was loaded: ")


def test_a_wrong_quotation_within_a_line_is_a_bad_row(tmp_path):
    path = write(
        tmp_path / "d.tsv", "id\tdocument\tsummary", "a\tx\ts", 'b\t"Yes" he said.\ts', "c\ty\tt", 'd\tz\t"cut'
    )
    message = error_of(path)
    assert f"{path}: row 2: the quotation that begins in line 3 ends in line 3, but its cell does not" in message
    assert f"{path}: row 4: the quotation that begins in line 5 never ends; close it" in message
    rejected = tmp_path / "r.jsonl"
    assert [e.id for e in load_examples(path, skip_bad_examples=True, rejected_file=rejected)] == ["a", "c"]
    assert [json.loads(line)["text"] for line in rejected.read_text().splitlines()] == [
        'b\t"Yes" he said.\ts\n',
        'd\tz\t"cut\n',
    ]


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"document,summary\nx,s\ncaf\xe9,s\n", "row 2: invalid UTF-8: byte 0xe9; it is '\u00e9' in Windows-1252"),
        (
            b"document,caf\xe9\nx,s\n",
            ":1: invalid UTF-8: byte 0xe9; it is '\u00e9' in Windows-1252, which Excel writes",
        ),
        (
            "document,summary\nx,s\n".encode("utf-16-le"),
            ":1: holds NUL characters, as UTF-16 without a byte order mark",
        ),
        (b"document,summary,summary\nx,s,t\n", ":1: several columns are named 'summary'; rename or remove all but one"),
        (b'sep=;\n"document;summary\nx;s\n', ":2: the quotation that begins in line 2 never ends"),
        (b"document,summary,evidence\nx,s,\nfirst line\nsecond line,s,\n", "row 2: has 2 fewer cells than the header"),
        (b"document;summary\nx;y;s\nx;s\n", "row 1: has 1 more cells than the header has columns; quote text that hol"),
        (b"document,summary\n", "d.csv: is empty"),
    ],
)
def test_a_table_that_cannot_be_read_is_named_with_the_remedy(tmp_path, content, problem):
    (tmp_path / "d.csv").write_bytes(content)
    assert problem in error_of(tmp_path / "d.csv")


# ---- the hand-over file


def test_retrieved_file_gives_the_examples_back(tmp_path):
    several = {
        **GOOD,
        "id": "b",
        "summary": ["s", "é"],
        "evidence": [0],
        "passages": ["a b", "c", "d e f g"],
        "doc_id": "x",
    }
    path = write(tmp_path / "d.jsonl", GOOD, several, {"document": "T u. " * 90, "summary": "s"})
    for merge in (False, True):
        examples = load_examples(path, merge_passages=merge, passage_words=2)
        write_retrieved(tmp_path / "r.jsonl", examples, one_hop([[(1, 0.123456789), (0, -2)], [], [(2, 1e-9)]]))
        again = load_examples(tmp_path / "r.jsonl")
        assert fields_of(again) == fields_of(examples)
        assert [e.retrieved for e in again] == [[(1, 0.123457), (0, -2.0)], [], [(2, 1e-9)]]
    first = json.loads((tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["summary"] == "short" and first["retrieved"][0] == {"passage": 1, "score": 0.123457}


def test_rankings_are_those_of_all_examples_or_of_none(tmp_path):
    ranked = {**GOOD, "retrieved": [{"passage": 1, "score": 2.0}]}
    (bare,) = load_examples(write(tmp_path / "b.jsonl", GOOD))
    first, second = load_examples(write(tmp_path / "d.jsonl", ranked, {**ranked, "id": "b"}))
    assert not have_rankings({"train": [bare], "validation": [bare]})
    assert have_rankings({"train": [first, second], "validation": [first]})
    for train, validation in (([first, bare], [second]), ([first, second], [bare]), ([bare], [first, second])):
        with pytest.raises(DataError, match=r"1 of 3 examples \(train, validation\) have no 'retrieved', such as 'a'"):
            have_rankings({"train": train, "validation": validation})
    with pytest.raises(DataError, match=r"1 of 3 examples \(train, validation, test\) have no 'retrieved'"):
        have_rankings({"train": [first], "validation": [second], "test": [bare]})


def test_hops_are_read_back_as_they_were_written(tmp_path):
    (example,) = load_examples(write(tmp_path / "d.jsonl", GOOD))
    hops = [Hop("first", [1], [(1, 0.5), (0, 0.25)]), Hop("second", [0, 1], [(0, 0.75), (1, 0.5)])]
    write_jsonl(tmp_path / "h.jsonl", [hops_record(example, hops, "the summary")])
    (again,) = load_examples(tmp_path / "h.jsonl")
    assert (again.hops, again.retrieved) == (hops, [(0, 0.75), (1, 0.5)])
    assert fields_of([again]) == fields_of([example])
    assert json.loads((tmp_path / "h.jsonl").read_text(encoding="utf-8"))["prediction"] == "the summary"


def test_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    write_jsonl(tmp_path / "f.jsonl", [{"a": "é"}])

    def records():
        yield {"a": 1}
        raise KeyError("broken off")

    with pytest.raises(KeyError):
        write_jsonl(tmp_path / "f.jsonl", records())
    assert (tmp_path / "f.jsonl").read_bytes() == '{"a": "é"}\n'.encode()
    assert os.listdir(tmp_path) == ["f.jsonl"]
    (example,) = load_examples(write(tmp_path / "d.jsonl", GOOD))
    with pytest.raises(ValueError, match="score of passage 0 is nan"):
        write_retrieved(tmp_path / "f.jsonl", [example], one_hop([[(0, float("nan"))]]))


# ---- a corpus that all examples search

ROWS = [
    {"_id": "d1", "title": "Mills", "text": "Mills grind wheat."},
    {"_id": 2, "title": "", "text": "Rivers drive mills."},
    {"_id": "d 3", "text": "Bakers want flour.", "metadata": {"url": "x"}},
]
PASSAGES = ["Mills Mills grind wheat.", "Rivers drive mills.", "Bakers want flour."]
BEIR = {"id_column": "_id", "query_column": "text"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where corpora are kept, apart for each test."""
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def corpus(tmp_path):
    return load_corpus(write(tmp_path / "corpus.jsonl", *ROWS))


def corpus_error(path, **options):
    with pytest.raises(DataError) as caught:
        load_corpus(path, **options)
    return str(caught.value)


def test_corpus_is_read_in_beirs_layout(corpus):
    assert list(corpus.passages) == PASSAGES and list(corpus.ids) == ["d1", "2", "d 3"]
    assert [corpus.passage_id(number) for number in range(3)] == ["d1", "2", "d 3"]
    assert isinstance(corpus, Document) and hash(corpus)  # stands where a document stands
    assert Document("doc", ["a", "b"]).passage_id(1) == "doc#1"


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.xz", ".json", ".csv", ".parquet", "folder"])
def test_every_kind_of_file_gives_the_same_corpus(tmp_path, corpus, ending):
    path = tmp_path / f"c{ending}"
    text = "\n".join(map(json.dumps, ROWS))
    if ending == "folder":
        path.mkdir()
        write(path / "part-0.jsonl", ROWS[0])
        write(path / "part-1.jsonl", {**ROWS[1], "_id": "2"}, {"_id": "d 3", "title": None, "text": PASSAGES[2]})
    elif ending == ".csv":
        path.write_text(
            "_id,title,text\nd1,Mills,Mills grind wheat.\n2,,Rivers drive mills.\nd 3,,Bakers want flour.\n"
        )
    elif ending == ".parquet":
        import datasets

        columns = [{"_id": str(row["_id"]), "title": row.get("title"), "text": row["text"]} for row in ROWS]
        datasets.Dataset.from_list(columns).to_parquet(path)
    else:
        opener = {"gz": gzip.open, "xz": lzma.open}.get(ending.rsplit(".", 1)[-1], open)
        with opener(path, "wt", encoding="utf-8") as file:
            file.write(f"[{','.join(map(json.dumps, ROWS))}]" if ending == ".json" else text)
    again = load_corpus(path)
    assert (list(again.passages), list(again.ids), again.id) == (PASSAGES, list(corpus.ids), corpus.id)


def test_corpus_stays_on_the_disk_and_is_read_in_parts(tmp_path):
    texts = [f"{number} " + "word " * 200 for number in range(9000)]
    corpus = load_corpus(write(tmp_path / "c.jsonl", *({"_id": n, "text": text} for n, text in enumerate(texts))))
    import pyarrow

    allocated = pyarrow.total_allocated_bytes()
    again = load_corpus(tmp_path / "c.jsonl")
    assert again.passages[8999] == texts[8999].strip() and again.passages[4:6] == [text.strip() for text in texts[4:6]]
    assert pyarrow.total_allocated_bytes() - allocated < 2**20  # of 9 MB
    assert [len(block) for block in blocks(corpus.passages, 4000)] == [4000, 4000, 1000]


def test_corpus_is_built_once_and_again_when_the_file_changes_or_what_is_kept_is_damaged(tmp_path, monkeypatch):
    from utils.data.corpus import _build_corpus
    from utils.files import cache_folder

    builds, build = [], _build_corpus
    monkeypatch.setattr("utils.data.corpus._build_corpus", lambda *args: builds.append(1) or build(*args))
    path = write(tmp_path / "c.jsonl", *ROWS)
    first = load_corpus(path)
    assert load_corpus(path).id == first.id and len(builds) == 1
    folder = next(path for path in cache_folder().glob("corpus_*") if path.is_dir())
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-9])
        assert list(load_corpus(path).passages) == PASSAGES
    assert len(builds) == 3
    kept = (folder / "passages.arrow").read_bytes()
    write(path, *ROWS[:2])
    assert load_corpus(path).id != first.id and len(builds) == 4
    (other,) = (each for each in cache_folder().glob("corpus_*") if each.is_dir() and each != folder)
    (other / "passages.arrow").write_bytes(kept)  # whole in itself
    assert list(load_corpus(path).passages) == PASSAGES[:2] and len(builds) == 5
    assert not list(cache_folder().glob(".*"))


CORPUS_LINES = {
    "id missing": ({"text": "x"}, "no '_id'; the record has text"),
    "id type": ({"_id": 1.5, "text": "x"}, "'_id' must be a string or a whole number, not 1.5"),
    "id twice": ({"_id": "d1", "text": "x"}, "'_id' is 'd1', like {path}:1; it must be unique"),
    "text missing": ({"_id": "x", "body": "x"}, "no 'text'; the record has _id, body"),
    "text empty": ({"_id": "x", "title": "", "text": " "}, "'text' is empty, and so is 'title'"),
    "text type": ({"_id": "x", "text": ["x"]}, "'text' must be a string, not [\"x\"]"),
    "title type": ({"_id": "x", "title": 3, "text": "x"}, "'title' must be a string, not 3"),
    "invalid JSON": ("{", "invalid JSON"),
}


@pytest.mark.parametrize("case", CORPUS_LINES)
def test_bad_passage_is_named_with_line_field_and_remedy_and_can_be_set_aside_in_every_run(tmp_path, caplog, case):
    line, reason = CORPUS_LINES[case]
    path = write(tmp_path / "c.jsonl", ROWS[0], line, {"_id": "z", "title": "Only a title"})
    message = corpus_error(path)
    assert message.startswith(f"{path}:2: {reason.format(path=path)}") and message.splitlines()[1] == REMEDY
    for run in range(2):  # the second finds what the first has kept
        rejected = tmp_path / f"rejected{run}.jsonl"
        corpus = load_corpus(path, skip_bad_examples=True, rejected_file=rejected)
        assert list(corpus.ids) == ["d1", "z"] and corpus.passages[1] == "Only a title"
        (entry,) = map(json.loads, rejected.read_text(encoding="utf-8").splitlines())
        assert (entry["file"], entry["line"]) == (str(path), 2) and entry["reason"] in message
        assert "1 bad records skipped" in caplog.text
        caplog.clear()
    assert corpus_error(path) == message


def test_corpus_of_nothing_or_of_other_columns_is_one_error(tmp_path):
    path = write(tmp_path / "c.jsonl", *[{"id": 1, "contents": "x"}] * 30)
    message = corpus_error(path)
    assert message.startswith(f"{path}: no record has '_id'; the columns found are contents, id: a corpus has records")
    assert "\n" not in message
    assert corpus_error(write(path)).startswith(f"{path}: is empty")
    assert "--skip_bad_examples would skip all" in corpus_error(write(path, "broken"), skip_bad_examples=True)
    assert "no such file or folder; give a .jsonl" in corpus_error(tmp_path / "none.jsonl")


def test_corpus_folder_that_cannot_be_written_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    message = corpus_error(write(tmp_path / "c.jsonl", *ROWS))
    assert (
        "a corpus cannot be kept there: Not a directory; name another folder with --cache_dir" in message
        and "\n" not in message
    )


def test_examples_share_the_corpus_and_name_their_evidence_by_its_ids(tmp_path, corpus):
    path = write(
        tmp_path / "queries.jsonl",
        {"_id": "q1", "text": "who?", "evidence": ["d 3", 2, "2"]},
        {"_id": "q2", "text": "what?", "summary": "flour"},
    )
    first, second = load_examples(path, corpus=corpus, **BEIR)
    assert first.document is second.document is corpus
    assert (first.evidence, first.evidence_words, first.summaries) == ([1, 2], [3, 3], [])
    assert (second.evidence, second.query, second.summaries) == (None, "what?", ["flour"])


def test_the_checksum_of_examples_is_another_if_the_passages_of_their_corpus_are(tmp_path):
    path = write(tmp_path / "q.jsonl", {"_id": "q1", "text": "who?"})
    corpora = [load_corpus(write(tmp_path / f"{text}.jsonl", {"_id": "d", "text": text})) for text in ("a", "b")]
    examples = [load_examples(path, corpus=corpus, **BEIR) for corpus in (*corpora, corpora[0])]
    for ours in (examples, [list(of_corpus) for of_corpus in examples]):
        first, second, third = map(content_key, ours)
        assert first == third != second


@pytest.mark.parametrize(
    "lines",
    [
        ["query-id\tcorpus-id\tscore", "q1\td 3\t1", "q1\td1\t0", "q2\t2\t2", "q9\td1\t1"],
        ["q1 0 2 1", "q1  Q0\td1 -1", "", "q2 0 2 3", "q9 0 d1 1", "q9 0 unknown 0"],
    ],
)
def test_evidence_comes_from_qrels_where_the_record_has_none(tmp_path, corpus, lines):
    queries = write(
        tmp_path / "queries.jsonl",
        {"_id": "q1", "text": "who?"},
        {"_id": "q2", "text": "what?", "evidence": ["d1"]},
        {"_id": "q3", "text": "why?"},
    )
    (tmp_path / "qrels.tsv").write_text("\n".join(lines) + "\n")
    examples = load_examples(queries, corpus=corpus, qrels_file=tmp_path / "qrels.tsv", **BEIR)
    gold = 2 if "corpus-id" in lines[0] else 1
    assert [e.evidence for e in examples] == [[gold], [0], None]
    assert [e.evidence_words for e in examples] == [[3], [4], None]
    assert read_qrels(tmp_path / "qrels.tsv")["q2"] == {"2": 2 if gold == 2 else 3}


QRELS_LINES = {
    "unknown passage": ("q1\td9\t1", "query 'q1' names passage 'd9', but the corpus holds no such '_id'"),
    "score": ("q1\td1\t1.5", 'the relevance must be a whole number, not "1.5"'),
    "columns": ("q1\td1", "has 2 columns; it must have BEIR's three columns, separated by tabs"),
    "twice": ("q1\t2\t0", "query 'q1' and passage '2' have relevance 1 further up; give it once"),
    "UTF-8": (b"q\xe9\td1\t1", "invalid UTF-8"),
}


@pytest.mark.parametrize("case", QRELS_LINES)
def test_bad_line_of_qrels_is_named_and_can_be_set_aside(tmp_path, corpus, case):
    line, reason = QRELS_LINES[case]
    queries = write(tmp_path / "q.jsonl", {"_id": "q1", "text": "who?"})
    qrels = write(tmp_path / "r.tsv", "query-id\tcorpus-id\tscore", "q1\t2\t1", line)
    options = {"corpus": corpus, "qrels_file": qrels, **BEIR}
    message = error_of(queries, **options)
    assert message.startswith(f"{qrels}:3: ") and reason in message and message.splitlines()[1] == REMEDY
    (example,) = load_examples(queries, skip_bad_examples=True, rejected_file=tmp_path / "x.jsonl", **options)
    assert example.evidence == [1]
    (entry,) = map(json.loads, (tmp_path / "x.jsonl").read_text(encoding="utf-8").splitlines())
    assert (entry["file"], entry["line"]) == (str(qrels), 3)


def test_qrels_of_other_files_are_one_error(tmp_path, corpus):
    queries = write(tmp_path / "q.jsonl", {"_id": "q1", "text": "who?"}, {"_id": "q2", "text": "who?"})
    options = {"corpus": corpus, "query_column": "text"}
    qrels = write(tmp_path / "r.tsv", "query-id\tcorpus-id\tscore", "1\t2\t1")
    message = error_of(queries, qrels_file=qrels, **options)
    assert "no record has 'id'" in message and "--id_column" in message
    message = error_of(queries, qrels_file=qrels, id_column="_id", **options)
    assert f"{qrels}: none of its queries, such as '1', is among the examples of {queries}, such as 'q1'" in message
    assert "or BEIR's three under the header" in error_of(queries, qrels_file=write(qrels, "1\t2\t1"), **options)
    assert "at least one query with a passage" in error_of(queries, qrels_file=write(qrels), **options)
    assert "no such file" in error_of(queries, qrels_file=tmp_path / "none.tsv", **options).lower()


BAD_QUERIES = {
    "unknown id": ({"_id": "q", "text": "x", "evidence": ["d9"]}, "'evidence' holds \"d9\", but the corpus holds no"),
    "number unknown": ({"_id": "q", "text": "x", "evidence": [7]}, "'evidence' holds 7, but the corpus holds no"),
    "evidence type": ({"_id": "q", "text": "x", "evidence": "d1"}, "'evidence' must be a list of the corpus's ids"),
    "evidence entry": ({"_id": "q", "text": "x", "evidence": [1.0]}, "strings or whole numbers, but holds 1.0"),
    "query empty": ({"_id": "q", "text": " "}, "no 'text' or an empty one; without a query"),
    "query missing": ({"_id": "q"}, "no 'text' or an empty one"),
    "hand-over": ({"_id": "q", "text": "x", "passages": ["x"], "retrieved": []}, "leave out --corpus_file"),
}


@pytest.mark.parametrize("case", BAD_QUERIES)
def test_bad_query_of_a_corpus_is_named(tmp_path, corpus, case):
    line, reason = BAD_QUERIES[case]
    path = write(tmp_path / "q.jsonl", {"_id": "q1", "text": "who?", "evidence": ["d1"]}, line)
    message = error_of(path, corpus=corpus, **BEIR)
    assert message.startswith(f"{path}:2: ") and reason in message and message.splitlines()[1] == REMEDY


def test_passages_without_an_order_stay_without_one_in_files_made_of_them(tmp_path):
    path = write(tmp_path / "d.jsonl", {"query": "who?", "summary": "s", "pos": ["one"], "neg": ["two", "three"]})
    for number in range(2):
        (example,) = load_examples(path)
        assert not example.document.is_ordered
        path = tmp_path / f"{number}.jsonl"
        write_retrieved(path, [example], one_hop([[(2, 0.5), (0, 0.25)]]))
    with pytest.raises(DataError, match="its passages are not neighbours in a text; leave out --smooth_window"):
        load_examples(path, smooth_window=2)


def test_a_name_that_no_file_can_have_is_refused_in_words():
    assert "cannot be read: File name too long" in error_of("x" * 300 + ".jsonl")


def test_test_examples_need_no_evidence_where_its_field_was_named(tmp_path):
    train = write(tmp_path / "train.jsonl", {**GOOD, "gold": [0]})
    test = write(tmp_path / "test.jsonl", {**GOOD, "query": "other?"})
    files = {"train_file": str(train), "validation_file": str(train), "test_file": str(test)}
    assert load_splits(CorpusArguments(**files, evidence_column="gold"))["test"][0].evidence is None


def test_hand_over_of_a_corpus_is_read_without_it(tmp_path, corpus):
    path = write(
        tmp_path / "queries.jsonl",
        {"_id": "q1", "text": "who?", "summary": "s", "evidence": ["d1", "d 3"]},
        {"_id": "q2", "text": "what?", "summary": ["s", "t"]},
        {"_id": "q3", "text": "why?", "summary": "s", "evidence": ["2"]},
    )
    examples = load_examples(path, corpus=corpus, **BEIR)
    write_retrieved(tmp_path / "r.jsonl", examples, one_hop([[(2, 0.5), (1, 0.25)], [(0, 1.0)], []]))
    first, second, third = load_examples(tmp_path / "r.jsonl")
    assert first.document.passages == [PASSAGES[2], PASSAGES[1], PASSAGES[0]]
    assert not any(e.document.is_ordered for e in (first, second, third))  # but by a ranking
    assert (first.evidence, first.evidence_words, first.retrieved) == ([0, 2], [3, 4], [(0, 0.5), (1, 0.25)])
    assert (second.document.passages, second.evidence, second.summaries) == ([PASSAGES[0]], None, ["s", "t"])
    assert (third.document.passages, third.evidence, third.retrieved) == ([PASSAGES[1]], [0], [])
    records = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["passage_ids"] for record in records] == [["d 3", "2", "d1"], ["d1"], ["2"]]


def test_hops_over_a_corpus_are_read_back_with_the_passages_that_they_name(tmp_path):
    corpus = load_corpus(write(tmp_path / "c.jsonl", *({"_id": f"d{n}", "text": "w " * (n + 1)} for n in range(9))))
    path = write(tmp_path / "q.jsonl", {"_id": "q", "text": "who?", "summary": "s", "evidence": ["d7", "d5"]})
    (example,) = load_examples(path, corpus=corpus, **BEIR)
    hops = [Hop("first", [8, 5, 0], [(8, 0.5), (5, 0.25)]), Hop("second", [2, 8], [(2, 0.75), (8, 0.5)]),
            Hop("third", [], [])]  # fmt: skip
    write_jsonl(tmp_path / "h.jsonl", [hops_record(example, hops[:2], "the summary"), hops_record(example, hops)])
    record, _ = map(json.loads, (tmp_path / "h.jsonl").read_text(encoding="utf-8").splitlines())
    assert record["passage_ids"] == ["d2", "d8", "d5", "d0", "d7"]
    assert record["passages"] == [corpus.passages[int(key[1:])] for key in record["passage_ids"]]
    write(tmp_path / "h.jsonl", record, {**hops_record(example, hops), "id": "r"})
    again, last = load_examples(tmp_path / "h.jsonl")
    assert again.hops == [Hop("first", [1, 2, 3], [(1, 0.5), (2, 0.25)]), Hop("second", [0, 1], [(0, 0.75), (1, 0.5)])]
    assert (again.retrieved, again.evidence, again.evidence_words) == ([(0, 0.75), (1, 0.5)], [2, 4], [6, 8])
    assert (last.retrieved, last.hops[2]) == ([], Hop("third", [], []))  # a hop that found nothing


def test_hand_over_leaves_out_examples_for_which_nothing_was_found(tmp_path, corpus, caplog):
    path = write(tmp_path / "q.jsonl", *({"_id": n, "text": "x", "summary": "s"} for n in "ab"))
    write_retrieved(tmp_path / "r.jsonl", load_examples(path, corpus=corpus, **BEIR), one_hop([[], [(0, 1.0)]]))
    assert [e.id for e in load_examples(tmp_path / "r.jsonl")] == ["b"]
    assert "r.jsonl is without 1 examples, for which nothing was found: a" in caplog.text


def test_splits_share_one_corpus(tmp_path):
    write(tmp_path / "c.jsonl", *ROWS)
    for split, gold in (("train", "d1"), ("validation", "2"), ("test", "2")):
        write(tmp_path / f"{split}.jsonl", {"_id": split, "text": "who?"})
        write(tmp_path / f"{split}.tsv", "query-id\tcorpus-id\tscore", f"{split}\t{gold}\t1")
    files = {f"{split}_file": str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    qrels = {f"{split}_qrels_file": str(tmp_path / f"{split}.tsv") for split in ("train", "validation", "test")}
    args = CorpusArguments(corpus_file=str(tmp_path / "c.jsonl"), **files, **qrels, **BEIR)
    (train,), (validation,), (test,) = load_splits(args).values()
    assert train.document is validation.document is test.document and isinstance(train.document, Corpus)
    assert (train.evidence, validation.evidence, test.evidence) == ([0], [1], [1])


def test_test_examples_may_lack_a_summary_and_come_from_a_folder_with_their_own_documents(tmp_path):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder/train.jsonl", {"id": "r", "doc_id": "d", "summary": "s"})
    write(
        tmp_path / "folder/test.jsonl",
        {"id": "t", "doc_id": "d", "summary": None},
        {"id": "u", "doc_id": "d", "summary": "s"},
    )
    write(tmp_path / "docs.jsonl", {"doc_id": "d", "passages": ["one"]})
    write(tmp_path / "test_docs.jsonl", {"doc_id": "d", "passages": ["two"]})
    folder = str(tmp_path / "folder")
    options = {"documents_file": str(tmp_path / "docs.jsonl"), "test_documents_file": str(tmp_path / "test_docs.jsonl")}
    files = {"train_file": folder, "validation_file": f"{folder}/train.jsonl", "test_file": folder}
    splits = load_splits(CorpusArguments(**files, **options))
    assert list(splits) == ["train", "validation", "test"]
    assert [(e.id, e.summaries, e.document.passages) for e in splits["test"]] == [
        ("t", [], ["two"]),
        ("u", ["s"], ["two"]),
    ]
    assert [e.id for e in load_splits(CorpusArguments(**files, **options, max_test_examples=1))["test"]] == ["t"]
    assert "test" not in load_splits(
        CorpusArguments(**files | {"test_file": None}, documents_file=options["documents_file"])
    )


def test_test_examples_that_are_training_examples_too_are_counted_in_one_warning(tmp_path, caplog):
    copy, other = {**GOOD, "id": "t", "summary": "x"}, {**GOOD, "id": "u", "query": "other?"}
    same_id = {**GOOD, "id": "v", "doc_id": "d", "passages": ["Other text.", "of it"]}
    write(tmp_path / "train.jsonl", GOOD, {**GOOD, "id": "b", "doc_id": "d"})
    write(tmp_path / "test.jsonl", copy, other, same_id)
    files = {f"{split}_file": str(tmp_path / "train.jsonl") for split in ("train", "validation")}
    load_splits(CorpusArguments(**files))
    assert not caplog.messages
    load_splits(CorpusArguments(**files, test_file=str(tmp_path / "test.jsonl")))
    assert caplog.messages == ["1 of 3 test examples are training examples too, with the same query and document"]


@pytest.mark.parametrize(
    "flags, reason",
    [
        ({"train_qrels_file": "q.tsv"}, "--train_qrels_file needs --corpus_file"),
        ({"validation_qrels_file": "q.tsv"}, "--validation_qrels_file needs --corpus_file"),
        ({"corpus_file": "c.jsonl", "documents_file": "d.jsonl"}, "--documents_file cannot be used with --corpus_file"),
        (
            {"corpus_file": "c.jsonl", "validation_documents_file": "d"},
            "--validation_documents_file cannot be used with",
        ),
        ({"test_file": "t.jsonl", "test_qrels_file": "q.tsv"}, "--test_qrels_file needs --corpus_file"),
        ({"test_documents_file": "d.jsonl"}, "--test_documents_file needs --test_file"),
        ({"max_test_examples": 3}, "--max_test_examples needs --test_file"),
        ({"train_file": None, "validation_file": None, "test_file": "t.jsonl"}, "--test_file needs --train_file"),
        ({"train_file": None, "validation_file": None, "documents_file": "d"}, "--documents_file needs --train_file"),
        ({"corpus_file": "c.jsonl", "train_file": None}, "--corpus_file needs --train_file"),
        ({"corpus_file": "c.jsonl", "merge_passages": True}, "--merge_passages cannot be used with --corpus_file"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(tmp_path, monkeypatch, flags, reason):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.jsonl", *ROWS)
    write(tmp_path / "t.jsonl", {"id": 1, "query": "x"})
    args = CorpusArguments(**{"train_file": "t.jsonl", "validation_file": "t.jsonl", **flags})
    with pytest.raises(DataError, match=reason):
        load_splits(args)


# ---- passages as turns, messages and titled texts


@pytest.mark.parametrize(
    "passages",
    [
        [{"speaker": "Anna", "text": "Yes."}, {"speaker": 2, "content": "No."}],  # QMSum
        [{"role": "Anna", "content": "Yes."}, {"role": "user", "name": "2", "content": "No."}],  # messages
        [{"speaker": "Anna", "utterance": "Yes.", "start": 0.5}, "2: No."],
        [{"from": "Anna", "value": "Yes."}, {"speaker": "2", "text": "No.", "title": None}],  # ShareGPT, transcripts
        [{"role": "Anna", "content": [{"type": "text", "text": "Yes."}]}, {"speaker": "", "text": "2: No."}],
        {"speaker": ["Anna", "2"], "text": ["Yes.", "No."]},  # what some versions of datasets make of a list of dicts
    ],
)
def test_turns_and_messages_are_passages_with_their_speaker(tmp_path, passages):
    path = write(tmp_path / "d.jsonl", {**GOOD, "turns": passages})
    (example,) = load_examples(path, passages_column="turns")
    assert example.document.passages == ["Anna: Yes.", "2: No."] and example.evidence == [1]
    documents = write(tmp_path / "docs.jsonl", {"doc_id": 1, "passages": passages})
    path = write(tmp_path / "q.jsonl", {"doc_id": 1, "summary": "s", "evidence": [1]})
    (again,) = load_examples(path, documents_file=documents)
    assert (again.document.passages, again.evidence) == (example.document.passages, [1])
    (tmp_path / "d.csv").write_text('summary,passages\ns,"' + json.dumps(passages).replace('"', '""') + '"\n')
    assert load_examples(tmp_path / "d.csv")[0].document.passages == example.document.passages


@pytest.mark.parametrize("flat", [True, False])
def test_turns_in_a_parquet_file_are_read(tmp_path, flat):
    import datasets

    turns = [{"speaker": "Anna", "text": "Yes."}, {"speaker": None, "text": "No."}]
    table = {"speaker": ["Anna", None], "text": ["Yes.", "No."]} if flat else turns
    datasets.Dataset.from_list([{**GOOD, "passages": table}]).to_parquet(tmp_path / "d.parquet")
    assert load_examples(tmp_path / "d.parquet")[0].document.passages == ["Anna: Yes.", "No."]


def test_a_title_is_joined_with_the_text_as_in_a_corpus(tmp_path, corpus):
    rows = [{("docid" if key == "_id" else key): value for key, value in row.items()} for row in ROWS]
    (example,) = load_examples(write(tmp_path / "d.jsonl", {"passages": rows, "summary": "s"}))
    assert example.document.passages == list(corpus.passages)


# ---- training data of other retrievers

TEVATRON = {
    "query_id": "q7",
    "query": "who?",
    "positive_passages": [{"docid": "3", "title": "Mills", "text": "Mills grind."}],
    "negative_passages": [{"docid": "5", "title": "", "text": "Rivers."}, {"docid": "9", "text": "Bakers."}],
}
PAIRS = {
    "Tevatron": TEVATRON,
    "Tevatron with strings": {**TEVATRON, "positive_passages": ["Mills Mills grind."]},
    "Tevatron as a dict of lists": {
        **TEVATRON,
        "negative_passages": {"docid": ["5", "9"], "title": ["", ""], "text": ["Rivers.", "Bakers."]},
    },
    "sentence-transformers": {
        "id": "q7", "anchor": "who?", "positive": "Mills Mills grind.", "negative_1": "Rivers.", "negative_2": "Bakers."
    },
    "FlagEmbedding": {"id": "q7", "query": "who?", "pos": ["Mills Mills grind."], "neg": ["Rivers.", "Bakers."]},
    "MS MARCO": {
        "query_id": "q7",
        "query": "who?",
        "answers": ["Mills."],
        "passages": {
            "is_selected": [0, 1, 0],
            "passage_text": ["Rivers.", "Mills Mills grind.", "Bakers."],
            "url": ["a", "b", "c"],
        },
    },
}  # fmt: skip


def without_drafts(path, **flags):
    return RetrieveArguments(train_file=str(path), validation_file=str(path), **{"draft_share": 0.0, **flags})


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".csv"])
def test_positives_and_negatives_become_passages_with_evidence(tmp_path, layout, ending):
    record, path = PAIRS[layout], tmp_path / f"d{ending}"
    if ending == ".jsonl":
        write(path, record)
    elif ending == ".parquet":
        import datasets

        datasets.Dataset.from_list([record]).to_parquet(path)
    else:
        import csv

        with path.open("w", newline="") as file:
            cells = {name: value if isinstance(value, str) else json.dumps(value) for name, value in record.items()}
            csv.writer(file).writerows([cells, cells.values()])
    (example,) = load_splits(without_drafts(path))["train"]
    assert (example.id, example.query, example.summaries) == ("q7", "who?", [])
    assert sorted(example.document.passages) == ["Bakers.", "Mills Mills grind.", "Rivers."]
    assert [example.document.passages[number] for number in example.evidence] == ["Mills Mills grind."]
    assert example.evidence_words == [3]


def test_the_order_of_passages_does_not_tell_the_positives(tmp_path):
    """A ranking with equal scores begins with the first passages."""
    rows = [
        {"query": "q", "positive_passages": [f"p{n}"], "negative_passages": [f"n{n}", f"m{n}", f"p{n}"]}
        for n in range(300)
    ]
    examples = load_examples(write(tmp_path / "d.jsonl", *rows), require_summary=False)
    assert {len(e.document.passages) for e in examples} == {3}  # the positive once
    assert all(60 < sum(e.evidence == [place] for e in examples) < 140 for place in range(3))
    assert fields_of(load_examples(tmp_path / "d.jsonl", require_summary=False)) == fields_of(examples)


def test_records_of_several_layouts_may_be_mixed(tmp_path):
    path = write(tmp_path / "d.jsonl", TEVATRON, GOOD, {**PAIRS["MS MARCO"], "query_id": 8, "summary": "m"})
    train = load_splits(without_drafts(path))["train"]
    assert [(e.id, e.summaries) for e in train] == [("q7", []), ("a", ["short"]), ("8", ["m"])]
    # an unrelated field of an example with passages of its own
    (example,) = load_examples(write(path, {**GOOD, "positive": "yes", "pos": "NN"}))
    assert example.document.passages == GOOD["passages"] and example.evidence == [1]


@pytest.mark.parametrize("flags", [{"supervision": "rouge"}, {"draft_share": 0.5}, None])
@pytest.mark.parametrize("layout", ["Tevatron", "MS MARCO"])
def test_positives_without_a_summary_are_refused_where_summaries_are_needed(tmp_path, layout, flags):
    path = write(tmp_path / "d.jsonl", PAIRS[layout], {**PAIRS[layout], "query_id": 2})
    files = {"train_file": str(path), "validation_file": str(path)}
    args = SummarizeArguments(**files) if flags is None else without_drafts(path, **flags)
    with pytest.raises(DataError, match=r"no record has 'summary'.*only for train_retrieve.py, with --draft_share 0"):
        load_splits(args)
    write(tmp_path / "d.jsonl", {**GOOD, "id": "b"}, PAIRS[layout])
    with pytest.raises(DataError, match=r"d.jsonl:2: no 'summary'; marked positives without summaries are only for"):
        load_splits(args)
    write(tmp_path / "d.jsonl", {**PAIRS[layout], "summary": "s"})
    assert load_splits(args)["train"][0].summaries == ["s"]


def test_positives_with_flags_that_contradict_them_are_refused(tmp_path, corpus):
    path = write(tmp_path / "d.jsonl", TEVATRON, {**TEVATRON, "query_id": 2})
    assert error_of(path, merge_passages=True, skip_bad_examples=True).endswith("leave out --merge_passages")
    assert error_of(path, smooth_window=1).endswith("leave out --smooth_window")
    assert error_of(path, corpus=corpus).endswith("passages of the record's own; leave out --corpus_file")
    documents = write(tmp_path / "docs.jsonl", {"doc_id": 1, "document": "x"})
    assert error_of(path, documents_file=documents).endswith("leave out --documents_file")


MARCO = PAIRS["MS MARCO"]
BAD_PAIRS = {
    "no positive": ({**TEVATRON, "positive_passages": []}, "'positive_passages' is empty; there must be at least one"),
    "empty negative": ({**TEVATRON, "negative_passages": ["x", " "]}, "'negative_passages' number 1 is empty; leave"),
    "type": ({**TEVATRON, "positive_passages": [3]}, "'positive_passages' number 0 is 3; a passage is a string, or a"),
    "no query": ({**TEVATRON, "query": " "}, "no 'query' or an empty one; 'positive_passages' answers a query"),
    "text twice": ({**TEVATRON, "passages": ["x"]}, "holds both 'positive_passages' and 'passages'; leave one"),
    "evidence twice": ({**TEVATRON, "evidence": [0]}, "holds both 'positive_passages' and 'evidence'; leave one"),
    "evidence of MS MARCO": ({**MARCO, "evidence": [0]}, "holds both 'is_selected' and 'evidence'; leave one"),
    "nothing selected": (
        {**MARCO, "passages": [{"passage_text": "x", "is_selected": 0}], "summary": "No Answer Present."},
        "no passage is marked as relevant: a retriever cannot learn from it",
    ),
    "selected partly": (
        {**MARCO, "passages": [{"passage_text": "x", "is_selected": 0}, {"passage_text": "y"}]},
        "'passages' number 1: 'is_selected' must be 0 or 1 in all passages, not null",
    ),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_positives_are_named_with_line_and_field_and_can_be_set_aside(tmp_path, case):
    record, reason = BAD_PAIRS[case]
    path = write(tmp_path / "d.jsonl", {**TEVATRON, "query_id": 1}, record)
    with pytest.raises(DataError) as caught:
        load_splits(without_drafts(path))
    assert str(caught.value).startswith(f"{path}:2: {reason}")
    train = load_splits(without_drafts(path, skip_bad_examples=True), tmp_path / "r.jsonl")["train"]
    assert [e.id for e in train] == ["1"]
    assert json.loads((tmp_path / "r.jsonl").read_text(encoding="utf-8"))["record"] == record


def test_a_question_of_the_test_split_without_a_selected_passage_is_ranked(tmp_path):
    record, _ = BAD_PAIRS["nothing selected"]
    [example] = load_examples(write(tmp_path / "d.jsonl", record), split="test", require_summary=False,
                              supervision="evidence")  # fmt: skip
    assert not example.evidence and len(example.document.passages) == 1


# ---- bad input


def but(**fields):
    """A good record with other fields."""
    return {**GOOD, "id": "b", **fields}


BAD_LINES = {
    "invalid JSON": ('{"id": ', "invalid JSON: Expecting value at column 8"),
    "nested without end": ("[" * 100_000, "invalid JSON: maximum recursion"),
    "not an object": ([1, 2], "must be a JSON object such as"),
    "invalid UTF-8": (b'{"summary": "caf\xe9"}', "invalid UTF-8: 0xe9 at byte 17 of the line; save the file as UTF-8"),
    "half a character": ('{"document": "\\ud83d", "summary": "s"}', "half of a character pair"),
    "summary missing": ({"id": "b", "document": "x"}, "no 'summary'; the record has document, id"),
    "summary null": (but(summary=None), "no 'summary'"),
    "summary empty": (but(summary=""), "'summary' is empty; an example needs a summary"),
    "summary of spaces": (but(summary=" \n"), "'summary' is empty"),
    "summary list empty": (but(summary=[]), "'summary' is empty"),
    "one summary empty": (but(summary=["x", ""]), "'summary' is empty or holds an empty string"),
    "summary type": (but(summary=3), "'summary' must be a string or a list of strings, not 3"),
    "summary list type": (but(summary=[3]), "'summary' must be a string or a list of strings, not [3]"),
    "text missing": ({"summary": "s"}, "no 'passages' and no 'document'; the record has summary"),
    "document empty": ({"document": " ", "summary": "s"}, "'document' is empty; it must hold the text to summarize"),
    "document type": (
        {"document": ["x"], "summary": "s"},
        "'document' must be a string, not [\"x\"] (a list of passages goes",
    ),
    "passages empty": (but(passages=[]), "'passages' is an empty list"),
    "passage empty": (but(passages=["x", " "]), "'passages' number 1 is empty; leave it out and renumber"),
    "passage type": (
        but(passages=["x", 1]),
        "'passages' number 1 is 1; a passage is a string, or a dict with one of text, content",
    ),
    "turn without text": (but(passages=["x", {"speaker": "A"}]), "; a passage is a string, or a dict with one of text"),
    "two texts": (but(passages=["x", {"text": "a", "content": "b"}]), "a dict with one of text, content, utterance"),
    "turn empty": (
        but(passages=["x", {"speaker": "A", "text": " "}]),
        "'passages' number 1 is empty; leave it out and",
    ),
    "speaker type": (but(passages=[{"speaker": ["A"], "text": "b"}]), "its text, title and speaker must be strings"),
    "image": (but(passages=[{"role": "user", "content": [{"type": "image_url"}]}]), "must be strings, without images"),
    "prediction": (but(passages=[{"passage": 4, "text": "x"}]), "predictions hold only passages that were read"),
    "one turn": (but(passages={"speaker": "A", "text": "b"}), "'passages' must be a list of strings or dicts, not "),
    "turns of several lengths": (but(passages={"speaker": ["A"], "text": ["b", "c"]}), "must be a list of strings or"),
    "passages type": (but(passages="x"), "'passages' must be a list of strings or dicts, not \"x\""),
    "evidence too high": (but(evidence=[2]), "'evidence' holds 2, but there are 2 passages (numbers 0 to 1)"),
    "evidence negative": (but(evidence=[-1]), "'evidence' holds -1, but there are 2 passages"),
    "evidence fraction": (but(evidence=[0.5]), "'evidence' must hold passage numbers (whole numbers from 0)"),
    "evidence text": (but(evidence=["1"]), "'evidence' must hold passage numbers"),
    "evidence bool": (but(evidence=[True]), "but holds true"),
    "evidence type": (but(evidence=1), "'evidence' must be a list of passage numbers such as [3, 7], not 1"),
    "evidence of a text": ({"document": "x", "summary": "s", "evidence": [0]}, "'evidence' needs 'passages'"),
    "words alone": (but(evidence=None, evidence_words=[1]), "'evidence_words' needs 'evidence'"),
    "too few words": (but(evidence_words=[]), "'evidence_words' must be a list with one word count for each"),
    "too many words": (but(evidence_words=[2]), "'evidence_words' holds 2 for passage 1, which has 1 words"),
    "id type": ({**GOOD, "id": 1.5}, "'id' must be a string or a whole number, not 1.5"),
    "id bool": ({**GOOD, "id": True}, "'id' must be a string or a whole number, not true"),
    "id empty": ({**GOOD, "id": ""}, "'id' is empty"),
    "id twice": ({**GOOD}, "'id' is 'a', like {path}:1; it must be unique"),
    "query type": (but(query=["q"]), "'query' must be a string, not [\"q\"]"),
    "doc_id type": (but(doc_id=[]), "'doc_id' must be a string or a whole number"),
    "retrieved type": (but(retrieved={}), "'retrieved' must be a list of"),
    "retrieved entry": (but(retrieved=[1]), "'retrieved' must be a list of"),
    "retrieved range": (but(retrieved=[{"passage": 2, "score": 1}]), "'retrieved' holds 2, but there are 2"),
    "retrieved score": (but(retrieved=[{"passage": 1, "score": "x"}]), 'with a finite number, not "x"'),
    "retrieved infinite": (
        '{"passages": ["x"], "summary": "s", "retrieved": [{"passage": 0, "score": Infinity}]}',
        "a finite number",
    ),
    "retrieved huge": (but(retrieved=[{"passage": 1, "score": 10**400}]), "a finite number"),
    "retrieved twice": (but(retrieved=[{"passage": 1, "score": 1}] * 2), "'retrieved' holds passage 1 twice"),
    "hops type": (but(hops="x"), "'hops' must be a list of"),
    "hops without a draft": (but(hops=[{"retrieved": []}]), "but number 1 is"),
    "hops range": (
        but(hops=[{"draft": "x", "read": [2], "retrieved": [{"passage": 0, "score": 1}]}]),
        "hop 1: 'read' holds 2, but there are 2",
    ),
    "retrieved of a text": ({"document": "x", "summary": "s", "retrieved": []}, "'retrieved' needs 'passages'"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named_with_file_line_field_and_remedy_and_can_be_set_aside(tmp_path, case):
    line, reason = BAD_LINES[case]
    path = write(tmp_path / "d.jsonl", GOOD, line, {**GOOD, "id": "z"})
    message, reason = error_of(path), reason.format(path=path)
    assert message.startswith(f"{path}:2: ") and reason in message
    assert len(message.splitlines()) == 2 and message.splitlines()[1] == REMEDY

    rejected = tmp_path / "rejected.jsonl"
    assert [e.id for e in load_examples(path, skip_bad_examples=True, rejected_file=rejected)] == ["a", "z"]
    (entry,) = map(json.loads, rejected.read_text(encoding="utf-8").splitlines())
    assert (entry["file"], entry["line"]) == (str(path), 2) and entry["reason"] in message
    assert "record" in entry or entry["text"]


def test_all_bad_lines_are_reported_together_twenty_in_full(tmp_path):
    path = write(tmp_path / "d.jsonl", GOOD, *["broken"] * 25)
    lines = error_of(path).splitlines()
    assert len(lines) == 22 and lines[0].startswith(f"{path}:2: ") and lines[19].startswith(f"{path}:21: ")
    assert lines[20:] == ["and 5 more", REMEDY]


def test_nothing_is_left_when_all_lines_are_bad(tmp_path):
    path = write(tmp_path / "d.jsonl", "broken", "too")
    message = error_of(path, skip_bad_examples=True, rejected_file=tmp_path / "r.jsonl")
    assert f"{path}:1: invalid JSON" in message and "--skip_bad_examples would skip all" in message
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2


def test_rejected_file_keeps_other_files_records_and_replaces_this_files(tmp_path):
    train, validation = (write(tmp_path / name, GOOD, "broken") for name in ("t.jsonl", "v.jsonl"))
    rejected = tmp_path / "r.jsonl"
    for path in (train, validation, train):
        load_examples(path, skip_bad_examples=True, rejected_file=rejected)
    entries = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert sorted(entry["file"] for entry in entries) == [str(train), str(validation)]
    assert entries[0]["text"] == "broken"


def test_rejected_records_of_the_splits_of_one_folder_are_kept_apart(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        write(tmp_path / f"data/{split}.jsonl", GOOD, {**GOOD, "id": "b", "summary": None})
    folder, rejected = str(tmp_path / "data"), tmp_path / "r.jsonl"
    for _ in range(2):  # read, and from what is kept
        args = CorpusArguments(train_file=folder, skip_bad_examples=True)
        assert [len(examples) for examples in load_splits(args, rejected).values()] == [1, 1]
        entries = [json.loads(line) for line in rejected.read_text().splitlines()]
        assert [(entry["file"], entry["line"]) for entry in entries] == [
            (f"{folder} (train)", 2), (f"{folder} (validation)", 2)
        ]  # fmt: skip
    with pytest.raises(DataError, match=r"data \(train\): row 2: no 'summary'"):
        load_splits(CorpusArguments(train_file=folder))


def test_bad_rows_of_tables_and_arrays_are_named_by_row(tmp_path):
    (tmp_path / "d.csv").write_text("document,summary,evidence\nx,s,\ny,,\nz,s,1,2\n", encoding="utf-8")
    message = error_of(tmp_path / "d.csv")
    assert "d.csv: row 2: no 'summary'" in message and "d.csv: row 3: has 1 more cells" in message
    (tmp_path / "d.csv").write_bytes(b"document,summary\nx,caf\xe9\n")
    assert "d.csv: row 1: invalid UTF-8" in error_of(tmp_path / "d.csv")
    write(tmp_path / "d.json", [GOOD, 3])
    assert "d.json: row 2: must be a JSON object" in error_of(tmp_path / "d.json")
    write(tmp_path / "d.json", "[", json.dumps(GOOD), "x]")
    assert "d.json:3: invalid JSON: Expecting ',' delimiter" in error_of(tmp_path / "d.json", skip_bad_examples=True)


def test_wrong_column_is_one_error_that_lists_the_columns(tmp_path):
    path = write(tmp_path / "d.jsonl", *[{"article": "x", "highlights": "h"}] * 50)
    message = error_of(path, document_column="article", skip_bad_examples=True)
    assert (
        message == f"{path}: no record has 'summary'; the columns found are article, highlights: "
        "name the right one with --summary_column"
    )
    assert "no record has 'document' or 'passages'" in error_of(path, summary_column="highlights")
    path = write(tmp_path / "d.jsonl", GOOD, {**GOOD, "id": "b"})
    assert "no record has 'gold'; the columns found are evidence, id" in error_of(path, evidence_column="gold")
    path = write(tmp_path / "d.jsonl", *[{"doc_id": 1, "summary": "s"}] * 2)
    assert "--documents_file" in error_of(path)


def test_bad_documents_file_is_reported_like_bad_examples(tmp_path):
    documents = write(
        tmp_path / "docs.jsonl", {"doc_id": 1, "document": "x"}, {"doc_id": "1", "document": "y"}, {"document": "z"}
    )
    path = write(tmp_path / "d.jsonl", {"doc_id": 1, "summary": "s"}, {"doc_id": 9, "summary": "s"}, {"summary": "s"})
    message = error_of(path, documents_file=documents)
    assert (
        f"{documents}:2: 'doc_id' is '1', like {documents}:1; it must be unique" in message
        and f"{documents}:3: no 'doc_id'" in message
    )
    options = {"documents_file": write(documents, {"doc_id": 1, "document": "x"})}
    message = error_of(path, **options)
    assert (
        f"{path}:2: 'doc_id' is '9', but {documents} holds no such document" in message
        and f"{path}:3: no 'doc_id'" in message
    )
    assert [e.id for e in load_examples(path, skip_bad_examples=True, **options)] == ["1"]


def test_one_doc_id_for_two_texts_is_an_error(tmp_path):
    path = write(
        tmp_path / "d.jsonl", {**GOOD, "doc_id": "x"}, {**GOOD, "id": "b", "doc_id": "x", "passages": ["p", "q"]}
    )
    assert f"{path}:2: 'doc_id' is 'x', like {path}:1, but the text differs" in error_of(path)


@pytest.mark.parametrize("field", ["retrieved", "evidence_words"])
def test_merging_is_refused_for_a_hand_over_file(tmp_path, field):
    value = [{"passage": 0, "score": 1}] if field == "retrieved" else [1]
    path = write(tmp_path / "d.jsonl", GOOD, {**GOOD, "id": "b", field: value})
    message = error_of(path, merge_passages=True)
    assert f"{path}:2: '{field}'" in message and "leave out --merge_passages" in message


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "d.jsonl").write_bytes(content)
    for options in ({}, {"skip_bad_examples": True}):
        assert error_of(tmp_path / "d.jsonl", **options).startswith(f"{tmp_path / 'd.jsonl'}: is empty")


@pytest.mark.parametrize("opener", [gzip.open, lzma.open])
def test_truncated_archive_is_an_error_even_when_bad_examples_are_skipped(tmp_path, opener):
    path = tmp_path / f"d.jsonl.{'gz' if opener is gzip.open else 'xz'}"
    with opener(path, "wt") as file:
        for i in range(2000):
            file.write(json.dumps({**GOOD, "id": i, "query": str(hash((i, "salt")))}) + "\n")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = error_of(path, skip_bad_examples=True)
    assert message.startswith(f"{path}: damaged after record ") and message.endswith("copy or make the file again")
    path.write_bytes(b"not compressed at all")
    assert f"{path}: damaged after record 0" in error_of(path)


def test_missing_and_unknown_files_are_named_with_the_remedy(tmp_path):
    message = error_of(tmp_path / "none.jsonl")
    assert message.startswith(f"{tmp_path / 'none.jsonl'}: no such file or folder; give a .jsonl")
    assert error_of("data/none.jsonl").startswith("data/none.jsonl: no such file or folder; give a .jsonl")
    assert error_of("report.docx").startswith("report.docx: no such file")
    assert "unknown kind of file '.docx'; give a .jsonl" in error_of(write(tmp_path / "report.docx", "x"))
    assert "--passage_words is 0" in error_of(tmp_path, passage_words=0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_unreadable_file_is_one_line(tmp_path):
    (tmp_path / "d.jsonl").symlink_to("/proc/self/mem")  # may be opened, but not read from its start, even by root
    assert error_of(tmp_path / "d.jsonl") == f"{tmp_path / 'd.jsonl'}: cannot be read: Input/output error"


def test_folder_without_data_is_one_line(tmp_path):
    message = error_of(tmp_path)
    assert message.startswith(f"{tmp_path}: datasets.load_dataset cannot read it: ") and "\n" not in message


def test_hub_name_without_network_is_one_line(monkeypatch):
    import datasets

    def no_network(*args, **options):
        raise ConnectionError("Couldn't reach the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    message = error_of("owner/name")
    assert message.startswith("owner/name: no such file or folder, nor can it be loaded from the Hub: Couldn't reach")
    assert "\n" not in message and message.endswith("download the data and give its path")
