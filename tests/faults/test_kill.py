"""kill -9, again and again, in steps and in saves."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from conftest import call_script, metric_rows
from processes import running, wait_for_step
from test_runs import train_flags, weights


@pytest.mark.slow
def test_killed_twenty_times(tiny_data, tmp_path):
    """A checkpoint after each step, so that many of the kills are within a save; at the end the
    run is bitwise the one that was left alone."""
    flags = lambda run: train_flags(  # noqa: E731
        tiny_data, tmp_path, run, "--max_steps=300", "--save_every=1"
    )
    cut, done, unfinished = tmp_path / "cut", 0, 0
    for _ in range(20):
        with running("train", *flags("cut"), "--resume=auto") as process:
            wait_for_step(process, cut, done + 1)
            time.sleep(random.uniform(0, 0.1))
            assert process.poll() is None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        done = len(metric_rows(cut))
        unfinished += any((cut / "checkpoints").glob("*.tmp"))
    assert 20 <= done < 300 and unfinished
    call_script("train", *flags("cut"), "--resume=auto")
    call_script("train", *flags("whole"))
    assert metric_rows(cut) == metric_rows(tmp_path / "whole")
    a, b = weights(tmp_path / "whole" / "model"), weights(cut / "model")
    assert all(a[n].equal(b[n]) for n in a)
