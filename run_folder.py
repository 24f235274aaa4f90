"""A run's folder: its name, and who may write into it.

Check: `pytest tests/test_run_folder.py`.
"""

from __future__ import annotations

import fcntl
import itertools
import time
from pathlib import Path
from typing import IO

from config import TrainConfig, UserError

_held: dict[Path, IO] = {}  # files whose locks end with this process


def run_folder(cfg: TrainConfig, script: str) -> Path:
    """runs/<run>; a run without a name is called after the script and the time."""
    return Path(cfg.save_model_dir) / (cfg.run or f"{script}-{time.strftime('%Y%m%d-%H%M%S')}")


def check_run_folder(cfg: TrainConfig) -> None:
    """Refuse to mix a new run into an old one's folder, before any work."""
    if cfg.resume not in ("never", "auto") and not Path(cfg.resume).exists():
        raise UserError(f"--resume: no checkpoint or run {cfg.resume}; never or auto also work")
    if cfg.resume == "auto" and not cfg.run:
        raise UserError("--resume: auto found without --run, the name of the run to go on with")
    folder = run_folder(cfg, "")
    for flag, path in (("save_model_dir", Path(cfg.save_model_dir)), ("run", folder)):
        if path.exists() and not path.is_dir():
            raise UserError(f"--{flag}: {path} is no folder; a folder, or a new path, expected")
    if not cfg.run or cfg.resume == "auto" or not folder.exists() or not any(folder.iterdir()):
        return
    resumed = Path(cfg.resume).resolve()
    if cfg.resume == "never" or folder.resolve() not in (resumed, *resumed.parents):
        raise UserError(f"--run: {folder} exists already; another name, or --resume auto, expected")


def take_folder(cfg: TrainConfig, script: str) -> Path:
    """`run_folder`, made where a new run has no name: of several that begin in one second each has
    its own. For one rank."""
    folder = first = run_folder(cfg, script)
    if cfg.run or cfg.resume != "never" or cfg.dry_run:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    for n in itertools.count(2):
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            folder = first.with_name(f"{first.name}-{n}")


def hold(folder: Path) -> None:
    """Keep other processes out of the folder while this one lives. For one rank. UserError where
    another one is in it; nothing where the file system has no locks."""
    folder = folder.resolve()
    if folder in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "a")  # noqa: SIM115 (a lock ends with its file)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(
            f"--run: {folder} is in use by another process; its end, or another name, expected"
        ) from None
    except OSError:
        pass
    _held[folder] = file


def release(folder: Path) -> None:
    """Let other processes in again."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        file.close()
