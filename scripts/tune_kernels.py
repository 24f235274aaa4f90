"""Find the fastest configurations of fla's Triton kernels on this GPU, and write them to tuned/.

    python scripts/tune_kernels.py                                  # about 5 minutes on 16 cores
    python scripts/tune_kernels.py --ops gla,kda --head_dims 96     # another head size

Compiling is nearly all of the work, so worker processes compile every configuration while one
process times them, op by op, at 16,384 tokens of packed documents through ops/fla_kernels.py. What
is chosen is then held against the float64 recurrence (ops/fla_reference.py): Triton miscompiles
some of them on some GPUs, and none that computes something else is written. One that takes its
process with it (an illegal access, a hang) is banned, named in the table, and the op tuned anew:
each op and head size has a process of its own, which notes in a file what it is about to run.
The GPU's file is written as each op is done; what it holds: ops/tuned.py. Tested by
tests/ops/test_tuned.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import UserError
from ops import fla_kernels
from ops.fla_reference import VARIANTS, naive, op_of, random_inputs, results
from ops.tuned import TUNED, autotuners, file_of, write_entries

TOKENS = 16_384
CHECK_BOUNDS = [0, 1, 70, 256]
LIMIT = 5e-2  # RMS error ratio: bfloat16 gives up to 2e-2, wrong code 0.1 and more
SHARDS = 4  # compile tasks per op and head size
MOST_BANNED = 8  # configurations of an op and head size that may fail before it is given up
PATIENCE = 150  # seconds that an op and head size may take once compiled; 30 are usual


def heads_of(head_dim: int) -> int:
    """Heads of a model of some 600 to 1,500 channels; the choice hardly depends on them."""
    return {64: 9, 128: 12}.get(head_dim, 8)


@functools.cache
def search_space() -> dict[str, tuple]:
    """kernel -> its configurations, without those of 16 warps and more, which never win."""
    import fla.ops  # noqa: F401

    spaces = {}
    for kernel, autotuner in autotuners().items():
        few = tuple(c for c in autotuner.configs if c.num_warps <= 8)
        spaces[kernel] = few or tuple(autotuner.configs)
    return spaces


def fitting(configs: tuple, head_dim: int) -> list:
    """Without tiles wider than a head, which only compute zeros."""
    narrow = [c for c in configs if max(c.kwargs.get("BK", 0), c.kwargs.get("BV", 0)) <= head_dim]
    return narrow or list(configs)


def kernel_name(autotuner: Any) -> str:
    return f"{autotuner.base_fn.__module__}.{autotuner.base_fn.__name__}"


def key_of(autotuner: Any, args: tuple, kwargs: dict) -> tuple[dict, list[str]]:
    """What Triton's autotuner keys this launch by: named values, and the dtype of every tensor."""
    every = {**dict(zip(autotuner.arg_names, args, strict=False)), **kwargs}
    every = {n: every[n] for n in every if n in autotuner.arg_names}
    key = {n: every[n] for n in autotuner.keys if n in every}
    return key, [str(x.dtype) for x in every.values() if hasattr(x, "dtype")]


def one_step(variant: str, head_dim: int, bounds: list[int], device: str = "cuda") -> Any:
    """A closure that runs forward and backward on packed documents, as training does."""
    x, _ = random_inputs(
        variant, bounds[-1], heads=heads_of(head_dim), key_dim=head_dim, value_dim=head_dim,
        device=device,
    )  # fmt: skip
    function = getattr(fla_kernels, op_of(variant))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)

    def run(tensors: dict, state: None) -> tuple:
        return function(*tensors.values(), cu_seqlens=cu_seqlens)

    return lambda: results(run, x, None, dtype=torch.bfloat16, final=False)


def compile_shard(variant: str, head_dim: int, shard: int) -> None:
    """Compile this shard's configurations of all kernels of an op into Triton's cache on disk.

    No kernel is launched: what they would compute decides nothing about the next one's launch.
    """
    from triton.runtime.autotuner import Autotuner, OutOfResources

    def compile_only(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs)[shard::SHARDS]:
            with contextlib.suppress(OutOfResources, *compile_errors()):
                self.fn.run(*args, **{**kwargs, **config.all_kwargs(), "warmup": True})

    for kernel, autotuner in fresh_autotuners().items():
        autotuner.configs = fitting(search_space()[kernel], head_dim)
    with mock.patch.object(Autotuner, "run", compile_only):
        one_step(variant, head_dim, [0, 48, 128])()


def compile_errors() -> tuple:
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import PTXASError

    return (CompileTimeAssertionFailure, PTXASError)


def fresh_autotuners() -> dict[str, Any]:
    """All autotuners, knowing nothing."""
    search_space()
    found = autotuners()
    for autotuner in found.values():
        autotuner.cache, autotuner.cache_results = {}, False
    return found


def errors_of(variant: str, head_dim: int, expected: dict) -> dict[str, float]:
    """RMS error ratio by output; inf for what is not finite."""
    actual = one_step(variant, head_dim, CHECK_BOUNDS, expected["o"].device)()
    ratios = {}
    for name, wanted in expected.items():
        found = actual[name].double()
        ratio = ((found - wanted).square().mean() / wanted.square().mean()).sqrt().item()
        ratios[name] = ratio if found.isfinite().all() else float("inf")
    return ratios


class Note:
    """A file that says which configuration of which kernel is running: after a crash, the culprit.

    Every launch is waited for, as an illegal access is reported by some later call otherwise.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)

    @contextlib.contextmanager
    def running(self, kernel: str, config: Any) -> Iterator[None]:
        """Cleared at the end unless it ends by an exception."""
        self.path.write_text(json.dumps([kernel, str(config)]))
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.path.write_text("")

    def read(self) -> tuple[str, str] | None:
        text = self.path.read_text() if self.path.exists() else ""
        return tuple(json.loads(text)) if text else None


def tune(
    variant: str, head_dim: int, path: str, note: Note, banned: frozenset, device: str = "cuda"
) -> tuple[int, int, str]:
    """Time, choose, check, write. Returns the kernels, the configurations tried, and a remark.

    banned: (kernel, configuration as text), which are not tried.
    """
    import triton.testing
    from triton.runtime.autotuner import Autotuner, OutOfResources

    times: dict[str, dict[str, Any]] = {}  # kernel -> key as text -> what was measured

    def bench(self, *args, config, **kwargs):
        key, dtypes = key_of(self, args, kwargs)
        slot = times.setdefault(kernel_name(self), {}).setdefault(
            repr((key, dtypes)), {"key": key, "dtypes": dtypes, "ms": {}}
        )

        def launch():
            self.fn.run(*args, **{**kwargs, **config.all_kwargs()})

        with note.running(kernel_name(self), config):
            try:
                ms = triton.testing.do_bench(launch, warmup=5, rep=20, quantiles=(0.5, 0.2, 0.8))
            except (OutOfResources, *compile_errors()):
                return [float("inf")] * 3
        slot["ms"][config] = ms[0]
        return ms

    launch_chosen = Autotuner.run

    def run(self, *args, **kwargs):
        result = launch_chosen(self, *args, **kwargs)
        with note.running(kernel_name(self), self.best_config):
            return result

    found = fresh_autotuners()
    for kernel, autotuner in found.items():
        autotuner.configs = allowed(kernel, head_dim, banned)
    bounds = [0, 1000, 3048, 3100, 7196, 9244, 13_340, TOKENS]
    with mock.patch.object(Autotuner, "_bench", bench), mock.patch.object(Autotuner, "run", run):
        one_step(variant, head_dim, bounds, device)()
        x, _ = random_inputs(
            variant, CHECK_BOUNDS[-1], heads=heads_of(head_dim), key_dim=head_dim,
            value_dim=head_dim, device=device,
        )  # fmt: skip
        reference = functools.partial(naive, op_of(variant))
        expected = results(reference, x, None, final=False, bounds=CHECK_BOUNDS)
        remark = repair(variant, head_dim, expected, found, times)
    write_entries(Path(path), entries_of(found, times))
    tried = sum(len(slot["ms"]) for slots in times.values() for slot in slots.values())
    return len(times), tried, remark


def allowed(kernel: str, head_dim: int, banned: frozenset) -> list:
    """The configurations to try; twice the same where there is but one of several left, as one
    alone would be launched without being timed."""
    every = search_space()[kernel]
    configs = [c for c in fitting(every, head_dim) if (kernel, str(c)) not in banned]
    if not configs:
        raise UserError(f"every configuration of {kernel} fails")
    return configs * 2 if len(configs) == 1 < len(every) else configs


def serve(pipe: Any, note_path: str) -> None:
    """A process for one op and head size: it imports and starts CUDA, waits for the arguments of
    `tune`, and sends back what that returns, or the exception as text."""
    search_space()
    torch.zeros(1, device="cuda")
    variant, head_dim, path, banned = pipe.recv()
    try:
        pipe.send((*tune(variant, head_dim, path, Note(note_path), banned), None))
    except Exception as error:  # reported by the parent, whatever it is
        text = str(error).strip().split("\n")[0]
        pipe.send((0, 0, "", f"{type(error).__name__}: {text}"))


class Timer:
    """One process of `serve`, started ahead of its use because imports take seconds."""

    def __init__(self, folder: str, number: int, target: Callable = serve):
        context = multiprocessing.get_context("spawn")
        self.note = Note(Path(folder) / f"note{number}")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=target, args=(theirs, str(self.note.path)), daemon=True
        )
        self.process.start()
        theirs.close()  # so that the death of the process ends a wait for its answer

    def answer(self, task: tuple) -> tuple[int, int, str, str | None]:
        """`tune`'s answer and None; or nothing and why."""
        try:
            self.pipe.send(task)
            if not self.pipe.poll(PATIENCE):
                return 0, 0, "", f"no answer in {PATIENCE} s"
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            return 0, 0, "", f"its process ended with code {self.process.exitcode}"
        finally:
            self.process.kill()
            self.process.join()


def tune_safely(
    variant: str, head_dim: int, path: str, timers: Iterator[Timer]
) -> tuple[int, int, str, bool]:
    """`tune` in a process of its own, again without the configuration that a failure is blamed on.

    Returns its answer, with the banned ones in the remark, and whether it succeeded.
    """
    banned: dict[tuple[str, str], str] = {}
    while True:
        timer = next(timers)
        kernels, tried, remark, failure = timer.answer((variant, head_dim, path, frozenset(banned)))
        culprit = timer.note.read()
        listed = "".join(f"; banned {k.split('.')[-1]} ({c}): {e}" for (k, c), e in banned.items())
        if failure is None:
            return kernels, tried, remark + listed, True
        if culprit is None or culprit in banned or len(banned) == MOST_BANNED:
            where = f" in {culprit[0]} ({culprit[1]})" if culprit else ""
            return 0, 0, f"FAILED{where}: {failure}{listed}", False
        banned[culprit] = failure


def timers_ahead(folder: str, first: Timer) -> Iterator[Timer]:
    """Timers without end, the next one started when one is taken."""
    ahead = first
    for number in itertools.count(1):
        timer, ahead = ahead, Timer(folder, number)
        yield timer


def repair(variant: str, head_dim: int, expected: dict, found: dict, times: dict) -> str:
    """Where the fastest configurations do not compute the recurrence, find ones that do."""
    errors = errors_of(variant, head_dim, expected)
    worst = max(errors.values())
    if worst <= LIMIT:
        return f"error {worst:.1e}"
    replaced = []
    for kernel, slots in times.items():
        cache = found[kernel].cache
        for slot in slots.values():
            key = (*slot["key"].values(), *slot["dtypes"])
            first, tried = cache[key], {}
            for config in sorted(slot["ms"], key=slot["ms"].get):
                cache[key] = config
                tried[config] = max(errors_of(variant, head_dim, expected).values())
            least = min(tried.values())
            # keep the fastest unless another one is clearly closer
            best = first if tried[first] <= 1.2 * least + 1e-3 else min(
                (c for c in tried if tried[c] <= 1.2 * least + 1e-3), key=slot["ms"].get
            )  # fmt: skip
            cache[key] = best
            if best is not first:
                wrong = [str(c) for c in tried if tried[c] > 1.2 * least + 1e-3]
                replaced.append(f"{kernel}: wrong: {'; '.join(wrong)}")
    errors = errors_of(variant, head_dim, expected)
    worst = max(errors.values())
    if worst > LIMIT:
        raise UserError(f"no configuration computes the recurrence: {errors} {replaced}")
    return f"error {worst:.1e}; " + " ".join(replaced)


def entries_of(found: dict, times: dict) -> dict[str, list[dict]]:
    """kernel -> entries for write_entries."""
    entries: dict[str, list[dict]] = {}
    for kernel, slots in times.items():
        for slot in slots.values():
            config = found[kernel].cache[(*slot["key"].values(), *slot["dtypes"])]
            chosen = {**config.kwargs, "num_warps": config.num_warps}
            chosen["num_stages"] = config.num_stages
            if config.num_ctas != 1:
                chosen["num_ctas"] = config.num_ctas
            entry = dict(key=slot["key"], dtypes=slot["dtypes"], config=chosen)
            entries.setdefault(kernel, []).append(entry)
    return entries


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--head_dims", default="64,128", help="head sizes")
    parser.add_argument("--ops", default="all", help="all, or names: " + ",".join(VARIANTS))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--out", default=str(TUNED), help="folder that holds one file per GPU")
    args = parser.parse_args(argv)
    names = list(fla_kernels.OPS) if args.ops == "all" else args.ops.split(",")
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"--ops: {name!r} found, some of {', '.join(VARIANTS)} expected")
    if not args.head_dims.replace(",", "").isdigit():
        raise UserError(f"--head_dims: {args.head_dims!r} found, numbers like 64,128 expected")
    args.head_dims = [int(size) for size in args.head_dims.split(",")]
    for name in names:
        for size in args.head_dims:
            if reason := fla_kernels.check_head_size(op_of(name), size, size):
                raise UserError(f"--head_dims: {reason}")
    args.variants = [v for v in VARIANTS if v in names or op_of(v) in names]
    if not torch.cuda.is_available():
        raise UserError("tuning needs a CUDA GPU, and there is none")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ["FLA_CACHE_RESULTS"] = "0"  # else an earlier search would be taken for this one
    os.environ["OMP_NUM_THREADS"] = "1"
    path = file_of(torch.cuda.get_device_name(), args.out)
    context = multiprocessing.get_context("spawn")
    tasks = [(v, size) for v in args.variants for size in args.head_dims]
    failed, start = False, time.time()
    print(f"{'op':<28}{'head':>5}{'kernels':>9}{'tried':>7}{'seconds':>9}  {path.name}", flush=True)
    with (
        tempfile.TemporaryDirectory() as notes,
        ProcessPoolExecutor(args.jobs, mp_context=context) as compilers,
    ):
        timers = timers_ahead(notes, Timer(notes, 0))
        compiling = {
            task: [compilers.submit(compile_shard, *task, shard) for shard in range(SHARDS)]
            for task in tasks
        }
        for task in tasks:
            variant, size = task
            wait(compiling[task])
            lost = [e for e in (f.exception() for f in compiling[task]) if e is not None]
            kernels, tried, remark, succeeded = tune_safely(variant, size, str(path), timers)
            failed = failed or not succeeded
            remark += f"; {len(lost)} shards not compiled ahead: {lost[0]!r}" if lost else ""
            row = f"{variant:<28}{size:>5}{kernels:>9}{tried:>7}{time.time() - start:>9.0f}"
            print(f"{row}  {remark}", flush=True)
    if path.exists():
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB", flush=True)
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
