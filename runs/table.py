"""Prints one row for each run folder of train_summarize.py: recall of the evidence that it read, and its ROUGE.

python runs/table.py outputs/embedded/lead outputs/embedded/bm25
"""

import json
import sys
from pathlib import Path

print(
    "| passages from | evidence read | ROUGE-1 | ROUGE-2 | ROUGE-L | minutes |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: |"
)
for folder in map(Path, sys.argv[1:]):
    predictions = [json.loads(line) for line in (folder / "predictions.validation.jsonl").read_bytes().splitlines()]
    recalls = [
        len({entry["passage"] for entry in line["passages"]} & set(line["evidence"])) / len(line["evidence"])
        for line in predictions
        if line["evidence"]
    ]
    evidence = f"{100 * sum(recalls) / len(recalls):.1f}" if recalls else "-"
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [event for event in events if event["event"] == "validation"][-1]
    minutes = [event["wall"] for event in events if event["event"] == "train"][-1] / 60
    rouge = " | ".join(f"{scores[name]:.1f}" for name in ("rouge1", "rouge2", "rougeL"))
    print(f"| {folder.name} | {evidence} | {rouge} | {minutes:.1f} |")
