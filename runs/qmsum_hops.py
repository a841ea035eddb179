"""What a second hop adds on QMSum's validation meetings, by the draft that it searches with: gold words within 1,024.

    python runs/qmsum_hops.py FOLDER_OF_QMSUM RETRIEVER [--selector SELECTOR]      (made by runs/qmsum_hops.sh)

237 specific questions, turns merged into chunks of 200 words. Hop 1 searches with the question and reads five chunks;
drafts are written from these (but for the reference). Rankings of both hops are fused. Intervals are 95%
of the paired bootstrap by meeting (10,000 draws, seed 42); `covered`: the difference where hop 1 alone has more than
two thirds of the gold words; `astray`: the reference of another question.

Results

2026-11-26, one core of an AMD EPYC (Zen 5), bfloat16, the models of runs/qmsum_hops.sh, one seed, an earlier smoothing.
Five points were hoped for; even the best extract of what was read gives little more. k and the weight of the last hop
in the fusion were chosen on the embedded data.

hop 1: 60.2; more than two thirds on 113 of 237 questions

| draft | hop 2 alone | fused with hop 1 | difference | covered |
| --- | ---: | ---: | ---: | ---: |
| the reference | 77.5 | 74.9 | +14.8 [+11.4, +18.5] | +2.8 |
| best extract of what was read | 66.4 | 65.4 | +5.2 [+3.2, +7.3] | +0.6 |
| best chunk | 59.8 | 60.9 | +0.7 [-1.6, +2.8] | -1.6 |
| extract of 15 words by the retriever | 61.1 | 61.9 | +1.7 [+0.3, +3.2] | -0.8 |
| extract of 30 words by the retriever | 61.2 | 61.7 | +1.5 [+0.2, +2.8] | -0.5 |
| extract of 60 words by the retriever | 60.0 | 61.4 | +1.2 [-0.2, +2.5] | -1.6 |
| extract of 120 words by the retriever | 60.7 | 60.7 | +0.5 [-0.8, +1.9] | -1.2 |
| extract of 15 words by the selector | 60.3 | 61.1 | +0.9 [-0.6, +2.5] | -2.7 |
| extract of 30 words by the selector | 59.8 | 60.9 | +0.7 [-1.0, +2.2] | -2.4 |
| extract of 60 words by the selector | 60.9 | 61.0 | +0.8 [-0.7, +2.3] | -0.9 |
| extract of 120 words by the selector | 61.9 | 61.9 | +1.7 [-0.1, +3.4] | -0.6 |

2026-11-27, Intel Xeon with AMX, bfloat16, the present smoothing and the retriever of runs/qmsum.sh (seed 42), which was
trained with questions alone: hop 1 63.7; fused with hop 1, the reference +14.6 [+10.6, +19.3], the best extract of what
was read +2.8 [+1.2, +4.5], extracts of 15, 30, 60 and 120 words by the retriever -1.5 [-3.6, +0.4], -2.2 [-4.3, -0.2],
-1.8 [-3.5, -0.1] and -0.2 [-1.6, +1.3].

2026-11-28, Intel Xeon, float32, the same retriever, hop 1 63.9; difference to hop 1, of all questions and (in brackets)
where hop 1 has more than two thirds. The last row is --hop_weight 0.5, the default since then; the second is the fusion
before.

| fusion | reference | best extract | astray | extract of 30 words | of 120 words |
| --- | ---: | ---: | ---: | ---: | ---: |
| hop 2 alone | +15.6 (+2.1) | +2.3 (+0.2) | -16.3 (-29.9) | -3.4 (-6.1) | -1.3 (-2.6) |
| reciprocal of rank, k 10, the last hop twice | +14.6 (+2.1) | +2.7 (+1.1) | -9.5 (-18.8) | -1.4 (-3.4) | -0.1 (-0.7) |
| scores, share 0.5 | +12.7 (+2.3) | +2.8 (+1.4) | -2.3 (-7.2) | -1.2 (-2.9) | -0.1 (-0.3) |
| scores, share 0.3 | +9.2 (+1.7) | +2.4 (+1.5) | +0.3 (-2.3) | -0.2 (-0.9) | +0.6 (+0.5) |
| scores, share 1, less without agreement | +12.9 (+2.0) | +2.3 (+0.1) | -8.0 (-16.1) | -2.8 (-5.1) | -1.0 (-2.1) |
| scores, share 0.5, less without agreement | +10.3 (+2.2) | +2.8 (+1.4) | -0.5 (-3.0) | -0.8 (-2.6) | +0.3 (-0.1) |

2026-11-29, the same retriever and fusion, and `--drafts_file`: summaries by `full` of runs/qmsum_language_model.sh,
which read the first hop. Alone they find 60.5, fused with hop 1 63.5, which is -0.3 [-2.0, +1.3] (-2.4 where hop 1 has
more than two thirds): a retriever of questions alone finds nothing more through them. In the same run the reference
+10.9 [+8.1, +14.0], the best extract +2.8 [+1.4, +4.3], extracts of 30 and 120 words -1.0 [-2.7, +0.5] and
+0.2 [-1.2, +1.6].

Cost (the last command of runs/qmsum_hops.sh, 272 questions with the general ones, no summarizer): 602,671 tokens
encoded and 57.4 s at hop 1, 31,514 tokens and 3.5 s at hop 2.

Fused otherwise, with the extract of 30 words by the retriever: equal weights and k = 60 +1.8 [+0.6, +3.0] (covered
-0.3), each passage by its best rank +1.1 [-0.0, +2.1], standardized scores added +1.2 [-0.3, +2.6] (2,000 draws).
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.data.hand_over import read_drafts
from utils.data.loading import load_examples
from utils.data.passages import split_sentences
from utils.evaluation.compare import score_examples
from utils.evaluation.intervals import bootstrap_means
from utils.models.encoder import encode, load_retriever
from utils.models.settings import saved_settings
from utils.retrieval.dense import remember_passages, retriever_rankings
from utils.retrieval.drafts import extract_drafts
from utils.retrieval.oracle import greedy_rouge_oracle
from utils.retrieval.ranking import fuse_hops, search_text

parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
parser.add_argument("qmsum", type=Path)
parser.add_argument("retriever", help="a folder of train_retrieve.py")
parser.add_argument("--selector", help="a retriever that was trained on turns, to score sentences")
parser.add_argument("--drafts_file", type=Path, help="predictions of a summarizer that read the first hop's passages")
parser.add_argument("--top_k", type=int, default=5)
parser.add_argument("--hop_weight", type=float, default=0.5)
args = parser.parse_args()

accelerator = Accelerator(mixed_precision="bf16")
examples = load_examples(args.qmsum / "validation.jsonl", merge_passages=True, passage_words=200)
examples = [example for example in examples if example.evidence]
meetings = [id(example.document) for example in examples]


def encoder(name: str):
    return remember_passages(partial(encode, load_retriever(name).to(accelerator.device), accelerator=accelerator))


def gold_words(rankings: list) -> np.ndarray:
    return np.array(list(score_examples("gold_words@1024", examples, rankings).values()))


def best_extract(example, passages: list[int]) -> str:
    """The sentences of what was read that the ROUGE oracle would choose: what an extract can be at best."""
    sentences = [text for passage in sorted(passages) for text in split_sentences(example.document.passages[passage])]
    return " ".join(sentences[i] for i in sorted(greedy_rouge_oracle(sentences, example.summaries)))


settings, own = saved_settings(args.retriever), encoder(args.retriever)
first = retriever_rankings(examples, own, settings)
read = [[passage for passage, _ in ranking[: args.top_k]] for ranking in first]
drafts = {
    "the reference": [example.summaries[0] for example in examples],
    "best extract of what was read": [best_extract(*both) for both in zip(examples, read, strict=True)],
    "best chunk": [example.document.passages[passages[0]] for example, passages in zip(examples, read, strict=True)],
}
drafts["astray"] = [examples[number - 37].summaries[0] for number in range(len(examples))]
if args.drafts_file:
    drafts["written, in the file"] = [of_example[0][0] for of_example in read_drafts(args.drafts_file, examples)]
scorers = {"the retriever": own} | ({"the selector": encoder(args.selector)} if args.selector else {})
for name, scorer in scorers.items():
    for count in (15, 30, 60, 120):
        drafts[f"extract of {count} words by {name}"] = extract_drafts(examples, read, scorer, count)

at_first = gold_words(first)
is_covered = at_first > 200 / 3
print(f"hop 1: {at_first.mean():.1f}; more than two thirds on {is_covered.sum()} of {len(examples)} questions")
print("| draft | hop 2 alone | fused with hop 1 | difference | covered |\n| --- | ---: | ---: | ---: | ---: |")
for name, texts in drafts.items():
    searches = [search_text(example.query, text) for example, text in zip(examples, texts, strict=True)]
    second = retriever_rankings(examples, own, settings, searches)
    scores = gold_words([fuse_hops(both, args.hop_weight) for both in zip(first, second, strict=True)])
    difference = scores - at_first
    low, high = np.percentile(bootstrap_means(difference[:, None], meetings), [2.5, 97.5])
    print(
        f"| {name} | {gold_words(second).mean():.1f} | {scores.mean():.1f} "
        f"| {difference.mean():+.1f} [{low:+.1f}, {high:+.1f}] | {difference[is_covered].mean():+.1f} |", flush=True,
    )  # fmt: skip
