"""What generation remembers: keys and values, or a linear layer's state and last inputs.

Check: `pytest tests/test_layers.py tests/test_generate.py`.
Shapes: B batch, T time, S keys, G key/value heads, D head size, W taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from layers import SeqInfo


class LayerCache:
    """What one layer remembers between calls: keys and values (a ring of `window` of them for
    sliding layers), or the last inputs of short convolutions and a recurrent state."""

    def __init__(self, capacity: int = 0, static: bool = False):
        self.capacity, self.static = capacity, static
        self.k: Tensor | None = None  # [B, G, capacity, D]; position p is in slot p % capacity
        self.v: Tensor | None = None
        self.conv: dict[str, Tensor] = {}  # name -> last inputs [B, W - 1, C]
        self.state: Tensor | tuple[Tensor, ...] | None = None  # [B, H, K, V] float32, or several

    def tensors(self) -> list[Tensor]:
        """Everything held."""
        state = self.state if isinstance(self.state, tuple) else (self.state,)
        return [t for t in (self.k, self.v, *state, *self.conv.values()) if t is not None]

    def apply(self, f: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor t by f(t)."""
        if self.k is not None:
            self.k, self.v = f(self.k), f(self.v)
        self.conv = {name: f(t) for name, t in self.conv.items()}
        state = self.state
        if state is not None:
            self.state = tuple(map(f, state)) if isinstance(state, tuple) else f(state)

    def store(self, conv: dict[str, Tensor], state: Tensor | tuple[Tensor, ...] | None) -> None:
        """Take over a linear layer's memory; into the same storage if `static` (CUDA graphs)."""
        if not self.static or self.state is None:
            self.conv, self.state = conv, state
            return
        for name, new in conv.items():
            self.conv[name].copy_(new)
        both = (state, self.state)
        olds = zip(*(x if isinstance(x, tuple) else (x,) for x in both), strict=True)
        for new, old in olds:
            if old is not None:
                old.copy_(new)

    def fill(self, k: Tensor, v: Tensor, seq: SeqInfo, window: int) -> None:
        """Start with a prompt's keys and values [B, T, G, D], or those of N packed prompts
        [1, T, G, D], which become N rows."""
        rows, device = k.shape[0], k.device
        where = seq.positions.expand(rows, -1)  # [B, T]
        row = torch.arange(rows, device=device)[:, None].expand_as(where)
        longest, ends = k.shape[1], where[:, -1:] + 1
        if seq.cu_seqlens is not None:
            rows, longest = len(seq.cu_seqlens) - 1, seq.max_seqlen
            time = torch.arange(k.shape[1], device=device)
            row = torch.searchsorted(seq.cu_seqlens[1:].contiguous(), time, right=True)[None]
            ends = seq.cu_seqlens.diff()[row]
        size = window or max(64, self.capacity, 1 << (longest - 1).bit_length())
        keep = where >= ends - window if window else torch.ones_like(where, dtype=torch.bool)
        row, slot = row[keep], where[keep] % size
        for name, new in (("k", k), ("v", v)):
            buffer = new.new_zeros(rows, new.shape[2], size, new.shape[3])
            buffer[row, :, slot] = new[keep]
            setattr(self, name, buffer)

    def append(self, k: Tensor, v: Tensor, seq: SeqInfo, window: int):
        """Add [B, T, G, D] to what is held. Returns the keys and values [B, S, G, D] to attend to
        and who may see whom, [B, T, S] bool, or None where every query sees every key."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, G, T, D]
        new = k.shape[2]
        row = torch.arange(k.shape[0], device=k.device)[:, None]
        past, where = seq.past[:, None], seq.positions  # [B, 1], [B, T]
        if not window:
            if not self.static:
                self._reserve(seq.held + new)
            for buffer, fresh in ((self.k, k), (self.v, v)):
                buffer[row, :, where] = fresh.transpose(1, 2)
            end = self.k.shape[2] if self.static else seq.held + new
            keys, values = self.k[:, :, :end], self.v[:, :, :end]
            at = torch.arange(end, device=k.device)[None]
        else:
            slots = torch.arange(window, device=k.device)[None]
            at = past - 1 - (past - 1 - slots) % window  # newest position in each slot, < 0: none
            keys, values = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
            at = torch.cat([at, where], 1)
            last = where[:, -window:]
            for buffer, fresh in ((self.k, k), (self.v, v)):
                buffer[row, :, last % window] = fresh[:, :, -window:].transpose(1, 2)
        mask = (at[:, None] >= 0) & (at[:, None] <= where[..., None])
        if window:
            mask &= at[:, None] > where[..., None] - window
        elif new == 1 and seq.even and not self.static:
            mask = None
        return keys.transpose(1, 2), values.transpose(1, 2), mask

    def _reserve(self, needed: int) -> None:
        more = (1 << (needed - 1).bit_length()) - self.k.shape[2]
        if needed > self.k.shape[2]:
            self.k, self.v = F.pad(self.k, (0, 0, 0, more)), F.pad(self.v, (0, 0, 0, more))


class Cache:
    """What a model remembers of B sequences, which may differ in length: one LayerCache a block.

    capacity: room for so many tokens at once (softmax layers; grows as needed). static: tensors
    are updated in place and keep their shapes, as a CUDA graph needs; capacity is then the limit.
    """

    def __init__(self, num_layers: int, capacity: int = 0, static: bool = False):
        self.layers = [LayerCache(capacity, static) for _ in range(num_layers)]
        self.capacity, self.static = capacity, static
        self.lengths: Tensor | None = None  # [B] int64, tokens seen
        self.longest, self.even = 0, True  # an upper bound of them; whether they are all equal

    def __getitem__(self, layer: int) -> LayerCache:
        return self.layers[layer]

    def advance(self, batch: int, length: int, cu_seqlens: Tensor | None, device) -> None:
        """Count what a forward added."""
        if self.lengths is not None:
            self.lengths += length
            self.longest += length
        elif cu_seqlens is None:
            self.lengths = torch.full((batch,), length, device=device)
            self.longest = length
        else:
            self.lengths = cu_seqlens.diff().long()
            self.longest = int(self.lengths.max())
            self.even = bool((self.lengths == self.longest).all())
        room = self.capacity if self.static else self.longest
        assert self.longest <= room, f"{self.longest} tokens in a static cache of {room}"

    def repeat(self, times: int) -> None:
        """Each sequence becomes `times` copies of it (several continuations of one prompt)."""
        for layer in self.layers:
            layer.apply(lambda t: t.repeat_interleave(times, 0))
        self.lengths = self.lengths.repeat_interleave(times)

    def num_bytes(self, up_to: int = 0) -> int:
        """Bytes held; with `up_to` only so many slots of keys and values are counted, not the room
        for more."""
        total = 0
        for layer in self.layers:
            for t in layer.tensors():
                size = t.numel() * t.element_size()
                if up_to and (t is layer.k or t is layer.v):
                    size = size * min(up_to, t.shape[2]) // t.shape[2]
                total += size
        return total
