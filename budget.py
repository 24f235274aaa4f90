"""What a run takes, as data, and how it is printed. `planner.py` makes it.

Check: `pytest tests/test_planner.py`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from config import TrainConfig
from flops import StageFlops
from footprint import Machine
from metrics import console_table
from room import Saves, parent_that_is
from stage_plan import StagePlan

GIB = 2**30


@dataclass
class StageBudget:
    """What one stage takes. memory: part -> bytes of one GPU, or of the process, at its peak."""

    name: str
    plan: StagePlan
    trained: int  # parameters
    per_token: StageFlops  # what is needed; nothing computed twice
    flops: float  # in all
    saves: Saves
    logs: int  # bytes
    memory: dict[str, int] = field(default_factory=dict)
    devices: int = 0  # that work on it; 0: all


@dataclass
class Budget:
    """What a run takes. moments: memory outside of its stages, by part. disk: the most at once, by
    part; there: bytes of that which are on the disk already."""

    machine: Machine
    peak: float | None  # FLOP/s of one device
    stages: list[StageBudget]
    moments: dict[str, dict[str, int]] = field(default_factory=dict)
    disk: list[tuple[str, int]] = field(default_factory=list)
    there: int = 0
    known: bool = True  # whether its length is, without the data
    notes: list[str] = field(default_factory=list)

    def memory(self) -> dict[str, dict[str, int]]:
        """Moment or stage -> part -> bytes."""
        return self.moments | {s.name: s.memory for s in self.stages}

    def most(self) -> tuple[str, int]:
        """When it holds the most, and how much."""
        totals = {name: sum(parts.values()) for name, parts in self.memory().items()}
        name = max(totals, key=totals.__getitem__)
        return name, totals[name]


# ---- what is printed


def gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size < 100 * GIB else f"{size / GIB:,.0f}"


def show_budget(cfg: TrainConfig, budget: Budget) -> None:
    """Three tables and what follows from them; rank 0 speaks."""
    m = budget.machine
    if m.world.rank or os.environ.get("RANK", "0") != "0":
        return
    rate = budget.peak and cfg.plan_mfu * budget.peak  # of one
    rows = []
    for s in budget.stages:
        size, known = s.plan.stage, budget.known
        hours = rate and s.flops / rate / (s.devices or m.world.size) / 3600
        rows.append({
            "stage": s.name, "steps": f"{s.plan.steps:,}" if known else "by the data",
            "tokens": f"{s.plan.steps * size.batch_tokens:,}" if known else "-",
            "at once": f"{s.plan.micro_batch} x {size.seq_len:,}", "trains": f"{s.trained:,}",
            "teacher": f"{s.per_token.teacher:.3g}", "forward": f"{s.per_token.forward:.3g}",
            "backward": f"{s.per_token.backward:.3g}",
            "FLOPs in all": f"{s.flops:.3g}" if known else "-",
            "hours": f"{hours:,.4g}" if known and rate else "-",
        })  # fmt: skip
    kind = str(m.dtype).removeprefix("torch.")
    how = f"fsdp over {m.shards}" if m.shards > 1 else "whole models"
    console_table(f"plan for {m.world.size} x {m.name}, {kind}, {how}: FLOPs of a token", rows)
    said = "hours: not known, for want of the device's peak (--peak_flops)"
    if rate:
        said = (
            f"hours: FLOPs that are needed (recomputed ones are not counted) at {cfg.plan_mfu:.0%} "
            f"of {budget.peak / 1e12:,.0f} TFLOP/s on {m.world.size}; without evaluations"
        )
    print(said)
    moments = budget.memory()
    names = list(dict.fromkeys(part for parts in moments.values() for part in parts))
    table = [
        {"part": n} | {w: gib(parts[n]) if parts.get(n) else "" for w, parts in moments.items()}
        for n in names
    ]
    table.append({"part": "total"} | {w: gib(sum(parts.values())) for w, parts in moments.items()})
    console_table(f"memory of {'each GPU' if m.gpu else 'each process'} at its peak, GiB", table)
    when, most = budget.most()
    line = f"memory: at most {gib(most)} GiB, in {when}"
    if m.gpu:
        room = m.world.gpu_memory
        line += f"; {m.name} has {gib(room)}: {'fits' if most <= room else 'does not fit'}"
    print(line)
    console_table("disk at most, GiB", [{"part": n, "GiB": gib(b)} for n, b in budget.disk])
    where = parent_that_is(Path(cfg.save_model_dir))
    total, free = sum(b for _, b in budget.disk) - budget.there, shutil.disk_usage(where).free
    line = f"disk: {gib(total)} GiB {'more ' if budget.there else ''}expected in "
    line += f"{cfg.save_model_dir}, {gib(free)} free"
    print(line + ("" if total <= free else ": too small"))
    for note in budget.notes:
        print(f"note: {note}")
