"""Token shards on disk: `TokenDataset` reads a data set folder that `ShardWriter` made.

    python -m pytest tests/test_shards.py

A data set is a folder: `train-00000.bin` ... `val-00000.bin` ..., beside each shard a sidecar of
document ends, and `meta.json`, written last. The format is described in docs/data.md. Nothing
here imports torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from config import UserError
from packing import Rows

MAGIC = int.from_bytes(b"RTRT", "little")
VERSION = 1
HEADER_BYTES = 1024
# magic, version, tokens, bytes per token, vocab, bos, eos, tokenizer hash, payload hash,
# documents, sidecar hash; then the hash of these 64 bytes, and zeros up to HEADER_BYTES.
HEADER = struct.Struct("<iiqiiii8sQqQ")
HEADER_HASH = struct.Struct("<Q")

GPT2_MAGIC, GPT2_VERSION, GPT2_EOT = 20240520, 1, 50256
LLAMA3_MAGIC = 20240801  # llm.c's other format: uint32, Llama-3's tokens
SCAN_BYTES = 1 << 25
MAX_OPEN = 128  # files a data set keeps open, far below the 1,024 that a process may


class TokenDataset:
    """One split as a single run of tokens over all its shards, read from the page cache as they
    are asked for. See `open`.

    name             folder and split, for messages
    num_tokens       over all shards
    vocab_size       of the writer's tokenizer; every id is below it
    tokenizer_hash   `Tokenizer.hash` of the writer, or None
    eos              id that ends each document
    doc_ends         int64 [documents], exclusive end of each document, increasing
    fingerprint      32 hex digits over the content hashes of all shards, in order

    To a loader it is a `mixture.Mixture` of itself alone, its documents concatenated.
    """

    weights, packing = (1,), "concatenate"
    attach = None  # what a loader does with every batch: see mixture.Mixture

    def __init__(
        self,
        name,
        shards,
        *,
        doc_ends,
        digests,
        vocab_size,
        eos,
        bos,
        tokenizer_hash,
    ):
        self.name = name
        self._shards = shards
        self._reader = functools.lru_cache(MAX_OPEN)(lambda shard: _Reader(shards[shard]))
        self._starts = np.cumsum([0] + [len(shard) for shard in shards])
        self.num_tokens = int(self._starts[-1])
        self.doc_ends = doc_ends
        self.vocab_size, self.eos, self.bos = vocab_size, eos, bos
        self.tokenizer_hash = tokenizer_hash
        self.fingerprint = hashlib.blake2b(json.dumps(digests).encode(), digest_size=16).hexdigest()
        self.parts = [self]

    @classmethod
    def open(cls, spec: str | os.PathLike, split: str, *, verify: bool = False) -> TokenDataset:
        """Opens a data set folder, or `nanogpt:FOLDER_OR_FILE` (GPT-2 tokens, read-only).

        Checks every header and file size; `verify` also reads all tokens against their checksum.
        Raises `UserError` naming the file that is missing, damaged or does not belong.
        """
        spec = os.fspath(spec)
        if spec.startswith("nanogpt:"):
            return _open_nanogpt(cls, spec, split)
        return _open_shards(cls, Path(spec), split, verify)

    def read(self, start: int, n: int) -> np.ndarray:
        """Tokens start .. start + n as int64 [n], across shard borders."""
        out = np.empty(n, dtype=np.int64)
        self.read_into(out, start)
        return out

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill out [n] with the tokens start .. start + n."""
        n = len(out)
        assert start >= 0 and start + n <= self.num_tokens, (start, n, self.num_tokens)
        shard = int(self._starts.searchsorted(start, side="right")) - 1
        done = 0
        while done < n:
            offset, data = start + done - int(self._starts[shard]), self._shards[shard]
            piece = out[done : done + len(data) - offset]
            piece[:] = self._reader(shard)(offset, len(piece))
            if piece.size and piece.max() >= self.vocab_size:
                raise UserError(
                    f"{data.path}: token {piece.max()} among those from {offset} on, ids below"
                    f" {self.vocab_size} expected; the file is damaged"
                )
            done += len(piece)
            shard += 1

    def rows(self, seq_len: int) -> Rows:
        """Its rows of seq_len inputs; see packing.py."""
        return Rows(self.parts, seq_len, self.packing)

    def num_rows(self, seq_len: int) -> int:
        """Whole rows of seq_len inputs, each with its next token as the last target."""
        return max(0, (self.num_tokens - 1) // seq_len)

    def check_tokenizer(self, tokenizer) -> None:
        """Raises `UserError` unless this data was, or can have been, written with `tokenizer`."""
        expected = f"tokenizer {tokenizer.name!r}"
        if self.tokenizer_hash not in (None, tokenizer.hash):
            raise UserError(
                f"--data {self.name}: written with tokenizer hash {self.tokenizer_hash},"
                f" expected {tokenizer.hash} ({expected})"
            )
        if self.eos != tokenizer.eos_token_id:
            raise UserError(
                f"--data {self.name}: documents end with token {self.eos}, expected"
                f" {tokenizer.eos_token_id} ({expected})"
            )
        if self.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"--data {self.name}: tokens of a vocabulary of {self.vocab_size}, expected"
                f" {tokenizer.vocab_size} ({expected})"
            )


class _Shard:
    """The tokens of one file: `tokens` little-endian integers of `itemsize` bytes after `offset`.

    They are read, not memory-mapped: where a mapped file is cut off, or its disk fails, the
    process that touches it ends with SIGBUS and without a word.
    """

    def __init__(self, path: Path, offset: int, tokens: int, itemsize: int):
        self.path, self.offset, self.tokens = path, offset, tokens
        self.dtype = np.dtype(f"<u{itemsize}")

    def __len__(self) -> int:
        return self.tokens

    def parts(self) -> Iterator[np.ndarray]:
        """Consecutive pieces small enough to hash and scan without holding a whole shard."""
        read, step = _Reader(self), SCAN_BYTES // self.dtype.itemsize
        return (read(i, min(step, len(self) - i)) for i in range(0, len(self), step))


class _Reader:
    """A shard's open file: called with a first token and a count, it gives an array [count]."""

    def __init__(self, shard: _Shard):
        self.shard, self.dtype, self.itemsize = shard, shard.dtype, shard.dtype.itemsize
        self.offset, self.end = shard.offset, shard.offset + shard.tokens * shard.dtype.itemsize
        self._file = None
        try:
            self._file = os.open(shard.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{shard.path}: {error.strerror}; it was there at first") from error

    def __call__(self, first: int, count: int) -> np.ndarray:
        at, size = self.offset + first * self.itemsize, count * self.itemsize
        found = os.fstat(self._file).st_size
        try:
            raw = os.pread(self._file, size, at)
            while found >= self.end and len(raw) < size:  # one call gives 2 GiB at most
                more = os.pread(self._file, size - len(raw), at + len(raw))
                raw, found = raw + more, found if more else at + len(raw)
        except OSError as error:
            raise UserError(f"{self.shard.path}: {error.strerror} at byte {at}") from error
        if found < self.end:  # already, or between the look and the read
            raise UserError(
                f"{self.shard.path}: {found} bytes found, {self.end} expected; it was cut off after"
                " the run began"
            )
        return np.frombuffer(raw, self.dtype)

    def __del__(self):
        if self._file is not None:
            os.close(self._file)


def split_names(folder: str | Path) -> list[str]:
    """The splits that a data set has."""
    return list(load_meta(Path(folder) / "meta.json")["splits"])


def _open_shards(cls, folder: Path, split: str, verify: bool) -> TokenDataset:
    path = folder / "meta.json"
    if not path.is_file():
        raise UserError(f"--data {folder}: no meta.json there; not a data set, or never finished")
    meta = load_meta(path)
    if split not in meta["splits"]:
        raise UserError(f"--data {folder}: no split {split!r}; it has {sorted(meta['splits'])}")
    entry = meta["splits"][split]
    if not entry["shards"]:
        raise UserError(f"--data {folder}: its {split!r} split holds no documents")
    shards, ends, digests, first = [], [], [], None
    for name in entry["shards"]:
        shard, shard_ends, head = _open_shard(folder / name, verify)
        first = first or head
        for key in ("itemsize", "vocab_size", "bos", "eos", "tokenizer_hash"):
            if head[key] != first[key]:
                raise UserError(
                    f"{folder / name}: {key} is {head[key]}, expected {first[key]} as in"
                    f" {entry['shards'][0]}"
                )
        ends.append(shard_ends + sum(map(len, shards)))
        shards.append(shard)
        digests.append([head["itemsize"], head["tokens"], head["payload"], head["sidecar"]])
    for key in ("vocab_size", "tokens"):
        found = sum(map(len, shards)) if key == "tokens" else first[key]
        expected = entry["tokens"] if key == "tokens" else meta["vocab_size"]
        if found != expected:
            raise UserError(f"{path}: says {key} {expected}, but the shards have {found}")
    return cls(
        f"{folder} ({split})",
        shards,
        doc_ends=np.concatenate(ends),
        digests=digests,
        vocab_size=first["vocab_size"],
        eos=first["eos"],
        bos=first["bos"],
        tokenizer_hash=first["tokenizer_hash"],
    )


def _open_shard(path: Path, verify: bool) -> tuple[_Shard, np.ndarray, dict]:
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UserError(f"{path}: missing, but meta.json lists it") from None
    if len(raw) < HEADER_BYTES:
        raise UserError(f"{path}: {size} bytes, shorter than the {HEADER_BYTES}-byte header")
    magic, version, tokens, itemsize, vocab, bos, eos, tok, payload, documents, sidecar = (
        HEADER.unpack_from(raw)
    )
    if magic != MAGIC:
        raise UserError(f"{path}: magic number {magic}, expected {MAGIC}; not a token shard")
    if version != VERSION:
        raise UserError(f"{path}: format version {version}, expected {VERSION}")
    (check,) = HEADER_HASH.unpack_from(raw, HEADER.size)
    if check != xxhash.xxh3_64_intdigest(raw[: HEADER.size]) or itemsize not in (2, 4):
        raise UserError(f"{path}: the header is damaged (its checksum does not match)")
    expected = HEADER_BYTES + tokens * itemsize
    if size != expected:
        raise UserError(f"{path}: {size} bytes, expected {expected} for {tokens} tokens")
    data = _Shard(path, HEADER_BYTES, tokens, itemsize)
    ends = _load_ends(sidecar_of(path))
    if len(ends) != documents or ends[-1] != tokens or xxhash.xxh3_64_intdigest(ends) != sidecar:
        raise UserError(f"{sidecar_of(path)}: damaged, or not of {path.name} (checksum mismatch)")
    if verify:
        hasher = xxhash.xxh3_64()
        for part in data.parts():
            hasher.update(part)
        if hasher.intdigest() != payload:
            raise UserError(f"{path}: the tokens do not match their checksum; the file is damaged")
    head = {"tokens": tokens, "itemsize": itemsize, "vocab_size": vocab, "eos": eos}
    head |= {"bos": None if bos < 0 else bos, "tokenizer_hash": tok.hex()}
    return data, ends, head | {"payload": payload, "sidecar": sidecar}


def _open_nanogpt(cls, spec: str, split: str) -> TokenDataset:
    """nanoGPT's headerless uint16 files and the 20240520 format of llm.c and modded-nanogpt.

    Neither stores hashes or document ends, so this reads every token once. A document ends after
    GPT-2's end-of-text token, as in nanoGPT and in our own shards, whether or not any is there.
    """
    paths = _nanogpt_files(spec, Path(spec.removeprefix("nanogpt:")).expanduser(), split)
    shards, digests, ends = [], [], []
    for path in paths:
        data = _open_nanogpt_file(path)
        hasher, offset = xxhash.xxh3_64(), sum(map(len, shards))
        for part in data.parts():
            hasher.update(part)
            ends.append(np.flatnonzero(part == GPT2_EOT) + offset + 1)
            if part.max() > GPT2_EOT:
                raise UserError(f"{path}: token {part.max()}, GPT-2's 0 to {GPT2_EOT} expected")
            offset += len(part)
        shards.append(data)
        digests.append([2, len(data), hasher.intdigest()])
    found = np.concatenate(ends)
    total = sum(map(len, shards))
    if not found.size or found[-1] != total:  # the last document may be cut short
        found = np.append(found, total)
    return cls(
        f"{spec} ({split})",
        shards,
        doc_ends=found,
        digests=digests,
        vocab_size=GPT2_EOT + 1,
        eos=GPT2_EOT,
        bos=None,
        tokenizer_hash=None,
    )


def _nanogpt_files(spec: str, path: Path, split: str) -> list[Path]:
    if path.is_dir():
        plain = path / f"{split}.bin"
        files = [plain] if plain.is_file() else sorted(path.glob(f"*{split}*.bin"))
        if not files:
            raise UserError(f"--data {spec}: no {split}.bin or *{split}*.bin in that folder")
        return files
    if not path.is_file():
        raise UserError(f"--data {spec}: no such file or folder")
    # One file must never serve as both training and held-out text.
    if split not in path.name and (split != "train" or "val" in path.name):
        raise UserError(f"--data {spec}: one file, without a {split!r} split; name its folder")
    return [path]


def _open_nanogpt_file(path: Path) -> _Shard:
    size = path.stat().st_size
    head = np.fromfile(path, "<i4", count=3)
    if len(head) and head[0] == LLAMA3_MAGIC:
        raise UserError(f"{path}: format {LLAMA3_MAGIC} (Llama-3) found, {GPT2_MAGIC} expected")
    if len(head) == 3 and head[0] == GPT2_MAGIC:
        if head[1] != GPT2_VERSION:
            raise UserError(f"{path}: format version {head[1]}, expected {GPT2_VERSION}")
        tokens, offset = int(head[2]), HEADER_BYTES
    else:
        tokens, offset = size // 2, 0
    if tokens < 1 or size != offset + 2 * tokens:
        raise UserError(
            f"{path}: {size} bytes, expected {offset} + 2 for each of {max(tokens, 1)} tokens"
        )
    return _Shard(path, offset, tokens, 2)


def sidecar_of(path: Path) -> Path:
    return path.with_suffix(".docs.npy")


def _load_ends(path: Path) -> np.ndarray:
    try:
        ends = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; it holds the document ends of its shard") from None
    except (ValueError, EOFError, IsADirectoryError) as error:
        raise UserError(f"{path}: not a readable .npy file") from error
    if ends.dtype != np.dtype("<i8") or ends.ndim != 1 or not len(ends):
        raise UserError(f"{path}: {ends.dtype} of shape {ends.shape}, expected 1-D int64")
    return ends


def load_meta(path: Path) -> dict:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        known = meta["format"] == "retort-shards"
        known &= {"name", "hash"} <= meta["tokenizer"].keys()
        known &= {"version", "source", "vocab_size", "eos_token_id"} <= meta.keys()
        for entry in meta["splits"].values():
            known &= {"shards", "tokens", "documents"} <= entry.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged, or not the meta.json of a token data set") from error
    if not known:
        raise UserError(f"{path}: not the meta.json of a token data set")
    if meta["version"] != VERSION:
        raise UserError(f"{path}: format version {meta['version']}, expected {VERSION}")
    return meta
