"""Two ways to train a retriever, several seeds of each, on QMSum's validation meetings: means, and their difference.

    python runs/seeds.py FOLDER_OF_QMSUM --a outputs/one_* --b outputs/other_*

Each folder is a run of train_retrieve.py, whose own scores rank, neither smoothed nor with BM25. The interval is of the
bootstrap by meeting (10,000 draws, seed 42) of the paired difference of the means over seeds.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.data.loading import load_examples
from utils.evaluation.compare import score_examples
from utils.evaluation.intervals import bootstrap_means
from utils.models.encoder import encode, load_retriever
from utils.retrieval.dense import dense_rankings

METRICS = ("gold_words@1024", "ndcg@10")

parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
parser.add_argument("qmsum", type=Path)
parser.add_argument("--a", nargs="+", required=True)
parser.add_argument("--b", nargs="+", required=True)
parser.add_argument("--max_seq_length", type=int, default=384)
args = parser.parse_args()

examples = load_examples(args.qmsum / "validation.jsonl", merge_passages=True, passage_words=200)
examples = [example for example in examples if example.evidence]
accelerator = Accelerator()


def mean_scores(folders: list[str]) -> np.ndarray:
    """(examples, metrics), the mean over the folders."""
    parts = []
    for folder in folders:
        retriever = load_retriever(folder).to(accelerator.device)
        retriever.max_seq_length = args.max_seq_length
        ranked = dense_rankings(examples, partial(encode, retriever, accelerator=accelerator))
        scores = [score_examples(metric, examples, ranked) for metric in METRICS]
        parts.append([[of_metric[example.id] for of_metric in scores] for example in examples])
        print(folder, *(f"{metric} {mean:.1f}" for metric, mean in zip(METRICS, np.mean(parts[-1], 0), strict=True)))
    return np.mean(parts, 0)


a, b = mean_scores(args.a), mean_scores(args.b)
draws = bootstrap_means(a - b, [id(example.document) for example in examples])
for number, metric in enumerate(METRICS):
    low, high = np.percentile(draws[:, number], [2.5, 97.5])
    one, other = a[:, number].mean(), b[:, number].mean()
    print(f"{metric}: {one:.1f} and {other:.1f}, {one - other:+.2f} [{low:.2f}, {high:.2f}]")
