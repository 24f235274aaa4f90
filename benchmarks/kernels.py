"""Kernels beside those of other libraries: the short convolution and mamba2's recurrence.

    python benchmarks/kernels.py --json kernels.json
    python benchmarks/kernels.py --device cpu --tokens 512 --channels 64 --heads 2 --repeats 2

The convolution of `--channels` with SiLU, in documents of 512 tokens: compiled PyTorch, our Triton
kernels, fla's. The recurrence with `--heads` heads of 64 and a state of 64, in documents of 1,024:
our chunks on a CPU, else fla's kernels and mamba-ssm's, with a group for every head and with one.
Milliseconds forward, and forward and backward. What is not installed is named and left out; fla's
convolution and mamba-ssm first search for their configurations, for a minute or more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import about, clock
from metrics import console_table
from ops.short_conv import plain_short_conv, triton_short_conv
from ops.ssd import KERNELS
from ops.tuned import use_tuned

SIZE = 64  # of a head, and of its state


def bounds(args, document: int) -> Tensor:
    """cu_seqlens of documents of one length."""
    starts = range(0, args.tokens, document)
    return torch.tensor([*starts, args.tokens], dtype=torch.int32, device=args.device)


def leaf(args, *shape: int, wide: bool = False) -> Tensor:
    """Random, bfloat16 on CUDA unless `wide`."""
    low = args.device == "cuda" and not wide
    dtype = torch.bfloat16 if low else torch.float32
    return torch.randn(shape, device=args.device, dtype=dtype).requires_grad_()


def short_convolutions(args) -> Iterator[tuple[str, Callable, list[Tensor]]]:
    """(name, forward, what it is differentiated by)."""
    x, weight = (
        leaf(args, 1, args.tokens, args.channels),
        leaf(args, args.channels, 1, 4, wide=True),
    )
    positions = (torch.arange(args.tokens, device=args.device) % 512)[None]
    plain = torch.compile(plain_short_conv) if args.device == "cuda" else plain_short_conv
    yield "short convolution, PyTorch", lambda: plain(x, weight, None, positions), [x, weight]
    if args.device != "cuda":
        return
    ours = lambda: triton_short_conv(x, weight, None, positions)  # noqa: E731
    yield "short convolution, ours", ours, [x, weight]
    if importlib.util.find_spec("fla") is None:
        print("left out: fla's short convolution; fla is not installed")
        return
    from fla.modules.causal_conv1d import causal_conv1d

    where = {"activation": "silu", "cu_seqlens": bounds(args, 512)}
    fla = lambda: causal_conv1d(x, weight[:, 0], None, **where)[0]  # noqa: E731
    yield "short convolution, fla", fla, [x, weight]


def recurrences(args) -> Iterator[tuple[str, Callable, list[Tensor]]]:
    """As `short_convolutions`."""
    names, cu_seqlens = ["fla", "mamba_ssm"], bounds(args, 1024)
    for name in [n for n in names if importlib.util.find_spec(n) is None]:
        print(f"left out: {name}'s recurrence; it is not installed")
        names.remove(name)
    for groups in (args.heads, 1):
        x = leaf(args, 1, args.tokens, args.heads, SIZE)
        b, c = (leaf(args, 1, args.tokens, groups, SIZE) for _ in range(2))
        dt = F.softplus(leaf(args, 1, args.tokens, args.heads, wide=True) - 2)
        dt = dt.detach().requires_grad_()
        a = (-torch.rand(args.heads, device=args.device)).requires_grad_()
        d = torch.ones(args.heads, device=args.device, requires_grad=True)
        inputs = [x, dt, a, b, c, d]
        for name in names if args.device == "cuda" else ["chunk"]:
            run = lambda n=name, i=inputs: KERNELS[n](*i, cu_seqlens=cu_seqlens)[0]  # noqa: E731
            yield f"recurrence, {groups} groups, {name}", run, inputs


def measure(args) -> dict:
    results = {"about": about(args, "kernels"), "rows": []}
    for cases in (short_convolutions, recurrences):
        for name, forward, leaves in cases(args):
            grad = torch.ones_like(forward())

            def both(forward=forward, leaves=leaves, grad=grad):
                torch.autograd.grad(forward(), leaves, grad)

            row = {"kernel": name}
            for what, work in (("forward_ms", torch.no_grad()(forward)), ("both_ms", both)):
                clock(work, args.device, 3)
                row[what] = 1e3 * clock(work, args.device, args.repeats)
            results["rows"].append(row)
            print(row, flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--channels", type=int, default=3072)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", default="", help="write the numbers here, row by row")
    args = parser.parse_args(argv)
    if args.device == "cuda":
        print(use_tuned(torch.device("cuda")))
    results = measure(args)
    print(json.dumps(results["about"]))
    console_table("milliseconds", [
        {"kernel": r["kernel"], "forward": f"{r['forward_ms']:.2f}",
         "and backward": f"{r['both_ms']:.2f}"} for r in results["rows"]
    ])  # fmt: skip


if __name__ == "__main__":
    main()
