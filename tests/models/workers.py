"""Running a program as one process and as two."""

import os
import subprocess
import sys

from conftest import OFFLINE, ROOT


def run_worker(program: str, folder) -> None:
    """Runs `program folder` on two processes and then on one, with the project on its path."""
    (folder / "worker.py").write_text(program)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT)}
    for command in (launcher, [sys.executable]):
        result = subprocess.run([*command, str(folder / "worker.py"), str(folder)], env=environment,
                                capture_output=True, text=True, timeout=120)  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
