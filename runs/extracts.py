"""What retrieved passages hold of the references, for data without marked evidence.

    python runs/extracts.py VALIDATION.jsonl TEACHER NAME=RETRIEVER ... [--top_k 8]

A retriever is a folder of train_retrieve.py, a model, or the word bm25. For each, over the validation examples: ROUGE
of the best extract from the passages that it ranks first (the greedy oracle's choice among them, maximum over
references), and the teacher's mean log-likelihood of a reference's token, in nats, given those passages; differences to
the first retriever with 95% intervals of the paired bootstrap by document (10,000 draws, seed 42).
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.data.loading import load_examples
from utils.evaluation.intervals import bootstrap_means
from utils.evaluation.rouge import rouge_scores
from utils.models.encoder import encode, load_retriever
from utils.models.settings import saved_settings
from utils.retrieval.bm25 import bm25_rankings
from utils.retrieval.dense import retriever_rankings
from utils.retrieval.oracle import greedy_rouge_oracle
from utils.retrieval.teacher import passage_likelihoods

parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
parser.add_argument("examples", type=Path)
parser.add_argument("teacher")
parser.add_argument("retrievers", nargs="+")
parser.add_argument("--top_k", type=int, default=8)
parser.add_argument("--passage_words", type=int, default=100)
args = parser.parse_args()

accelerator = Accelerator()
examples = load_examples(args.examples, passage_words=args.passage_words)
columns = {}
for name, _, model in (retriever.partition("=") for retriever in args.retrievers):
    if model == "bm25":
        rankings = bm25_rankings(examples)
    else:
        encoder = load_retriever(model).to(accelerator.device)
        rankings = retriever_rankings(
            examples, partial(encode, encoder, accelerator=accelerator), saved_settings(model)
        )
    read = [sorted(passage for passage, _ in ranking[: args.top_k]) for ranking in rankings]
    scores = []
    for example, numbers in zip(examples, read, strict=True):
        passages = [example.document.passages[number] for number in numbers]
        extract = " ".join(passages[i] for i in sorted(greedy_rouge_oracle(passages, example.summaries)))
        rouge = rouge_scores(extract, example.summaries)
        scores.append([rouge["rouge1"], rouge["rouge2"], rouge["rougeL"]])
    likelihoods = passage_likelihoods(args.teacher, examples, [[numbers] for numbers in read], accelerator)
    columns[name] = np.hstack([np.array(scores), np.array(likelihoods)])

groups = [example.document.id for example in examples]
first = next(iter(columns.values()))
print(f"{len(examples)} examples, {len(set(groups))} documents, top {args.top_k}")
print("| passages from | ROUGE-1 | ROUGE-2 | ROUGE-L | log-likelihood |\n| --- | ---: | ---: | ---: | ---: |")
for name, scores in columns.items():
    cells = [f"{mean:.2f}" for mean in scores.mean(0)[:3]] + [f"{scores.mean(0)[3]:.4f}"]
    if scores is not first:
        low, high = np.percentile(bootstrap_means(scores - first, groups), [2.5, 97.5], axis=0)
        cells = [f"{cell} [{a:+.3g}, {b:+.3g}]" for cell, a, b in zip(cells, low, high, strict=True)]
    print(f"| {name} | {' | '.join(cells)} |")
