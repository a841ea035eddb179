"""Processes wait for one that works alone, for as long as that takes; exchanges of tensors give up earlier."""

import pytest
from conftest import ROOT, launch, run

WORKER = """
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from utils import processes
from utils.retrieval.vectors import encode_corpus
from utils.training.signals import Signals
from utils.training.step import any_process

accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=10))])
processes.connect()
main, count = accelerator.is_main_process, accelerator.num_processes


def slowly(result):
    time.sleep(13 * (count > 1))  # alone, and longer than an exchange of tensors waits
    return result


assert processes.from_main(accelerator, lambda: slowly({"rankings": [(1, 2)]})) == {"rankings": [(1, 2)]}
assert accelerator.reduce(torch.ones(1)).item() == count  # and these still work
if main:
    slowly(None)
assert any_process(accelerator, not main) == (count == 2)
signals = Signals()
signals.received = None if main else signals.NUMBERS[2]
assert signals.agree(5) == (5 * count, signals.NUMBERS[2] if count == 2 else None)
assert processes.add_up([1, 0.5]) == [count, count / 2]
found = processes.gather_padded(torch.arange(2 + accelerator.process_index), -2)
assert found.tolist() == ([[0, 1]] if count == 1 else [[0, 1, -2], [0, 1, 2]])

# an encoder, whose processes exchange vectors, waits for the main process, which writes them
save, folder = np.save, Path(sys.argv[1]) / str(count)
np.save = lambda *arguments: slowly(save(*arguments))
encode = lambda texts: accelerator.reduce(processes.wait_for_all() or torch.ones(len(texts), 3), "mean").numpy()
vectors = encode_corpus(["a", "b", "c"], encode, folder, key="k", accelerator=accelerator, shard_size=2)
assert [len(shard) for _, shard in vectors.shards()] == [2, 1]
"""


@pytest.mark.slow  # it sleeps, and a machine at work may itself take longer than the exchanges wait
def test_one_process_may_work_alone_for_longer_than_exchanges_wait(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    for processes in (2, 1):
        result = launch(tmp_path / "worker.py", tmp_path, processes=processes, PYTHONPATH=str(ROOT))
        assert result.returncode == 0, result.stderr[-3000:]


SLOW = """
import os, runpy, sys, time
from datetime import timedelta
sys.path.insert(0, {root!r})
import torch.distributed
plain, short = torch.distributed.init_process_group, dict(timeout=timedelta(seconds=20))
torch.distributed.init_process_group = lambda *args, **options: plain(*args, **options | short)
import utils.training.checkpoint_files
if os.environ["RANK"] == "0":
    for owner, name in ((utils.training.checkpoint_files, "publish"), (utils.training.checkpoint_files, "read")):
        def slowly(*args, work=getattr(owner, name), **options):
            print("alone:", work.__name__, flush=True)
            time.sleep(25)
            return work(*args, **options)
        setattr(owner, name, slowly)
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_survives_slow_reading_and_writing_of_its_main_process(tmp_path):
    script = "train_summarize.py"
    wrapper = tmp_path / script
    wrapper.write_text(SLOW.format(root=str(ROOT), script=str(ROOT / script)))
    flags = ["--max_train_steps", 2]
    result = run(wrapper, tmp_path / "run", *flags, processes=2)
    assert result.stdout.count("alone: publish") == 1
    result = run(wrapper, tmp_path / "run", *flags, processes=2)  # started again: reads the checkpoint
    assert result.stdout.count("alone: ") == 2
