"""A run that has come to a standstill ends itself and names the rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, metric_rows, run_python
from processes import children, driver, running, wait_for_step
from test_runs import train_flags

from watchdog import HUNG

SLEEPY = """
import data, time
build = data.PackedLoader._build
def sleepy(self, first):
    if os.environ["RANK"] == "1" and first == 4 * 5:
        time.sleep(1000)
    return build(self, first)
data.PackedLoader._build = sleepy
"""


PAUSE = "sleep 0.3; kill -STOP {0}; sleep 4; kill -CONT {0}"


@pytest.mark.parametrize("how", ["hung", "progress", "paused"])
def test_one_process(how):
    """Also where the main thread is in C code that never returns; not while there is progress, nor
    because the process was stopped for a while."""
    pause = f"subprocess.Popen([{PAUSE!r}.format(os.getpid())], shell=True)"
    code = (
        "import os, subprocess, time, torch\n"
        "from distributed import World\n"
        "from watchdog import Watchdog\n"
        "with Watchdog(World(0, 1, torch.device('cpu')), 2) as dog:\n"
        f"    {pause if how == 'paused' else 'pass'}\n"
        "    for step in range(5):\n"
        "        dog.watch(step, 'computing')\n"
        f"        for _ in range(12): time.sleep({20 if how == 'hung' else 0.05})\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    line = "error: no progress for 2 s (--hang_timeout): rank 0 in step 0, computing\n"
    assert (found.returncode, found.stderr) == ((HUNG, line) if how == "hung" else (0, ""))


@pytest.mark.slow
def test_a_rank_whose_loader_hangs_is_named(tiny_data, tmp_path):
    flags = train_flags(tiny_data, tmp_path, "a", "--hang_timeout=8", "--save_every=2")
    result = run_python(driver(tmp_path, SLEEPY), *flags, ranks=2, check=False, timeout=120)
    said = re.findall("error: no progress.*", result.stderr)
    assert said == [
        "error: no progress for 8 s (--hang_timeout): rank 1 in step 6, loading data"
    ], result.stderr  # fmt: skip
    assert result.returncode == 1 and f"exitcode  : {HUNG}" in result.stderr
    assert sorted(metric_rows(tmp_path / "a")) == [1, 2, 3, 4, 5]
    assert {p.name for p in (tmp_path / "a" / "checkpoints").iterdir()} == {"step-2", "step-4"}


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named(tiny_data, tmp_path):
    """SIGSTOP: it sends nothing any more, and the others wait for it."""
    flags = train_flags(tiny_data, tmp_path, "a", "--max_steps=2000", "--hang_timeout=8")
    with running("train", *flags, ranks=2) as process:
        wait_for_step(process, tmp_path / "a", 5)
        stopped = children(process.pid)[1]
        os.kill(stopped, signal.SIGSTOP)
        begun = time.monotonic()
        line = next(line for line in process.stderr if "no progress" in line)
        assert time.monotonic() - begun < 30
        os.kill(stopped, signal.SIGKILL)
    assert re.search(r"\(--hang_timeout\): rank 1 in step \d+, .*, silent for \d+ s\n", line)
