"""Document bounds that the host knows, so that no kernel has to wait for the GPU to tell it.

Kernels over packed documents want tables of chunks, whose length depends on where documents end:
read from a tensor on the GPU, that would stop the host until all work before is done. Who moves
bounds to a GPU calls `remember`.

Check: `pytest tests/ops/test_bounds.py`.
Shapes: N documents.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

KEPT = 64  # the last so many, far more than the micro-batches in flight have, two each at most


@dataclass
class _Known:
    bounds: Tensor  # on the device; held, so that its address belongs to nothing else
    host: Tensor
    tables: dict[int, Tensor] = field(default_factory=dict)  # chunk size -> table


_known: OrderedDict[int, _Known] = OrderedDict()


def remember(bounds: Tensor, host: Tensor) -> None:
    """bounds [N + 1] on a device hold what `host` holds, and never change."""
    _known[bounds.data_ptr()] = _Known(bounds, host)
    _known.move_to_end(bounds.data_ptr())
    while len(_known) > KEPT:
        _known.popitem(last=False)


def chunk_table(host: Tensor, chunk: int) -> Tensor:
    """host [N + 1] -> [chunks, 2]: each chunk's document and its number there, in host's dtype."""
    counts = (host.diff() + chunk - 1) // chunk
    document = torch.repeat_interleave(counts)
    number = torch.arange(len(document)) - (counts.cumsum(0) - counts)[document]
    return torch.stack([document, number], 1).to(host.dtype)


def known_chunk_table(bounds: Tensor, chunk: int) -> Tensor | None:
    """`chunk_table` on the device of `bounds`, without a wait; None if they are not known."""
    known = _known.get(bounds.data_ptr())
    if known is None or known.bounds.shape != bounds.shape or known.bounds.device != bounds.device:
        return None
    if chunk not in known.tables:
        table = chunk_table(known.host, chunk)
        if bounds.is_cuda:
            table = table.pin_memory()
        known.tables[chunk] = table.to(bounds.device, non_blocking=True)
    return known.tables[chunk]
