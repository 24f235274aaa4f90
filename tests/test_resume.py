"""Runs taken up again: killed, stopped, finished, gone back; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call_script, metric_rows, run_python
from test_runs import kd_flags, relative, train_flags, weights

from config import DistillConfig
from distributed import StopSignals, World
from train_kd import Samples


def test_a_table_that_is_not_whole_stops_no_resume(tiny_teacher, tiny_data, tmp_path, capsys):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--max_steps=2", "--resume=auto")
    call_script("train_kd", *flags)
    table, samples = (tmp_path / "a" / name for name in ("table.json", "samples.jsonl"))
    expected, rows = json.loads(table.read_text()), samples.read_text()
    table.write_text("")
    samples.write_text(rows + '{"step": 99, "samples": []}\n')
    capsys.readouterr()
    call_script("train_kd", *flags)
    assert "table.json: no rows found" in capsys.readouterr().out
    assert json.loads(table.read_text()) == [expected[0], expected[-1]]
    assert '"step": 99' not in samples.read_text()


def test_samples_of_a_run_killed_before_its_first_save(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 2, "samples": []}\n')
    run = SimpleNamespace(
        folder=tmp_path, world=World(0, 1, torch.device("cpu")), cfg=DistillConfig(resume="auto"),
        resumed_from=None, step=0,
    )  # fmt: skip
    Samples(run, None, None)
    assert (tmp_path / "samples.jsonl").read_text() == ""


@pytest.mark.parametrize("script", ["train", "train_kd"])
def test_a_finished_run_goes_on(script, tiny_teacher, tiny_data, tmp_path, capsys):
    """Longer, from its last step; of the same length, without a row twice."""
    if script == "train":
        flags = train_flags(tiny_data, tmp_path, "a", "--resume=auto", "--eval_every=2")
    else:
        flags = kd_flags(
            tiny_teacher, tiny_data, tmp_path, "a", "--resume=auto", "--stages=distill",
            "--eval_every=2",
        )  # fmt: skip
    call_script(script, *flags, "--max_steps=4")
    first = metric_rows(tmp_path / "a")
    assert list(first) == [1, 2, 3, 4]
    logs = list((tmp_path / "a").glob("*.jsonl"))
    before = [p.read_text() for p in logs]
    call_script(script, *flags, "--max_steps=4")
    assert [p.read_text() for p in logs] == before
    capsys.readouterr()
    call_script(script, *flags, "--max_steps=7")
    stage = "distill" if script == "train_kd" else "pretrain"
    assert f"note: {stage} had ended with step 4 and goes on to 7" in capsys.readouterr().out
    rows = metric_rows(tmp_path / "a")
    assert list(rows) == list(range(1, 8)) and first.items() <= rows.items()
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "eval/ce" in line][-4:] == [2, 4, 6, 7]


def test_another_length_within_a_stage(refused, tiny_data, tmp_path, capsys):
    flags = train_flags(tiny_data, tmp_path, "a", "--save_every=2", "--keep_checkpoints=9")
    call_script("train", *flags)
    at = f"--resume={tmp_path / 'a' / 'checkpoints' / 'step-4'}"
    assert "has 4 steps of pretrain, this run 3;" in refused("train", *flags, at, "--max_steps=3")
    capsys.readouterr()
    for steps, told in ((6, False), (9, True)):
        call_script("train", *flags, at, f"--max_steps={steps}", "--dry_run")
        said = f"note: pretrain was to have 6 steps and has {steps} now" in capsys.readouterr().out
        assert said == told


def test_auto_says_that_there_is_nothing_to_go_on_from(tiny_data, tmp_path, capsys):
    flags = train_flags(tiny_data, tmp_path, "a", "--resume=auto")
    for told in (True, False):
        call_script("train", *flags)
        assert ("no checkpoint in" in capsys.readouterr().out) == told


def test_a_checkpoint_of_the_other_script(refused, tiny_teacher, tiny_data, tmp_path):
    call_script("train", *train_flags(tiny_data, tmp_path, "a"))
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "b", f"--resume={tmp_path / 'a'}")
    assert "has script train, this run train_kd;" in refused("train_kd", *flags)


def test_an_evaluation_that_a_signal_came_before_is_made_up_for(tiny_data, tmp_path, monkeypatch):
    flags = lambda run: train_flags(tiny_data, tmp_path, run, "--eval_every=2")  # noqa: E731
    call_script("train", *flags("whole"))
    steps = iter(range(1, 9))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop = lambda self, *_: signal.SIGTERM * (next(steps) == 4)  # noqa: E731
        patch.setattr(StopSignals, "agreed", stop)
        call_script("train", *flags("cut"))
    assert list(metric_rows(tmp_path / "cut", "eval/ce")) == [2]
    call_script("train", *flags("cut"), "--resume=auto")
    whole, cut = (metric_rows(tmp_path / run, "eval/ce") for run in ("whole", "cut"))
    assert list(cut) == [2, 4, 6] and cut == whole


def test_going_back_is_told_what_auto_would_do(tiny_data, tmp_path, capsys):
    call_script("train", *train_flags(tiny_data, tmp_path, "a", "--save_every=2"))
    for step, told in ((6, False), (4, True)):
        at = f"--resume={tmp_path / 'a' / 'checkpoints' / f'step-{step}'}"
        call_script("train", *train_flags(tiny_data, tmp_path, "a", "--dry_run"), at)
        assert ("step-6 and what else is of later steps" in capsys.readouterr().out) == told


def test_resume_refuses_changes(refused, tiny_teacher, tiny_data, tmp_path):
    call_script("train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "a"))
    again = [*kd_flags(tiny_teacher, tiny_data, tmp_path, "a"), "--resume=auto"]
    assert "layers" in refused("train_kd", *again, "--layers=2")
    found = refused("train_kd", *again, "--distill_temperature=2")
    assert "has distill_temperature 1.0, this run 2.0;" in found
    assert "has stages align,distill, this run align;" in refused(
        "train_kd", *again, "--stages=align"
    )
    assert "seed" in refused("train_kd", *again, "--seed=9")
    assert "align_lr" in refused("train_kd", *again, "--align_lr=0.5")
    other = tmp_path / "other-data"
    shutil.copytree(tiny_data, other)
    from shard_writer import ShardWriter
    from tokenizer import load_tokenizer

    with ShardWriter(other, "train", load_tokenizer("byte"), overwrite=True) as writer:
        for _ in range(40):
            writer.add(list(range(97, 120)) * 4)
    assert "data" in refused("train_kd", *again, f"--data={other}")
    changed = tmp_path / "other-teacher"
    shutil.copytree(tiny_teacher, changed)
    raw = bytearray((changed / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (changed / "model.safetensors").write_bytes(raw)
    assert "teacher" in refused("train_kd", *again, f"--teacher={changed}")


def test_stage_of_the_checkpoint_is_checked(refused, tiny_teacher, tiny_data, tmp_path):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a")
    call_script("train_kd", *flags, "--stages=align,distill")
    again = [*flags, "--stages=align", f"--resume={tmp_path / 'a'}"]
    line = refused("train_kd", *again)
    assert "stage" in line


@pytest.mark.parametrize("script", [pytest.param("train", marks=pytest.mark.slow), "train_kd"])
def test_kill_and_resume_is_bitwise(script, tiny_teacher, tiny_data, tmp_path):
    """kill -9 at a random step, then --resume auto: the same losses, bit for bit."""
    if script == "train":
        flags = lambda run: train_flags(tiny_data, tmp_path, run, "--max_steps=40")  # noqa: E731
    else:
        flags = lambda run: kd_flags(  # noqa: E731
            tiny_teacher, tiny_data, tmp_path, run, "--distill_train=all"
        )
    call_script(script, *flags("whole"))
    expected = metric_rows(tmp_path / "whole")
    command = [sys.executable, f"{script}.py", *flags("cut"), "--save_every=3"]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    target = len(expected) * (0.2 + 0.6 * int.from_bytes(os.urandom(1)) / 255)
    log = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if log.is_file() and log.read_text().count('"loss"') >= target:
            break
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(metric_rows(tmp_path / "cut"))
    assert 0 < done < len(expected)
    call_script(script, *flags("cut"), "--save_every=3", "--resume=auto")
    assert metric_rows(tmp_path / "cut") == expected
    a, b = weights(tmp_path / "whole" / "model"), weights(tmp_path / "cut" / "model")
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.slow
def test_resume_on_another_number_of_ranks(tiny_teacher, tiny_data, tmp_path):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "two", "--save_every=4")
    whole = kd_flags(tiny_teacher, tiny_data, tmp_path, "whole")
    call_script("train_kd", *whole)
    run_python("train_kd.py", *flags, "--stages=align,distill", "--max_steps=30", ranks=2)
    expected = metric_rows(tmp_path / "whole")
    newest = max((tmp_path / "two" / "checkpoints").iterdir(), key=lambda p: int(p.name[5:]))
    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "two" / "model")
    call_script("train_kd", *flags, "--resume=auto")
    assert relative(expected, metric_rows(tmp_path / "two")) <= 1e-4
