"""Timer, console, log files, trackers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types

import pytest
import torch
from conftest import ROOT

import metrics
from config import UserError

# Time


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_timer_counts_all_tokens_over_the_whole_interval():
    clock = Clock()
    timer = metrics.StepTimer(total_steps=110, start_step=100, clock=clock)
    assert timer.read() == {}
    for _ in range(2):
        clock.now += 15.0  # slow: compiling
        timer.step(1000)
    assert timer.read() == {"tok/s": 2000 / 30, "time_per_step": 15.0, "eta": 8 * 15.0}
    for _ in range(3):
        clock.now += 2.0
        timer.step(1000)
    with timer.paused():
        clock.now += 9.0
    # The pause is no training time, but it is waited for: 15 s for 3 steps, 5 more steps to go.
    assert timer.read() == {"tok/s": 500.0, "time_per_step": 2.0, "eta": 5 * 5.0}
    clock.now += 4.0
    timer.step(1000)
    assert timer.read()["tok/s"] == 250.0


def test_memory_is_in_gib():
    before = metrics.memory_gib("cpu")
    block = torch.ones(2**28 // 4)  # 0.25 GiB
    assert 0.01 < before < metrics.memory_gib("cpu") + 1e-9 < 500
    assert metrics.memory_gib("cpu") >= block.nbytes / 2**30


def test_memory_is_not_that_of_the_starting_process():
    held = b"." * 2**30
    code = "import metrics; print(metrics.memory_gib('cpu'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert 0.05 < float(out.stdout) < len(held) / 2**30 - 0.2


# Console


def test_console_line():
    row = {
        "step": 120, "loss": 2.34567, "ce": 3.1, "kl": 4.2e-5, "lr": 1e-3, "grad_norm": 0.51,
        "tok/s": 636012.4, "mfu": 0.5512, "mem": 41.239, "eta": 3723, "unknown": 1,
    }  # fmt: skip
    assert metrics.header_line() == (
        "   step |     loss |       ce |       kl |       lr | grad_norm |     tok/s |"
        "    mfu |     mem |    eta"
    )
    assert metrics.format_line(row) == (
        "    120 |   2.3457 |   3.1000 |  4.2e-05 | 1.00e-03 |    0.5100 |   636,012 |"
        "  55.1% |  41.24G |  1h02m"
    )
    assert metrics.format_line(
        {"step": 1, "loss": math.nan, "kl": None, "grad_norm": 123456.0}
    ) == (
        "      1 |      nan |        - |        - |        - |   1.2e+05 |         - |"
        "      - |       - |      -"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (185, "3m05s"), (3599.7, "1h00m"), (183_600, "2d03h")],
)
def test_duration(seconds, text):
    assert metrics._duration(seconds) == text


# Log files


def rows(run_dir):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_log_writes_the_same_keys_to_console_and_file(tmp_path, capsys):
    logger = metrics.MetricsLogger(tmp_path)
    logger.log(1, "align", {"loss": torch.tensor(0.5), "tok/s": 10.0, "time_per_step": 2.0})
    assert rows(tmp_path)[0] == {
        "step": 1,
        "stage": "align",
        "loss": 0.5,
        "tok/s": 10.0,
        "time_per_step": 2.0,
        "tokens_per_sec": 10.0,
    }  # fmt: skip (read before close: every row is flushed)
    logger.log(2, "align", {"loss": math.nan, "kl": torch.tensor(math.inf), "n": torch.tensor(3)})
    logger.log_eval(2, "align", {"ppl": 12.5, "top1": torch.tensor(0.75)})
    logger.log(0, "distill", {"loss": 1.0})
    logger.table("Samples", [{"prompt": "a [b]", "loss": 1.5}, {"prompt": "c", "top1": 0.25}])
    logger.close()
    logger.close()
    assert rows(tmp_path)[1:] == [
        {"step": 2, "stage": "align", "loss": None, "kl": None, "n": 3.0},
        {"step": 2, "stage": "align", "eval/ppl": 12.5, "eval/top1": 0.75},
        {"step": 0, "stage": "distill", "loss": 1.0},
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["stage align", metrics.header_line()]
    assert lines[2] == metrics.format_line({"step": 1, "loss": 0.5, "tok/s": 10.0})
    assert lines[3] == metrics.format_line({"step": 2, "loss": math.nan, "kl": math.inf})
    assert lines[4] == "      2 | eval/ppl 12.5000 | eval/top1 0.7500"
    assert lines[5:7] == ["stage distill", metrics.header_line()]
    table = "\n".join(lines[8:])
    assert "Samples" in table and "a [b]" in table and "0.2500" in table and "-" in table


def test_other_ranks_are_silent(tmp_path, capsys):
    logger = metrics.MetricsLogger(tmp_path / "run", rank=1, tracker="wandb")
    logger.log(1, "align", {"loss": 1.0})
    logger.log_eval(1, "align", {"loss": 1.0})
    logger.table("t", [{"a": 1}])
    logger.say("hello")
    logger.close()
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_tensors_cost_one_host_copy_per_step(tmp_path, monkeypatch):
    copies = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copies.append(1) or original(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a copy per value"))
    logger = metrics.MetricsLogger(tmp_path)
    values = {name: torch.rand(()) for name in ("loss", "ce", "kl", "grad_norm")}
    logger.log(1, "distill", values)
    logger.close()
    assert len(copies) == 1 and rows(tmp_path)[0]["kl"] == original(values["kl"].double())


def log_steps(run_dir, stage, steps, **kwargs):
    logger = metrics.MetricsLogger(run_dir, **kwargs)
    for step in steps:
        logger.log(step, stage, {"loss": float(step)})
    logger.close()


def keys(run_dir):
    return [(r["stage"], r["step"]) for r in rows(run_dir)]


def test_resume_leaves_no_duplicate_steps(tmp_path):
    log_steps(tmp_path, "pretrain", range(1, 6))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "sta')  # the process died here
    log_steps(tmp_path, "pretrain", range(4, 8), resume_step=4)
    assert keys(tmp_path) == [("pretrain", s) for s in range(1, 8)]
    log_steps(tmp_path, "pretrain", [8])  # without resume_step: appended
    assert keys(tmp_path) == [("pretrain", s) for s in range(1, 9)]


def test_env_file(tmp_path):
    path = tmp_path / ".env"
    path.write_text(
        "# comment\nWANDB_API_KEY=abc=def # mine\nexport WANDB_MODE='off line' # x\n"
        'WANDB_NAME = "a # b"\nSECRET=1\nWANDB_BROKEN\n  WANDB_EMPTY=\n'
    )
    assert metrics.read_env_file(path) == {
        "WANDB_API_KEY": "abc=def",
        "WANDB_MODE": "off line",
        "WANDB_NAME": "a # b",
        "WANDB_EMPTY": "",
    }
    assert metrics.read_env_file(tmp_path / "absent") == {}


def test_wandb_missing_is_a_users_mistake(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--tracker.*\[wandb\]") as error:
        metrics.MetricsLogger(tmp_path, tracker="wandb")
    assert "\n" not in str(error.value)
    metrics.MetricsLogger(tmp_path).close()  # and it is not needed otherwise


def test_tensorboard_gets_the_same_rows(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = metrics.MetricsLogger(tmp_path, tracker="tensorboard")
    for step in (1, 2, 3):
        logger.log(step, "distill", {"loss": torch.tensor(float(step)), "kl": math.nan})
    logger.log_eval(3, "distill", {"ppl": 7.0})
    logger.close()
    logger = metrics.MetricsLogger(tmp_path, tracker="tensorboard", resume_step=3)
    logger.log(3, "distill", {"loss": 30.0})
    logger.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 1), (2, 2), (3, 30)]
    assert [e.value for e in found.Scalars("eval/ppl")] == []  # of the step that is done again
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"--tracker.*\[tensorboard\]"):
        metrics.MetricsLogger(tmp_path, tracker="tensorboard")


class FakeRun:
    def __init__(self, run_id):
        self.id, self.rows, self.finished = run_id or "fresh", [], False

    def define_metric(self, name, step_metric):
        assert step_metric == "step"

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


def test_wandb_gets_the_same_rows_and_the_env_file(tmp_path, monkeypatch, capsys):
    calls, error = [], type("Error", (Exception,), {})

    def init(**kwargs):
        calls.append(kwargs | {"key": metrics.os.environ.get("WANDB_API_KEY")})
        if kwargs["project"] == "broken":
            raise error("no key\nfound")
        return FakeRun(kwargs["id"])

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=error))
    monkeypatch.setenv("WANDB_API_KEY", "")  # restores the variable afterwards
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("WANDB_API_KEY=s3cret\n")
    options = dict(tracker="wandb", run_name="n", config={"lr": 1})
    logger = metrics.MetricsLogger(tmp_path / "run", **options)
    run = logger.tracker
    logger.log(1, "distill", {"loss": 1.5, "grad_norm": 2.0, "tok/s": 7.0, "mfu": None})
    logger.close()
    assert run.finished and run.rows == [
        {"step": 1, "stage": "distill", "loss": 1.5, "grad_norm": 2.0, "tok/s": 7.0,
         "tokens_per_sec": 7.0}
    ]  # fmt: skip
    assert calls[0]["key"] == "s3cret" and calls[0]["project"] == "retort"
    assert calls[0]["name"] == "n" and calls[0]["config"] == {"lr": 1} and calls[0]["id"] is None
    metrics.MetricsLogger(tmp_path / "run", resume_step=2, **options).close()
    assert calls[1]["id"] == "fresh"  # the same wandb run goes on
    with pytest.raises(UserError, match="wandb did not start: no key found"):
        metrics.MetricsLogger(tmp_path / "run", project="broken", **options)
    captured = capsys.readouterr()
    assert "s3cret" not in captured.out + captured.err


def test_what_cannot_be_written_is_said_beforehand(tmp_path, monkeypatch):
    metrics.check_writable("out", tmp_path / "new" / "a.json")
    assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())
    (tmp_path / "a").touch()
    metrics.check_writable("out", tmp_path / "a")
    for path, says in ((tmp_path / "new", "a folder"), (tmp_path / "a/b", "no folder")):
        with pytest.raises(UserError, match=f"^--out: .*{says}"):
            metrics.check_writable("out", path)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anything
    with pytest.raises(UserError, match=r"^--out: .*a cannot be written"):
        metrics.check_writable("out", tmp_path / "a")
