"""Which fusion of the rankings of two hops finds most, and whether a second hop hurts where the first was right.

    python runs/hop_fusion.py CORPUS RETRIEVER RERANKER|none EXAMPLES DRAFTS [EXAMPLES DRAFTS]

Searches the corpus with each question, and with the question and its first draft (of retrieve_and_summarize.py), and
fuses the two rankings in several ways. Choose on training examples, the first pair of files; the second pair, of
validation examples, shows what the choice is worth. Recall of the 25 best passages, in percent: of all examples; of
those whose first hop found over two thirds of the evidence; of the others.

2026-11-28, EntailmentBank, validation, a MiniLM of runs/entailmentbank.sh (3 epochs, learning rate 5e-5), no reranker:

    drafts                               gold first conclusion   gold hypothesis     conclusion of another question
    hop 1 alone                               75.7  94.9  46.3   75.7  94.9  46.3    75.7  94.9  46.3
    hop 2 alone                               83.1  96.6  62.4   79.2  95.6  54.1    64.9  82.1  38.6
    reciprocal ranks, k 10, weight 0.5        79.3  96.2  53.4   76.7  94.7  49.1    75.3  93.3  47.7
    reciprocal ranks, k 10, weight 2          82.0  96.3  60.2   78.8  95.3  53.6    70.8  88.4  44.0
    scores, weight 0.5                        79.1  95.8  53.5   77.4  95.2  50.2    75.5  93.1  48.6
    scores, weight 2                          81.7  96.3  59.5   78.3  95.1  52.7    70.8  88.1  44.4
    exponentials of scores, weight 2          82.1  96.3  60.5   78.7  95.3  53.3    70.3  87.6  44.0
"""

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
        drafts = read_drafts(drafts_file, examples)
        chosen = [number for number, example in enumerate(examples) if example.evidence and drafts[number]]
        examples, drafts = [examples[number] for number in chosen], [drafts[number] for number in chosen]
        texts = [
            search_text(e.query, draft) for e, draft in zip(examples, first_drafts(drafts, examples, []), strict=True)
        ]
        one = rank_passages(search, examples, encode_texts, settings, score=score)
        two = rank_passages(search, examples, encode_texts, settings, texts, score=score)
        was_right = np.array([recall(ranking, e.evidence) > 200 / 3 for ranking, e in zip(one, examples, strict=True)])
        print(f"| **{examples_file}**, {len(examples)} examples | | {was_right.sum()} | {(~was_right).sum()} |")
        for name, fuse in FUSIONS.items():
            found = np.array([recall(fuse(*pair), e.evidence) for *pair, e in zip(one, two, examples, strict=True)])
            cells = [found.mean(), found[was_right].mean(), found[~was_right].mean()]
            print(f"| {name} | {' | '.join(f'{cell:.1f}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
