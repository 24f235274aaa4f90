"""Runs that save in the background and are killed, stopped, or short of room while they do."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, call_script, metric_rows, run_python
from processes import driver, newest, running, wait_for_step
from test_runs import train_flags, weights

import checkpoint as ckpt

# Saves after step 3 take for ever, or until they are let go on.
SLOW = """
import checkpoint, pathlib, time
write = checkpoint.write_tensors
def slow(path, pieces):
    step = int(path.parent.name[5:-4])
    if step > 3:
        (path.parent.parent.parent / "writing").touch()
        while not (path.parent.parent.parent / "go").exists(): time.sleep(0.01)
    return write(path, pieces)
checkpoint.write_tensors = slow
"""
NO_ROOM = """
import checkpoint, errno, os
write = checkpoint.write_tensors
def full(path, pieces):
    if os.environ.get("RANK", "1") == "1" and path.parent.name == "step-6.tmp":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    return write(path, pieces)
checkpoint.write_tensors = full
"""
ONCE = (
    NO_ROOM
    + """
import trainer
save = trainer.save_step
trainer.save_step = lambda run, *a, **k: save(run, *a, **k) if run.step <= 6 else None
"""
)


def begin(script: str, flags: list[str]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, script, *flags], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(path: Path) -> None:
    deadline = time.time() + 60
    while not path.exists():
        assert time.time() < deadline
        time.sleep(0.01)


@pytest.fixture
def flags(tiny_data, tmp_path):
    return lambda run, *more: train_flags(
        tiny_data, tmp_path, run, "--max_steps=12", "--save_every=3", "--async_save=True", *more
    )


def assert_goes_on_exactly(flags, tmp_path) -> None:
    call_script("train", *flags("cut"), "--resume=auto")
    call_script("train", *flags("whole"))
    assert metric_rows(tmp_path / "cut") == metric_rows(tmp_path / "whole")
    a, b = weights(tmp_path / "whole" / "model"), weights(tmp_path / "cut" / "model")
    assert all(a[n].equal(b[n]) for n in a)
    assert {p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()} == {"step-9", "step-12"}


def test_killed_while_a_save_is_written(flags, tmp_path):
    """Training goes on meanwhile: to the step before the next save, which has to wait."""
    process, cut = begin(driver(tmp_path, SLOW), flags("cut")), tmp_path / "cut"
    wait_for_step(process, cut, 9)
    process.kill()
    process.communicate()
    assert {p.name for p in (cut / "checkpoints").iterdir()} == {"step-3", "step-6.tmp"}
    assert max(metric_rows(cut)) == 9
    assert_goes_on_exactly(flags, tmp_path)


def test_stopped_while_a_save_is_written(flags, tmp_path):
    """SIGTERM: that save and one of the last step are complete before the run ends."""
    process, cut = begin(driver(tmp_path, SLOW), flags("cut", "--save_every=6")), tmp_path / "cut"
    wait_for(cut / "writing")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    (cut / "go").touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err.startswith("stopped by SIGTERM after step")
    count, state = newest(cut)
    assert count == 2 and state["step"] == max(metric_rows(cut)) > 6
    assert (cut / "checkpoints" / "step-6" / "manifest.json").is_file()


@pytest.mark.slow
def test_no_room_in_the_background(flags, tmp_path):
    process = begin(driver(tmp_path, NO_ROOM), flags("cut"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(
        r"error: \S+/step-6\.tmp/shard\S+: No space left on device; room and permission to write "
        r"expected\n", err,
    ), err  # fmt: skip
    assert {p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()} == {"step-3"}
    assert 6 <= max(metric_rows(tmp_path / "cut")) <= 9
    assert_goes_on_exactly(flags, tmp_path)


@pytest.mark.slow
def test_no_room_on_one_of_two_ranks(flags, tmp_path):
    """Both end after the same step, long before the next save, with one line and exit code 2."""
    more = ("--max_steps=2000", "--save_every=3", "--hang_timeout=20")
    ranks = {"ranks": 2, "check": False, "timeout": 120}
    result = run_python(driver(tmp_path, ONCE), *flags("cut", *more), **ranks)
    said = re.findall("error: .*", result.stderr)
    assert re.fullmatch(
        r"error: \S+/step-6\.tmp: rank 1 failed: \[Errno 28\] No space left on device: '\S+'; room "
        "and permission to write expected", said[0],
    ), said  # fmt: skip
    assert "exitcode  : 2" in result.stderr
    assert {p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()} == {"step-3"}
    assert max(metric_rows(tmp_path / "cut")) < 1000


@pytest.mark.slow
def test_two_ranks_killed_three_times(flags, tmp_path):
    """A save after each step, so that they are killed in one; what follows is bitwise the same."""
    more = ("--max_steps=70", "--save_every=1")
    cut, done = tmp_path / "cut", 0
    for _ in range(3):
        with running("train", *flags("cut", *more), "--resume=auto", ranks=2) as process:
            wait_for_step(process, cut, done + 15)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        done = len(metric_rows(cut))
        assert newest_finished(cut) >= done - 2
    assert 45 <= done < 70
    run_python("train.py", *flags("cut", *more), "--resume=auto", ranks=2)
    run_python("train.py", *flags("whole", *more), ranks=2)
    assert metric_rows(cut) == metric_rows(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_stopped_while_they_save(flags, tmp_path):
    """The last checkpoint is that of the last step, and complete when the run has ended."""
    with running("train", *flags("cut", "--max_steps=999", "--save_every=1"), ranks=2) as process:
        wait_for_step(process, tmp_path / "cut", 10)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    count, state = newest(tmp_path / "cut")
    assert count == 2 and state["step"] == max(metric_rows(tmp_path / "cut")) < 999
    assert err.count(f"stopped by SIGTERM after step {state['step']}: checkpoints in") == 1
    assert ckpt.find_checkpoint(tmp_path / "cut", explicit=True).name == f"step-{state['step']}"


def newest_finished(run: Path) -> int:
    names = [p.parent.name for p in (run / "checkpoints").glob("step-*/manifest.json")]
    return max(int(name[5:]) for name in names if not name.endswith(".tmp"))
