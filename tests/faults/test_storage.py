"""Disks that are full or cannot be written: one line with the path, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import call_script, metric_rows, run_python
from processes import driver, newest, running, wait_for_step
from test_runs import train_flags, weights


@pytest.mark.slow
@pytest.mark.parametrize("how", ["False", "True"])
def test_a_disk_that_fills_up(how, tiny_data, tmp_path):
    """The checkpoint that does not fit is named; the run goes on from the one before it."""
    flags = lambda run: train_flags(  # noqa: E731
        tiny_data, tmp_path, run, "--max_steps=60", "--save_every=4", f"--async_save={how}"
    )
    cut = tmp_path / "cut"
    with running("train", *flags("cut")) as process:
        wait_for_step(process, cut, 8)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    count, state = newest(cut)
    with running("train", *flags("cut"), "--resume=auto", file_bytes=100_000) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    line = err.splitlines()[-1]
    assert line.startswith("error: ") and ".tmp" in line and "Traceback" not in err, err
    assert "File too large; room and permission to write expected" in line
    assert newest(cut) == (count, state)
    call_script("train", *flags("cut"), "--resume=auto")
    call_script("train", *flags("whole"))
    assert metric_rows(cut) == metric_rows(tmp_path / "whole")
    a, b = weights(tmp_path / "whole" / "model"), weights(cut / "model")
    assert all(a[n].equal(b[n]) for n in a)


def test_a_shard_cut_off_while_it_is_read(tiny_data, tmp_path):
    """The run says which one and keeps what it has saved."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    flags = train_flags(data, tmp_path, "a", "--max_steps=4000", "--save_every=5")
    with running("train", *flags) as process:
        wait_for_step(process, tmp_path / "a", 6)
        os.truncate(data / "train-00000.bin", 3000)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1, err
    assert "train-00000.bin: 3000 bytes found" in err and "cut off after the run began" in err
    assert newest(tmp_path / "a")[1]["step"] >= 5


ALONE = """
import data
from config import UserError
build = data.PackedLoader._build
def missing(self, first):
    if os.environ["RANK"] == "1" and first == 4 * 3:
        raise UserError("shard: gone")
    return build(self, first)
data.PackedLoader._build = missing
"""


@pytest.mark.slow
def test_the_one_rank_in_trouble_speaks(tiny_data, tmp_path):
    flags = train_flags(tiny_data, tmp_path, "a", "--save_every=1")
    result = run_python(driver(tmp_path, ALONE), *flags, ranks=2, check=False, timeout=120)
    assert result.returncode == 1 and result.stderr.count("rank 1: error: shard: gone") == 1
    assert newest(tmp_path / "a")[1]["step"] == 3


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="a folder that root cannot write")
def test_a_folder_that_cannot_be_written(tiny_data, refused):
    line = refused("train", *train_flags(tiny_data, "/sys/kernel", "a"))
    assert "/sys/kernel/a" in line and "room and permission to write expected" in line
    assert not os.path.exists("/sys/kernel/a")
