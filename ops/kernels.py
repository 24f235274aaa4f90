"""Which implementation of a linear mixer's recurrence runs: auto | naive | chunk | fla |
mamba_ssm."""

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


@functools.cache
def has_mamba_ssm() -> bool:
    """Whether mamba-ssm is installed."""
    return importlib.util.find_spec("mamba_ssm") is not None


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; it comes with PyTorch's CUDA builds."""
    return importlib.util.find_spec("triton") is not None


PACKAGES = {"fla": ("flash-linear-attention", has_fla), "mamba_ssm": ("mamba-ssm", has_mamba_ssm)}


def resolve_kernel(kernel: str, device: torch.device, mixer: type) -> str:
    """The kernel that `kernel` means for a mixer class on `device`. auto is, on CUDA, fla's where
    the package is installed and has the recurrence, else our own chunked form. UserError for a
    kernel that cannot run."""
    cuda = device.type == "cuda"
    if kernel == "auto":
        return "fla" if cuda and "fla" in mixer.kernels and PACKAGES["fla"][1]() else "chunk"
    if kernel in PACKAGES and not (cuda and PACKAGES[kernel][1]()):
        raise UserError(
            f"--kernel: {kernel} found, but it needs CUDA (device is {device.type}) and the "
            f"package {PACKAGES[kernel][0]}; auto, chunk or naive expected"
        )
    if kernel not in mixer.kernels:
        raise UserError(
            f"--kernel: {kernel} found, but there is none for {mixer.name}; "
            f"auto or {', '.join(mixer.kernels)} expected"
        )
    return kernel
