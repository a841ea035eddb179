"""Outputs made in parts."""

import pytest
from conftest import alone

from utils.data.parts import read_parts, write_parts


def write(folder, examples, blocks, work):
    accelerator = alone(wait_for_everyone=lambda: None)
    said = []
    write_parts(folder, examples, blocks, work, say=said.append, accelerator=accelerator, poll=lambda: None)
    return said


def work_on(texts):
    return [{"seconds": 1}], [{"text": text} for text in texts]


def test_what_is_done_is_not_done_again_and_records_come_in_the_examples_order(tmp_path):
    blocks, calls = [[0, 2], [1]], []

    def interrupted(texts):
        calls.append(texts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return work_on(texts)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "parts.validation.key", "abc", blocks, interrupted)
    said = write(tmp_path / "parts.validation.key", "abc", blocks, interrupted)
    assert said == ["1 of 2 parts were done before"]
    assert calls == [["a", "c"], ["b"], ["b"]]
    records, costs = read_parts(tmp_path / "parts.validation.key", blocks, 1)
    assert [record["text"] for record in records] == ["a", "b", "c"]
    assert dict(costs[0]) == {"seconds": 2}


def test_parts_of_another_key_go_and_those_of_splits_with_a_similar_name_stay(tmp_path):
    for name in ("parts.*.old", "parts.validation.old", "parts.validation.extra.old", "parts.validationx.old"):
        write(tmp_path / name, "a", [[0]], work_on)
    write(tmp_path / "parts.validation.new", "a", [[0]], work_on)
    kept = {"parts.*.old", "parts.validation.extra.old", "parts.validation.new", "parts.validationx.old"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    write(tmp_path / "parts.*.new", "a", [[0]], work_on)
    assert {path.name for path in tmp_path.iterdir()} == kept - {"parts.*.old"} | {"parts.*.new"}
