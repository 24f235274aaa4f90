"""Tuned configurations of fla's Triton kernels, so that a first step does not search for minutes.

    python scripts/tune_kernels.py       # makes tuned/<GPU>.json on the GPU at hand

fla finds the fastest of up to 135 configurations of each kernel when a shape is new, minutes per
op. `use_tuned` gives Triton's autotuners the results of that search instead. (fla's own
FLA_CONFIG_DIR covers only half of the kernels used here, mixes kernels of the same name, and either
misses for another number of heads or matches any head size; if FLA_CACHE_MODE is set, it decides.)
An entry is used where everything in its key is the same but batch, heads and packing, which do not
change the code that is generated: so one entry per head size serves any model, and never a larger
tile than was tuned. Another 0.x of fla gets none: its kernels may be others. GPUs of the same chip
share a file until they have their own.
Check: `pytest tests/ops/test_tuned.py`.

The file: {"versions": {...}, "kernels": {kernel: [entry, ...]}}, one line per entry, sorted, so
that tuning again changes only the lines where another configuration won. An entry: `config`, what
triton.Config takes; `dtypes` of the tensors; `key`, the values that Triton keys a launch by, both
in the order of the kernel's arguments.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).resolve().parents[1] / "tuned"
# Hopper parts: the same compute capability and shared memory as the one that was tuned.
SAME_CHIP = dict.fromkeys(("H100", "H200", "GH200", "H800"), "NVIDIA_H100_80GB_HBM3")
# The parts of a key that may differ between an entry and a call.
FREE = frozenset(("B", "H", "HQ", "HV", "IS_VARLEN"))
OPTIONS = ("num_warps", "num_stages", "num_ctas")  # of a configuration; the rest is the tile


def file_of(gpu: str, root: Path | str = TUNED) -> Path:
    """A GPU's file, named as fla names GPUs: NVIDIA_H100_80GB_HBM3.json."""
    return Path(root) / f"{re.sub(r'[^0-9A-Za-z]+', '_', gpu).strip('_') or 'unknown_gpu'}.json"


def versions() -> dict[str, str]:
    """What a configuration holds for: fla and Triton, without local suffixes."""
    names = {"fla": "fla-core", "triton": "triton"}
    return {n: importlib.metadata.version(p).split("+")[0] for n, p in names.items()}


def read_entries(path: Path) -> tuple[dict[str, str], dict[str, list[dict]]]:
    """The versions that the file was made with, and kernel -> entries; none of no file."""
    if not path.exists():
        return {}, {}
    data = json.loads(path.read_text())
    for entries in data["kernels"].values():
        for entry in entries:
            entry["dtypes"] = [f"torch.{d}" for d in entry["dtypes"].split()]
    return data["versions"], data["kernels"]


def write_entries(path: Path, kernels: dict[str, list[dict]]) -> None:
    """Merge kernel -> entries into the file: those of the same key are replaced, and those of other
    versions dropped."""
    made, merged = read_entries(path)
    if made != versions():
        merged = {}
    for kernel, entries in kernels.items():
        keys = [(e["key"], e["dtypes"]) for e in entries]
        kept = [e for e in merged.get(kernel, []) if (e["key"], e["dtypes"]) not in keys]
        merged[kernel] = kept + entries
    blocks = []
    for kernel in sorted(merged):
        rows = sorted(_line(entry) for entry in merged[kernel])
        blocks.append(f"{json.dumps(kernel)}: [\n" + ",\n".join(rows) + "\n]")
    text = f'{{"versions": {json.dumps(versions())},\n"kernels": {{\n'
    text += ",\n".join(blocks) + "\n}}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _line(entry: dict) -> str:
    config = dict(sorted(entry["config"].items()))
    dtypes = " ".join(d.removeprefix("torch.") for d in entry["dtypes"])
    return json.dumps({"config": config, "dtypes": dtypes, "key": entry["key"]})


def nearest(entries: list[dict], key: tuple[Any, ...]) -> dict | None:
    """The entry for an autotuner's key: its values in order, then the dtype of every tensor.

    Which optional tensors there are, and integer widths, may differ too; the floating types that
    were computed in may not. Among those that fit: the same tensors, then the nearest sizes.
    """
    best, least = None, (True, math.inf)
    for entry in entries:
        names, values = list(entry["key"]), list(entry["key"].values())
        found, dtypes = list(key[: len(values)]), list(key[len(values) :])
        if len(found) < len(values) or not all(isinstance(d, str) for d in dtypes):
            continue
        same = all(
            n in FREE or (a == b and type(a) is type(b))
            for n, a, b in zip(names, values, found, strict=True)
        )
        if not same or _floats(entry["dtypes"]) != _floats(dtypes):
            continue
        sizes = [
            abs(math.log2(a / b))
            for n, a, b in zip(names, values, found, strict=True)
            if n in FREE and n != "IS_VARLEN"
        ]
        distance = (entry["dtypes"] != dtypes, sum(sizes))
        if distance < least:
            best, least = entry, distance
    return best


def _floats(dtypes: list[str]) -> set[str]:
    """The types that decide how much a tile holds; decays and states are always float32."""
    return {d for d in dtypes if "float" in d} - {"torch.float32"}


class TunedConfigs(dict):
    """An autotuner's `cache`, which knows an answer for keys that nobody has tuned yet."""

    def __init__(self, entries: list[dict]):
        super().__init__()
        self.entries = entries

    def __contains__(self, key: object) -> bool:
        if not super().__contains__(key):
            entry = nearest(self.entries, key)
            if entry is not None:
                import triton

                tile = dict(entry["config"])
                others = {n: tile.pop(n) for n in OPTIONS if n in tile}
                self[key] = triton.Config(tile, **others)
        return super().__contains__(key)


def autotuners() -> dict[str, Any]:
    """module.function -> the autotuner of every kernel that the imported fla modules define."""
    from triton.runtime.autotuner import Autotuner

    found = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith("fla.ops.") or module is None:
            continue
        for value in list(vars(module).values()):
            while value is not None and not isinstance(value, Autotuner):
                value = getattr(value, "fn", None) if hasattr(value, "run") else None
            if value is not None:
                function = value.base_fn
                found[f"{function.__module__}.{function.__name__}"] = value
    return found


def use_tuned(device: torch.device, root: Path | str = TUNED) -> str:
    """Use the configurations tuned for this GPU, where there are any.

    Returns a line to print; an empty one for a device without Triton.
    """
    if device.type != "cuda":
        return ""
    if importlib.util.find_spec("fla") is None:
        return "tuned kernels: none, flash-linear-attention is not installed"
    if "FLA_CACHE_MODE" in os.environ:
        return f"tuned kernels: left to FLA_CACHE_MODE={os.environ['FLA_CACHE_MODE']}"
    gpu = torch.cuda.get_device_name(device)
    path = file_of(gpu, root)
    if not path.exists():
        chip = next((file for part, file in SAME_CHIP.items() if part in gpu), path.stem)
        path = path.with_name(f"{chip}.json")
    made, kernels = read_entries(path)
    search = "first steps search for minutes (scripts/tune_kernels.py)"
    if not kernels:
        return f"tuned kernels: none for {gpu}; {search}"
    if _minor(made) != _minor(versions()):
        return f"tuned kernels: those of {_say(made)} do not hold for {_say(versions())}; {search}"
    import_ops()
    for kernel, autotuner in autotuners().items():
        if kernel in kernels and not isinstance(autotuner.cache, TunedConfigs):
            autotuner.cache = TunedConfigs(kernels[kernel])
    return f"tuned kernels: {path.stem}, {_say(made)}"


def import_ops() -> None:
    """All modules of fla's kernels, without its layers and models: those import transformers,
    which takes seconds. fla treats them as optional, so a later import finds them as ever."""
    optional = [name for name in ("fla.layers", "fla.models") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(optional))  # None: not to be found
    try:
        import fla.ops  # noqa: F401
    finally:
        for name in optional:
            del sys.modules[name]


def _minor(found: dict[str, str]) -> list[str]:
    """fla's version as far as its kernels' arguments go."""
    return found["fla"].split(".")[:2]


def _say(found: dict[str, str]) -> str:
    return ", ".join(f"{n} {v}" for n, v in found.items())
