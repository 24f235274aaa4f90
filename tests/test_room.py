"""The disk that a run would take, against what real runs leave behind, and its refusals."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import call_script
from kit import some_slow
from test_planner import config_of, kd_budget
from test_runs import kd_flags, train_flags

import planner
from budget import Budget
from config import PretrainConfig
from room import Saves, at_most
from train import model_config


def du(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def left_behind(budget: Budget) -> int:
    return sum(size for name, size in budget.disk if "being written" not in name)


CASES = {
    "plain": ([],),
    "saves": (["--save_every=2", "--max_steps=5"],),
    "all": (["--distill_train=all"],),
    "bfloat16": (["--dtype=bfloat16"],),
}


@pytest.mark.parametrize("more", some_slow(CASES, "plain", "saves"))
def test_a_distillation_leaves_behind_what_was_planned(tiny_teacher, tiny_data, tmp_path, more):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", *more)
    budget = kd_budget(*flags)
    call_script("train_kd", *flags)
    assert left_behind(budget) == pytest.approx(du(tmp_path / "a"), rel=0.03)
    saved = len(list((tmp_path / "a" / "checkpoints").iterdir()))
    assert budget.disk[0][0] == f"checkpoints, {saved} kept"


def test_pretraining_leaves_behind_what_was_planned(tiny_data, tmp_path):
    flags = train_flags(tiny_data, tmp_path, "p", "--embedding_dim=64", "--save_every=2")
    cfg = config_of(PretrainConfig, *flags)
    budget = planner.pretraining(cfg, model_config(cfg, 257, 256), None)
    call_script("train", *flags)
    assert left_behind(budget) == pytest.approx(du(tmp_path / "p"), rel=0.03)


def test_the_most_that_is_there_at_once():
    def needs(saves, there=()):
        parts = at_most([Saves("", n, 0, b) for n, b in saves], 2, 50, 7, list(there))
        assert all(size >= 0 for _, size in parts)
        return sum(size for _, size in parts)

    assert needs([(1, 100)]) == 100 + 50 + 7
    assert needs([(2, 100)]) == 200 + 50 + 7
    assert needs([(3, 100)]) == 300 + 7  # the model comes when only two are left
    assert needs([(10**9, 100)]) == 300 + 7
    assert needs([(1, 10), (1, 100)]) == 110 + 50 + 7
    assert needs([(9, 10), (1, 100)]) == 110 + 50 + 7
    assert needs([(9, 100), (1, 10)]) == 300 + 7
    assert needs([(1, 100)], there=[100, 100]) == 300 + 7
    assert needs([], there=[100, 100]) == 200 + 50 + 7


Usage = namedtuple("Usage", "total used free")


def set_free(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**15, 0, free))


@pytest.mark.parametrize("script", ["train_kd", "train"])
def test_a_disk_that_is_too_small_is_refused(
    refused, monkeypatch, tiny_teacher, tiny_data, tmp_path, script
):
    flags = train_flags(tiny_data, tmp_path / "runs", "a")
    if script == "train_kd":
        flags = kd_flags(tiny_teacher, tiny_data, tmp_path / "runs", "a", "--max_steps=2")
        budget = kd_budget(*flags)
    else:
        cfg = config_of(PretrainConfig, *flags)
        budget = planner.pretraining(cfg, model_config(cfg, 257, 256), None)
    needed = sum(size for _, size in budget.disk)
    set_free(monkeypatch, needed - 1)
    line = refused(script, *flags)
    assert line.startswith("error: --save_model_dir: ")
    assert f"{needed - 1:,} bytes free" in line and f"{needed:,} expected" in line
    assert not (tmp_path / "runs").exists()
    set_free(monkeypatch, needed)
    call_script(script, *flags)
    assert (tmp_path / "runs" / "a" / "model").is_dir()


def test_a_run_that_goes_on_needs_what_is_left_to_write(
    refused, monkeypatch, tiny_teacher, tiny_data, tmp_path
):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--max_steps=6", "--save_every=2")
    whole = kd_budget(*flags)
    call_script("train_kd", *flags)
    again = kd_budget(*flags, "--resume=auto")
    there = du(tmp_path / "a" / "checkpoints")
    assert again.there == there
    model = dict(whole.disk)["the saved model"]
    # All checkpoints are written: only the model is, once more.
    assert sum(b for _, b in again.disk) - there == model + dict(whole.disk)["logs"]
    newest = tmp_path / "a" / "checkpoints" / "step-12"
    shutil.rmtree(newest)
    one = kd_budget(*flags, "--resume=auto")
    size = one.stages[1].saves.size
    logs = dict(whole.disk)["logs"]
    # The last one is still to be written; before it only step-10 is there.
    assert sum(b for _, b in one.disk) - one.there == size + model + logs
    other = kd_budget(*flags, f"--resume={tmp_path / 'a'}", "--run=b")
    assert other.there == 0 and sum(b for _, b in other.disk) == size + model + logs
    set_free(monkeypatch, size + model + logs - 1)
    assert "--save_model_dir" in refused("train_kd", *flags, "--resume=auto")
    set_free(monkeypatch, size + model + logs)
    call_script("train_kd", *flags, "--resume=auto")
    assert newest.is_dir()


def test_a_run_that_saves_nothing_needs_no_room(monkeypatch, tiny_teacher, tiny_data, tmp_path):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--save_model=False", "--max_steps=1")
    set_free(monkeypatch, 100_000)
    call_script("train_kd", *flags)
    assert not (tmp_path / "a" / "checkpoints").exists()
