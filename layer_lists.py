"""The lists that `--layers` takes: 10,14,20 | 4-8 | all | 3:1 | auto:0.75.

    python -m pytest tests/test_config.py

No torch here.
"""

from __future__ import annotations

import math

from config import UserError


def parse_layers(layers: str, num_layers: int, keep: str = "") -> list[int]:
    """Indices of the layers that are or become linear.

    `10,14,20` (ranges `4-8` too), `all`, or `3:1` = three linear then one full, repeating. `keep`
    names the complement in the same grammar and excludes `layers`. Empty: no linear layer.
    """
    if keep:
        kept = set(_layer_list("keep_layers", keep, num_layers))
        return [i for i in range(num_layers) if i not in kept]
    return _layer_list("layers", layers, num_layers) if layers else []


def auto_share(layers: str) -> float | None:
    """The share of linear layers that `auto:0.75` asks for; None for any other list."""
    name, _, share = layers.strip("()[] ").partition(":")
    if name != "auto":
        return None
    try:
        found = float(share or "nan")
    except ValueError:
        found = math.nan
    if not 0 < found < 1:
        raise UserError(f"--layers: '{layers}' found, auto:0.75 or another share expected")
    return found


def uniform_layers(num_layers: int, share: float) -> list[int]:
    """Linear layers at this share with the softmax ones spread evenly, the last of each period as
    in 3:1; softmax layers are rounded down."""
    kept = math.floor((1 - share) * num_layers + 1e-6)
    return [i for i in range(num_layers) if (i + 1) * kept // num_layers == i * kept // num_layers]


def _layer_list(flag: str, spec: str, num_layers: int) -> list[int]:
    grammar = "10,14,20, a range 4-8, all, or a ratio like 3:1"
    spec = spec.strip("()[] ").replace(" ", "")
    if spec == "all":
        return list(range(num_layers))
    if spec.startswith("auto"):
        raise UserError(
            f"--{flag}: '{spec}' found, {grammar} expected (only train_kd.py --layers searches)"
        )
    if ":" in spec:
        parts = spec.split(":")
        if len(parts) != 2 or not all(p.isdigit() and int(p) for p in parts):
            raise UserError(f"--{flag}: '{spec}' found, {grammar} expected")
        linear, full = map(int, parts)
        return [i for i in range(num_layers) if i % (linear + full) < linear]
    found: list[int] = []
    for part in spec.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--{flag}: '{part or spec}' found, {grammar} expected")
        run = range(int(first), int(last or first) + 1)
        if not run:
            raise UserError(f"--{flag}: the range {part} is empty")
        for i in run:
            if i >= num_layers:
                raise UserError(f"--{flag}: layer {i} found, 0 to {num_layers - 1} expected")
            if i in found:
                raise UserError(f"--{flag}: layer {i} is named twice")
            found.append(i)
    return sorted(found)
