"""Block-wise distillation killed again and again, and on a disk without room."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from conftest import call_script
from processes import running
from test_cria import flags_of

STEPS = ("--cria=2", "--stages=align,block", "--align_micro_batch=2")


def files(folder) -> dict:
    """What the run is about: inputs, weights, trained blocks, the student."""
    found = folder.rglob("*")
    return {
        p.relative_to(folder): p.read_bytes() for p in found
        if p.is_file() and "checkpoints" not in p.parts
        and p.suffix in (".safetensors", ".json") and p.name != "table.json"
    }  # fmt: skip


@pytest.mark.slow
def test_killed_until_done(tiny_teacher, tiny_data, tmp_path):
    """kill -9 at random moments of shard, collect, train and stitch; the same command goes on, to
    the bytes of a run that was left alone."""
    long = ("--align_tokens=25600", "--block_tokens=25600", "--save_every=40")
    make = lambda run: flags_of(tiny_teacher, tiny_data, tmp_path, run, *STEPS, *long)  # noqa: E731
    call_script("train_kd", *make("whole"))
    kills = 0
    for longest in (5, 5, 5, 6, 6, 8, 8, 600):
        with running("train_kd", *make("cut")) as process:
            end = time.time() + random.uniform(3, longest)
            while process.poll() is None and time.time() < end:
                time.sleep(0.01)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
            _, err = process.communicate()
            assert process.returncode in (0, -signal.SIGKILL), err
            if process.returncode == 0:
                break
    assert kills >= 2 and process.returncode == 0
    whole, cut = files(tmp_path / "whole" / "cria"), files(tmp_path / "cut" / "cria")
    assert len(whole) > 15 and whole == cut


def test_a_full_disk(tiny_teacher, tiny_data, tmp_path):
    """One line that names the file; with room the same command goes on."""
    make = lambda run: flags_of(tiny_teacher, tiny_data, tmp_path, run, *STEPS)  # noqa: E731
    with running("train_kd", *make("cut"), file_bytes=150_000) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "cria" in err, err
    assert "room and permission to write expected" in err
    call_script("train_kd", *make("cut"))
    assert (tmp_path / "cut" / "cria" / "student" / "model.safetensors").is_file()
