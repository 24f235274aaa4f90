"""Tensors in safetensors files: which rank writes which, their copies, and the bytes.

The files are those that torch.distributed.checkpoint writes and reads; its planner spreads them
over the ranks. The bytes are written here: its writer holds Python's lock while it serialises (a
second for 400 MB), which from a thread would stop training, and orders its metadata at random, so
that two files of the same tensors differ. Check: `pytest tests/test_async_save.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor

from config import UserError
from muon_shards import local

CHUNK_BYTES = 16 << 20  # hashed, read or written at once, without Python's lock
BLOCK_BYTES = 256 << 20  # of a Snapshot; torch rounds pinned memory up to powers of two
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass
class Piece:
    """What one rank writes of a tensor: all of it, or its shard, which begins at `offsets`."""

    name: str
    offsets: list[int]
    tensor: Tensor  # this rank's own, wherever it is
    copied: list[Tensor] | None = None  # its bytes in a Snapshot

    @property
    def size(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def chunks(self) -> Iterator[memoryview]:
        parts = self.copied
        if parts is None:
            parts = [as_bytes(self.tensor).cpu()]
        for part in parts:
            view = memoryview(part.numpy())
            for at in range(0, len(view), CHUNK_BYTES):
                yield view[at : at + CHUNK_BYTES]


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes [N] in row-major order; the same memory if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def local_plan(tensors: dict[str, Tensor], is_main: bool) -> dcp.SavePlan:
    """What this rank could write."""
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(tensors, is_coordinator=is_main)
    return planner.create_local_plan()


def own_files(
    tensors: dict[str, Tensor], plans: list[dcp.SavePlan], rank: int, max_bytes: int
) -> dict[str, list[Piece]]:
    """File name -> what rank `rank` writes to it, given all ranks' plans. No file has more than
    `max_bytes`, or else one tensor."""
    file_of, index, used = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if used and used + size > max_bytes:
            index, used = index + 1, 0
        file_of[name], used = index, used + size
    plans, _ = dcp.DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)
    files: dict[str, list[Piece]] = {}
    for item in plans[rank].items:
        name = item.index.fqn
        file = f"shard-{rank + 1:05d}-model-{file_of[name]:05d}-of-{index:05d}.safetensors"
        offsets = list(item.tensor_data.chunk.offsets)
        files.setdefault(file, []).append(Piece(name, offsets, local(tensors[name]).detach()))
    return files


def file_entry(path: Path) -> dict:
    """Size and xxh3_64 of a file, as `write_tensors` returns them."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return {"size": path.stat().st_size, "xxh3_64": digest.hexdigest()}


def write_tensors(path: Path, pieces: list[Piece]) -> dict:
    """Write one file and flush it to the disk; returns its size and xxh3_64. The same pieces give
    the same bytes. OSError with the path."""
    pieces = sorted(pieces, key=lambda p: (-p.tensor.element_size(), p.name))  # all are aligned
    where = {p.name: {"saved_offsets": p.offsets} for p in pieces}
    metadata = {"DCP_SHARDING_INFO": json.dumps(where), "DCP_VERSION": "1.0", "format": "pt"}
    header, end = {"__metadata__": metadata}, 0
    for p in pieces:
        begin, end = end, end + p.size
        entry = {"dtype": DTYPES[p.tensor.dtype], "shape": list(p.tensor.shape)}
        header[p.name] = {**entry, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_64()
    start = [len(text).to_bytes(8, "little"), text]
    try:
        with open(path, "wb") as file:
            for chunk in chain(start, *(p.chunks() for p in pieces)):
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # that of a write does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    return {"size": 8 + len(text) + end, "xxh3_64": digest.hexdigest()}


class Snapshot:
    """Copies of tensors in the host's memory, which is kept for the next ones. From CUDA they are
    made by a stream of their own: `protect` before what was copied is changed, and `wait` before
    the copies are read."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        self.blocks: list[Tensor] = []
        self.done: torch.cuda.Event | None = None
        self.sources: list[Tensor] = []

    def take(self, pieces: list[Piece]) -> None:
        """Fill in `copied`. UserError where there is no memory for it."""
        need = sum(p.size for p in pieces)
        try:
            while len(self.blocks) * BLOCK_BYTES < need:
                block = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=self.cuda)
                self.blocks.append(block)
        except RuntimeError as error:
            kind = "pinned memory" if self.cuda else "memory"
            raise UserError(
                f"--async_save: True found, but {need / 2**30:.1f} GiB of {kind} for a copy on "
                f"each rank expected: {str(error).splitlines()[0]}"
            ) from None
        # Held until they are copied: those that were not contiguous are in memory of their own.
        self.sources, at = [as_bytes(p.tensor) for p in pieces], 0
        if self.cuda:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream) if self.cuda else nullcontext():
            for piece, source in zip(pieces, self.sources, strict=True):
                piece.copied, taken = [], 0
                while taken < len(source):
                    block, begin = divmod(at, BLOCK_BYTES)
                    size = min(BLOCK_BYTES - begin, len(source) - taken)
                    into = self.blocks[block][begin : begin + size]
                    into.copy_(source[taken : taken + size], non_blocking=self.cuda)
                    piece.copied.append(into)
                    at, taken = at + size, taken + size
            if self.cuda:
                self.done = torch.cuda.Event()
                self.done.record()

    def protect(self) -> None:
        """What the device does from here on begins when the copies are made."""
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)

    def wait(self) -> None:
        """Until the copies are made; in any thread."""
        if self.done is not None:
            self.done.synchronize()
        self.sources = []
