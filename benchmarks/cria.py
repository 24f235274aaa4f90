"""What saving and reading inputs costs a block-wise distillation (cria.py).

    python benchmarks/cria.py --teacher models/smollm2-135m --cria 10 --tokens 16384

collect   against the plain forward of the same teacher on the same batches, in turns
train     align of one block from saved inputs against the same steps with the batches in memory:
          what the loader costs. Rows of the table are tokens per second.

--shape: a teacher of that shape with random weights, for which --teacher lends its tokenizer.
`--data random`: as many bytes as --tokens, where the modules of Python are too few.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cria
from benchmarks.common import about, random_data
from benchmarks.decode import SHAPES
from cli import load_config, parse_argv
from config import DistillConfig, ModelConfig
from cria_files import read_tensor_file
from cria_job import Job, load_block, prepare
from distributed import compile_blocks
from evaluate import inputs
from hf import load_model, save_model
from hybrid_layers import resolve_kernels, use_kernels
from layers import sdpa_priority
from metrics import console_table
from model import Transformer
from objectives import AlignObjective
from student import set_trainable
from train_kd import default_preset
from trainer import amp_context, compile_wanted, stage_loader


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def plain_forward(job: Job) -> float:
    """Seconds of the teacher's blocks over the rows that align sees, up to the last input."""
    device = job.world.device
    model = load_model(job.cfg.teacher, dtype=job.dtype, device=device).eval()
    use_kernels(model, resolve_kernels(model.config, "auto", device, job.cfg.dtype), device)
    model.layers = model.layers[: job.blocks[job.trained[-1]].start]
    if compile_wanted(job.cfg, job.world):
        compile_blocks(model)
    loader = stage_loader(job.cfg, job.plans[0], job.data, job.world)
    order = cria.collected_rows(loader, job.plans[0].steps)
    amp = amp_context(device, job.dtype)

    def once() -> float:
        start = time.perf_counter()
        with torch.no_grad(), amp(), sdpa_priority(device):
            for at in range(0, len(order), loader.micro_batch):
                batch = loader.batch_of(order[at : at + loader.micro_batch]).to(device)
                model(**inputs(batch))
        wait(device)
        return time.perf_counter() - start

    once()
    return once()


def saved_forward(job: Job) -> float:
    """Seconds of collect, but for loading the embedding and the blocks, which is done once."""
    shutil.rmtree(job.folder / "inputs", ignore_errors=True)
    outer = read_tensor_file(job.weights("outer"))
    blocks = {b: load_block(job, b) for b in range(len(job.blocks))}
    if compile_wanted(job.cfg, job.world):
        for model in blocks.values():
            compile_blocks(model)
    with patch.multiple(
        cria,
        read_tensor_file=lambda path: outer,
        load_block=lambda job, b: blocks[b],
        compile_wanted=lambda cfg, world: False,
    ):
        cria.collect(job)
        wait(job.world.device)
        shutil.rmtree(job.folder / "inputs")
        start = time.perf_counter()
        cria.collect(job)
        wait(job.world.device)
        return time.perf_counter() - start


def block_steps(job: Job, from_disk: bool) -> float:
    """Seconds of align's steps of the first block, after one that is not counted."""
    b, plan, device = job.trained[0], job.plans[0], job.world.device
    teacher, student, local = cria.make_block(job, b)
    if compile_wanted(job.cfg, job.world):
        compile_blocks(teacher)
        compile_blocks(student)
    set_trainable(student, plan.stage, local)
    objective = AlignObjective(student, teacher, plan.stage, local, job.world)
    job.data.attach = job.saved("inputs", b)
    loader = stage_loader(job.cfg, plan, job.data, job.world)
    loader = loader if from_disk else held(loader, plan.steps, device)
    amp = amp_context(device, job.dtype)
    for step in range(plan.steps):
        batches = loader.next_step()
        if from_disk:
            batches = [batch.to(device) for batch in batches]
        with amp(), sdpa_priority(device):
            count = sum(map(objective.tokens, batches))
            objective.backward(batches, torch.full((), float(count), device=device))
        for p in objective.params.values():
            p.grad = None
        if not step:
            wait(device)
            start = time.perf_counter()
    wait(device)
    loader.close()
    job.data.attach = None
    return time.perf_counter() - start


class held:
    """All of a loader's steps, on the device already."""

    def __init__(self, loader, steps: int, device: torch.device):
        self.steps = iter([[b.to(device) for b in loader.next_step()] for _ in range(steps)])
        self.close = loader.close

    def next_step(self) -> list:
        return next(self.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="models/smollm2-135m")
    parser.add_argument("--shape", default="", choices=("", *SHAPES))
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--mixer", default="hedgehog_window")
    parser.add_argument("--cria", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--batch_tokens", type=int, default=0, help="0 = as in the preset")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each")
    parser.add_argument("--folder", default="", help="where inputs are saved; empty = a fresh one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        teacher = f"{folder}/teacher" if args.shape else args.teacher
        if args.shape:
            torch.manual_seed(0)
            model = Transformer(ModelConfig(**SHAPES[args.shape]))
            model.init_weights()
            save_model(model, teacher, tokenizer_from=args.teacher, dtype=torch.bfloat16)
        data = args.data
        if data == "random":
            data = f"{folder}/data"
            random_data(data, args.teacher, args.tokens)
        flags = [
            f"--teacher={teacher}", f"--data={data}", f"--mixer={args.mixer}",
            f"--cria={args.cria}", "--layers=all", "--stages=align", "--run_name=bench",
            f"--align_tokens={args.tokens}", f"--context_len={args.seq_len}",
            "--align_unique_tokens=0", f"--save_model_dir={folder}", "--calibrate_tokens=0",
        ]  # fmt: skip
        if args.batch_tokens:
            flags.append(f"--align_batch_tokens={args.batch_tokens}")
        _, found = parse_argv(flags)
        job = prepare(load_config(DistillConfig, found, default_preset({})), flags)
        cria.shard(job)
        plan = job.plans[0]
        tokens = plan.steps * plan.rows * plan.stage.seq_len
        rest = tokens - plan.rows * plan.stage.seq_len
        rows = []
        for what, count, turn in (
            ("collect", tokens, lambda: (plain_forward(job), saved_forward(job))),
            ("train", rest, lambda: (block_steps(job, False), block_steps(job, True))),
        ):
            times = [turn() for _ in range(args.repeats)]
            print(f"{what}, seconds plain and with files: {times}", flush=True)
            base, ours = (sorted(t)[len(t) // 2] for t in zip(*times, strict=True))
            rows.append({
                "": what, "plain, tok/s": f"{count / base:,.0f}",
                "with files, tok/s": f"{count / ours:,.0f}", "share": f"{base / ours:.3f}",
            })  # fmt: skip
        size = sum(p.stat().st_size for p in (job.folder / "inputs").rglob("*.safetensors"))
    info = argparse.Namespace(**vars(args), device=job.world.device.type)
    print(about(info, "cria") | {"bytes": size, "dtype": str(job.dtype)})
    console_table("tokens per second, median of the turns", rows)


if __name__ == "__main__":
    main()
