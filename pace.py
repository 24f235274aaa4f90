"""Which rank the others wait for: one line where a rank is slower, and in what.

A step of one rank is as long as that of the slowest, so what is compared is each rank's own time:
waiting for data, and computing until gradients first meet. Under ddp and in align that is all but
the last backward and the update; under FSDP2 all ranks wait for one another in every block, and
only data can be told apart. And `quiet_gc`, for steps of one length.
Check: `pytest tests/faults/test_stragglers.py`.
"""

from __future__ import annotations

import gc
import platform
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from statistics import median, median_low

import torch

from distributed import World, everyone, gather_later

EVERY = 50  # steps between comparisons
SLOWER = 1.2  # times the median of the ranks, twice in a row
SHARE, LEAST = 0.05, 0.01  # of a step, and seconds, that must be lost by it
QUIET = 300.0  # seconds between two lines


class Pace:
    """A step calls `begin`, `loaded`, `together` (after the ranks have met) and `computed`; its
    end is `step`. Without a world it measures and tells nobody."""

    def __init__(self, world: World | None = None, say: Callable[[str], None] = print):
        self.world, self.say = world, say
        self.cuda = world is not None and world.device.type == "cuda"
        self.alone = world is None or world.size == 1
        self.hosts = [] if self.alone else everyone(platform.node(), world)
        self.times: deque = deque(maxlen=EVERY)  # (loading, computing from, to) of each step
        self.walls: deque = deque(maxlen=EVERY)
        self.loading, self.since = 0.0, None
        self.last: float | None = None
        self.steps, self.asked = 0, None
        self.suspect, self.said = None, -QUIET

    def begin(self) -> None:
        self.began = time.perf_counter()

    def loaded(self) -> None:
        self.loading = time.perf_counter() - self.began

    def together(self) -> None:
        self.since = self._now()

    def computed(self) -> None:
        self.times.append((self.loading, self.since, self._now()))
        self.since = None

    def step(self) -> None:
        """The end of a step; every EVERY steps the ranks' medians set out to rank 0."""
        now = time.perf_counter()
        if self.last is not None:
            self.walls.append(now - self.last)
        self.last = now
        if self.alone:
            return
        if self.since is not None:  # FSDP2
            self.times.append((self.loading, None, None))
            self.since = None
        self._answered()
        self.steps += 1
        if self.steps % EVERY == 0:
            self._answered(wait=True)
            self.asked = gather_later(torch.tensor(self._medians()), self.world)

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _medians(self) -> tuple[float, float, float]:
        """Seconds of loading, computing, and of a whole step; what the device is still at is left
        out."""
        computing = [0.0]
        known = [(a, b) for _, a, b in self.times if b is not None]
        if self.cuda:
            computing = [a.elapsed_time(b) / 1e3 for a, b in known if b.query()] or computing
        else:
            computing = [b - a for a, b in known] or computing
        loading = [load for load, *_ in self.times]
        return median(loading), median(computing), median(self.walls)

    def _answered(self, wait: bool = False) -> None:
        if self.asked is None or not (wait or self.asked[0].is_completed()):
            return
        (work, found), self.asked = self.asked, None
        work.wait()
        if not self.world.is_main:
            return
        slow = slowest([tuple(t.tolist()) for t in found])
        again, self.suspect = slow is not None and slow[0] == self.suspect, slow and slow[0]
        if again and time.monotonic() - self.said > QUIET:
            rank, line = slow
            self.say(f"rank {rank} ({self.hosts[rank]}) {line}")
            self.said = time.monotonic()


def slowest(ranks: list[tuple[float, float, float]]) -> tuple[int, str] | None:
    """The rank that is slow, if one is, and what is to be said of it, from (loading, computing,
    whole step) of all ranks."""
    own = [load + compute for load, compute, _ in ranks]
    usual, step = median_low(own), median(wall for *_, wall in ranks)
    rank = max(range(len(ranks)), key=own.__getitem__)
    if own[rank] <= SLOWER * usual or own[rank] - usual <= max(SHARE * step, LEAST):
        return None
    names = ("loading data", "computing")
    usual = [median_low(r[i] for r in ranks) for i in (0, 1)]
    cause = max((0, 1), key=lambda i: ranks[rank][i] - usual[i])
    return rank, (
        f"holds up the others, in {names[cause]}: {1e3 * ranks[rank][cause]:.3g} ms a step, where "
        f"the median of the ranks is {1e3 * usual[cause]:.3g} ms and a step takes {1e3 * step:.3g}"
    )


@contextmanager
def quiet_gc():
    """Python's garbage collector off: a full collection, which may come at any moment, stops the
    host for tens of milliseconds. What exists by now is never looked at again."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
