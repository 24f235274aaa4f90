"""A thread that ends a run which has come to a standstill, and says where every rank stands.

A hung rank leaves the others waiting in a collective, for half an hour by PyTorch's own time-out,
which then names the collective and not the rank. Here each rank's thread tells the others once a
second where its run is; the first one to see no progress for `seconds` prints one line and
every rank ends with exit code 4, for torchrun (`--max-restarts`) or a scheduler to begin it again.
A rank that fails tells the others (`distributed.stop`), which end soon after it, whatever they
wait for.

Check: `pytest tests/faults/test_hangs.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time

from distributed import FAILURE, World, shared_store

HUNG = 4  # exit code
PLACES = ("loading data", "computing", "evaluating", "saving")  # of a step, in this order
GRACE = 10.0  # seconds in which a rank should feel by itself that another one has failed
LATE = 1.0  # seconds by which the thread wakes too late where its process was stopped meanwhile
SILENT = 5  # missed messages after which a process counts as stopped, not as waiting


class Watchdog:
    """Within it, `watch(step, place)` says that the run goes on; 0 seconds: nobody watches."""

    def __init__(self, world: World, seconds: float):
        self.world, self.seconds = world, seconds
        self.interval = min(1.0, seconds / 20)
        self.step, self.place, self.when = 0, PLACES[0], time.monotonic()
        self.over, self.begun = threading.Event(), time.time()
        self.store = None
        if world.size > 1 and seconds:
            self.store = shared_store()

    def watch(self, step: int, place: str) -> None:
        self.step, self.place, self.when = step, place, time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        if self.seconds:
            self.thread.join()

    def _run(self) -> None:
        failed = 0.0  # when another rank was seen to have failed
        seen = paused = 0.0  # a time of `watch`, and for how long the process was stopped after it
        while True:
            begun = time.monotonic()
            if self.over.wait(self.interval):
                return
            extra = time.monotonic() - begun - self.interval
            if seen != self.when:
                seen, paused = self.when, 0.0
            if extra > LATE:  # SIGSTOP, docker pause, Slurm's suspend
                paused = min(paused + extra, time.monotonic() - seen)
            if self.store is not None:
                with contextlib.suppress(Exception):  # the store's host may be what is gone
                    here = json.dumps([self.step, PLACES.index(self.place), time.time()])
                    self.store.set(str(self.world.rank), here)
                    if not failed and self.store.check([FAILURE]):
                        failed = time.monotonic()
                if failed and time.monotonic() - failed > GRACE:
                    os._exit(1)  # that rank has said why
            if time.monotonic() - self.when - paused > self.seconds:
                self._end()

    def _end(self) -> None:
        """One line from whoever is first, and out: what hangs cannot be unwound."""
        first = True
        where = f"rank {self.world.rank} in step {self.step}, {self.place}"
        if self.store is not None:
            with contextlib.suppress(Exception):
                first = self.store.add("ended", 1) == 1
                where = self._suspects()
        if first:
            line = f"error: no progress for {self.seconds:g} s (--hang_timeout): {where}"
            print(line, file=sys.stderr, flush=True)
        else:
            time.sleep(1)  # torchrun stops all when the first one ends
        os._exit(HUNG)

    def _suspects(self) -> str:
        """Ranks that send nothing, else those that are behind the others."""
        ranks = range(self.world.size)
        nothing = json.dumps([0, 0, self.begun])  # of a rank that has not come this far
        told = {
            r: json.loads(self.store.get(str(r)) if self.store.check([str(r)]) else nothing)
            for r in ranks
        }
        late = {r: time.time() - told[r][2] for r in ranks}
        silent = [r for r in ranks if late[r] > SILENT * self.interval]
        at = lambda r: tuple(told[r][:2])  # noqa: E731
        behind = silent or [r for r in ranks if at(r) == min(map(at, ranks))]
        names = ", ".join(
            f"rank {r} in step {told[r][0]}, {PLACES[told[r][1]]}"
            + (f", silent for {late[r]:.0f} s" if r in silent else "")
            for r in behind
        )
        return names if len(behind) < self.world.size else f"all ranks: {names}"
