"""Muon on matrices whose rows FSDP2 has cut over ranks: whole ones are put together where they are
orthogonalised, and nowhere else.

    pytest tests/test_fsdp.py

Momentum is kept in pieces. In a round every rank has at most one stack of its own; all pieces of
its directions come to it, it runs Newton-Schulz on the whole stack, and the pieces of the update go
back: two exchanges of a matrix's size in the dtype of Newton-Schulz.

Shapes: N matrices of a stack, R rows, C columns, of which this rank has r rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """The ranks that a matrix is cut over, and this one's place among them."""

    group: dist.ProcessGroup
    rank: int
    size: int

    def rows(self, total: int) -> list[int]:
        """How many of `total` rows each rank has: ceil(total / ranks), while there are any left."""
        chunk = -(-total // self.size)
        return [max(0, min(chunk, total - chunk * r)) for r in range(self.size)]


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP2 has cut it. Importing DTensor to ask isinstance would cost a second."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This rank's piece, or the whole of what is not cut; the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def cut_of(tensor: Tensor) -> Cut:
    """How FSDP2 has cut a matrix: along its rows over one dimension of its mesh."""
    mesh, cuts = tensor.device_mesh, [i for i, p in enumerate(tensor.placements) if p.is_shard(0)]
    assert len(cuts) == 1, tensor.placements
    (dim,) = cuts
    return Cut(mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim))


class Exchange:
    """One round: shapes[owner] is the [N, R, C] of the stack that rank `owner` orthogonalises."""

    def __init__(self, cut: Cut, shapes: dict[int, Sequence[int]], like: Tensor):
        self.cut, self.shapes, self.like = cut, shapes, like
        self.mine = shapes.get(cut.rank)  # None: nothing to do in this round but to send

    def _sizes(self) -> tuple[list[int], list[int]]:
        """Elements of this rank's piece of each owner's stack, and of each rank's piece of its own
        stack."""
        pieces = [0] * self.cut.size
        for owner, (n, rows, columns) in self.shapes.items():
            pieces[owner] = n * self.cut.rows(rows)[self.cut.rank] * columns
        whole = [0] * self.cut.size
        if self.mine:
            n, rows, columns = self.mine
            whole = [n * r * columns for r in self.cut.rows(rows)]
        return pieces, whole

    def _send(self, flat: Tensor, give: list[int], take: list[int]) -> Tensor:
        out = self.like.new_empty(sum(take))
        size = self.like.element_size()
        dist.all_to_all_single(  # as bytes: gloo has not always known bfloat16
            out.view(torch.uint8), flat.view(torch.uint8), [n * size for n in take],
            [n * size for n in give], group=self.cut.group,
        )  # fmt: skip
        return out

    def to_owners(self, pieces: dict[int, Tensor]) -> Tensor | None:
        """pieces[owner]: this rank's [N, r, C] of that stack. Returns its own stack [N, R, C]."""
        give, take = self._sizes()
        found = self._send(torch.cat([pieces[o].flatten() for o in sorted(pieces)]), give, take)
        if not self.mine:
            return None
        n, rows, columns = self.mine
        parts = found.split(take)
        parts = [p.view(n, r, columns) for p, r in zip(parts, self.cut.rows(rows), strict=True)]
        return torch.cat(parts, 1)

    def to_ranks(self, whole: Tensor | None) -> dict[int, Tensor]:
        """The reverse: this rank's piece [N, r, C] of every owner's stack."""
        take, give = self._sizes()
        flat = self.like.new_empty(0)
        if whole is not None:
            flat = torch.cat([p.flatten() for p in whole.split(self.cut.rows(self.mine[1]), 1)])
        found = self._send(flat, give, take).split(take)
        pieces = {}
        for owner, (n, rows, columns) in self.shapes.items():
            pieces[owner] = found[owner].view(n, self.cut.rows(rows)[self.cut.rank], columns)
        return pieces


def total_norms(norms: list[Tensor], cut: Cut) -> list[Tensor]:
    """The norms [N] of whole matrices from those of this rank's pieces, in one message."""
    flat = torch.cat([n.square() for n in norms])
    dist.all_reduce(flat, group=cut.group)
    return list(flat.sqrt().split([len(n) for n in norms]))
