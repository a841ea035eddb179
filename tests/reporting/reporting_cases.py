"""Small run folders for the tests of reports."""

import json

from utils.files import write_json, write_jsonl

HOSTILE = {
    "script": "<script>window.broken = true; throw new Error('run')</script>",
    "image": '<img src=x onerror="window.broken = true"> </textarea></script><!-- "\'`{{ 7 * 7 }}{% raw %}',
    "long": "w" * 10_000,
    "rtl": "\u202eמה הוחלט בישיבה\u202c",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 decided",
    "nul": "before\x00after \x1b[31mred\x07",
    "surrogate": "half \ud83d of a pair",
}


def hop(draft, read, ranking=None):
    ranking = read if ranking is None else ranking
    return {"draft": draft, "read": read, "retrieved": [{"passage": n, "score": 1 / rank} for rank, n in
                                                        enumerate(ranking, 1)]}  # fmt: skip


def example(number: int, *, passages, hops, prediction, query="Who said it?", **fields) -> dict:
    """A record as retrieve_and_summarize.py writes it."""
    return {"id": f"q{number}", "query": query, "doc_id": f"d{number // 2}", "retrieved": hops[-1]["retrieved"],
            "prediction": prediction, "hops": hops, "passages": passages, **fields}  # fmt: skip


PASSAGES = ["Ann: The old mill was sold in March.", "Bob: Norwood looks after the forest path.",
            "Norwood: Wooden fences cracked in the cellar.", "Eve: Nothing happened here."]  # fmt: skip


def hops_records() -> list[dict]:
    """Three examples: the second hop helps, hurts, and changes nothing; the third has a sentence without support."""
    right, wrong = "Wooden fences cracked in the cellar.", "The old mill was sold in March."
    return [
        example(0, passages=PASSAGES, prediction=right, summary=right, evidence=[1, 2], query="What was reported?",
                hops=[hop("Norwood looks after the path.", [1, 0], [1, 0, 2, 3]), hop(right, [1, 2], [1, 2, 0, 3])]),
        example(1, passages=PASSAGES, prediction=wrong, summary=right, evidence=[2], query="What cracked?",
                hops=[hop(right, [2, 1], [2, 1, 0, 3]), hop(wrong, [0, 1], [0, 1, 2, 3])]),
        example(2, passages=PASSAGES, prediction=f"{wrong} Elephants danced on the table.", summary=wrong,
                evidence=[0], query="What was sold?", hops=[hop(f"{wrong} Elephants danced on the table.", [0, 3])]),
    ]  # fmt: skip


def write_hops(folder, records=None, *, split="validation", **arguments):
    """A run folder of retrieve_and_summarize.py; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "arguments.json", {"output_dir": str(folder), "summarizer": "s", "drafter": None, "num_hops": 2,
                                           **arguments})  # fmt: skip
    write_json(folder / "environment.json", {"script": "retrieve_and_summarize.py", "processes": 1})
    (folder / "command.txt").write_text("python retrieve_and_summarize.py --num_hops 2\n")
    write_jsonl(folder / f"predictions.{split}.jsonl", hops_records() if records is None else records)
    return folder


def write_training(folder, *, ends=True, scores=(40.0, 60.0, 50.0), **arguments):
    """A run folder of train_retrieve.py with three validations; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {"num_train_epochs": 3, "metric_for_best": "ndcg@10", "max_grad_norm": 1.0, "learning_rate": 0.001,
                "greater_is_better": None, "seed": 42}  # fmt: skip
    write_json(folder / "arguments.json", defaults | arguments)
    write_json(folder / "environment.json", {"script": "train_retrieve.py", "torch": "2.13.0", "processes": 1})
    (folder / "command.txt").write_text("python train_retrieve.py --learning_rate 1e-3 --no_nan_detector\n")
    events = []
    for step in range(10, 40, 10):
        events.append({"event": "train", "step": step, "epoch": step / 10, "loss": 50 / step, "lr": 1e-3, "gnorm": 2.0,
                       "tokens_per_second": 900.0, "seconds_left": 120.0})  # fmt: skip
        events.append({"event": "validation", "step": step, "epoch": step / 10, "ndcg@10": scores[step // 10 - 1],
                       "bm25": {"ndcg@10": 30.0}})  # fmt: skip
    events.insert(2, {"event": "skip", "step": 12, "reason": "the gradient norm is not finite", "in_a_row": 1})
    events.insert(3, {"event": "resume", "step": 15, "checkpoint": "checkpoints/step_00000015"})
    if ends:
        events += [{"event": "stop", "step": 30, "reason": "num_train_epochs 3 reached"},
                   {"event": "done", "step": 30, "seconds": 90.0}]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def retrieved_records() -> list[dict]:
    """Two questions as train_retrieve.py hands them over: BM25 is better on the second, this run on the first."""
    records = [
        {"id": "q0", "query": "Who keeps mills?", "doc_id": "d", "evidence": [2], "retrieved": [2, 0, 1, 3]},
        {"id": "q1", "query": "Norwood forest path", "doc_id": "d", "evidence": [1], "retrieved": [3, 2, 0, 1]},
    ]
    for record in records:
        record["retrieved"] = [{"passage": n, "score": -float(i)} for i, n in enumerate(record["retrieved"])]
        record["passages"] = PASSAGES
    return records
