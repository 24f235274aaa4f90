"""What the tests share: the tolerance table, random tiny models, gradients by name.

Tolerances are RMS-error ratios. Everything random is seeded here, so a failure can be repeated.
"""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import Tensor, nn

from config import ModelConfig
from model import Transformer

# RMS(actual - expected) / RMS(expected), by the dtype of `actual`.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}


def some_slow(cases: dict[str, tuple], *quick: str) -> list:
    """name -> arguments of a parametrized test's cases; all but the quick ones are slow."""
    assert set(quick) < set(cases), quick
    return [
        pytest.param(*arguments, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, arguments in cases.items()
    ]


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected), in float64; inf where `actual` is not finite."""
    assert actual.shape == expected.shape, (tuple(actual.shape), tuple(expected.shape))
    actual, expected = actual.detach().double(), expected.detach().double()
    if not actual.isfinite().all():
        return float("inf")
    error, size = (actual - expected).square().mean().sqrt(), expected.square().mean().sqrt()
    return 0.0 if error == 0 else (error / size).item()


def assert_close_rms(actual: Tensor, expected: Tensor, tol: float | None = None, what="") -> None:
    """The ratio is at most `tol` (default: by actual's dtype). `expected` must not be zero."""
    assert expected.detach().abs().max() > 0, f"{what}: nothing to compare with, all zero"
    tol = TOLERANCE[actual.dtype] if tol is None else tol
    ratio = rms_ratio(actual, expected)
    assert ratio <= tol, f"{what}: RMS ratio {ratio:.2e}, at most {tol:.0e} expected"


def stock(module: str):
    """A module of transformers, with its own PyTorch code: where fla is installed transformers
    takes fla's Triton kernels, which a CPU cannot run. It decides when it is first imported."""
    pytest.importorskip("transformers")
    held = sys.modules.get("fla")
    sys.modules["fla"] = None
    try:
        return importlib.import_module(module)
    finally:
        del sys.modules["fla"]
        if held is not None:
            sys.modules["fla"] = held


def tiny_config(kinds: str = "FF", **overrides) -> ModelConfig:
    """A config of one letter per layer (F full, S sliding, L linear), with GQA and q/k-norm."""
    names = {"F": "full_attention", "S": "sliding_attention", "L": "linear_attention"}
    shape = dict(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=5 if "S" in kinds else 0,
    )  # fmt: skip
    shape |= overrides
    return ModelConfig(num_hidden_layers=len(kinds), layer_types=[names[k] for k in kinds], **shape)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random and mattering: no bias zero, no norm weight one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        value = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            value = 1 + 0.3 * value
        elif name.endswith(("A_log", "w_proj.linear.lora.2.bias")):
            # Decays near exp(-0.1): old tokens stay visible.
            value = 0.3 * value - 2
        elif name.endswith("conv1d.weight"):
            value = 0.5 * value
        elif p.dim() == 2 and "embed" not in name:
            value = 1.2 * value / p.shape[1] ** 0.5
        else:
            value = 0.5 * value
        p.copy_(value)
    return module


def tiny_model(kinds: str = "FF", *, seed: int = 0, dtype=torch.float64, **overrides):
    """A random Transformer of `tiny_config(kinds, **overrides)`."""
    return randomise(Transformer(tiny_config(kinds, **overrides)).to(dtype), seed)


def random_ids(model: Transformer, *shape: int, seed: int = 0) -> Tensor:
    """Token ids [*shape]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def logits(model: Transformer, input_ids: Tensor, **kwargs) -> Tensor:
    """[B, T, V]."""
    return model(input_ids, **kwargs) @ model.head_weight.T


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """name -> gradient of every parameter of `module`; fails on one that has none."""
    names, params = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, params), strict=True))
