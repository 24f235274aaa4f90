"""The files of a Hugging Face folder: JSON, and safetensors whose keys are our names but for a
prefix.

What their contents mean is in hf.py. Check: `pytest tests/test_hf.py tests/test_hf_files.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import UserError

SHARD_BYTES = 5 * 10**9
PROBE_BYTES = 4096  # of a tensor, for its fingerprint


def read_json(path: Path) -> dict:
    """A file that holds an object; UserError where it does not."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:  # not JSON, or not even UTF-8
        raise UserError(f"{path}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a {type(value).__name__} found, an object expected")
    return value


def listed_ends(source: Path, eos: int | None) -> list[int]:
    """`eos`, then the other tokens that end a text by the config.json beside a tokenizer."""
    path = (source if source.is_dir() else source.parent) / "config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    others = found if isinstance(found, list) and eos in found else []
    return list(dict.fromkeys([eos, *others]))


def require_tied(folder: str | Path, read: Callable[[str], Tensor]) -> None:
    """UserError where the head that is stored beside a tied embedding is another one."""
    head, tied = "lm_head.weight", "embed_tokens.weight"
    if not torch.equal(read(head), read(tied)):
        raise UserError(f"{folder}: {head} differs from {tied}, tie_word_embeddings false expected")


def require_rows(folder: str | Path, rows: int, tokenizer) -> None:
    """UserError where a folder's embedding of so many rows lacks some of its tokenizer's tokens."""
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{folder}: vocab_size {rows} found, at least the {tokenizer.vocab_size} of its "
            f"tokenizer {tokenizer.name} expected"
        )


def our_name(key: str) -> str:
    """A parameter's name, from its key in a file."""
    return key.removeprefix("model.")


def file_key(name: str) -> str:
    """The reverse."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def fingerprint(folder: str | Path) -> str:
    """Hex digest of a model's config and weights: of each safetensors file its header, which names
    every tensor, and each tensor's first and last 4 KiB; reading all of a large model is too
    slow."""
    digest = xxhash.xxh3_64()
    folder = Path(folder)
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with open(path, "rb") as f:
            if path.suffix == ".json":
                digest.update(f.read())
                continue
            head = f.read(int.from_bytes(f.read(8), "little"))
            digest.update(head)
            for start, end in _spans(path, head):
                for at in (start, max(start, end - PROBE_BYTES)):
                    f.seek(at)
                    digest.update(f.read(min(PROBE_BYTES, end - at)))
    return digest.hexdigest()


def _spans(path: Path, head: bytes) -> list[tuple[int, int]]:
    """(start, end) in the file of each tensor of a safetensors header, in order."""
    try:
        tensors = json.loads(head)
        tensors.pop("__metadata__", None)
        spans = sorted(tuple(tensor["data_offsets"]) for tensor in tensors.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a whole safetensors file (header)") from None
    return [(8 + len(head) + a, 8 + len(head) + b) for a, b in spans]


def read_weights(
    folder: str | Path, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """The wanted tensors of `model.safetensors` or of the files its index names, by file key;
    `wanted` is asked for names as of our parameters."""
    tensors = {}
    for path in weight_files(Path(folder), wanted):
        with opened(path) as f:
            keys = [key for key in f.keys() if wanted(our_name(key))]  # noqa: SIM118
            tensors.update({key: f.get_tensor(key) for key in keys})
    return tensors


def weight_files(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> list[Path]:
    """`model.safetensors`, or the files that have wanted tensors by the index, there or not. Where
    both are, the one file, as in transformers."""
    index, one = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if one.is_file() or not index.is_file():
        return [one]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or {str} != {type(file) for file in names.values()}:
        raise UserError(f"{index}: no weight_map from names to files found")
    return [folder / f for f in sorted({f for key, f in names.items() if wanted(our_name(key))})]


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file; UserError where there is none, also for what is found while reading."""
    if not path.is_file():
        raise UserError(f"{path.parent}: no {path.name}; safetensors weights expected "
                        "(pickles never)")  # fmt: skip
    try:
        with safe_open(path, "pt") as f:
            yield f
    except Exception as e:  # safetensors raises its own class, not an OSError
        if type(e).__name__ != "SafetensorError":
            raise
        raise UserError(f"{path}: not a whole safetensors file ({e})") from None


def settle(path: Path) -> None:
    """Onto the disk, and readable for whom new files are; safetensors writes them with 0600."""
    os.umask(mask := os.umask(0o077))
    os.chmod(path, 0o666 & ~mask)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """One safetensors file, or shards of at most SHARD_BYTES with an index."""
    files: list[list[str]] = []  # the keys of each
    shard: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        path = folder / f"model-{len(files) + 1:05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        settle(path)
        files.append(list(shard))
        shard.clear()

    for key, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > SHARD_BYTES:
            flush()
            held = 0
        shard[key] = tensor
        held, total = held + size, total + size
    flush()
    if len(files) == 1:
        (folder / "model-00001.safetensors").rename(folder / "model.safetensors")
        return
    names = {}
    for i, keys in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"model-{i + 1:05d}.safetensors").rename(folder / name)
        names.update(dict.fromkeys(keys, name))
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
