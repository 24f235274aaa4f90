r"""One optimizer step of our Muon, batched by shape, against torch.optim.Muon: time and result.

    python benchmarks/muon.py --json muon.json
    python benchmarks/muon.py --compile                  # the peer compiled as well, minutes
    python benchmarks/muon.py --device cpu --sizes tiny --repeats 3

The matrices of a model, without embeddings and head, as float32 parameters with random gradients.
Both run five quintic Newton-Schulz iterations with Nesterov momentum, weight decay and the same
adjustment of the learning rate, which are torch.optim.Muon's defaults; ours in float16 on CUDA (on
Gram matrices where they are wide), the peer in bfloat16. The updates of the first step, from zero
weights, are held against the plain iteration in float32: RMS of the error over the RMS of that
update, and the largest error over it. Times are medians; TFLOP/s are those of the plain iteration;
memory is what a step needs beyond weights, gradients and momentum.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import about, clock, extra_memory, show_profile
from benchmarks.decode import SHAPES
from config import ModelConfig
from metrics import console_table
from model import Transformer
from muon import ADJUST_LR, newton_schulz_ref
from optimizer import build_optimizer, param_role

SIZES = {
    "124m": dict(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, head_dim=64,
    ),
    "1.5b": SHAPES["qwen2.5-1.5b"],
    "tiny": SHAPES["tiny"],
}  # fmt: skip
LR, DECAY = 0.02, 0.1


def matrices(size: str) -> dict[str, torch.Size]:
    """Name -> shape of the parameters that Muon takes."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(**SIZES[size]))
    named = model.named_parameters()
    return {name: p.shape for name, p in named if param_role(name, p) == "muon"}


def newton_schulz_flops(shapes: list[torch.Size], steps: int = 5) -> int:
    """FLOPs of X X^T, its square, and their product with X, in every iteration."""
    total = 0
    for shape in shapes:
        rows, cols = sorted(shape)
        total += steps * (4 * rows * rows * cols + 2 * rows**3)
    return total


def parameters(shapes: dict[str, torch.Size], device: str) -> dict[str, Tensor]:
    """Zeros, with the same random gradients at every call."""
    generator = torch.Generator(device).manual_seed(0)
    params = {}
    for name, shape in shapes.items():
        params[name] = torch.zeros(shape, device=device, requires_grad=True)
        params[name].grad = torch.randn(shape, device=device, generator=generator)
    return params


def our_muon(params: dict[str, Tensor]):
    """As a run builds it, with the peer's coefficients."""
    return build_optimizer(
        params.items(), lr=LR, muon_lr=LR, weight_decay=DECAY, use_muon=True,
        coefficients="quintic", adjust_lr="original",
    )  # fmt: skip


def torch_muon(params: dict[str, Tensor]):
    """PyTorch's, one matrix after the other."""
    return torch.optim.Muon(params.values(), lr=LR, weight_decay=DECAY, adjust_lr_fn="original")


def measure(make, shapes: dict, args, compiled: bool) -> tuple[dict, list[Tensor]]:
    """The row, and the updates of the first step."""
    params = parameters(shapes, args.device)
    optimizer = make(params)
    step = torch.compile(optimizer.step) if compiled else optimizer.step
    first = clock(step, args.device, 1)
    updates = [p.detach().clone() for p in params.values()]
    clock(step, args.device, args.warmup)
    seconds = clock(step, args.device, args.repeats)
    if args.profile:
        show_profile(step, f"{make.__name__}, {len(shapes)} matrices")
    rate = newton_schulz_flops(list(shapes.values())) / seconds
    extra = extra_memory(step, args.device)
    row = {"ms": 1e3 * seconds, "tflops": rate / 1e12, "extra_bytes": extra, "first_step_s": first}
    return row, updates


def errors(updates: list[Tensor], shapes: dict, device: str) -> dict:
    """RMS and largest error of a first step's updates, over the RMS of the exact ones."""
    total = apart = largest = 0.0
    for (name, p), update in zip(parameters(shapes, device).items(), updates, strict=True):
        factor = -LR * ADJUST_LR["original"](*shapes[name])
        exact = factor * newton_schulz_ref(p.grad, coefficients="quintic")
        error = update - exact
        total += exact.square().sum().item()
        apart += error.square().sum().item()
        largest = max(largest, error.abs().max().item())
    count = sum(shape.numel() for shape in shapes.values())
    return {"rms_error": (apart / total) ** 0.5, "max_error": largest / (total / count) ** 0.5}


def run(args) -> dict:
    """Every size: ours, the peer, and with --compile the peer compiled."""
    results = {"about": about(args, "muon"), "rows": []}
    makers = {"ours": (our_muon, False)}
    if hasattr(torch.optim, "Muon"):
        makers["torch.optim.Muon"] = (torch_muon, False)
        if args.compile:
            makers["torch.optim.Muon, compiled"] = (torch_muon, True)
    else:
        print(f"torch.optim.Muon: not in torch {torch.__version__} (2.9 has it), left out")
    for size in args.sizes:
        shapes = matrices(size)
        count = sum(shape.numel() for shape in shapes.values())
        for name, (make, compiled) in makers.items():
            row = {"size": size, "matrices": len(shapes), "parameters": count, "optimizer": name}
            found, updates = measure(make, shapes, args, compiled)
            row |= found | errors(updates, shapes, args.device)
            results["rows"].append(row)
            print(row, flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return results


def show(results: dict) -> None:
    """A row for each optimizer."""
    print(json.dumps(results["about"]))
    ours = {row["size"]: row["ms"] for row in results["rows"] if row["optimizer"] == "ours"}
    table = []
    for row in results["rows"]:
        line = {"size": row["size"], "matrices": row["matrices"], "optimizer": row["optimizer"]}
        line |= {"ms": f"{row['ms']:.2f}", "times ours": f"{row['ms'] / ours[row['size']]:.2f}"}
        line |= {"TFLOP/s": f"{row['tflops']:.1f}"}
        line |= {"extra MiB": f"{row['extra_bytes'] / 2**20:.0f}"}
        for name in ("rms", "max"):
            line[f"{name} error"] = f"{row[f'{name}_error']:.1e}"
        table.append(line)
    console_table("one step over a model's matrices", table)


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = ["124m", "1.5b"] if cuda else ["tiny"]
    parser.add_argument("--sizes", nargs="+", default=sizes, choices=SIZES)
    parser.add_argument("--warmup", type=int, default=3, help="steps not timed")
    parser.add_argument("--repeats", type=int, default=20, help="steps timed")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--compile", action="store_true", help="time the peer compiled, too")
    parser.add_argument("--profile", action="store_true", help="also show where the time goes")
    parser.add_argument("--json", default="", help="write the numbers here, row by row")
    parser.add_argument("--read", default="", help="show these numbers instead of measuring")
    args = parser.parse_args(argv)
    show(json.loads(Path(args.read).read_text()) if args.read else run(args))


if __name__ == "__main__":
    main()
