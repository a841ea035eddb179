"""Gold words found within 1,024 words, of a hand-over file and of BM25 on the same examples, with 95% intervals.

python runs/interval.py outputs/qmsum/retrieve/retrieved.validation.jsonl

Bootstrap over documents (2,000 draws, seed 42): all questions about a document are drawn together. The last line is the
paired difference.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.data import load_examples
from utils.metrics import retrieval_scores
from utils.search import bm25_rankings

METRIC = "gold_words@1024"


def score(example, ranking) -> float:
    words = [len(text.split()) for text in example.document.passages]
    passages = [passage for passage, _ in ranking]
    return retrieval_scores(passages, example.evidence, words, example.evidence_words)[METRIC]


examples = [example for example in load_examples(sys.argv[1]) if example.evidence]
ours = np.array([score(example, example.retrieved) for example in examples])
bm25 = np.array([score(*pair) for pair in zip(examples, bm25_rankings(examples), strict=True)])
members: dict = {}
for number, example in enumerate(examples):
    members.setdefault(example.document, []).append(number)
groups = list(members.values())
rng = np.random.default_rng(42)
draws = [np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]) for _ in range(2000)]
print(f"{METRIC}, {len(examples)} examples, {len(groups)} documents")
for name, scores in (("hand-over", ours), ("BM25", bm25), ("difference", ours - bm25)):
    low, high = np.percentile([scores[draw].mean() for draw in draws], [2.5, 97.5])
    print(f"{name:<12}{scores.mean():6.1f}  [{low:.1f}, {high:.1f}]")
