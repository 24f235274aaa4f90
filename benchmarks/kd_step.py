r"""The distillation step, teacher and student together: tokens/s and memory beside peers.

    python benchmarks/kd_step.py --json kd_step.json          # on a GPU: Qwen2.5-1.5B, 4 x 4096
    python benchmarks/kd_step.py --variants ours "transformers + Liger"
    python benchmarks/kd_step.py --device cpu --shape tiny --batch 2 --length 64 --repeats 1

A step: the teacher's forward, the student's forward and backward by KL(teacher || student),
clipping and AdamW of all parameters. Ours is `trainer.one_step` with the default recipe of the
distill stage: float32 masters under bfloat16 autocast; "bfloat16 trunk" stores weights, gradients
and optimizer state as the peers do (--trunk_dtype). Rows are plain, as the peers'; "documents":
each is one document, which attention has to keep apart. The peers are transformers' models, in
bfloat16 through and through, which takes less memory and is less exact; those without a mask have
been helped to the fast attention kernel (see `stock`). All have the same random weights and tokens,
so the softmax ones must agree on the first step's loss. What runs out of memory is tried again with
fewer rows at once. MFU counts what teacher and student need (flops.flops_per_token).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.align import (
    add_flags,
    add_row,
    make_fast,
    our_step,
    random_batches,
    random_model,
    release,
    set_up,
    timed,
)
from benchmarks.common import about, show_profile
from benchmarks.decode import SHAPES
from config import ModelConfig
from flops import flops_per_token, mfu, peak_flops
from hf import stock_type, to_hf_config
from hybrid_layers import cast_trunk, convert_layers
from layer_lists import parse_layers
from metrics import console_table
from objectives import HeadObjective
from ops.float8_linear import float8_copy
from stage_plan import StagePlan
from trainer import Run


def ours(
    run: Run, plan: StagePlan, args, *, layers: str = "", narrow: bool = False,
    documents: bool = False, float8: bool = False,
) -> tuple[Callable, ModelConfig]:  # fmt: skip
    """Our models; `layers` of the student are converted. narrow: its trunk is stored in the compute
    type. float8: the teacher's blocks."""
    run = dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, doc_mask=documents))
    teacher = random_model(run, args, 0).to(run.dtype).eval().requires_grad_(False)
    student = random_model(run, args, 1)
    converted = parse_layers(layers, len(student.layers))
    student = convert_layers(student, converted).train()
    cast_trunk(student, converted, run.dtype if narrow else torch.float32)
    if float8:
        teacher = float8_copy(teacher)
    make_fast(teacher, run, args)
    make_fast(student, run, args)
    objective = HeadObjective(student, teacher, plan.stage, run.world, converted)
    return our_step(run, plan, objective, student.config.vocab_size), student.config


def stock_model(run: Run, args, seed: int) -> torch.nn.Module:
    """transformers' model with the weights of `random_model`, in the compute type."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = random_model(run, args, seed)
    raw = to_hf_config(source.config, stock_type(source.config), run.dtype)
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    with run.world.device:
        model = AutoModelForCausalLM.from_config(config, dtype=run.dtype)
    model.model.load_state_dict(source.state_dict())
    return model


def stock(
    run: Run, plan: StagePlan, args, *, liger: bool = False, mask: bool = True,
    masters: bool = False,
) -> tuple[Callable, ModelConfig]:  # fmt: skip
    """transformers' models and PyTorch's AdamW, with Liger's chunked head or, eager, all logits.

    Compiled, transformers makes a causal mask, which keeps SDPA from its fast kernels; without
    `mask` it is handed none, which means plain causal attention to Qwen's models. masters: float32
    weights under autocast, as ours."""
    teacher = stock_model(run, args, 0).eval().requires_grad_(False)
    student = stock_model(run, args, 1).train()
    if masters:
        student.float()
    if liger:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        # At beta 0 its divergence is KL(teacher || student).
        head = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=args.compile)
        if args.compile:
            teacher.model.compile()
            student.model.compile()

    plain = not mask and "qwen" in student.config.model_type
    attention_mask = {"full_attention": None} if plain else None
    amp = run.amp if masters else nullcontext

    def states(model, ids):
        return model.model(ids, attention_mask=attention_mask, use_cache=False)[0].flatten(0, 1)

    def divergence(ids, labels):
        with torch.no_grad():
            known = states(teacher, ids)
        hidden = states(student, ids)
        if liger:
            weights = student.lm_head.weight, teacher.lm_head.weight
            return head(hidden, weights[0], known, weights[1], labels.flatten())
        known = teacher.lm_head(known).float().log_softmax(-1)
        logs = student.lm_head(hidden).float().log_softmax(-1)
        return F.kl_div(logs, known, log_target=True, reduction="batchmean")

    stage, params = plan.stage, list(student.parameters())
    optimizer = torch.optim.AdamW(params, stage.lr, (0.9, 0.95), weight_decay=0.0, fused=True)
    config = ModelConfig(**SHAPES[args.shape])
    batches = random_batches(run, plan, config.vocab_size)

    def step():
        total = 0.0
        for batch in batches:
            batch = batch.to(run.world.device)
            rows = (t.view(-1, stage.seq_len) for t in (batch.input_ids, batch.labels))
            with amp():
                loss = divergence(*rows) / len(batches)
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(params, stage.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": total}

    return step, config


LIGER = ("transformers", "liger_kernel")
# name -> (packages needed, what makes its step)
VARIANTS = {
    "ours": ((), ours),
    "ours, bfloat16 trunk": ((), partial(ours, narrow=True)),
    "ours, bfloat16 trunk, float8 teacher": ((), partial(ours, narrow=True, float8=True)),
    "ours, documents": ((), partial(ours, documents=True)),
    "ours 3:1": ((), partial(ours, layers="3:1")),
    "ours 3:1, bfloat16 trunk": ((), partial(ours, layers="3:1", narrow=True)),
    "transformers + Liger": (LIGER, partial(stock, liger=True)),
    "transformers + Liger, no mask": (LIGER, partial(stock, liger=True, mask=False)),
    "transformers + Liger, no mask, float32 masters":
        (LIGER, partial(stock, liger=True, mask=False, masters=True)),
    "transformers, full logits": (("transformers",), stock),
}  # fmt: skip


def measure(name: str, run: Run, plan: StagePlan, args) -> dict:
    """A variant's figures; its models live only as long as this call."""
    step, config = VARIANTS[name][1](run, plan, args)
    values, row = timed(step, args)
    if args.profile:
        show_profile(step, name)
    needed = flops_per_token("distill", config, ModelConfig(**SHAPES[args.shape]), args.length)
    rate = mfu(row["tok_s"], needed, 1, peak_flops(run.world.device, run.dtype))
    return row | {"loss": values["loss"], "tflops": row["tok_s"] * needed / 1e12, "mfu": rate}


def measure_all(args) -> dict:
    """Every variant whose packages are there."""
    run, plan = set_up(args, "distill")
    results = {"about": about(args, "kd_step"), "rows": []}
    for name in args.variants:
        missing = [p for p in VARIANTS[name][0] if importlib.util.find_spec(p) is None]
        if missing:
            print(f"left out: {name}; not installed: {', '.join(missing)}", flush=True)
            continue
        row = {"variant": name}
        for rows in (n for n in range(plan.micro_batch, 0, -1) if plan.micro_batch % n == 0):
            try:
                row |= measure(name, run, dataclasses.replace(plan, micro_batch=rows), args)
                row["rows"] = rows
            except torch.OutOfMemoryError:
                row["note"] = f"out of memory with {rows} rows at once"
            release(args)
            torch.compiler.reset()
            if "rows" in row:
                break
        add_row(results, row, args)
    return results


def show(results: dict) -> None:
    """A row for each variant; ratios are to the first peer that was measured."""
    print(json.dumps(results["about"]))
    done = [row for row in results["rows"] if "tok_s" in row]
    peer = next((row for row in done if not row["variant"].startswith("ours")), {})
    formats = {
        "rows at once": ("rows", 1, ".0f"), "tok/s": ("tok_s", 1, ",.0f"), "ms": ("ms", 1, ",.1f"),
        "TFLOP/s": ("tflops", 1, ".3g"), "MFU": ("mfu", 1, ".1%"),
        "peak GiB": ("peak_bytes", 2**30, ".1f"), "first step, s": ("first_step_s", 1, ".1f"),
        "first loss": ("loss", 1, ".4f"),
    }  # fmt: skip
    table = []
    for row in results["rows"]:
        line = {"variant": row["variant"]}
        for column, (key, unit, form) in formats.items():
            line[column] = format(row[key] / unit, form) if row.get(key) else "-"
        for what, key in (("tok/s", "tok_s"), ("memory", "peak_bytes")):
            if row.get(key) and peer.get(key):
                line[f"{what} ratio"] = f"{row[key] / peer[key]:.2f}"
        table.append(line | {"note": row.get("note", "")})
    console_table(f"a distillation step; ratios to {peer.get('variant', 'none')}", table, width=170)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    add_flags(parser, batch=4, length=4096)
    args = parser.parse_args(argv)
    show(json.loads(Path(args.read).read_text()) if args.read else measure_all(args))


if __name__ == "__main__":
    main()
