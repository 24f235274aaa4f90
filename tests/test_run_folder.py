"""Whose folder a run's is: runs that begin in one second, and two processes with one name."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT, call_script
from test_runs import train_flags

import run_folder
from config import PretrainConfig, UserError

HOLDER = """
import sys, run_folder, pathlib
run_folder.hold(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_runs_without_a_name_that_begin_in_one_second(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "now")
    cfg = PretrainConfig(save_model_dir=str(tmp_path / "runs"))
    found = [run_folder.take_folder(cfg, "train").name for _ in range(3)]
    assert found == ["train-now", "train-now-2", "train-now-3"]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == found
    named = run_folder.take_folder(PretrainConfig(save_model_dir=str(tmp_path), run="a"), "train")
    assert named == tmp_path / "a" and not named.exists()


def test_a_folder_that_another_process_is_in(refused, tiny_data, tmp_path):
    flags = train_flags(tiny_data, tmp_path, "a", "--max_steps=2", "--resume=auto")
    words = [sys.executable, "-c", HOLDER, str(tmp_path / "a")]
    with subprocess.Popen(
        words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        said = refused("train", *flags)
        assert "--run: " in said and "a is in use by another process" in said
        assert [p.name for p in (tmp_path / "a").iterdir()] == ["lock"]
        other.stdin.close()
    call_script("train", *flags)
    assert (tmp_path / "a").resolve() not in run_folder._held
    for _ in range(2):  # by this process already
        run_folder.hold(tmp_path / "a")
    run_folder.release(tmp_path / "a")


def test_a_file_system_without_locks_stops_nothing(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "not supported")

    monkeypatch.setattr(run_folder.fcntl, "lockf", none)
    run_folder.hold(tmp_path / "a")
    run_folder.release(tmp_path / "a")

    def taken(*_):
        raise BlockingIOError

    monkeypatch.setattr(run_folder.fcntl, "lockf", taken)
    with pytest.raises(UserError, match="in use by another process"):
        run_folder.hold(tmp_path / "b")
