r"""The align stage: all converted layers in one pass, against one run for each layer.

    python benchmarks/align.py --json align.json         # on a GPU: Qwen2.5-1.5B, a 96 x 512 step
    python benchmarks/align.py --batch 8 --probe all
    python benchmarks/align.py --device cpu --shape tiny --batch 2 --length 64 --repeats 1

Every step is `trainer.one_step` with the default recipe of the stage and a student that shares the
teacher's trunk. In a run of one layer the teacher either goes through all of its layers and the
last norm ("whole") or ends at that layer's attention ("stopped"). The time of such runs for all
layers is a sum over the layers, of which --probe are measured; between those it is taken to be
linear in the layer's index. Weights and tokens are random but the same everywhere, so a layer must
have the same loss in all three after as many steps (unless its mixer starts from random values, as
gla, kda and rwkv6 do): how far apart they are is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import about, clock, show_profile
from benchmarks.decode import SHAPES
from config import DistillConfig, ModelConfig
from data import Batch, pack
from distributed import compile_blocks, this_process
from evaluate import inputs
from hybrid_layers import convert_layers, resolve_kernels, use_kernels
from layer_lists import parse_layers
from metrics import console_table
from model import Transformer
from objectives import AlignObjective
from optimizer import StepGuard
from stage_plan import StagePlan, plan_stage
from trainer import Run, one_step, set_up_torch, stage_optimizer


def set_up(args, name: str) -> tuple[Run, StagePlan]:
    """A run without a folder, and its stage `name`: the default recipe, --batch rows a step."""
    cfg = DistillConfig(device=args.device)
    world = this_process(args.device)
    dtype = set_up_torch(cfg, world)
    size = {"seq_len": args.length, "batch_tokens": args.batch * args.length}
    stage = dataclasses.replace(getattr(cfg, name), **size)
    plan = plan_stage(cfg, name, stage, world, config=ModelConfig(**SHAPES[args.shape]))
    return Run(cfg, world, Path(), None, dtype, {}), plan


def random_model(run: Run, args, seed: int) -> Transformer:
    """A float32 model, made on the device."""
    torch.manual_seed(seed)
    with run.world.device:
        model = Transformer(ModelConfig(**SHAPES[args.shape]))
        model.init_weights()
    return model


def random_batches(run: Run, plan: StagePlan, vocab: int) -> list[Batch]:
    """The micro-batches of a step, packed by the loader's function; each row is one document."""
    length = plan.stage.seq_len
    tokens = np.random.default_rng(0).integers(vocab, size=plan.rows * length + 1)

    def read(row: int, out: np.ndarray) -> tuple[np.ndarray, int]:
        out[:] = tokens[row * length :][: length + 1]
        return np.empty(0, np.int64), length

    source = SimpleNamespace(seq_len=length, read=read)  # what `pack` needs of a `packing.Rows`
    rows = np.arange(plan.rows).reshape(-1, plan.micro_batch)
    return [pack(source, part, run.cfg.doc_mask) for part in rows]


def our_step(run: Run, plan: StagePlan, objective, vocab: int) -> Callable[[], dict]:
    """A step as the trainer takes it."""
    optimizer = stage_optimizer(plan, objective, run.world)
    guard = StepGuard(0.0, run.world.device)
    batches = random_batches(run, plan, vocab)
    loader = SimpleNamespace(next_step=lambda: batches)
    return lambda: one_step(run, plan, plan.stage.warmup_steps, objective, optimizer, loader, guard)


def make_fast(model: Transformer, run: Run, args) -> None:
    """Kernels as in a run, named on the console; blocks compiled if asked for."""
    kernels = resolve_kernels(model.config, "auto", run.world.device)
    line = use_kernels(model, kernels, run.world.device)
    if kernels:
        print(line, flush=True)
    if args.compile:
        compile_blocks(model)


def timed(step: Callable[[], dict], args) -> tuple[dict[str, float], dict]:
    """What the first step returned; then, after one more, times and peak memory of a step."""
    cuda, start = args.device == "cuda", time.perf_counter()
    values = {name: float(value) for name, value in step().items()}  # waits for the device
    first = time.perf_counter() - start
    step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = clock(step, args.device, args.repeats)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    rate = args.batch * args.length / seconds
    return values, {"ms": 1e3 * seconds, "tok_s": rate, "peak_bytes": peak, "first_step_s": first}


def release(args) -> None:
    """Give back what the last measurement held."""
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()


def add_row(results: dict, row: dict, args) -> None:
    """To the results, the console and --json."""
    results["rows"].append(row)
    print(row, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


def add_flags(parser: argparse.ArgumentParser, *, batch: int, length: int) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=batch, help="rows a step")
    parser.add_argument("--length", type=int, default=length, help="tokens a row")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps; the median counts")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--compile", action=flag, default=cuda)
    parser.add_argument("--profile", action="store_true", help="also show where the time goes")
    parser.add_argument("--json", default="", help="write the numbers here, row by row")
    parser.add_argument("--read", default="", help="show these numbers instead of measuring")


class WholeTeacher(AlignObjective):
    """One layer, and a teacher that does not stop there."""

    def _taps(self, batch: Batch) -> Iterator[tuple]:
        where = inputs(batch)
        h = self.teacher.embed(where.pop("input_ids"))
        seq = self.teacher.seq_info(h.shape[1], dtype=h.dtype, **where)
        for i, block in enumerate(self.teacher.layers):
            h, normed, out = block(h, seq, None, True)
            if i in self.layers:
                tap = i, normed, out, seq
        self.teacher.norm(h)
        yield tap


KINDS = {
    "one pass": AlignObjective,
    "runs of one layer, whole teacher": WholeTeacher,
    "runs of one layer, stopped teacher": AlignObjective,
}


def measure(run: Run, plan: StagePlan, args, teacher: Transformer, kind: str, layers) -> dict:
    """A step that trains `layers`: its time and memory, and the losses of one step more."""
    student = convert_layers(teacher, layers, mixer=args.mixer, share_trunk=True).train()
    make_fast(student, run, args)
    objective = KINDS[kind](student, teacher, plan.stage, layers, run.world)
    step = our_step(run, plan, objective, teacher.config.vocab_size)
    row, values = timed(step, args)[1], step()
    if args.profile:
        show_profile(step, f"{kind}, {len(layers)} layers")
    return row | {"losses": [float(values[f"layer_{i}"]) for i in layers]}


def measure_all(args) -> dict:
    """One pass over all layers, then both kinds of single runs."""
    run, plan = set_up(args, "align")
    teacher = random_model(run, args, 0).to(run.dtype).eval().requires_grad_(False)
    layers = parse_layers(args.layers, len(teacher.layers))
    spaced = np.linspace(0, len(layers) - 1, min(4, len(layers))).round().astype(int)
    probed = parse_layers(args.probe, len(teacher.layers)) or [layers[i] for i in spaced]
    make_fast(teacher, run, args)
    results = {"about": about(args, "align") | {"converted": layers}, "rows": []}
    for kind in KINDS:
        for some in [layers] if kind == "one pass" else [[i] for i in probed]:
            row = {"kind": kind, "layers": some}
            try:
                row |= measure(run, plan, args, teacher, kind, some)
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
            release(args)
            add_row(results, row, args)
    return results


def show(results: dict) -> None:
    """A row for each way to train all layers; ratios are to one pass."""
    print(json.dumps(results["about"]))
    layers = results["about"]["converted"]
    tokens = results["about"]["batch"] * results["about"]["length"]
    done = [row for row in results["rows"] if "ms" in row]
    table, one = [], 0.0
    for kind in KINDS:
        rows = [row for row in done if row["kind"] == kind]
        if not rows:
            table.append({"way": kind, "all layers": "out of memory"})
            continue
        whole, peak = kind == "one pass", max(row["peak_bytes"] for row in rows)
        at, times = [row["layers"][0] for row in rows], [row["ms"] for row in rows]
        total = times[0] if whole else float(np.interp(layers, at, times).sum())
        one = total if whole else one
        source = f"sum over {len(layers)} layers, from {len(rows)} measured"
        table.append({
            "way": kind, "ms a step": f"{times[0]:,.1f}" + f" - {times[-1]:,.1f}" * (not whole),
            "all layers": "measured" if whole else source, "ms": f"{total:,.1f}",
            "tok/s": f"{1e3 * tokens / total:,.0f}",
            "times one pass": f"{total / one:.2f}" if one else "-",
            "peak GiB": f"{peak / 2**30:.2f}" if peak else "-",
        })  # fmt: skip
    console_table(f"align: a step of {tokens:,} tokens on {len(layers)} layers", table, width=150)
    losses = [pair for row in done for pair in zip(row["layers"], row["losses"], strict=True)]
    spread = max((abs(a / b - 1) for i, a in losses for j, b in losses if i == j), default=0.0)
    print(f"a layer's loss after {results['about']['repeats'] + 3} steps: within {spread:.1e}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="all", help="layers that are converted")
    parser.add_argument("--mixer", default="gated_deltanet")
    parser.add_argument("--probe", default="", help="layers run alone; empty = four of --layers")
    add_flags(parser, batch=96, length=512)
    args = parser.parse_args(argv)
    show(json.loads(Path(args.read).read_text()) if args.read else measure_all(args))


if __name__ == "__main__":
    main()
