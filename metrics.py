"""What a run reports: throughput, memory, the console line, metrics.jsonl, wandb.

Try it: pytest tests/test_metrics.py
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from config import UserError

# The console line, and the spelling of these keys in metrics.jsonl and the trackers.
# Units: tok/s over all ranks, mfu a fraction, mem GiB, eta seconds.
COLUMNS = ("step", "loss", "ce", "kl", "lr", "grad_norm", "tok/s", "mfu", "mem", "eta")
WIDTHS = (7, 8, 8, 8, 8, 9, 9, 6, 7, 6)


# Time and memory


class StepTimer:
    """Tokens per second over wall time, and the time left.

    for step in ...:
        timer.step(tokens)      # once an optimizer step: all its micro-batches, all ranks
        if log_now:
            metrics |= timer.read()

    CUDA is synchronised in read() and around paused() only, never between micro-batches. Who knows
    better when the steps were done calls mark() after them and read(mark) at that moment, or
    read(mark, now) at any later one.

    Args:
        total_steps: of the stage, for the time left.
        start_step: steps done before this process began.
        clock: seconds; tests pass their own.
    """

    def __init__(
        self,
        total_steps: int,
        device: torch.device | str = "cpu",
        *,
        start_step: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.device = torch.device(device)
        self.clock = clock
        self.remaining_steps = total_steps - start_step
        self.tokens = self.steps = 0
        self.idle = 0.0
        self.last_read = self._now()
        # The first interval compiles and autotunes: the time left is judged by the later ones.
        self.steady_since: float | None = None
        self.steady_steps = 0

    def step(self, tokens: int) -> None:
        """Counts one optimizer step and all of its tokens, of every micro-batch and rank."""
        self.tokens += tokens
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves an evaluation or a save out of tok/s; the time left does count it."""
        start = self._now()
        try:
            yield
        finally:
            self.idle += self._now() - start

    def mark(self) -> tuple[int, int, float]:
        """(tokens, steps, idle seconds) since the last mark."""
        counts = self.tokens, self.steps, self.idle
        self.tokens, self.steps, self.idle = 0, 0, 0.0
        return counts

    def read(
        self, mark: tuple[int, int, float] | None = None, now: float | None = None
    ) -> dict[str, float]:
        """tok/s, time_per_step (s) and eta (s) of the steps since the last read; {} if none."""
        if now is None:
            now = self._now() if mark is None else self.clock()
        tokens, steps, idle = mark or self.mark()
        if not steps:
            return {}
        busy = max(now - self.last_read - idle, 1e-9)
        time_per_step = busy / steps
        self.remaining_steps -= steps
        if self.steady_since is None:
            self.steady_since, wall_per_step = now, time_per_step
        else:
            self.steady_steps += steps
            wall_per_step = (now - self.steady_since) / self.steady_steps
        self.last_read = now
        return {
            "tok/s": tokens / busy,
            "time_per_step": time_per_step,
            "eta": max(self.remaining_steps, 0) * wall_per_step,
        }

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


def memory_gib(device: torch.device | str) -> float | None:
    """Peak memory in GiB: allocated by torch on a CUDA device, else resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:  # on Linux ru_maxrss counts what the starting process held, VmHWM does not
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, else KiB


# Console


def header_line() -> str:
    """The titles of format_line's columns."""
    return " | ".join(name.rjust(width) for name, width in zip(COLUMNS, WIDTHS, strict=True))


def format_line(row: dict) -> str:
    """One step as a line of COLUMNS, in that order; what is missing or None prints "-"."""
    cells = (_cell(name, row.get(name)) for name in COLUMNS)
    return " | ".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))


def _cell(name: str, value: float | int | str | None) -> str:
    if not isinstance(value, int | float):
        return "-" if value is None else str(value)
    if not math.isfinite(value):
        return str(value)
    if name == "lr":
        return f"{value:.2e}"
    if name == "tok/s":
        return f"{value:,.0f}"
    if name == "mfu":
        return f"{100 * value:.1f}%"
    if name == "mem":
        return f"{value:.2f}G"
    if name == "eta":
        return _duration(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _duration(seconds: float) -> str:
    """Two units at most: 12s, 3m05s, 1h02m, 2d03h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


# Log files and trackers


def git_commit() -> str | None:
    """The checkout's commit, with -dirty for local changes; None outside git."""
    root = Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def check_writable(flag: str, path: Path) -> None:
    """UserError unless `path` can be written as a file, asked before the work that fills it; its
    folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--{flag}: no folder {path.parent} ({e.strerror})") from None
    if path.is_dir():
        raise UserError(f"--{flag}: {path} is a folder, a file expected")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--{flag}: {path} cannot be written (Permission denied)")


def console_table(title: str, rows: list[dict], width: int = 120) -> None:
    """A table on the console; columns are the rows' keys, in the order of first use. A log file
    has no width of its own; 80 columns would fold ordinary rows."""
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(_cell("", row.get(name)) for name in columns))
    Console(width=None if sys.stdout.isatty() else width, markup=False).print(table)


class MetricsLogger:
    """Console, `<run_dir>/metrics.jsonl` and, if asked for, a tracker; without a run_dir the
    console alone. Ranks other than 0 do nothing.

    metrics.jsonl has one strict-JSON object a line, flushed at once, with "step" and "stage" first
    and the console's keys; NaN and infinities, which JSON lacks, are null.

    Args:
        resume_step: the first step that will be run (again). Rows of it and of later steps are
            removed, so that no step appears twice. None appends.
        tracker: wandb, tensorboard (files in `<run_dir>/tensorboard`) or none.
        project, run_name, config: for wandb.
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        *,
        rank: int = 0,
        tracker: str = "none",
        project: str = "retort",
        run_name: str | None = None,
        config: dict | None = None,
        resume_step: int | None = None,
    ):
        self.file = self.tracker = self.header_stage = None
        self.active = rank == 0
        if not self.active or run_dir is None:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        if tracker == "wandb":
            resumed = resume_step is not None
            self.tracker = _start_wandb(run_dir, project, run_name, config or {}, resumed)
        elif tracker == "tensorboard":
            self.tracker = TensorBoard(run_dir / "tensorboard", resume_step)
        path = run_dir / "metrics.jsonl"
        kept = trim_rows(path, resume_step)
        self.evaluated = {
            (row["step"], row.get("stage"))
            for row in kept
            if any(k.startswith("eval/") for k in row)
        }
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def log(self, step: int, stage: str, metrics: dict) -> None:
        """A training step: one console line, one row. Values: numbers or 0-d tensors."""
        if not self.active:
            return
        row = {"step": step, "stage": stage, **_to_numbers(metrics)}
        if "tok/s" in row:
            row["tokens_per_sec"] = row["tok/s"]  # the name that older dashboards plot
        if stage != self.header_stage:
            self.say(f"stage {stage}")
            self.say(header_line())
            self.header_stage = stage
        self.say(format_line(row))
        self._write(row)

    def log_eval(self, step: int, stage: str, metrics: dict) -> None:
        """An evaluation, under keys that begin with "eval/" wherever they appear."""
        if not self.active:
            return
        values = {f"eval/{name}": value for name, value in _to_numbers(metrics).items()}
        shown = [f"{name} {_cell('', value)}" for name, value in values.items()]
        self.say(" | ".join([_cell("step", step).rjust(WIDTHS[0]), *shown]))
        if (step, stage) not in self.evaluated:  # of a finished run, begun again
            self._write({"step": step, "stage": stage, **values})

    def table(self, title: str, rows: list[dict]) -> None:
        """`console_table` on rank 0."""
        if self.active:
            console_table(title, rows)

    def say(self, text: str) -> None:
        """A line on the console, from rank 0 only."""
        if self.active:
            print(text, flush=True)

    def close(self) -> None:
        """Closes the file and the tracker; calling it twice does no harm."""
        if self.file is not None:
            self.file.close()
        if self.tracker is not None:
            self.tracker.finish()
        self.file = self.tracker = None

    def _write(self, row: dict) -> None:
        assert self.file is not None, "the logger is closed"
        finite = {k: _or_null(v) for k, v in row.items()}
        self.file.write(json.dumps(finite, allow_nan=False) + "\n")
        self.file.flush()
        if self.tracker is not None:
            self.tracker.log({k: v for k, v in row.items() if v is not None})


def _to_numbers(metrics: dict) -> dict:
    """Python numbers for 0-d tensors, with one copy (and one wait) per device, not per value."""
    by_device: dict[torch.device, list[str]] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, []).append(name)
    numbers = dict(metrics)
    for device, names in by_device.items():
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        stacked = torch.stack([metrics[name].detach().reshape(()).to(wide) for name in names])
        numbers.update(zip(names, stacked.tolist(), strict=True))
    return numbers


def _or_null(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def trim_rows(path: Path, resume_step: int | None) -> list[dict]:
    """Drops the rows that a resumed run will write again, and a last line cut off by a crash;
    returns the others."""
    if not path.exists():
        return []
    lines, rows = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            keep = resume_step is None or row["step"] < resume_step
        except (ValueError, KeyError, TypeError):
            continue
        if keep:
            lines.append(line + "\n")
            rows.append(row)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)
    return rows


def read_env_file(path: str | Path) -> dict[str, str]:
    """The WANDB_* settings of a .env file: KEY=value lines, `export`, quotes, # comments."""
    path = Path(path)
    if not path.is_file():
        return {}
    values = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, equals, value = line.strip().removeprefix("export ").partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not key.startswith("WANDB_"):
            continue
        if value[:1] in ("'", '"') and value[:1] in value[1:]:
            value = value[1 : value.index(value[0], 1)]
        else:
            value = value.split(" #")[0].strip()
        values[key] = value
    return values


class TensorBoard:
    """Rows as scalars of a TensorBoard log; a resumed run's later ones are hidden."""

    def __init__(self, folder: Path, resume_step: int | None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "--tracker: package tensorboard not found, expected after "
                'pip install -e ".[tensorboard]"'
            ) from None
        self.writer = SummaryWriter(str(folder), purge_step=resume_step)

    def log(self, row: dict) -> None:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, row["step"])

    def finish(self) -> None:
        self.writer.close()


def _start_wandb(run_dir: Path, project: str, name: str | None, config: dict, resumed: bool):
    for key, value in read_env_file(".env").items():
        os.environ.setdefault(key, value)  # the environment wins; wandb reads it from there
    try:
        import wandb
    except ImportError:
        raise UserError(
            '--tracker: package wandb not found, expected after pip install -e ".[wandb]"'
        ) from None
    id_file = run_dir / "wandb_id"
    run_id = id_file.read_text().strip() if resumed and id_file.exists() else None
    try:
        run = wandb.init(
            project=project, name=name, config=config, dir=str(run_dir), id=run_id, resume="allow"
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--tracker: wandb did not start: {reason} (expected WANDB_API_KEY, or "
            "WANDB_MODE=offline)"
        ) from None
    id_file.write_text(run.id + "\n")
    # wandb drops rows whose own step goes back, as ours does after a resume: "step" is a value.
    run.define_metric("*", step_metric="step")
    return run
