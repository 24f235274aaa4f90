"""A step's line is written after the next step was launched, and never lost.

pytest tests/test_step_log.py
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import metric_rows

import step_log
from config import DIVERGED, Stopped
from distributed import World
from flops import StageFlops
from metrics import MetricsLogger, StepTimer

RATES = {"model": 1e3, "useful": StageFlops(1e3, 3e2, 7e2), "peak": 1e9}


class Event:
    """torch.cuda.Event, as far as it is used; counts what was waited for."""

    waited = 0
    clock = None

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.time = Event.clock()

    def synchronize(self) -> None:
        Event.waited += 1

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.time - self.time)


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A StepLog as on CUDA, with a clock that stands at 0 until it is moved."""
    monkeypatch.setattr(step_log.torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "waited", 0)
    run = SimpleNamespace(
        world=World(0, 1, torch.device("cpu")), step=0, folder=tmp_path,
        logger=MetricsLogger(tmp_path), cfg=SimpleNamespace(max_skipped=3),
    )  # fmt: skip
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(Event, "clock", lambda: now.seconds)
    timer = StepTimer(10, clock=lambda: now.seconds)
    run.world = World(0, 1, torch.device("cuda"))
    monkeypatch.setattr(step_log, "memory_gib", lambda device: 1.0)
    stage = SimpleNamespace(unique_tokens=0, batch_tokens=100)
    log = step_log.StepLog(run, SimpleNamespace(name="align", steps=10, stage=stage), timer, RATES)
    log.now = now
    return log


def launch(log, loss: float, skipped: int = 0, in_row: int = 0) -> None:
    """A step of 100 tokens."""
    log.run.step += 1
    log.timer.step(100)
    log.take({"loss": torch.tensor(loss), "kl": torch.tensor(0.5), "grad_norm": torch.tensor(3.0),
              "lr": 1e-3, "skipped": torch.tensor(float(skipped)),
              "in_row": torch.tensor(float(in_row))}, {})  # fmt: skip


def test_a_row_comes_with_the_step_after(log):
    """And says how long the device took for it, whenever the host looks."""
    log.now.seconds = 2.0
    launch(log, 1.0)
    assert metric_rows(log.run.folder) == {} and Event.waited == 0
    log.now.seconds = 5.0
    log.flush()
    log.now.seconds = 6.0
    launch(log, 4.0)
    assert metric_rows(log.run.folder) == {1: 1.0}
    log.now.seconds = 60.0
    log.flush()
    log.flush()
    assert metric_rows(log.run.folder) == {1: 1.0, 2: 4.0} and Event.waited == 2
    assert metric_rows(log.run.folder, "tok/s") == {1: 50.0, 2: 25.0}
    assert metric_rows(log.run.folder, "grad_norm") == {1: 3.0, 2: 3.0}
    assert metric_rows(log.run.folder, "kl") == {1: 0.5, 2: 0.5}
    assert metric_rows(log.run.folder, "mfu")[2] == pytest.approx(25.0 * 1e3 / 1e9)


def test_steps_in_between_count(log):
    log.timer.step(100)
    log.timer.step(100)
    log.now.seconds = 3.0
    launch(log, 1.0)
    log.flush()
    assert metric_rows(log.run.folder, "tok/s") == {1: 100.0}


def test_a_teacher_is_counted_while_it_runs(log):
    """150 tokens, whose targets are kept, in steps of 100: it runs for the first and half the
    second."""
    log.plan.stage.unique_tokens = 150
    log.now.seconds = 1.0
    for _ in range(3):
        log.now.seconds += 1.0
        launch(log, 1.0)
        log.flush()
    log.timer.step(100)
    launch(log, 1.0)
    log.flush()
    rows = metric_rows(log.run.folder, "useful_tflops"), metric_rows(log.run.folder, "tok/s")
    each = [1e12 * rows[0][s] / rows[1][s] for s in (1, 2, 3, 4)]
    assert each == pytest.approx([2e3, 1.5e3, 1e3, 1e3])


def test_without_cuda_at_once(log):
    log.late = False
    launch(log, 1.0)
    assert metric_rows(log.run.folder) == {1: 1.0} and Event.waited == 0


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(log, loss):
    """Where the step was taken all the same."""
    launch(log, loss)
    with pytest.raises(Stopped, match=r"stage align, step 1: given up, loss (nan|inf),") as stop:
        log.flush()
    assert stop.value.code == DIVERGED and metric_rows(log.run.folder) == {}


def test_steps_left_out_are_counted_and_too_many_end_the_run(log, capsys):
    log.late = False
    nan = float("nan")
    launch(log, 1.0)
    launch(log, nan, skipped=1, in_row=1)
    launch(log, 2.0, skipped=1)
    launch(log, 2.0, skipped=3)  # two that no line was written for
    assert metric_rows(log.run.folder) == {1: 1.0, 2: None, 3: 2.0, 4: 2.0}
    assert metric_rows(log.run.folder, "skipped") == {2: 1, 3: 1, 4: 3}
    out = capsys.readouterr().out
    assert "stage align, step 2: 1 steps left out so far, this one with loss nan, grad" in out
    assert "stage align, step 4: 3 steps left out so far\n" in out
    assert out.count("left out") == 2
    launch(log, 9.0, skipped=4, in_row=1)
    launch(log, 9.0, skipped=5, in_row=2)
    with pytest.raises(Stopped, match=r"step 7: given up, loss 9, .* 3 steps left out one after"):
        launch(log, 9.0, skipped=6, in_row=3)


def test_rows_are_json(log):
    launch(log, 1.0)
    log.flush()
    (line,) = (log.run.folder / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["stage"] == "align" and row["step"] == 1 and row["lr"] == 1e-3
