#!/usr/bin/env bash
# The README's table: the same summarizer trained on passages from the document's lead, BM25, the trained retriever, and
# the gold evidence. Everything at its default.
#
# @@RESULT@@
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export ACCELERATE_USE_CPU=1
out=${1:-outputs/embedded}

python train_retrieve.py --output_dir "$out/retrieve"
python train_summarize.py --output_dir "$out/retriever" \
    --train_file "$out/retrieve/retrieved.train.jsonl" --validation_file "$out/retrieve/retrieved.validation.jsonl"
for passages in lead bm25 oracle; do
    python train_summarize.py --output_dir "$out/$passages" --retriever "$passages"
done
python runs/table.py "$out"/{lead,bm25,retriever,oracle}
