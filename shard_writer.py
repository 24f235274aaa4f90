"""Writes token shards: `ShardWriter` makes one split of a data set folder (docs/data.md).

python -m pytest tests/test_shards.py
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import xxhash

from config import UserError
from shards import (
    HEADER,
    HEADER_BYTES,
    HEADER_HASH,
    MAGIC,
    SCAN_BYTES,
    VERSION,
    load_meta,
    sidecar_of,
)

NPY_HEADER_BYTES = 128  # numpy leaves room for any number of document ends


def pack_documents(documents, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, ends): lists of ids as one array of the shards' dtype, `tokenizer.starts` before
    each document and an eos after it, and the exclusive int64 ends. An empty document is left out;
    a foreign id is a ValueError."""
    documents = [document for document in documents if len(document)]
    starts = tokenizer.starts
    ends = np.cumsum([len(starts) + len(document) + 1 for document in documents], dtype="<i8")
    tokens = np.full(ends[-1] if documents else 0, tokenizer.eos_token_id, dtype=np.int64)
    for ids, end in zip(documents, ends.tolist(), strict=True):
        begin = end - 1 - len(ids)
        tokens[begin - len(starts) : begin] = starts
        tokens[begin : end - 1] = ids
    if documents and (tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size):
        raise ValueError(f"token ids outside 0..{tokenizer.vocab_size - 1} in a document")
    return tokens.astype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"), ends


class ShardWriter:
    """Writes one split of a data set: `add` each document's ids, then `close`.

    Every document gets `tokenizer.starts` before it and `tokenizer.eos_token_id` after it, and
    stays in one shard. A shard appears
    under its name only when complete (temporary file, fsync, rename), and `meta.json`, without
    which no data set opens, comes last. As a context manager, an exception discards the split.
    `resume` is what `save_state` gave: what was added later is dropped, whether its shard was
    finished or not, and must be added again. Raises `UserError` if the folder has this split
    already, unless `overwrite`, or if its other splits were written with another tokenizer.
    """

    def __init__(
        self,
        folder,
        split: str,
        tokenizer,
        *,
        shard_tokens: int = 100_000_000,
        overwrite: bool = False,
        source: str = "",
        resume: dict | None = None,
    ):
        assert re.fullmatch(r"[a-z][a-z0-9_]*", split), split
        self.folder, self.split = Path(folder), split
        self.tokenizer, self.shard_tokens, self.source = tokenizer, shard_tokens, source
        self.num_tokens = self.num_documents = 0
        self._shards: list[str] = []
        self._file = None
        if resume is not None:
            self._go_back(resume)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        meta = self._read_meta()
        old = sorted(self.folder.glob(f"{split}-*.bin"))
        if (old or split in meta["splits"]) and not overwrite:
            raise UserError(
                f"{self.folder} already holds a {split!r} split; choose another folder, or ask to"
                " overwrite it"
            )
        if meta["splits"].pop(split, None) is not None:
            # First make the split invisible, so that no reader sees half old and half new shards.
            write_file(self.folder / "meta.json", json.dumps(meta, indent=1).encode())
        for path in old:
            _remove_shard(path)

    def _read_meta(self) -> dict:
        t = self.tokenizer
        meta = {
            "format": "retort-shards",
            "version": VERSION,
            "source": self.source,
            # An absolute path would mean nothing on another machine, and tell about this one.
            "tokenizer": {"name": t.name, "spec": t.portable_spec, "hash": t.hash},
            "vocab_size": t.vocab_size,
            "eos_token_id": t.eos_token_id,
            "bos_token_id": t.bos_token_id,
            "splits": {},
        }
        path = self.folder / "meta.json"
        if path.exists():
            old = load_meta(path)
            found = (old["tokenizer"]["hash"], old["vocab_size"], old["eos_token_id"])
            if old["splits"].keys() - {self.split}:
                if found != (t.hash, t.vocab_size, t.eos_token_id):
                    raise UserError(
                        f"{path}: written with tokenizer {old['tokenizer']['name']!r}"
                        f" (hash, vocab, eos {found}), expected {t.name!r}"
                    )
                meta["source"] = self.source or old["source"]
            meta["splits"] = old["splits"]
        return meta

    def add(self, ids) -> None:
        """One document's token ids. An empty document is left out."""
        self.add_packed(*pack_documents([ids], self.tokenizer))

    def add_packed(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Documents as `pack_documents` gives them."""
        done = first = 0
        while first < len(ends):
            room = self.shard_tokens - (self._count if self._file else 0)
            last = int(np.searchsorted(ends, done + room, side="right"))
            if last <= first and self._file:
                self._finish_shard()
                continue
            last = max(last, first + 1)  # a document larger than a shard has one of its own
            self._append(tokens[done : ends[last - 1]], ends[first:last] - done)
            done, first = int(ends[last - 1]), last

    def _append(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        if self._file is None:
            self._open("wb")
            # Real headers take the place of these at the end.
            self._file.write(bytes(HEADER_BYTES))
            self._ends_file.write(bytes(NPY_HEADER_BYTES))
        payload, ends = tokens.tobytes(), (ends + self._count).tobytes()
        self._file.write(payload)
        self._hash.update(payload)
        self._ends_file.write(ends)
        self._ends_hash.update(ends)
        self._count += len(tokens)
        self._documents += len(ends) // 8
        self.num_tokens += len(tokens)
        self.num_documents += len(ends) // 8

    def _open(self, mode: str) -> None:
        self._path = self.folder / _shard_name(self.split, len(self._shards))
        self._file = open(_tmp(self._path), mode)  # noqa: SIM115 (until the shard is full)
        self._ends_file = open(_tmp(sidecar_of(self._path)), mode)  # noqa: SIM115
        self._hash, self._ends_hash = xxhash.xxh3_64(), xxhash.xxh3_64()
        self._count = self._documents = 0

    def _finish_shard(self) -> None:
        t = self.tokenizer
        head = HEADER.pack(
            *(MAGIC, VERSION, self._count, 2 if t.vocab_size <= 1 << 16 else 4, t.vocab_size),
            *(-1 if t.bos_token_id is None else t.bos_token_id, t.eos_token_id),
            *(bytes.fromhex(t.hash), self._hash.intdigest(), self._documents),
            self._ends_hash.intdigest(),
        )
        self._file.seek(0)
        self._file.write(head + HEADER_HASH.pack(xxhash.xxh3_64_intdigest(head)))
        self._ends_file.seek(0)
        self._ends_file.write(_npy_header(self._documents))
        self._flush()
        self._file.close()
        self._ends_file.close()
        self._file = None
        os.replace(_tmp(sidecar_of(self._path)), sidecar_of(self._path))
        os.replace(_tmp(self._path), self._path)
        self._shards.append(self._path.name)

    def _flush(self) -> None:
        for file in (self._file, self._ends_file):
            file.flush()
            os.fsync(file.fileno())

    def save_state(self) -> dict:
        """Where this split stands, for `resume`; everything added so far is on the disk then."""
        if self._file:
            self._flush()
        return {
            "shards": len(self._shards),
            "tokens": self.num_tokens,
            "documents": self.num_documents,
            "open_tokens": self._count if self._file else 0,
            "open_documents": self._documents if self._file else 0,
        }

    def _go_back(self, state: dict) -> None:
        done, count = state["shards"], state["open_documents"]
        self._shards = [_shard_name(self.split, i) for i in range(done)]
        for name in self._shards:
            for path in (self.folder / name, sidecar_of(self.folder / name)):
                if not path.is_file():
                    raise UserError(f"{path}: missing; remove {self.folder} to start over")
        if count:
            bin_path = self.folder / _shard_name(self.split, done)
            for path in (bin_path, sidecar_of(bin_path)):
                if path.exists():  # it was finished after the state was saved
                    os.replace(path, _tmp(path))
            self._open("r+b")
            itemsize = 2 if self.tokenizer.vocab_size <= 1 << 16 else 4
            self._count, self._documents = state["open_tokens"], count
            _cut(self._file, HEADER_BYTES, itemsize * self._count, self._hash)
            _cut(self._ends_file, NPY_HEADER_BYTES, 8 * count, self._ends_hash)
        self.num_tokens, self.num_documents = state["tokens"], state["documents"]

    def close(self) -> None:
        """Finishes the last shard and enters the split in meta.json."""
        if self._file:
            self._finish_shard()
        meta = self._read_meta()
        meta["splits"][self.split] = {
            "shards": self._shards,
            "tokens": self.num_tokens,
            "documents": self.num_documents,
        }
        write_file(self.folder / "meta.json", json.dumps(meta, indent=1).encode())

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def abandon(self) -> None:
        """Leaves the unfinished shard as it is, for `resume`."""
        for file in (self._file, self._ends_file) if self._file else ():
            with contextlib.suppress(OSError):  # what ended us: a full disk
                file.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()
            return
        if self._file:
            self.abandon()
            _tmp(self._path).unlink()
            _tmp(sidecar_of(self._path)).unlink()
        for name in self._shards:
            _remove_shard(self.folder / name)


def _shard_name(split: str, i: int) -> str:
    return f"{split}-{i:05d}.bin"


def _tmp(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _remove_shard(path: Path) -> None:
    path.unlink()
    sidecar_of(path).unlink(missing_ok=True)


def _npy_header(count: int) -> bytes:
    """What `np.save` puts before `count` int64."""
    file = io.BytesIO()
    fields = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, fields)
    assert file.tell() == NPY_HEADER_BYTES
    return file.getvalue()


def _cut(file, start: int, size: int, hasher) -> None:
    """Cuts an unfinished file after `size` bytes of content, which `hasher` reads."""
    if os.fstat(file.fileno()).st_size < start + size:
        raise UserError(f"{file.name}: shorter than the {start + size} bytes that were written")
    file.truncate(start + size)
    file.seek(start)
    while chunk := file.read(SCAN_BYTES):
        hasher.update(chunk)


def write_file(path: Path, payload: bytes) -> None:
    """The file whole or not at all."""
    with open(_tmp(path), "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    os.replace(_tmp(path), path)
