"""By hop, what the embedded data's two-hop questions find and get: for the files of retrieve_and_summarize.py given.

Second-hop evidence is the passage that only a name in another passage leads to.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.data.sample import sample_records
from utils.evaluation.rouge import rouge_scores

second = {
    record["id"]: hops[1][0]
    for record in sample_records("validation", 50)
    if len(hops := record["evidence_hops"]) == 2
}  # fmt: skip
print(f"{'':40}second-hop recall@5   ROUGE-L of these   ROUGE-L of all")
for file in sys.argv[1:]:
    records = [json.loads(line) for line in Path(file).read_bytes().splitlines()]
    for number in range(1, max(len(record["hops"]) for record in records) + 1):
        found, of_these, of_all = [], [], []
        for record in records:
            hop = record["hops"][:number][-1]
            rouge = rouge_scores(hop["draft"], record["summary"])["rougeL"]
            of_all.append(rouge)
            if record["id"] in second:
                found.append(second[record["id"]] in [entry["passage"] for entry in hop["retrieved"][:5]])
                of_these.append(rouge)
        name = f"{'/'.join(Path(file).parts[-3:-1])}, hop {number}"
        print(f"{name:40}{100 * np.mean(found):19.1f}{np.mean(of_these):19.1f}{np.mean(of_all):17.1f}")
