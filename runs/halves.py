"""Two halves of a file of examples, by document, so that a model can write drafts for documents it was not trained on.

    python runs/halves.py EXAMPLES.jsonl FOLDER      (writes FOLDER/half_1.jsonl and FOLDER/half_2.jsonl)

Each record needs a `doc_id`, as hand-over files have it.
"""

import json
import sys
from pathlib import Path

examples, folder = Path(sys.argv[1]), Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
half_of: dict[str, int] = {}  # every second document
with (folder / "half_1.jsonl").open("w") as first, (folder / "half_2.jsonl").open("w") as second:
    for line in examples.open():
        half = half_of.setdefault(json.loads(line)["doc_id"], len(half_of) % 2)
        (first, second)[half].write(line)
