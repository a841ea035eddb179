#!/usr/bin/env bash
# The alternation on the embedded data: stage 1, stage 2, drafts, stage 1 again from the drafts, stage 2 again on what
# both hops found, and the hops of both rounds. The second retriever compares each question with most passages of its
# transcript; summarizers read passages in the order of their ranks.
# usage: runs/hops.sh [OUTPUT]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export ACCELERATE_USE_CPU=1
out=${1:-outputs/embedded_hops}

hops() {  # RETRIEVER SUMMARIZER OUTPUT: on both splits, greedily on the one that is only trained on
    python retrieve_and_summarize.py --retriever "$1" --summarizer "$2" --output_dir "$3"
    python retrieve_and_summarize.py --retriever "$1" --summarizer "$2" --output_dir "$3" \
        --input_file "$out/1/retrieve/retrieved.train.jsonl" --split train --num_beams 1
}

python train_retrieve.py --output_dir "$out/1/retrieve"
python train_summarize.py --output_dir "$out/1/summarize" --passage_order rank \
    --train_file "$out/1/retrieve/retrieved.train.jsonl" --validation_file "$out/1/retrieve/retrieved.validation.jsonl"
hops "$out/1/retrieve" "$out/1/summarize" "$out/1/hops"

python train_retrieve.py --output_dir "$out/2/retrieve" --draft_share 0.7 --group_by_document \
    --num_hard_negatives 20 --negatives_pool 50 --drafts_file "$out/1/hops/predictions.train.jsonl" \
    --validation_drafts_file "$out/1/hops/predictions.validation.jsonl"
hops "$out/2/retrieve" "$out/1/summarize" "$out/2/drafts"
python train_summarize.py --output_dir "$out/2/summarize" --passage_order rank --num_train_epochs 6 \
    --train_file "$out/2/drafts/predictions.train.jsonl" --validation_file "$out/2/drafts/predictions.validation.jsonl"
python retrieve_and_summarize.py --retriever "$out/2/retrieve" --summarizer "$out/2/summarize" --output_dir "$out/2/hops"
python runs/second_hop.py "$out"/{1/hops,2/drafts,2/hops}/predictions.validation.jsonl
