"""Refusing to resume another run."""

import signal

import pytest

from utils.errors import UsageError
from utils.training.checkpoints import _compare

SHAPE = {"num_processes": 2, "gradient_accumulation_steps": 4, "batch_size": 16, "max_tokens": 0}


@pytest.mark.parametrize(
    ("here", "said", "can_be_allowed"),
    [
        ({"data": "other"}, "data same there, other here", False),
        ({"seed": 7}, "seed 42 there, 7 here", False),
        ({"parameters": 9}, "parameters 5 there, 9 here", False),
        ({"shape": SHAPE | {"num_processes": 1}}, "num_processes 2 there, 1 here", True),
        ({"shape": SHAPE | {"batch_size": 8}}, "batch_size 16 there, 8 here", True),
        ({"shape": SHAPE | {"max_tokens": 99}}, "max_tokens 0 there, 99 here", True),
    ],
)
def test_going_on_as_another_run_is_refused_with_what_differs(here, said, can_be_allowed, tmp_path):
    saved = {"data": "same", "parameters": 5, "seed": 42, "shape": SHAPE}
    _compare(tmp_path, saved, saved, allow_reshard=False)
    with pytest.raises(UsageError, match=said) as refusal:
        _compare(tmp_path, saved, saved | here, allow_reshard=False)
    assert ("--allow_reshard" in str(refusal.value)) == can_be_allowed
    if can_be_allowed:
        _compare(tmp_path, saved, saved | here, allow_reshard=True)
    else:
        with pytest.raises(UsageError):
            _compare(tmp_path, saved, saved | here, allow_reshard=True)


TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
