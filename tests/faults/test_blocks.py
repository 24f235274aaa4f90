"""Block-wise distillation killed again and again, and on a disk without room."""

from __future__ import annotations

import os
import random
import signal
import subprocess

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


def progress(cria) -> int:
    """Files written and steps trained."""
    try:
        found = [p for p in cria.rglob("*") if p.is_file() and "checkpoints" not in p.parts]
        logs = [p.read_text() for p in found if p.name == "metrics.jsonl"]
        return len(found) + sum(log.count("\n") for log in logs)
    except FileNotFoundError:  # gone since it was listed
        return 0


@pytest.mark.slow
def test_killed_until_done(tiny_teacher, tiny_data, tmp_path):
    """kill -9 at random moments of shard, collect and train, and as stitch begins; the same command
    goes on, to the bytes of a run that was left alone."""
    long = ("--align_tokens=25600", "--block_tokens=25600", "--save_every=40")
    make = lambda run: flags_of(tiny_teacher, tiny_data, tmp_path, run, *STEPS, *long)  # noqa: E731
    call_script("train_kd", *make("whole"))
    whole, cut = tmp_path / "whole" / "cria", tmp_path / "cut" / "cria"
    most = progress(whole)
    assert most > 1600  # 2 blocks of 2 stages of 400 steps
    early, late = random.sample(range(1, 12), 2), random.sample(range(most - 100), 4)
    moments = [lambda n=n: progress(cut) >= n for n in sorted(early) + sorted(late)]
    for reached in (*moments, (cut / "blocks" / "block-001" / "trained.safetensors").is_file):
        with running("train_kd", *make("cut")) as process:
            while not reached():
                with pytest.raises(subprocess.TimeoutExpired):  # it goes on, and its pipes are read
                    process.communicate(timeout=0.002)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    call_script("train_kd", *make("cut"))
    assert len(files(whole)) > 15 and files(whole) == files(cut)


@pytest.mark.slow
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
