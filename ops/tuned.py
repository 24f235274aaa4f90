"""Tuned configurations of fla's Triton kernels, so that a first step does not search for minutes.

    python scripts/tune_kernels.py       # makes tuned/<GPU>/<op>.json on the GPU at hand

fla finds the fastest of up to 135 configurations of each kernel when a shape is new, minutes per
op. `use_tuned` gives Triton's autotuners the results of that search instead. (fla's own
FLA_CONFIG_DIR covers only half of the kernels used here, mixes kernels of the same name, and either
misses for another number of heads or matches any head size; if FLA_CACHE_MODE is set, it decides.)
An entry is used where everything in its key is the same but batch, heads and packing, which do not
change the code that is generated: so one entry per head size serves any model, and never a larger
tile than was tuned. Other versions of Triton or fla get none: a configuration can be wrong there.
Check: `pytest tests/ops/test_tuned.py`.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

# The parts of a key that may differ between an entry and a call.
FREE = frozenset(("B", "H", "HQ", "HV", "IS_VARLEN"))


def gpu_folder(name: str) -> str:
    """A GPU's name as that of a folder, as fla has it: NVIDIA_H100_80GB_HBM3."""
    return re.sub(r"[^0-9A-Za-z]+", "_", name).strip("_") or "unknown_gpu"


def versions() -> dict[str, str]:
    """What a configuration holds for: fla and Triton, without local suffixes."""
    names = {"fla": "flash-linear-attention", "triton": "triton"}
    return {n: importlib.metadata.version(p).split("+")[0] for n, p in names.items()}


def read_folder(folder: Path) -> tuple[dict[str, str], dict[str, list[dict]]]:
    """The versions that all files name, and kernel -> entries of all files.

    ValueError for files of different versions: one of them would be used wrongly.
    """
    found: dict[str, str] = {}
    kernels: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        if found and data["versions"] != found:
            raise ValueError(
                f"{path}: {data['versions']} found, {found} of its neighbours expected"
            )
        found = data["versions"]
        for kernel, entries in data["kernels"].items():
            known = kernels.setdefault(kernel, [])
            keys = [(e["key"], e["dtypes"]) for e in known]
            known += [e for e in entries if (e["key"], e["dtypes"]) not in keys]
    return found, kernels


def write_entries(path: Path, kernels: dict[str, list[dict]]) -> None:
    """Merge kernel -> entries into the file; entries of the same key are replaced."""
    merged: dict[str, list[dict]] = {}
    if path.exists():
        data = json.loads(path.read_text())
        merged = data["kernels"] if data["versions"] == versions() else {}
    for kernel, entries in kernels.items():
        keys = [(e["key"], e["dtypes"]) for e in entries]
        kept = [e for e in merged.get(kernel, []) if (e["key"], e["dtypes"]) not in keys]
        merged[kernel] = kept + entries
    lines = []
    for kernel in sorted(merged):
        rows = sorted(json.dumps(entry) for entry in merged[kernel])
        lines.append(f"{json.dumps(kernel)}: [\n" + ",\n".join(rows) + "\n]")
    text = (
        f'{{"versions": {json.dumps(versions())},\n"kernels": {{\n' + ",\n".join(lines) + "\n}}\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


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

                self[key] = triton.Config(**entry["config"])
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


def use_tuned(device: torch.device, root: Path | str = "tuned") -> str:
    """Use the configurations tuned for this GPU, where there are any. Returns a line to print."""
    name = torch.cuda.get_device_name(device)
    folder = Path(root) / gpu_folder(name)
    if "FLA_CACHE_MODE" in os.environ:
        return f"tuned kernels: left to FLA_CACHE_MODE={os.environ['FLA_CACHE_MODE']}"
    tune = "the first step autotunes for minutes; python scripts/tune_kernels.py saves that"
    made, kernels = read_folder(folder)
    if not kernels:
        return f"no tuned kernels for {name}: {tune}"
    if made != versions():
        return f"tuned kernels for {name} are of {_say(made)}, not {_say(versions())}: {tune}"
    import fla.ops  # noqa: F401  # all kernels' modules

    for kernel, autotuner in autotuners().items():
        if kernel in kernels and not isinstance(autotuner.cache, TunedConfigs):
            autotuner.cache = TunedConfigs(kernels[kernel])
    return f"tuned kernels: {folder.name}, {_say(made)}"


def _say(found: dict[str, str]) -> str:
    return ", ".join(f"{n} {v}" for n, v in found.items())
