"""Files of block-wise distillation (cria.py): checksummed tensors, and saved inputs row by row.

    NAME.safetensors   tensors
    NAME.json          their file's size and xxh3_64, and what else is known; written last

A file without its .json was never finished. Inputs are a folder of parts, part-00000 and so on, of
one tensor `hidden` [R, T, d] each; the .json names their rows. Check: `pytest tests/test_cria.py`.

Shapes: R rows of a part, T tokens per row, d hidden size.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from config import UserError
from data import Batch
from hf import DTYPES
from shard_writer import write_file
from tensor_files import Piece, as_bytes, file_entry, write_tensors

PART_BYTES = 64 << 20
WRITERS = 8  # threads: what one hashes and writes is far below what a disk or a GPU does


# ---- checksummed tensors


def write_tensor_file(path: Path, tensors: dict[str, Tensor], **about) -> None:
    """path.safetensors and its .json, whole or not at all. about: what else the .json tells."""
    pieces = [Piece(name, [0] * t.dim(), t.detach()) for name, t in tensors.items()]
    write_pieces(path, pieces, about)


def write_pieces(path: Path, pieces: list[Piece], about: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp, final = path.with_suffix(".tmp"), path.with_suffix(".safetensors")
    entry = write_tensors(tmp, pieces)
    path.with_suffix(".json").unlink(missing_ok=True)  # of an older file
    os.replace(tmp, final)
    write_file(path.with_suffix(".json"), sealed({**entry, **about}))


def sealed(content: dict) -> bytes:
    """JSON with its own checksum."""
    text = json.dumps(content, sort_keys=True)
    return json.dumps({"self": xxhash.xxh3_64_hexdigest(text.encode()), **content}).encode() + b"\n"


def unsealed(path: Path) -> dict:
    """The content of `sealed`; UserError naming the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a step of --cria before this one writes it")
    try:
        content = json.loads(path.read_bytes())
        whole = sealed({k: v for k, v in content.items() if k != "self"}) == path.read_bytes()
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: damaged, its checksum is not that of its content")
    return {k: v for k, v in content.items() if k != "self"}


def check_size(path: Path) -> dict:
    """What the .json of path.safetensors says; UserError if that is missing or not as long."""
    about, file = unsealed(path.with_suffix(".json")), path.with_suffix(".safetensors")
    if not file.is_file():
        raise UserError(f"{file}: missing, {about['size']:,} bytes expected")
    if file.stat().st_size != about["size"]:
        found = file.stat().st_size
        raise UserError(f"{file}: {found:,} bytes found, {about['size']:,} expected")
    return about


def check_content(path: Path, about: dict) -> Path:
    """UserError if path.safetensors does not have the checksum that its .json says."""
    file = path.with_suffix(".safetensors")
    found = file_entry(file)["xxh3_64"]
    if found != about["xxh3_64"]:
        raise UserError(f"{file}: damaged, checksum {found} found, {about['xxh3_64']} expected")
    return file


def read_tensor_file(path: Path) -> dict[str, Tensor]:
    """What `write_tensor_file` wrote, checked; on the CPU."""
    return load_file(check_content(path, check_size(path)))


def is_finished(path: Path) -> bool:
    """Whether the file was written to its end, and still has its size."""
    if not path.with_suffix(".json").is_file():
        return False
    check_size(path)
    return True


# ---- inputs, row by row


def part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}"


class RowWriter:
    """Appends rows [T, d] to a folder; goes on behind the parts that are there. `add` what comes
    at a position of the whole sequence: what is there already is left out. put: what calls the
    writing of a part, at once or later; parts may then be finished in any order, and one behind a
    gap is written again."""

    def __init__(self, folder: Path, total: int, put: Callable[[Callable], None] = lambda f: f()):
        self.folder, self.total, self.put = folder, total, put
        self.parts = self.done = 0  # on disk, or on the way
        while part_path(folder, self.parts).with_suffix(".json").is_file():
            self.done += len(check_size(part_path(folder, self.parts))["rows"])
            self.parts += 1
        for path in folder.glob("part-*.json"):
            if path.stem > part_path(folder, self.parts).stem:
                path.unlink()
        self.rows: list[int] = []
        self.held: list[Tensor] = []

    def add(
        self, at: int, rows: list[int], hidden: Tensor, ready: Callable[[], None] | None = None
    ) -> None:
        """hidden [R, T, d] on the CPU, of the rows at positions at .. at + R; what is in it counts
        when `ready` has returned."""
        skip = self.done + len(self.rows) - at
        assert skip >= 0, (at, self.done)
        if skip < len(rows):
            self.rows += rows[skip:]
            self.held.append(hidden[skip:])
        size = hidden[0].numel() * hidden.element_size() * len(self.rows)
        if self.rows and (size >= PART_BYTES or self.done + len(self.rows) == self.total):
            path = part_path(self.folder, self.parts)
            self.put(partial(write_rows, path, self.rows, self.held, ready))
            self.parts, self.done = self.parts + 1, self.done + len(self.rows)
            self.rows, self.held = [], []


def write_rows(
    path: Path, rows: list[int], held: list[Tensor], ready: Callable[[], None] | None
) -> None:
    """One part, of tensors [R, T, d] one after the other."""
    if ready is not None:
        ready()
    shape, dtype = held[0].shape[1:], held[0].dtype
    whole = torch.empty(len(rows), *shape, dtype=dtype, device="meta")
    piece = Piece("hidden", [0, 0, 0], whole, [as_bytes(t) for t in held])
    write_pieces(path, [piece], {"rows": rows, "shape": list(shape), "dtype": str(dtype)[6:]})


class Background:
    """Calls in threads, never more than there are threads; their error is raised by a later `put`,
    or at the end."""

    def __init__(self, threads: int = WRITERS):
        self.threads, self.calls = threads, deque()

    def __enter__(self) -> Background:
        self.pool = ThreadPoolExecutor(self.threads)
        return self

    def put(self, call: Callable[[], None]) -> None:
        while self.calls and (len(self.calls) >= self.threads or self.calls[0].done()):
            self.calls.popleft().result()
        self.calls.append(self.pool.submit(call))

    def __exit__(self, kind, *_) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
        for call in self.calls if kind is None else ():
            call.result()


class SavedRows:
    """Reads what RowWriter wrote, by row number. Sizes are checked at once, the checksum of a part
    before the first of its rows is used. Memory is that of the rows asked for; pin: page-locked,
    so that a copy to the GPU need not copy them first."""

    def __init__(self, folder: Path, pin: bool = False):
        self.folder, self.pin, self.about = folder, pin, []
        self.where: dict[int, tuple[int, int]] = {}
        while part_path(folder, len(self.about)).with_suffix(".json").is_file():
            about = check_size(part_path(folder, len(self.about)))
            for slot, row in enumerate(about["rows"]):
                self.where.setdefault(row, (len(self.about), slot))
            self.about.append(about)
        self.start: dict[int, int] = {}  # of the checked parts, where the first row begins

    def require(self, rows: list[int]) -> None:
        """UserError if some row is not there."""
        lacking = set(rows) - self.where.keys()
        if lacking:
            raise UserError(
                f"{self.folder}: {len(lacking):,} of {len(set(rows)):,} rows are missing, row "
                f"{min(lacking)} among them; --cria_step collect writes them"
            )

    def _open(self, part: int) -> Path:
        path, about = part_path(self.folder, part), self.about[part]
        file = path.with_suffix(".safetensors")
        if part not in self.start:
            check_content(path, about)
            with open(file, "rb") as f:
                self.start[part] = 8 + int.from_bytes(f.read(8), "little")
        return file

    def read(self, rows: list[int]) -> Tensor:
        """[R, T, d]"""
        self.require(rows)
        about = self.about[self.where[rows[0]][0]]
        out = torch.empty(
            len(rows), *about["shape"], dtype=DTYPES[about["dtype"]], pin_memory=self.pin
        )
        size = math.prod(about["shape"]) * out.element_size()
        into = out.view(torch.uint8).view(len(rows), -1).numpy()
        for row, target in zip(rows, into, strict=True):
            part, slot = self.where[row]
            read_into(self._open(part), self.start[part] + slot * size, target)
        return out

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its rows, for a loader's `attach`."""
        hidden = self.read(batch.sample_ids)
        return replace(batch, hidden=hidden.view(*batch.input_ids.shape, hidden.shape[-1]))


def read_into(path: Path, offset: int, target: np.ndarray) -> None:
    """Fill `target` (bytes) from there on."""
    with open(path, "rb", buffering=0) as f:
        f.seek(offset)
        view, got = memoryview(target), 0
        while got < len(view):
            count = f.readinto(view[got:])
            if not count:
                raise UserError(f"{path}: ends at byte {offset + got:,}, more expected")
            got += count
