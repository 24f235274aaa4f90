"""What a run says of its steps: losses, rates, MFU; written one step late, so that nothing waits.

Check: `pytest tests/test_step_log.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from config import DIVERGED, Stopped
from distributed import all_sum
from flops import (
    matmul_params,
    mfu,
    model_flops_per_token,
    peak_flops,
    stage_flops,
    uses_teacher,
)
from metrics import StepTimer, memory_gib
from model import Transformer

if TYPE_CHECKING:
    from stage_plan import StagePlan
    from trainer import Run


SAME = ("grad_norm", "skipped", "in_row")  # on all ranks; other values are added up over them


class StepLog:
    """A line and a row for a step, written while the next one runs: on CUDA the host looks at a
    step's values only after it has launched another, so that the device is never without work."""

    def __init__(self, run: Run, plan: StagePlan, timer: StepTimer, rates: dict):
        self.run, self.plan, self.timer, self.rates = run, plan, timer, rates
        self.late = run.world.device.type == "cuda"
        self.pending: tuple | None = None
        self.skipped = 0
        # An event of the device, and what the host's clock said then: steps are timed by events,
        # as the host may look long after they were done.
        self.base = self._event(), timer.last_read

    def _event(self) -> torch.cuda.Event | None:
        if not self.late:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self, values: dict, known: dict) -> None:
        """The values of the step that was just launched, and what is known of it already."""
        run = self.run
        names = [n for n in values if n not in ("lr", *SAME)]
        sums = all_sum(torch.stack([values[n].float() for n in names]), run.world)
        sums = torch.cat([sums, torch.stack([values[n].to(sums) for n in SAME])])
        if self.late:
            sums = sums.to("cpu", non_blocking=True)  # into pinned memory
        done, mark = self._event(), self.timer.mark()
        self.pending = run.step, [*names, *SAME], sums, values["lr"], known, mark, done
        if not self.late:
            self.flush()

    def _needed(self, begin: int, end: int) -> float:
        """FLOPs of a token of the stage's steps begin to end: the teacher's only in the first pass
        over tokens whose targets are kept."""
        stage, work, share = self.plan.stage, self.rates["useful"], 1.0
        if stage.unique_tokens:
            new = stage.unique_tokens / stage.batch_tokens - begin
            share = min(max(new, 0), end - begin) / (end - begin)
        return share * work.teacher + work.forward + work.backward

    def flush(self) -> None:
        """Write what was taken; the only place of a step where the host waits for the device."""
        if self.pending is None:
            return
        run, (step, names, sums, lr, known, mark, done) = self.run, self.pending
        self.pending, now = None, None
        if done is not None:
            done.synchronize()
            event, then = self.base
            now = then + event.elapsed_time(done) / 1e3
            self.base = done, now
        row = {**dict(zip(names, sums.tolist(), strict=True)), "lr": lr}
        self._check(step, row)
        begin = self.plan.steps - self.timer.remaining_steps
        row |= self.timer.read(mark, now)
        rate = row.get("tok/s")
        if rate:
            needed = self._needed(begin, self.plan.steps - self.timer.remaining_steps)
            row["mfu"] = mfu(rate, self.rates["model"], run.world.size, self.rates["peak"])
            row["useful_tflops"] = rate * needed / run.world.size / 1e12
        row["mem"] = memory_gib(run.world.device)
        run.logger.log(step, self.plan.name, row | known)

    def _check(self, step: int, row: dict) -> None:
        """Say how many steps were left out; `Stopped` where a run learns nothing any more."""
        run, in_row, skipped = self.run, int(row.pop("in_row")), int(row["skipped"])
        where = f"stage {self.plan.name}, step {step}: "
        found = f"loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"
        if skipped > self.skipped:
            this = f", this one with {found}" if in_row else ""
            run.logger.say(f"{where}{skipped} steps left out so far{this}")
            self.skipped = skipped
        why = ""
        if in_row >= run.cfg.max_skipped:
            why = f"{in_row} steps left out one after another, none of which is in a checkpoint"
        elif not in_row and not math.isfinite(row["loss"]):
            why = "though the gradient is finite and the step was taken"
        if why:
            raise Stopped(DIVERGED, f"{where}given up, {found}, {why}; see {run.folder}")
        if not skipped:
            del row["skipped"]


def flop_rates(run: Run, plan: StagePlan, student: Transformer, teacher, shared: int) -> dict:
    """FLOPs per token by PaLM's formula and as really needed, and the device's peak; shared: as
    `flops.stage_flops`."""
    seq = plan.stage.seq_len
    config = student.config
    return {
        "model": model_flops_per_token(config, seq, num_matmul_params=matmul_params(config)),
        "useful": stage_flops(
            plan.name, config, teacher.config if teacher else None, seq, plan.stage.train, shared,
            guided=uses_teacher(plan.name, plan.stage),
        ),
        "peak": peak_flops(run.world.device, run.dtype, run.cfg.peak_flops),
    }  # fmt: skip
