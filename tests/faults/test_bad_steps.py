"""Gradients that are not finite, or far too large: left out on every rank, counted, and an end."""

from __future__ import annotations

import json
import math

import pytest
from conftest import call_script, metric_rows, run_python
from processes import driver
from test_runs import kd_flags, train_flags, weights

import trainer
from config import DIVERGED
from objectives import AlignObjective, HeadObjective

POISON = """
import objectives
forward, calls = objectives.HeadLoss.forward, []
def poisoned(self, *args):
    out = forward(self, *args)
    calls.append(0)
    if os.environ["RANK"] == "1" and len(calls) in {calls}:
        out.loss = out.loss * float("nan")
    return out
objectives.HeadLoss.forward = poisoned
"""


def spoil(monkeypatch, objective, steps: range, value: float) -> None:
    """Put `value` among the gradients of these calls."""
    backward, calls = objective.backward, []

    def spoilt(self, *args):
        sums = backward(self, *args)
        calls.append(0)
        if len(calls) in steps:
            next(p for p in self.params.values() if p.grad is not None).grad.view(-1)[0] = value
        return sums

    monkeypatch.setattr(objective, "backward", spoilt)


@pytest.mark.parametrize("script", ["train", "train_kd"])
def test_a_step_is_left_out(script, tiny_teacher, tiny_data, tmp_path, monkeypatch, capsys):
    """As if that step's update had not been made; weights and momentum are not touched by it."""
    flags, objective = train_flags, HeadObjective
    if script == "train_kd":
        objective = AlignObjective
        more = "--stages=align", "--max_steps=6"
        flags = lambda *args: kd_flags(tiny_teacher, *args, *more)  # noqa: E731

    def run(name: str) -> dict:
        call_script(script, *flags(tiny_data, tmp_path, name))
        return weights(tmp_path / name / "model")

    whole = run("whole")
    assert metric_rows(tmp_path / "whole", "skipped") == {}
    with monkeypatch.context() as m:
        spoil(m, objective, range(4, 5), math.nan)
        found = run("spoilt")
    assert "step 4: 1 steps left out so far, this one with loss" in capsys.readouterr().out
    assert metric_rows(tmp_path / "spoilt", "skipped") == {4: 1, 5: 1, 6: 1}
    with monkeypatch.context() as m:  # the same gradients, and the fourth update is not made
        step, calls = trainer.OptimizerSet.step, []

        def three_and_two(self, go):
            calls.append(0)
            if len(calls) != 4:
                step(self, go)

        m.setattr(trainer.OptimizerSet, "step", three_and_two)
        expected = run("left-out")
    assert all(found[n].equal(expected[n]) for n in expected)
    assert not all(found[n].equal(whole[n]) for n in whole)


def test_a_spike_is_left_out_only_if_asked_for(tiny_data, tmp_path, monkeypatch):
    more = ("--max_steps=24", "--grad_clip=0")
    for name, flags in (("off", more), ("on", (*more, "--skip_spikes=20"))):
        with monkeypatch.context() as m:
            spoil(m, HeadObjective, range(20, 22), 1e4)
            call_script("train", *train_flags(tiny_data, tmp_path, name, *flags))
    assert metric_rows(tmp_path / "off", "skipped") == {}
    assert metric_rows(tmp_path / "on", "skipped") == {20: 1, 21: 2, 22: 2, 23: 2, 24: 2}
    assert metric_rows(tmp_path / "on", "grad_norm")[20] > 1e3


def test_a_run_that_only_skips_ends(tiny_data, tmp_path, monkeypatch, capsys):
    """With exit code 3 and one line; what it saved is from before, and can be gone on from."""
    flags = train_flags(tiny_data, tmp_path, "a", "--max_skipped=3", "--save_every=2")
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        spoil(m, HeadObjective, range(4, 99), math.inf)
        call_script("train", *flags)
    assert stop.value.code == DIVERGED == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "stage pretrain, step 6: given up, loss" in err
    assert "gradient norm inf, 3 steps left out one after another" in err
    call_script("train", *flags, "--resume=auto")
    assert all(map(math.isfinite, metric_rows(tmp_path / "a").values()))


@pytest.mark.slow
def test_nan_on_one_rank_is_left_out_on_both(tiny_data, tmp_path):
    """Two micro-batches a rank and step: the fifth call is in step 3."""
    script = driver(tmp_path, POISON.format(calls=[5]))
    run_python(script, *train_flags(tiny_data, tmp_path, "two"), ranks=2)
    assert metric_rows(tmp_path / "two", "skipped") == {3: 1, 4: 1, 5: 1, 6: 1}
    rows = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").open()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert losses[3] is None and all(math.isfinite(losses[s]) for s in (1, 2, 4, 5, 6))
    assert all(t.isfinite().all() for t in weights(tmp_path / "two" / "model").values())

    script = driver(tmp_path, POISON.format(calls=list(range(5, 99))))
    flags = train_flags(tiny_data, tmp_path, "end", "--max_skipped=2")
    result = run_python(script, *flags, ranks=2, check=False)
    assert result.returncode == 1 and result.stderr.count("step 4: given up, loss nan") == 1
    assert "exitcode  : 3" in result.stderr
