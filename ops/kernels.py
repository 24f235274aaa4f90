"""Which implementation of a linear-attention op runs: auto | naive | chunk | fla."""

from __future__ import annotations

import functools
import importlib.util

import torch

from config import UserError


@functools.cache
def has_fla() -> bool:
    """Whether flash-linear-attention is installed."""
    return importlib.util.find_spec("fla") is not None


def resolve_kernel(kernel: str, device: torch.device) -> str:
    """The kernel that `kernel` means on `device`: auto is fla on CUDA where it is installed, else
    our own chunked form. Raises UserError for fla without CUDA or without the package."""
    if kernel == "auto":
        return "fla" if device.type == "cuda" and has_fla() else "chunk"
    if kernel == "fla" and not (device.type == "cuda" and has_fla()):
        raise UserError(
            f"--kernel: fla found, but it needs CUDA (device is {device.type}) and the package "
            "flash-linear-attention; auto, chunk or naive expected"
        )
    return kernel
