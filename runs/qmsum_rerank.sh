#!/usr/bin/env bash
# QMSum (Zhong et al., 2021): a reranker on top of the fine-tuned retriever of runs/qmsum.sh, beside the same model as it
# comes, and each of them alone, without the retriever's scores.
# usage: runs/qmsum_rerank.sh FOLDER_OF_QMSUM FOLDER_OF_THE_RETRIEVER [OUTPUT] [SEED] [RERANKER]
#   RERANKER: cross-encoder/ms-marco-MiniLM-L12-v2, or its folder
set -euo pipefail
data=$(realpath "$1") retriever=$(realpath "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export ACCELERATE_USE_CPU=1
out=${3:-outputs/qmsum_rerank} seed=${4:-42} model=${5:-cross-encoder/ms-marco-MiniLM-L12-v2}
flags=(--train_file "$data/train.jsonl.xz" --validation_file "$data/validation.jsonl" --merge_passages
    --passage_words 200 --retriever "$retriever" --max_seq_length 384 --num_hard_negatives 7 --rerank_top_k 50
    --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --metric_for_best gold_words@1024
    --checkpointing_steps 40 --log_steps 20 --seed "$seed")
train() {  # NAME MODEL [FLAGS]
    python train_rerank.py --output_dir "$out/$1" --model_name_or_path "$2" "${flags[@]}" "${@:3}"
}
as_it_is=(--max_train_steps 1 --learning_rate 0 --max_train_examples 8 --draft_share 0)
train trained "$model" --learning_rate 3e-5 --num_train_epochs 1
train untrained "$model" "${as_it_is[@]}"
train trained_alone "$out/trained" "${as_it_is[@]}" --rerank_weight 1000
train untrained_alone "$model" "${as_it_is[@]}" --rerank_weight 1000
for name in trained untrained trained_alone untrained_alone; do
    for metric in gold_words@1024 ndcg@10; do
        python -m utils.evaluation.compare "$out/$name/retrieved.validation.jsonl" \
            "$retriever/retrieved.validation.jsonl" --metric $metric
    done
done
