"""A script with PyTorch's DistributedDataParallel in the place of gradient_sums.py.

    torchrun --nproc_per_node 2 benchmarks/torch_ddp.py train.py --parallel ddp ...
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gradient_sums
from distributed import World


class TorchSums:
    """`GradientSums` by DistributedDataParallel as it comes. It takes means, which `end` makes sums
    of again: for SmolLM2-135M a pass over 0.5 GB."""

    def __init__(self, params: Iterable[nn.Parameter], world: World):
        self.size, holder = world.size, nn.Module()
        for i, p in enumerate(params):
            holder.register_parameter(f"p{i}", p)
        ids = [world.device.index] if world.device.type == "cuda" else None
        self.ddp = nn.parallel.DistributedDataParallel(
            holder, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    def begin(self) -> None:
        self.ddp.reducer.prepare_for_backward([])

    def end(self) -> None:
        """The backward itself waited for the last mean."""
        torch._foreach_mul_([p.grad for p in self.ddp.parameters()], self.size)


if __name__ == "__main__":
    gradient_sums.GradientSums = TorchSums
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
