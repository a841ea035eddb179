"""Which fusion of the rankings of two hops finds most, and whether a second hop hurts where the first was right.

    python runs/hop_fusion.py CORPUS RETRIEVER RERANKER|none EXAMPLES DRAFTS [EXAMPLES DRAFTS ...]

Searches the corpus with each question, and with the question and its first draft, and fuses the two rankings in several
ways. DRAFTS is a file of retrieve_and_summarize.py, or one of these words, for drafts that no model writes: conclusion,
all, hypothesis (of EntailmentBank's `steps`, `summary` and `hypothesis`), found, astray. Recall of the 25 best
passages, in percent: of all examples; of those whose first hop found over two thirds of the evidence; of the others.

2026-11-29, EntailmentBank, a MiniLM of runs/entailmentbank.sh (3 epochs, learning rate 5e-5), no reranker. Drafts: the
gold first conclusion; all gold conclusions; the hypothesis; the three facts that hop 1 ranks first; the first
conclusion of another question. First on the first 400 training questions, then on validation; the gate was chosen with
both in view, and with QMSum's validation questions (runs/qmsum_hops.py):

    training                       conclusion        all        hypothesis     three found        astray
    hop 1 alone                  78.1 95.5 50.6  78.1 95.5 50.6  78.1 95.5 50.6  78.1 95.5 50.6  78.1 95.5 50.6
    hop 2 alone                  85.3 96.4 67.7  87.5 97.5 71.7  81.1 95.1 59.1  77.4 91.1 55.8  66.9 81.6 43.7
    reciprocal ranks, last twice 84.7 96.7 65.8  86.0 97.3 68.1  81.0 95.2 58.7  79.6 93.9 57.1  73.5 88.9 49.2
    scores, share 0.5            83.6 96.7 63.1  84.7 97.2 64.9  80.6 95.3 57.5  79.6 94.5 56.1  76.5 91.9 52.1
    --hop_weight 0.5             83.5 96.7 62.7  84.5 97.2 64.5  80.6 95.3 57.5  79.6 94.5 56.1  77.7 94.6 51.0
    scores, share 1              85.3 96.4 67.7  87.5 97.5 71.7  81.1 95.1 59.1  77.4 91.1 55.8  66.9 81.6 43.7
    --hop_weight 1               84.9 96.3 66.9  87.2 97.4 71.0  81.1 95.1 59.0  77.4 91.0 55.8  76.2 93.4 49.0

    validation                     conclusion        all        hypothesis     three found        astray
    hop 1 alone                  75.7 94.9 46.3  75.7 94.9 46.3  75.7 94.9 46.3  75.7 94.9 46.3  75.7 94.9 46.3
    hop 2 alone                  83.1 96.6 62.4  85.7 96.7 68.9  79.2 95.6 54.1  74.6 90.9 49.8  63.0 81.5 34.7
    reciprocal ranks, last twice 82.0 96.3 60.2  84.9 97.4 65.8  78.8 95.3 53.6  76.5 94.3 49.5  70.3 90.1 40.1
    scores, share 0.5            80.5 96.2 56.4  83.2 97.0 62.2  78.0 95.1 51.8  76.6 95.3 48.1  73.6 92.8 44.4
    --hop_weight 0.5             79.6 96.0 54.7  81.9 97.0 58.8  78.0 95.1 51.8  76.5 95.1 48.1  75.2 94.4 45.7
    scores, share 1              83.1 96.6 62.4  85.7 96.7 68.9  79.2 95.6 54.1  74.6 90.9 49.8  63.0 81.5 34.7
    --hop_weight 1               82.8 96.6 61.7  85.1 96.7 67.3  79.1 95.6 54.0  75.0 91.3 50.0  74.0 93.0 44.9

So a draft that can be trusted deserves --hop_weight 1. Extracts of what was found gain 0.8 (validation) and 1.5
(training) with 0.5, the default; where hop 1 was right they gain 0.2 and lose 1.0. On validation a draft that leads
astray costs 1.7 points with 1, and 0.5 with 0.5.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.cli.arguments import RankingArguments
from utils.data.corpus import load_corpus
from utils.data.hand_over import read_drafts
from utils.data.loading import load_examples
from utils.models.cross_encoder import load_reranker
from utils.models.encoder import encode, load_retriever
from utils.models.settings import saved_settings
from utils.retrieval.corpus_search import make_search
from utils.retrieval.drafts import first_drafts
from utils.retrieval.ranking import fuse_hops, rank, reciprocal_rank_fusion, scores_of, search_text, standardized
from utils.retrieval.reranking import rank_passages, scorer

FOUND = 25  # passages


def by_score(first, second, weight: float):
    """Adds the standardized scores of two rankings as `fuse_hops` does, whether they agree or not."""
    passages = sorted({passage for ranking in (first, second) for passage, _ in ranking})
    before, now = (standardized(scores_of(ranking, passages)) for ranking in (first, second))
    return [(passages[place], score) for place, score in rank((1 - weight) * before + weight * now)]


FUSIONS = {"hop 1 alone": lambda first, second: first, "hop 2 alone": lambda first, second: second}
FUSIONS |= {
    f"reciprocal ranks, k 10, last hop {weight:g} times": partial(
        lambda first, second, weight: reciprocal_rank_fusion([first, second], k=10, weights=[1.0, weight]),
        weight=weight,
    ) for weight in (0.5, 1.0, 2.0)
}  # fmt: skip
for share in (0.25, 0.5, 0.75, 1.0):
    FUSIONS[f"scores, share {share:g}"] = partial(by_score, weight=share)
    FUSIONS[f"--hop_weight {share:g}"] = lambda first, second, share=share: fuse_hops([first, second], share)


def imitated(kind: str, rows: list[dict], examples: list, rankings: list) -> list[str]:
    """A draft for each example, without a model: what it concludes, what it found, or what another one concludes."""
    if kind == "found":
        return [" ".join(e.document.passages[passage] for passage, _ in ranking[:3])
                for e, ranking in zip(examples, rankings, strict=True)]  # fmt: skip
    first = [row["steps"][0] for row in rows]
    return {"conclusion": first, "all": [example.summaries[0] for example in examples],
            "hypothesis": [row["hypothesis"] for row in rows], "astray": [*first[1:], *first[:1]]}[kind]  # fmt: skip


def recall(ranking, evidence) -> float:
    return 100 * len({passage for passage, _ in ranking[:FOUND]} & set(evidence)) / len(evidence)


def main():
    corpus_file, retriever_name, reranker_name, *files = sys.argv[1:]
    accelerator, corpus = Accelerator(), load_corpus(corpus_file)
    retriever = load_retriever(retriever_name).to(accelerator.device)
    encode_texts = partial(encode, retriever, accelerator=accelerator)
    settings = vars(RankingArguments()) | saved_settings(retriever_name)
    score = None
    if reranker_name != "none":
        settings |= {"rerank_top_k": 50, "rerank_weight": 1.0} | saved_settings(reranker_name)
        score = scorer(load_reranker(reranker_name).to(accelerator.device), accelerator=accelerator)
    search = make_search([corpus], retriever, index="flat", folder=Path(retriever_name) / "embeddings", top_k=200,
                         language=settings.get("language"), say=print, accelerator=accelerator)  # fmt: skip
    print("| fusion | all | first hop right | the others |\n| --- | ---: | ---: | ---: |")
    for examples_file, drafts_file in zip(files[::2], files[1::2], strict=True):
        examples = list(load_examples(examples_file, corpus=corpus, require_summary=False))
        one = rank_passages(search, examples, encode_texts, settings, score=score)
        if drafts_file in ("conclusion", "all", "hypothesis", "found", "astray"):
            rows = [json.loads(line) for line in Path(examples_file).read_bytes().splitlines()]
            drafts = imitated(drafts_file, rows, examples, one)
        else:
            drafts = first_drafts(read_drafts(drafts_file, examples), examples, [])
        chosen = [number for number, example in enumerate(examples) if example.evidence and drafts[number]]
        examples, drafts, one = ([each[number] for number in chosen] for each in (examples, drafts, one))
        texts = [search_text(example.query, draft) for example, draft in zip(examples, drafts, strict=True)]
        two = rank_passages(search, examples, encode_texts, settings, texts, score=score)
        was_right = np.array([recall(ranking, e.evidence) > 200 / 3 for ranking, e in zip(one, examples, strict=True)])
        of_these = f"| **{examples_file}, {drafts_file}**, {len(examples)} examples"
        print(f"{of_these} | | {was_right.sum()} | {(~was_right).sum()} |")
        for name, fuse in FUSIONS.items():
            found = np.array([recall(fuse(*pair), e.evidence) for *pair, e in zip(one, two, examples, strict=True)])
            cells = [found.mean(), found[was_right].mean(), found[~was_right].mean()]
            print(f"| {name} | {' | '.join(f'{cell:.1f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
