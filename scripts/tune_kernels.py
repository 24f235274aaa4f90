"""Find the fastest configurations of fla's Triton kernels on this GPU, and write them to tuned/.

    python scripts/tune_kernels.py                                  # about 6 minutes on 16 cores
    python scripts/tune_kernels.py --ops gla,kda --head_dims 96     # another head size

Compiling is nearly all of the work, so worker processes compile every configuration while one
process times them, op by op, at 16,384 tokens of packed documents through ops/fla_kernels.py. What
is chosen is then held against the float64 recurrence (ops/fla_reference.py): Triton miscompiles
some of them on some GPUs, and none that computes something else is written. Each op's file is
written when the op is done. What the files are: ops/tuned.py. Tested by tests/ops/test_tuned.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import UserError
from ops import fla_kernels
from ops.fla_reference import VARIANTS, naive, op_of, random_inputs, results
from ops.tuned import autotuners, gpu_folder, write_entries

TOKENS = 16_384
CHECK_BOUNDS = [0, 1, 70, 256]
LIMIT = 5e-2  # RMS error ratio: bfloat16 gives up to 2e-2, wrong code 0.1 and more
SHARDS = 4  # compile tasks per op and head size


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


def tune(variant: str, head_dim: int, path: str, device: str = "cuda") -> tuple[int, int, str]:
    """Time, choose, check, write. Returns the kernels, the configurations tried, and a remark."""
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

        try:
            ms = triton.testing.do_bench(launch, warmup=5, rep=20, quantiles=(0.5, 0.2, 0.8))
        except (OutOfResources, *compile_errors()):
            return [float("inf")] * 3
        slot["ms"][config] = ms[0]
        return ms

    found = fresh_autotuners()
    for kernel, autotuner in found.items():
        autotuner.configs = fitting(search_space()[kernel], head_dim)
        if len(autotuner.configs) == 1 < len(search_space()[kernel]):
            autotuner.configs *= 2  # one alone would be launched without being timed
    bounds = [0, 1000, 3048, 3100, 7196, 9244, 13_340, TOKENS]
    with mock.patch.object(Autotuner, "_bench", bench):
        one_step(variant, head_dim, bounds, device)()

    x, _ = random_inputs(
        variant, CHECK_BOUNDS[-1], heads=heads_of(head_dim), key_dim=head_dim, value_dim=head_dim,
        device=device,
    )  # fmt: skip
    reference = functools.partial(naive, op_of(variant))
    expected = results(reference, x, None, final=False, bounds=CHECK_BOUNDS)
    remark = repair(variant, head_dim, expected, found, times)
    write_entries(Path(path), entries_of(found, times))
    tried = sum(len(slot["ms"]) for slots in times.values() for slot in slots.values())
    return len(times), tried, remark


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
            chosen = dict(
                kwargs=config.kwargs, num_warps=config.num_warps, num_stages=config.num_stages,
                num_ctas=config.num_ctas,
            )  # fmt: skip
            entry = dict(key=slot["key"], dtypes=slot["dtypes"], config=chosen)
            entries.setdefault(kernel, []).append(entry | {"ms": round(slot["ms"][config], 5)})
    return entries


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--head_dims", default="64,128", help="head sizes")
    parser.add_argument("--ops", default="all", help="all, or names: " + ",".join(fla_kernels.OPS))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--out", default="tuned", help="folder that holds one per GPU")
    args = parser.parse_args(argv)
    names = list(fla_kernels.OPS) if args.ops == "all" else args.ops.split(",")
    for name in names:
        if name not in fla_kernels.OPS:
            raise UserError(f"--ops: {name!r} found, some of {', '.join(fla_kernels.OPS)} expected")
    if not args.head_dims.replace(",", "").isdigit():
        raise UserError(f"--head_dims: {args.head_dims!r} found, numbers like 64,128 expected")
    args.head_dims = [int(size) for size in args.head_dims.split(",")]
    for name in names:
        for size in args.head_dims:
            if reason := fla_kernels.check_head_size(name, size, size):
                raise UserError(f"--head_dims: {reason}")
    args.variants = [v for v in VARIANTS if op_of(v) in names]
    if not torch.cuda.is_available():
        raise UserError("tuning needs a CUDA GPU, and there is none")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ["FLA_CACHE_RESULTS"] = "0"  # else an earlier search would be taken for this one
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(args.out) / gpu_folder(torch.cuda.get_device_name())
    context = multiprocessing.get_context("spawn")
    tasks = [(v, size) for v in args.variants for size in args.head_dims]
    failed, start = False, time.time()
    print(f"{'op':<28}{'head':>5}{'kernels':>9}{'tried':>7}{'seconds':>9}  {folder}", flush=True)
    with ProcessPoolExecutor(args.jobs, mp_context=context) as compilers:
        compiling = {
            task: [compilers.submit(compile_shard, *task, shard) for shard in range(SHARDS)]
            for task in tasks
        }
        timer = ProcessPoolExecutor(1, mp_context=context)
        for task in tasks:
            variant, size = task
            wait(compiling[task])
            lost = [e for e in (f.exception() for f in compiling[task]) if e is not None]
            path = folder / f"{variant.replace(' ', '_')}.json"
            try:
                kernels, tried, remark = timer.submit(tune, variant, size, str(path)).result()
            except Exception as error:  # a kernel may take the process or its GPU context with it
                failed = True
                kernels, tried, remark = 0, 0, f"FAILED: {type(error).__name__}: {error}"
                timer.shutdown(wait=False)
                timer = ProcessPoolExecutor(1, mp_context=context)
            remark += f"; {len(lost)} shards not compiled ahead: {lost[0]!r}" if lost else ""
            row = f"{variant:<28}{size:>5}{kernels:>9}{tried:>7}{time.time() - start:>9.0f}"
            print(f"{row}  {remark}", flush=True)
        timer.shutdown()
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
