"""What the benchmarks share: a clock, peak memory, and where and how something was measured."""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.profiler import profile, schedule

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from metrics import git_commit
from scripts.profile_table import read_events, show, summarise
from shard_writer import ShardWriter
from tokenizer import load_tokenizer


def clock(work: Callable, device: str, repeats: int) -> float:
    """Median seconds of `work()`. Nothing is run before. On CUDA by the device's own clock, and the
    next one is launched while one runs, as in training."""
    if device == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        marks[-1].synchronize()
        return statistics.median(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def extra_memory(work: Callable, device: str) -> int:
    """Bytes that `work()` needs at its peak beyond what is allocated before; 0 off CUDA."""
    if device != "cuda":
        work()
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def show_profile(work: Callable, what: str) -> None:
    """Where the time of two calls of `work()` goes, as scripts/profile_table.py tells of a run."""
    steps = schedule(wait=0, warmup=1, active=2, repeat=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        save = lambda prof: prof.export_chrome_trace(str(path))  # noqa: E731
        with profile(schedule=steps, on_trace_ready=save) as prof:
            for _ in range(3):
                work()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()  # or the window would begin with the warm-up's work
                prof.step()
        found = summarise(read_events(path))
    print(f"profile of {what}")
    show(found, 20)


def about(args, script: str) -> dict:
    """Device, version, commit, command and settings of a measurement."""
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    skip = ("json", "read", "plot", "device", "profile")
    return {
        "device": device, "torch": torch.__version__, "commit": git_commit() or "no repository",
        "command": f"python benchmarks/{script}.py " + " ".join(sys.argv[1:]),
        **{name: value for name, value in vars(args).items() if name not in skip},
    }  # fmt: skip


def random_data(folder: str, tokenizer: str, tokens: int) -> None:
    """Shards of documents of random bytes, at least `tokens` for training."""
    rng = np.random.default_rng(0)
    for split, count in (("train", tokens), ("val", 100_000)):
        with ShardWriter(folder, split, load_tokenizer(tokenizer)) as writer:
            for length in rng.lognormal(np.log(400), 1.0, count // 600).astype(int) + 1:
                writer.add(rng.integers(0, 256, length))
