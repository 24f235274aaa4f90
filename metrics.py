"""What a run reports: FLOP counts and MFU, throughput, the console line, metrics.jsonl, wandb.

FLOP counts are per token, one multiply-add = 2. Shape legend for the formulas:
    d hidden_size   H query heads   Q head_dim   T tokens per row   K, V linear head sizes
Only matmuls (and the recurrences and short convolutions, which replace one) are counted; norms,
activations, decays and the embedding lookup are not. Try it: pytest tests/test_metrics.py
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from config import ModelConfig, UserError

# Dense (not 2:4 sparse) bf16/fp16 tensor-core peak, FLOP/s, from the vendors' data sheets. The
# first substring found in the device's name counts, so the longer names come first.
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}

# The console line, and the spelling of these keys in metrics.jsonl and the trackers.
# Units: tok/s over all ranks, mfu a fraction, mem GiB, eta seconds.
COLUMNS = ("step", "loss", "ce", "kl", "lr", "grad_norm", "tok/s", "mfu", "mem", "eta")
WIDTHS = (7, 8, 8, 8, 8, 9, 9, 6, 7, 6)


# FLOPs


def peak_flops(
    device: torch.device | str, dtype: torch.dtype, override: float | None = None
) -> float | None:
    """Dense peak of one device in FLOP/s; None where it is unknown (CPU, unlisted cards).

    `override` (--peak_flops, 0 or None = off) wins, on any device. float32 means TF32, which is
    half the bf16 rate on every card listed.
    """
    if override:
        return override
    if torch.device(device).type != "cuda":
        return None
    return peak_of_name(torch.cuda.get_device_name(device), dtype)


def peak_of_name(name: str, dtype: torch.dtype) -> float | None:
    """The table look-up of peak_flops; `name` as torch.cuda.get_device_name gives it."""
    factor = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 0.5}.get(dtype)
    peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    return peak * factor if peak and factor else None


def mfu(tokens_per_sec: float, flops: float, num_devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation: tokens_per_sec * flops / (num_devices * peak). None without peak."""
    return tokens_per_sec * flops / (num_devices * peak) if peak else None


def _layer(config: ModelConfig, i: int, seq_len: int) -> tuple[int, int, float]:
    """(weights projecting into the mixer, weights of o_proj, forward FLOPs between the two)."""
    d = config.hidden_size
    if config.layer_types[i] == "linear_attention":
        q_dim = config.linear_num_key_heads * config.linear_key_head_dim
        v_dim = config.linear_num_value_heads * config.linear_value_head_dim
        inner = d * (2 * q_dim + 2 * v_dim + 2 * config.linear_num_value_heads)  # qk, vg, ab
        # S^T k (read), k beta(v - ..)^T (write), S^T q (output): three K x V multiply-adds a head.
        recurrence = 6 * v_dim * config.linear_key_head_dim
        convolution = 2 * config.linear_conv_kernel_dim * (2 * q_dim + v_dim)
        return inner, v_dim * d, recurrence + convolution
    q_dim = config.num_attention_heads * config.head_dim
    inner = d * (q_dim + 2 * config.num_key_value_heads * config.head_dim)
    return inner, q_dim * d, 4 * q_dim * _mean_keys(config, i, seq_len)


def _span(config: ModelConfig, i: int, seq_len: int) -> int:
    """Keys the last query of softmax layer i sees: T, or the window where that is less."""
    sliding = config.layer_types[i] == "sliding_attention" and config.sliding_window
    return min(seq_len, config.sliding_window) if sliding else seq_len


def _mean_keys(config: ModelConfig, i: int, seq_len: int) -> float:
    """Keys a query sees, averaged over a row: (1 + 2 + .. + w + w + ..) / T = w - w (w - 1) / 2T.

    For a full layer w = T, which gives (T + 1) / 2: the causal half.
    """
    w = _span(config, i, seq_len)
    return w - w * (w - 1) / (2 * seq_len)


def matmul_params(config: ModelConfig) -> int:
    """N: weights used in matmuls. Head d * vocab once, tied or not; no embedding lookup.

    Per layer: MLP 3 d f; softmax d (H + 2 H_kv) Q + H Q d; linear, for H_k key and H_v value
    heads, d (2 H_k K [q, k] + 2 H_v V [v, g] + 2 H_v [a, b]) + H_v V d [o]. Mixers other than
    gated_deltanet are counted as if they had these projections, which they do within a few percent.
    """
    mlp = 3 * config.hidden_size * config.intermediate_size
    mixers = sum(sum(_layer(config, i, 1)[:2]) for i in range(config.num_hidden_layers))
    return config.num_hidden_layers * mlp + mixers + config.hidden_size * config.vocab_size


def model_flops_per_token(config: ModelConfig, seq_len: int, *, num_matmul_params: int) -> int:
    """PaLM's training FLOPs of a token (arXiv 2204.02311, appendix B): 6 N + 12 L H Q T.

    L counts softmax layers only and T is min(T, window) layer by layer. Nothing is halved for
    causality and the recurrences of linear layers are left out: this is the comparable figure,
    flops_per_token the honest one.
    """
    softmax = [i for i, kind in enumerate(config.layer_types) if kind != "linear_attention"]
    spans = sum(_span(config, i, seq_len) for i in softmax)
    return 6 * num_matmul_params + 12 * config.num_attention_heads * config.head_dim * spans


def forward_flops(config: ModelConfig, seq_len: int) -> float:
    """Useful FLOPs of one forward, per token: 2 N + sum of the mixers' own.

    A softmax layer adds 4 H Q keys (q k^T and p v; keys = average over causal queries, see
    _mean_keys), a linear one 6 H_v K V (the recurrence itself, not its chunked form, which spends
    more to run faster) + 2 W (2 H_k K + H_v V) for its short convolutions.
    """
    cores = sum(_layer(config, i, seq_len)[2] for i in range(config.num_hidden_layers))
    return 2 * matmul_params(config) + cores


def flops_per_token(
    stage: str,
    student: ModelConfig,
    teacher: ModelConfig | None,
    seq_len: int,
    train: str = "all",
) -> float:
    """FLOPs that a token of this stage needs, for "useful TFLOP/s"; recomputation is not counted.

    With F = forward_flops and, for one layer, P_in, P_o, P_mlp its weights and C its mixer's own
    forward FLOPs:

    pretrain       3 F(student): a backward is twice its forward (input and weight gradients).
    distill, long  the same + F(teacher), where there is a teacher.
      train=mixers F(student) + F(teacher) + the backward down to the first converted layer c:
                   2 d vocab (through the head) + for every layer i >= c: 2 P_mlp + 2 P_o + 2 C
                   + 2 P_in if i > c (input gradients) + 2 (P_in + P_o) if i is converted (weight
                   gradients; a frozen weight has none). Below c there is no backward.
    align          teacher forward up to the attention output of the last converted layer l,
                   sum_{i<l} (2 P + C)_i + (2 P_in + 2 P_o + C)_l, without head and l's MLP; then
                   for each converted student layer, whose input needs no gradient,
                   (2 + 2) P_in + (2 + 2 + 2) P_o + 3 C. `train` changes nothing here.

    Converted layers are those whose type is not the teacher's (without a teacher of the same
    depth: the linear layers).
    """
    assert stage in ("pretrain", "align", "distill", "long"), stage
    assert train in ("all", "mixers"), train
    converted = _converted_layers(student, teacher)
    if stage == "align":
        assert teacher is not None and converted, "align needs a teacher and a converted layer"
        return _align_flops(student, teacher, converted, seq_len)
    total = forward_flops(student, seq_len)
    if train == "all":
        total *= 3
    elif converted:
        mlp = 3 * student.hidden_size * student.intermediate_size
        total += 2 * student.hidden_size * student.vocab_size
        for i in range(converted[0], student.num_hidden_layers):
            inner, out, core = _layer(student, i, seq_len)
            total += 2 * mlp + 2 * out + 2 * core
            total += 2 * inner if i > converted[0] else 0
            total += 2 * (inner + out) if i in converted else 0
    if teacher is not None and stage != "pretrain":
        total += forward_flops(teacher, seq_len)
    return total


def _align_flops(
    student: ModelConfig, teacher: ModelConfig, converted: list[int], seq_len: int
) -> float:
    mlp = 3 * teacher.hidden_size * teacher.intermediate_size
    total = converted[-1] * 2 * mlp
    for i in range(converted[-1] + 1):
        inner, out, core = _layer(teacher, i, seq_len)
        total += 2 * inner + 2 * out + core
    for i in converted:
        inner, out, core = _layer(student, i, seq_len)
        total += 4 * inner + 6 * out + 3 * core
    return total


def _converted_layers(student: ModelConfig, teacher: ModelConfig | None) -> list[int]:
    layers = range(student.num_hidden_layers)
    if teacher is None or teacher.num_hidden_layers != student.num_hidden_layers:
        return [i for i in layers if student.layer_types[i] == "linear_attention"]
    return [i for i in layers if student.layer_types[i] != teacher.layer_types[i]]


# Time and memory


class StepTimer:
    """Tokens per second over wall time, and the time left.

    for step in ...:
        timer.step(tokens)      # once an optimizer step: all its micro-batches, all ranks
        if log_now:
            metrics |= timer.read()

    CUDA is synchronised in read() and around paused() only, never between micro-batches.

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

    def read(self) -> dict[str, float]:
        """tok/s, time_per_step (s) and eta (s) of the steps since the last read; {} if none."""
        now = self._now()
        if not self.steps:
            return {}
        busy = max(now - self.last_read - self.idle, 1e-9)
        time_per_step = busy / self.steps
        self.remaining_steps -= self.steps
        if self.steady_since is None:
            self.steady_since, wall_per_step = now, time_per_step
        else:
            self.steady_steps += self.steps
            wall_per_step = (now - self.steady_since) / self.steady_steps
        result = {
            "tok/s": self.tokens / busy,
            "time_per_step": time_per_step,
            "eta": max(self.remaining_steps, 0) * wall_per_step,
        }
        self.tokens, self.steps, self.idle, self.last_read = 0, 0, 0.0, now
        return result

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


def memory_gib(device: torch.device | str) -> float | None:
    """Peak memory in GiB: allocated by torch on a CUDA device, else resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
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


class MetricsLogger:
    """Console, `<run_dir>/metrics.jsonl` and, if asked for, wandb. Ranks other than 0 do nothing.

    metrics.jsonl has one strict-JSON object a line, flushed at once, with "step" and "stage" first
    and the console's keys; NaN and infinities, which JSON lacks, are null.

    Args:
        resume_step: the first step that will be run (again). Rows of it and of later steps are
            removed, so that no step appears twice. None appends.
        resume_stage: for stages that each count from step 0: the stage of resume_step. Everything
            logged from that point on goes, later stages included; earlier stages stay.
        run_name, config: for wandb.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        rank: int = 0,
        wandb_enabled: bool = False,
        wandb_project: str = "retort",
        run_name: str | None = None,
        config: dict | None = None,
        resume_step: int | None = None,
        resume_stage: str | None = None,
    ):
        self.file = self.wandb_run = self.header_stage = None
        self.active = rank == 0
        if not self.active:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        if wandb_enabled:
            resumed = resume_step is not None
            self.wandb_run = _start_wandb(run_dir, wandb_project, run_name, config or {}, resumed)
        path = run_dir / "metrics.jsonl"
        _trim_rows(path, resume_step, resume_stage)
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
        self._write({"step": step, "stage": stage, **values})

    def table(self, title: str, rows: list[dict]) -> None:
        """A table on the console; columns are the rows' keys, in the order of first use."""
        if not self.active:
            return
        from rich.console import Console
        from rich.table import Table

        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = Table(title=title, title_justify="left")
        for name in columns:
            table.add_column(name, overflow="fold")
        for row in rows:
            values = (row.get(name) for name in columns)
            table.add_row(*(_cell("", value) for value in values))
        # A log file has no width of its own; 80 columns would fold ordinary rows.
        Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)

    def say(self, text: str) -> None:
        """A line on the console, from rank 0 only."""
        if self.active:
            print(text, flush=True)

    def close(self) -> None:
        """Closes the file and the tracker; calling it twice does no harm."""
        if self.file is not None:
            self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()
        self.file = self.wandb_run = None

    def _write(self, row: dict) -> None:
        assert self.file is not None, "the logger is closed"
        finite = {k: _or_null(v) for k, v in row.items()}
        self.file.write(json.dumps(finite, allow_nan=False) + "\n")
        self.file.flush()
        if self.wandb_run is not None:
            self.wandb_run.log({k: v for k, v in row.items() if v is not None})


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


def _trim_rows(path: Path, resume_step: int | None, resume_stage: str | None) -> None:
    """Drops the rows that a resumed run will write again, and a last line cut off by a crash."""
    if not path.exists():
        return
    kept, seen_stage = [], False
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            step, stage = row["step"], row["stage"]
        except (ValueError, KeyError, TypeError):
            continue
        if resume_step is not None:
            in_stage = resume_stage in (None, stage)
            if resume_stage is not None and (seen_stage and not in_stage):
                break  # a later stage than the one resumed
            seen_stage = seen_stage or in_stage
            if in_stage and step >= resume_step:
                continue
        kept.append(line + "\n")
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


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


def _start_wandb(run_dir: Path, project: str, name: str | None, config: dict, resumed: bool):
    for key, value in read_env_file(".env").items():
        os.environ.setdefault(key, value)  # the environment wins; wandb reads it from there
    try:
        import wandb
    except ImportError:
        raise UserError(
            '--wandb_enabled: package wandb not found, expected after pip install -e ".[wandb]"'
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
            f"--wandb_enabled: wandb did not start: {reason} (expected WANDB_API_KEY, or "
            "WANDB_MODE=offline)"
        ) from None
    id_file.write_text(run.id + "\n")
    # wandb drops rows whose own step goes back, as ours does after a resume: "step" is a value.
    run.define_metric("*", step_metric="step")
    return run
