"""Sums of gradients over ranks that hold whole models (`--parallel ddp`), during the backward.

Check: `pytest tests/test_gradient_sums.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from distributed import World, broadcast


class GradientSums:
    """Sums the gradients of `params` over ranks while a backward still runs:

        sums.begin()
        loss.backward()
        sums.end()  # every .grad is the sum over ranks, laid out in the messages

    DistributedDataParallel launches a kernel for each parameter, which scales and copies it, and
    sends 25 MB at a time, each of which some matmul waits for (docs/performance.md#several-gpus).
    All ranks begin with rank 0's values.
    """

    MESSAGE = 128 * 2**20  # bytes, at most, but for a larger gradient
    ALIGNED = 128  # bytes

    def __init__(self, params: Iterable[nn.Parameter], world: World):
        params = list(params)
        broadcast([p.detach() for p in params], world)
        self.messages = self._messages(params)  # in the order in which they are sent
        self.missing: list[int] | None = None  # of each message, while they are collected
        self.sent: list[dist.Work | None] = []
        for i, message in enumerate(self.messages):
            for p in message:
                p.register_post_accumulate_grad_hook(functools.partial(self._arrived, i))

    def _messages(self, params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        """The last parameters get their gradients first; those of a message have one dtype."""
        found: list[list[nn.Parameter]] = []
        open_ones: dict[torch.dtype, tuple[list[nn.Parameter], int]] = {}
        for p in reversed(params):
            message, size = open_ones.get(p.dtype, (None, 0))
            if message is None or size + p.nbytes > self.MESSAGE:
                message, size = [], 0
                found.append(message)
            message.append(p)
            open_ones[p.dtype] = message, size + p.nbytes
        return found

    def begin(self) -> None:
        """The backward that comes is a step's last one."""
        self.missing = [len(message) for message in self.messages]

    def _arrived(self, message: int, _: nn.Parameter) -> None:
        if self.missing is None:
            return
        self.missing[message] -= 1
        while len(self.sent) < len(self.messages) and not self.missing[len(self.sent)]:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """The next message, in the same order on all ranks."""
        params = [p for p in self.messages[len(self.sent)] if p.grad is not None]
        if not params:
            self.sent.append(None)
            return
        unit = self.ALIGNED // params[0].element_size()
        sizes = [-(-p.numel() // unit) * unit for p in params]
        flat = torch.empty(sum(sizes), dtype=params[0].dtype, device=params[0].device)
        places = [x[: p.numel()].view_as(p) for x, p in zip(flat.split(sizes), params, strict=True)]
        torch._foreach_copy_(places, [p.grad for p in params])
        for p, place in zip(params, places, strict=True):
            p.grad = place
        self.sent.append(dist.all_reduce(flat, async_op=True))

    def end(self) -> None:
        """What the backward did not reach is sent too; then the device waits for all sums."""
        while len(self.sent) < len(self.messages):
            self._send()
        for work in self.sent:
            if work is not None:
                work.wait()
        self.missing, self.sent = None, []
