"""The folder of a data set that is being written: `prepare_data.py` goes on there after a crash.

    python -m pytest tests/test_resume_data.py

`.NAME.unfinished` beside the target NAME holds `data/`, which becomes the target, `command.json`,
what decides the content (options, tokenizer, input files), and `progress.json`, how far it is,
replaced only after all that it counts is on the disk. `lock` keeps a second process out, and
`old/` is the data set that is replaced, from the moment before the new one has its name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path

from config import UserError
from shard_writer import write_file

FILES = ("lock", "progress.json", "command.json")  # removed in this order


class Unfinished:
    """`command` is a flat dict, with the input files as lists [name, bytes, mtime] under "files".

    `progress` is what `save` was given last, by whatever process; None: begin at the beginning.
    Raises `UserError` if the target may not be replaced, or another command was at work here;
    `overwrite` allows the one and starts over for the other.
    """

    def __init__(self, out: Path, command: dict, *, overwrite: bool):
        self.out = out.resolve()
        self.folder = self.out.with_name(f".{self.out.name}.unfinished")
        self.data, self._old = self.folder / "data", self.folder / "old"
        self._lock = self._take() if self.folder.is_dir() else None
        if self._old.exists() and not self.out.exists():
            self._old.rename(self.out)
        shutil.rmtree(self._old, ignore_errors=True)  # the new one is in its place
        found = _read(self.folder / "command.json")
        self.progress = _read(self.folder / "progress.json")
        if self.progress and not (found and self.data.exists()):
            if found == command and self.is_done() and self.out.exists():
                return  # the target is complete and has its name
            (self.folder / "progress.json").unlink()  # of data that somebody took away
            self.progress = None
        _check_out(out, overwrite)
        if found and found != command:
            if not overwrite:
                raise UserError(
                    f"--out {out}: {self.folder} holds the unfinished work of another command"
                    f" ({_difference(found, command)}); go on with that one, or add --overwrite to"
                    " start over"
                )
            self.discard()
            found = self.progress = self._lock = None
        if not self._lock:
            self.folder.mkdir(parents=True)
            self._lock = self._take()
        if not found:
            write_file(self.folder / "command.json", json.dumps(command).encode())
        if self.progress and not self.is_done():
            (self.data / "meta.json").unlink(missing_ok=True)  # of a split that is opened again
        if not self.progress:
            shutil.rmtree(self.data, ignore_errors=True)
            self.data.mkdir()

    def _take(self):
        if strange := {p.name.removesuffix(".tmp") for p in self.folder.iterdir()} - {
            *FILES, "data", "old",
        }:  # fmt: skip
            raise UserError(f"{self.folder}: holds {min(strange)}, which is not ours; remove it")
        lock = open(self.folder / "lock", "a")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(f"{self.folder}: another process is writing there") from None
        return lock

    def is_done(self) -> bool:
        return bool(self.progress and self.progress["done"])

    def save(self, progress: dict) -> None:
        """`done`: nothing but the name is missing."""
        folder = os.open(self.data, os.O_RDONLY)
        try:
            os.fsync(folder)  # the names of finished shards
        finally:
            os.close(folder)
        write_file(self.folder / "progress.json", json.dumps(progress).encode())
        self.progress = progress

    def finish(self) -> None:
        """The data set takes its place, and an old one goes only then."""
        if self.data.exists():
            if self.out.exists():
                self.out.rename(self._old)
            self.data.rename(self.out)
        self.discard()

    def discard(self) -> None:
        for folder in (self.data, self._old):
            shutil.rmtree(folder, ignore_errors=True)
        for name in FILES:
            for path in (self.folder / f"{name}.tmp", self.folder / name):
                path.unlink(missing_ok=True)
        self.folder.rmdir()
        if self._lock:
            self._lock.close()


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise UserError(f"--out {out}: exists and is not empty; choose another, or add --overwrite")
    names = [p.name for p in out.iterdir()] if out.is_dir() else [out.name]
    strange = [n for n in names if n != "meta.json" and not n.endswith((".bin", ".docs.npy"))]
    if strange or "meta.json" not in names:
        raise UserError(f"--out {out}: not only a data set; --overwrite would delete other files")


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); remove {path.parent} to start over") from None


def _difference(found: dict, command: dict) -> str:
    """The first one, in words."""
    for key in command.keys() - {"files"}:
        if found.get(key) != command[key]:
            return f"{key} was {found.get(key)!r}, is {command[key]!r}"
    before, now = ({name: rest for name, *rest in c["files"]} for c in (found, command))
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            return f"{name} was an input, is none"
        if name not in before:
            return f"{name} was no input, is one"
        if before[name] != now[name]:
            sizes = f"{before[name][0]} bytes, {now[name][0]} now"
            return f"{name} was changed since: {sizes}"
    return "the inputs had another order"
