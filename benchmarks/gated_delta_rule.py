"""Chunked against naive gated delta rule, forward and backward: milliseconds and their ratio.

    python benchmarks/gated_delta_rule.py
    python benchmarks/gated_delta_rule.py --lengths 512,2048 --device cuda

The naive loop is timed in the same process, round by round in turn. At least 10x is expected of
the chunked form at T 2048 on a CPU; nothing is asserted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ops.gated_delta_rule import chunk_gated_delta_rule, naive_gated_delta_rule


def make_inputs(batch: int, length: int, heads: int, key: int, value: int, dtype, device):
    """q, k, v, g, beta as the mixer makes them."""
    torch.manual_seed(0)
    shape = (batch, length, heads)
    q, k = (F.normalize(torch.randn(*shape, key), dim=-1) for _ in "qk")
    v, beta = torch.randn(*shape, value), torch.rand(shape)
    g = -torch.rand(shape) * 0.3
    tensors = [x.to(device, dtype) for x in (q, k, v)] + [g.to(device), beta.to(device, dtype)]
    return [x.requires_grad_() for x in tensors]


def milliseconds(op, inputs) -> float:
    """One forward and backward."""
    cuda = inputs[0].is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    o, _ = op(*inputs)
    torch.autograd.grad(o.sum(), inputs)
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--lengths", default="256,2048", help="tokens per row, comma-separated")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key_dim", type=int, default=64)
    parser.add_argument("--value_dim", type=int, default=64)
    parser.add_argument("--chunk_sizes", default="64", help="comma-separated")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; the median is printed")
    args = parser.parse_args(argv)

    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {args.device}, {threads} threads, {args.dtype}")
    print(f"B {args.batch}, H {args.heads}, K {args.key_dim}, V {args.value_dim}; fwd + bwd")
    print(f"{'T':>6} {'chunk size':>10} {'naive ms':>10} {'chunk ms':>10} {'ratio':>7}")
    for length in map(int, args.lengths.split(",")):
        inputs = make_inputs(
            args.batch, length, args.heads, args.key_dim, args.value_dim,
            getattr(torch, args.dtype), args.device,
        )  # fmt: skip
        for size in map(int, args.chunk_sizes.split(",")):

            def chunk(*tensors, size=size):
                return chunk_gated_delta_rule(*tensors, chunk_size=size)

            times: dict = {naive_gated_delta_rule: [], chunk: []}
            milliseconds(chunk, inputs)  # the first call pays for allocations
            for _ in range(args.repeats):
                for op, taken in times.items():
                    taken.append(milliseconds(op, inputs))
            naive, chunked = (statistics.median(taken) for taken in times.values())
            ratio = naive / chunked
            print(f"{length:>6} {size:>10} {naive:>10.1f} {chunked:>10.1f} {ratio:>6.1f}x")


if __name__ == "__main__":
    main()
