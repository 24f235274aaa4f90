"""Training runs in processes of their own, for the tests of faults."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from conftest import ROOT, own_session


@contextlib.contextmanager
def running(
    script: str, *flags: str, ranks: int = 0, file_bytes: int = 0, restarts: int = 0, gpus: str = ""
):  # fmt: skip
    """The run as a process group of its own, which sees `gpus` alone, can write files of
    `file_bytes` (0: any), and which torchrun begins again `restarts` times."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launch += [f"--max_restarts={restarts}"]
    command = [sys.executable, *(launch if ranks else []), f"{script}.py", *flags]
    threads = "1" if ranks else str(torch.get_num_threads())
    env = {**os.environ, "OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": gpus}

    with own_session(command, file_bytes, env=env) as process:
        yield process


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    log, deadline = run / "metrics.jsonl", time.time() + 120
    while not log.is_file() or log.read_text().count('"loss"') < step:
        assert process.poll() is None and time.time() < deadline, "".join(process.communicate())
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(p) for p in found if "train" in Path(f"/proc/{p}/cmdline").read_text()]


def newest(run: Path) -> tuple[int, dict]:
    """Number and state of the only checkpoints there."""
    folders = sorted((run / "checkpoints").iterdir(), key=lambda p: int(p.name[5:]))
    return len(folders), json.loads((folders[-1] / "state.json").read_text())


def driver(folder: Path, patch: str, script: str = "train") -> str:
    """A script that runs train.py (or another) on its flags, with code that a rank runs first."""
    path = folder / "driver.py"
    path.write_text(
        f"import os, sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n{patch}\n"
        f"from conftest import call_script\ncall_script({script!r}, *sys.argv[1:])\n"
    )
    return str(path)
