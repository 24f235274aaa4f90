"""What a run needs on the disk, and whether it is there.

Checkpoints come and go: the most at once is what counts. A run that goes on needs what is still to
be written. Check: `pytest tests/test_room.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoint
from config import TrainConfig, UserError
from hf import TOKENIZER_FILES
from run_folder import run_folder

STATE_BYTES = 32_000  # of a checkpoint's state.json and manifest.json: mostly random generators
RUN_BYTES = 12_000  # of a run's config.yaml, table.json and the rest
ROW_BYTES, LAYER_BYTES = 300, 32  # of a step's row in metrics.jsonl; of a layer in one of align


class Saves(NamedTuple):
    """The checkpoints of a stage: how many it writes, one every so many of its steps (0: at its
    end), and the bytes of one."""

    stage: str
    count: int
    every: int
    size: int


def file_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Of safetensors files: names come twice, with shapes and offsets."""
    return sum(t.numel() * t.element_size() + 2 * len(n) + 125 for n, t in tensors.items())


def tokenizer_bytes(folder: str) -> int:
    """Of the files that a saved model gets from there."""
    files = [Path(folder) / name for name in TOKENIZER_FILES]
    return sum(f.stat().st_size for f in files if f.is_file())


def at_most(
    saves: list[Saves], keep: int, model: int, logs: int, there: list[int]
) -> list[tuple[str, int]]:
    """The most that there is at once, by part. saves: still to come; model: the saved one; there:
    the bytes of checkpoints that are there already."""
    kept, peak = list(there), sum(there)
    for stage in saves:
        for _ in range(min(stage.count, keep + 1)):
            peak = max(peak, sum(kept) + stage.size)
            kept = [*kept, stage.size][-keep:]
    left = sum(kept)
    parts = [(f"checkpoints, {len(kept)} kept", left), ("the saved model", model), ("logs", logs)]
    return [*parts, ("one more checkpoint, being written", max(0, peak - left - model))]


def found_checkpoints(cfg: TrainConfig) -> tuple[list[int], dict]:
    """(bytes of each checkpoint that the run finds in its own folder, state of the one it goes on
    from). What of them is damaged is for the run to say."""
    if cfg.resume == "never":
        return [], {}
    source = run_folder(cfg, "") if cfg.resume == "auto" else Path(cfg.resume)
    named = checkpoint.STEP_FOLDER.fullmatch(source.name) is not None
    folder = source.parent if named else source
    folder = folder.parent if folder.name == "checkpoints" else folder
    state: dict = {}
    for path in [source] if named else reversed(checkpoint.list_checkpoints(folder)):
        try:
            state = checkpoint.read_state(path)
            break
        except (UserError, OSError):
            continue
    if cfg.run and run_folder(cfg, "").resolve() != folder.resolve():
        return [], state  # it goes on in a folder of its own
    own = checkpoint.list_checkpoints(folder)
    return [sum(f.stat().st_size for f in path.iterdir()) for path in own], state


def disk_parts(
    cfg: TrainConfig, saves: list[Saves], model: int, logs: int
) -> tuple[list[tuple[str, int]], int]:
    """(`at_most` of the run, or of what is left of it; bytes of that which are there already)."""
    if not cfg.save_model:
        return [("logs", logs)], 0
    there, state = found_checkpoints(cfg)
    names = [stage.stage for stage in saves]
    if state.get("stage") in names:
        at = names.index(state["stage"])
        written = state["stage_step"] // saves[at].every if saves[at].every else 0
        if state["stage"] in state["done"]:
            written = saves[at].count
        rest = saves[at]._replace(count=max(0, saves[at].count - written))
        saves = [rest, *saves[at + 1 :]]
    return at_most(saves, cfg.keep_checkpoints, model, logs, there), sum(there)


def parent_that_is(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that there is."""
    folder = folder.absolute()
    return next(f for f in (folder, *folder.parents) if f.is_dir())


def check_room(cfg: TrainConfig, parts: list[tuple[str, int]], there: int) -> None:
    """UserError where the disk lacks room for the run. The same on every rank, if the folder is."""
    where = parent_that_is(Path(cfg.save_model_dir))
    needed, disk = sum(size for _, size in parts) - there, shutil.disk_usage(where)
    free = disk.free
    if disk.total and needed > free:  # no size: a file system of the kernel's, /sys or the like
        raise UserError(
            f"--save_model_dir: {free:,} bytes free in {cfg.save_model_dir} found, {needed:,} "
            f"expected for checkpoints and the saved model (--plan shows the parts)"
        )
