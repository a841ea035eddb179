#!/usr/bin/env bash
# The README's Quick start: both stages and two hops on the embedded data, where half of the questions need two hops.
# usage: runs/quick_start.sh [OUTPUT] [SEED]
#
# 2026-11-28, Intel Xeon without bfloat16 instructions, 2 cores, float32, torch 2.13.0; 300 validation questions, of which
# 150 need two hops. Second-hop evidence is the passage that can only be found through a name in another passage.
#
# | seed | hop | recall@5 | second-hop evidence, recall@5 | ROUGE-L | ROUGE-L of two-hop questions | seconds, all stages |
# | --- | --- | ---: | ---: | ---: | ---: | ---: |
# | 42 | 1 | 83.7 | 34.7 | 75.0 | 50.7 | 325 |
# | 42 | 2 | 100.0 | 100.0 | 88.6 | 78.2 | |
# | 43 | 1 | 84.2 | 36.7 | 76.1 | 53.0 | 315 |
# | 43 | 2 | 100.0 | 100.0 | 89.6 | 80.2 | |
# | 44 | 1 | 83.7 | 34.7 | 76.1 | 53.0 | 306 |
# | 44 | 2 | 100.0 | 100.0 | 89.4 | 79.7 | |
#
# Since passages of equal text are one passage to the retriever, and hops are fused by score (2026-11-29, one core):
#
# | 42 | 1 | 84.3 | 37.3 | 74.8 | 50.7 | 407 |
# | 42 | 2 | 100.0 | 100.0 | 98.6 | 98.3 | |
# | 43 | 1 | 83.3 | 33.3 | 76.4 | 53.1 | |
# | 43 | 2 | 100.0 | 100.0 | 99.5 | 99.6 | |
#
# Before the last of these changes, seed 42 had ROUGE-L 74.6 and 89.7 at the same recall@5: the summarizer reads passages
# by rank, and those of the evidence now come first.
#
# What was tried for the retriever, by recall@5 of all evidence at hop 2 with imitated drafts (hop 1: 81 to 85 everywhere).
# A run either learns to search for names (over 90) or does not. fw: --found_weight.
#
# | epochs | --draft_share | fw | other | seed: recall@5 at hop 2 |
# | --- | --- | --- | --- | --- |
# | 3 | 0.5 | 0.5 | 3 negatives, batches of any documents | 42: 85.0 |
# | 3 | 0.5 | 0.5 | 8 negatives of 50, batches of any documents | 42: 85.0 |
# | 3 | 0.5 | 0.5 | 8 negatives of 50, --group_by_document | 42: 83.7 |
# | 3 | 0.5 | 0.5 | 20 of 50, --group_by_document (as below) | 42: 81.7 |
# | 3 | 0.5 | 0.1 | | 1: 100.0, 2: 99.5, 3: 84.8 |
# | 3 | 0.7 | 0.5 | | 42: 100.0 |
# | 2 | 0.7 | 0.1 | | 42: 100.0, 3: 99.2 |
# | 2 | 0.7 | 0.1 | --learning_rate 2e-3, batches of 16 and of 32 | 3: 84.2, 82.8 |
#
# The last rows of seed 3 also had the rule that the best-ranked one of several passages of evidence is always read; with
# it 0.5 and 0.1 still stayed at 83.8. The summarizer needs --passage_order rank: in the document's order ROUGE-L was 66.0
# and 69.7.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-outputs} seed=${2:-42}
launch() { accelerate launch --quiet --config_file accelerate_configs/cpu.yaml "$@"; }

launch train_retrieve.py --output_dir "$out/retrieve" --seed "$seed" \
    --group_by_document --num_hard_negatives 20 --negatives_pool 50 --draft_share 0.7 --found_weight 0.1
launch train_summarize.py --output_dir "$out/summarize" --seed "$seed" --passage_order rank \
    --train_file "$out/retrieve/retrieved.train.jsonl" --validation_file "$out/retrieve/retrieved.validation.jsonl"
launch retrieve_and_summarize.py --output_dir "$out/hops" --seed "$seed" \
    --retriever "$out/retrieve" --summarizer "$out/summarize"
python runs/second_hop.py "$out/hops/predictions.validation.jsonl"
