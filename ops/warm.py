"""Compile Triton kernels in the background while a run starts.

    python -m ops.warm gated_delta_rule 9 64 64       # op, heads, key size, value size
    python -m ops.warm short_conv 576 4 0             # channels, taps, whether there is a bias

Triton compiles the 9 to 13 kernels of an op one after the other when they are first called: on an
H100 22 seconds for the gated delta rule, most of them in the first backward. `start` runs a tiny
forward and backward of every op in a process of its own, so that the run finds the code in Triton's
cache. It changes nothing but time: if it fails, the run compiles by itself.
Check: `pytest tests/ops/test_warm.py`.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from ops import short_conv
from ops.tuned import TunedConfigs, autotuners, use_tuned

ROOT = Path(__file__).resolve().parents[1]


def start(jobs: Iterable[tuple[str, int, int, int]]) -> list[subprocess.Popen]:
    """A process for each job, an op and its sizes as above; they end by themselves, or with this
    one."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = []
    for job in jobs:
        command = [sys.executable, "-m", "ops.warm", *map(str, job)]
        processes.append(subprocess.Popen(command, cwd=ROOT, **quiet))
        atexit.register(processes[-1].kill)
    return processes


def compile_op(op: str, heads: int, key_dim: int, value_dim: int, device: torch.device) -> None:
    """Forward and backward of packed documents without states, as training calls them."""
    from ops import fla_kernels
    from ops.fla_reference import LOW, op_of, random_inputs

    x, _ = random_inputs(op, 128, heads=heads, key_dim=key_dim, value_dim=value_dim, device=device)
    leaves = {}
    for name, t in x.items():
        if t is not None:
            low = name in LOW or name == "v"
            leaves[name] = t.to(torch.bfloat16 if low else torch.float32).requires_grad_()
    inputs = {name: leaves.get(name) for name in x}
    bounds = torch.tensor([0, 60, 128, 128], dtype=torch.int32, device=device)
    o, _ = getattr(fla_kernels, op_of(op))(
        *inputs.values(), scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=bounds
    )
    o.sum().backward()


def compile_short_conv(channels: int, taps: int, bias: int, device: torch.device) -> None:
    """Forward and backward of packed documents."""
    x = torch.zeros(1, 128, channels, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.zeros(channels, 1, taps, device=device, requires_grad=True)
    b = torch.zeros(channels, device=device, requires_grad=True) if bias else None
    positions = torch.arange(128, device=device)[None]
    short_conv.triton_short_conv(x, weight, b, positions).sum().backward()


def main(argv: list[str]) -> None:
    device = torch.device("cuda")
    if argv[0] == "short_conv":
        compile_short_conv(*map(int, argv[1:4]), device)
        return
    use_tuned(device)
    if not any(isinstance(a.cache, TunedConfigs) for a in autotuners().values()):
        return  # a search, which is to be the run's alone: it times
    compile_op(argv[0], *map(int, argv[1:4]), device)


if __name__ == "__main__":
    main(sys.argv[1:])
