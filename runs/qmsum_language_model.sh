#!/usr/bin/env bash
# QMSum (Zhong et al., 2021): a language model summarizes what the fine-tuned retriever of runs/qmsum.sh ranks first.
# usage: runs/qmsum_language_model.sh FOLDER_OF_QMSUM FOLDER_OF_THE_RETRIEVER [OUTPUT] [MODEL]
#   MODEL: HuggingFaceTB/SmolLM2-135M-Instruct, or its folder
#
# 2026-11-29, Intel Xeon without bfloat16 instructions, one seed, float32 (an epoch takes 85 minutes on both cores, the
# predictions of 272 questions 27 minutes on one), validation, ROUGE-1/2/Lsum:
#   full           31.8/8.9/27.8 (summaries of 56 words; the references have 71)
#   full_on_bm25   31.0/8.7/27.2; full is +0.75 [-0.34, 1.70], +0.22 [-0.43, 0.80], +0.59 [-0.30, 1.42] better
# So one epoch is too little to show what the retriever is worth.
# What did not help: longer summaries. On the first 96 questions `full` has ROUGE-1 29.9 (54 words), and 26.7 with
# --length_penalty 2 --min_new_tokens 64 (111 words). The other rows were not run to their end yet.
set -euo pipefail
data=$(realpath "$1") retriever=$(realpath "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export ACCELERATE_USE_CPU=1
out=${3:-outputs/qmsum_language_model} model=${4:-HuggingFaceTB/SmolLM2-135M-Instruct}
reads=(--max_source_length 1024 --max_target_length 192 --max_new_tokens 160 --num_beams 4 --no_repeat_ngram_size 6)
retrieved=(--train_file "$retriever/retrieved.train.jsonl" --validation_file "$retriever/retrieved.validation.jsonl")
raw=(--train_file "$data/train.jsonl.xz" --validation_file "$data/validation.jsonl" --merge_passages --passage_words 200)
train=(--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --label_smoothing_factor 0 --num_train_epochs 1
    --per_device_eval_batch_size 16 --checkpointing_steps 20 --log_steps 5 --metric_for_best rouge1)
# a step that changes nothing, and then the predictions: a model as it is, with passages from some source
as_it_is=(--max_train_steps 1 --learning_rate 0 --max_train_examples 1 --per_device_eval_batch_size 16)

python train_summarize.py --output_dir "$out/full" --model_name_or_path "$model" "${retrieved[@]}" "${reads[@]}" \
    "${train[@]}" --learning_rate 1e-4
python train_summarize.py --output_dir "$out/lora" --model_name_or_path "$model" "${retrieved[@]}" "${reads[@]}" \
    "${train[@]}" --learning_rate 1e-3 --lora_rank 16
python train_summarize.py --output_dir "$out/zero_shot" --model_name_or_path "$model" "${retrieved[@]}" "${reads[@]}" \
    "${as_it_is[@]}"
for source in bm25 lead oracle; do  # oracle: the gold evidence
    python train_summarize.py --output_dir "$out/full_on_$source" --model_name_or_path "$out/full" "${raw[@]}" \
        "${reads[@]}" "${as_it_is[@]}" --retriever "$source"
done
for other in lora zero_shot full_on_bm25 full_on_lead full_on_oracle; do
    for metric in rouge1 rouge2 rougeLsum; do
        python -m utils.evaluation.compare "$out/full/predictions.validation.jsonl" \
            "$out/$other/predictions.validation.jsonl" --metric $metric
    done
done
