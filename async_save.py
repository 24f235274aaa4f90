"""Checkpoints that are written while training goes on (--async_save).

    saver = Saver(world, background=True)
    saver.save(folder, step, tensors, state, keep=2)   copies the tensors and returns
    saver.protect()                                    before the tensors are changed
    if saver.failed: ...                               and, when all ranks know it:
    saver.wait()                                       raises what went wrong, on all ranks

A thread, not a process: writing and hashing let go of Python's lock, the copies need not be shared,
and nothing outlives a run that is killed. It takes no part in collectives, whose order only the
main threads keep: each rank's thread leaves what it has written in the process group's store, where
rank 0's waits for it before it publishes. Check: `pytest tests/test_async_save.py`.
"""

from __future__ import annotations

import errno
import json
import threading
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from checkpoint import Save, save_checkpoint
from distributed import World, on_all_ranks, shared_store
from tensor_files import Snapshot

PATIENCE = 900.0  # seconds that a rank's part of a checkpoint may take longer than rank 0's
LAST = 60.0  # seconds that a save has where the run ends by an error


class Saver:
    """Saves in the background, one at a time, or (background=False) where it is asked to."""

    def __init__(self, world: World, background: bool):
        self.world, self.background = world, background
        self.thread: threading.Thread | None = None
        self.path: Path | None = None  # of the save under way
        self.error: Exception | None = None
        if not background:
            return
        self.snapshot = Snapshot(world.device)
        self.store = None
        if world.size > 1:
            self.store = dist.PrefixStore("saves", shared_store())

    def save(
        self, run_dir: Path, step: int, tensors: dict[str, Tensor], state: dict, *, keep: int
    ) -> None:
        """As checkpoint.save_checkpoint. Collective. In the background it waits for the save
        before it, then copies this rank's share of `tensors`."""
        ranks = {"rank": self.world.rank, "world_size": self.world.size}
        if not self.background:
            save_checkpoint(run_dir, step, tensors, state, keep=keep, **ranks)
            return
        self.wait()
        save = Save(Path(run_dir) / "checkpoints", step, keep, **ranks)
        save.begin(tensors, state)
        pieces = [p for file in save.files.values() for p in file]
        with save.whole_or_nothing():
            on_all_ranks(lambda: self.snapshot.take(pieces), save.tmp, self.world.size)
        self.path = save.tmp
        self.thread = threading.Thread(target=self._run, args=(save,), daemon=True)
        self.thread.start()

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a failure of the save under way."""
        return self.error is not None

    def protect(self) -> None:
        """Tensors may change from here on: the device first finishes its copies of them."""
        if self.thread is not None:
            self.snapshot.protect()

    def wait(self) -> None:
        """Until the save under way is published. Collective; raises on all ranks if it failed."""
        if self.thread is not None:
            on_all_ranks(self._join, self.path, self.world.size)

    def close(self) -> None:
        """Let a save under way come to its end, where a run ends for another reason: that has to be
        said soon, and the checkpoint before is there."""
        if self.thread is not None:
            self.thread.join(LAST)

    def _join(self) -> None:
        thread, self.thread = self.thread, None
        thread.join(PATIENCE)
        error, self.error = self.error, None
        if thread.is_alive():
            raise OSError(errno.EIO, f"not written after {PATIENCE:g} s", str(self.path))
        if error is not None:
            raise error

    def _run(self, save: Save) -> None:
        written = None
        try:
            self.snapshot.wait()
            written = save.write()
        except Exception as error:
            self.error = error
        try:
            everyone = self._exchange(save, written)
        except Exception as error:  # a rank that is gone, or whose disk hangs
            text = f"another rank has not written its part after {PATIENCE:g} s: {error}"
            self.error = self.error or OSError(errno.EIO, text, str(save.tmp))
            return
        if save.rank != 0:
            return
        try:
            if None in everyone:  # that rank says why
                save.discard()
                return
            save.publish(everyone)
        except Exception as error:
            self.error = error
            save.discard()
            return
        save.prune()

    def _exchange(self, save: Save, written: dict | None) -> list[dict | None]:
        """On rank 0 what every rank has written, None for one that has failed."""
        if self.store is None:
            return [written]
        key = f"{save.step}/{{}}".format
        self.store.set(key(save.rank), json.dumps(written))
        if save.rank != 0:
            return []
        keys = [key(rank) for rank in range(save.world_size)]
        self.store.wait(keys, timedelta(seconds=PATIENCE))
        found = [json.loads(self.store.get(k)) for k in keys]
        for k in keys:
            self.store.delete_key(k)
        return found
