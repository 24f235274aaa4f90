"""Which implementation of a linear mixer's recurrence runs: auto | naive | chunk | fla."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

import torch

from config import UserError


@functools.cache
def has_fla() -> bool:
    """Whether flash-linear-attention is installed."""
    return importlib.util.find_spec("fla") is not None


def fla_backward_refused(device: torch.device) -> bool:
    """Whether fla refuses the backward of its gated kernels here: on Hopper with triton 3.4 to
    3.7.0, whose code for them can be wrong (flash-linear-attention issue 640). ops/fla_kernels.py
    runs them in the one shape that is right."""
    if torch.cuda.get_device_capability(device)[0] != 9 or not has_fla():
        return False
    version = importlib.metadata.version("triton").split("+")[0].split(".")
    return (3, 4, 0) <= tuple(int(x) for x in version[:3]) < (3, 7, 1)


def resolve_kernel(kernel: str, device: torch.device, mixer: type) -> str:
    """The kernel that `kernel` means for a mixer class on `device`: auto is fla on CUDA where it
    is installed and has the recurrence, else our own chunked form. UserError for fla where it
    cannot run."""
    if kernel in ("naive", "chunk"):
        return kernel
    usable = device.type == "cuda" and has_fla()
    if kernel == "auto":
        return "fla" if usable and "fla" in mixer.kernels else "chunk"
    if not usable:
        raise UserError(
            f"--kernel: fla found, but it needs CUDA (device is {device.type}) and the package "
            "flash-linear-attention; auto, chunk or naive expected"
        )
    if "fla" not in mixer.kernels:
        raise UserError(
            f"--kernel: fla found, but it has no kernel for {mixer.name}; "
            f"auto or {', '.join(mixer.kernels)} expected"
        )
    return kernel
