"""Prints a table of a run of retrieve_and_summarize.py by hop: what its rankings find, and how good its texts are.

    python runs/hops_table.py outputs/hops/predictions.validation.jsonl

Recall and MAP are of the fused ranking of each hop, ROUGE is of its draft or summary; tokens and seconds are those that
the hop took for all examples. A search that ended earlier counts with its last hop.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.evaluation.retrieval import retrieval_scores
from utils.evaluation.rouge import Rouge

path = Path(sys.argv[1])
records = [json.loads(line) for line in path.read_bytes().splitlines()]
costs = json.loads(path.with_name(path.name.replace("predictions.", "hops.").replace(".jsonl", ".json")).read_text())
print("| hop | recall@5 | @10 | @25 | MAP | ROUGE-1 | ROUGE-2 | ROUGE-L | searched | tokens | seconds |")
print("| ---: " * 11 + "|")
for cost in costs:
    found, texts = [], []
    is_last = all(len(record["hops"]) <= cost["hop"] for record in records)
    for record in records:
        hop = record["hops"][: cost["hop"]][-1]
        if evidence := record.get("evidence"):
            ranking, words = [entry["passage"] for entry in hop["retrieved"]], [1] * len(record["passages"])
            found.append(retrieval_scores(ranking, evidence, words, recall_cutoffs=(5, 10, 25), map_cutoff=100))
        if record.get("summary"):
            text = record["prediction"] if is_last else hop["draft"]
            summaries = record["summary"]
            texts.append((text, summaries if isinstance(summaries, list) else [summaries]))
    cells = [f"{sum(row[name] for row in found) / len(found):.1f}" if found else "-"
             for name in ("recall@5", "recall@10", "recall@25", "map@100")]  # fmt: skip
    predictions, references = zip(*texts, strict=True) if texts else ((), ())
    rouge = Rouge().compute(predictions=predictions, references=references) if texts else {}
    cells += [f"{rouge[name]:.1f}" if rouge else "-" for name in ("rouge1", "rouge2", "rougeL")]
    tokens = sum(cost.get(name, 0) for name in ("encoder_tokens", "pair_tokens", "source_tokens", "generated_tokens"))
    print(f"| {cost['hop']} | {' | '.join(cells)} | {cost['examples']} | {tokens:,} | {cost['seconds']:.0f} |")
