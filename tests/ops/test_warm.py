"""The background compilation calls the kernels as training does, and never stops a run."""

from __future__ import annotations

import pytest
import torch

from config import ModelConfig, PretrainConfig
from distributed import World
from ops import fla_kernels, fla_reference, short_conv, warm
from trainer import warm_up


@pytest.mark.parametrize("op", fla_reference.VARIANTS)
def test_calls_every_op_forward_and_backward(op, monkeypatch):
    """With float64 loops in the place of the kernels."""
    seen = []

    def loops(*tensors, scale, initial_state, output_final_state, cu_seqlens):
        name = fla_reference.op_of(op)
        x = dict(zip(fla_kernels.OPS[name].inputs.replace("?", "").split(), tensors, strict=True))
        assert initial_state is None and not output_final_state
        seen.extend(t for t in tensors if t is not None)
        assert x["v"].dtype == torch.bfloat16 and x["v"].shape == (1, 128, 3, 32)
        double = {n: None if t is None else t.double() for n, t in x.items()}
        o, _ = fla_reference.naive(name, double, scale=scale, bounds=cu_seqlens.tolist())
        return o.to(x["v"].dtype), None

    monkeypatch.setattr(fla_kernels, fla_reference.op_of(op), loops)
    warm.compile_op(op, 3, 16, 32, torch.device("cpu"))
    assert seen and all(t.grad is not None for t in seen)


def test_what_a_run_compiles_ahead(monkeypatch):
    """The ops of its fla mixers at their sizes, once each; on rank 0's GPU and nowhere else."""
    started = []
    monkeypatch.setattr(warm, "start", lambda jobs: started.append(list(jobs)))
    config = ModelConfig(
        num_hidden_layers=4, layer_types=["linear_attention"] * 4, head_dim=64,
        linear_feature_map="hedgehog",
        mixer=["mamba2", "retention", "linear_attention", "hedgehog_window"],
    )  # fmt: skip
    kernels = dict.fromkeys(config.mixer, "fla") | {"hedgehog_window": "chunk"}
    cfg = PretrainConfig(torch_compile="false")
    for world in (World(1, 2, torch.device("cuda", 1)), World(0, 1, torch.device("cpu"))):
        warm_up(config, kernels, cfg, world)
    assert started == []
    warm_up(config, kernels, cfg, World(0, 1, torch.device("cuda", 0)))
    (jobs,) = started
    assert jobs == [
        ("linear_attention", 4, 64, 64), ("short_conv", 768, 4, 1),
        ("linear_attention without g", 4, 128, 64),
    ]  # fmt: skip


@pytest.mark.parametrize("bias", [0, 1])
def test_compiles_the_short_convolution(bias, monkeypatch):
    seen = []

    def plain(*args):
        seen.extend(args)
        return short_conv.plain_short_conv(*args)

    monkeypatch.setattr(short_conv, "triton_short_conv", plain)
    warm.compile_short_conv(24, 4, bias, torch.device("cpu"))
    x, weight, b, positions = seen
    assert x.grad is not None and weight.grad is not None and (b is not None) == bias
    assert positions.shape == x.shape[:2] and weight.shape == (24, 1, 4)


def test_a_failing_process_is_no_failure_of_the_run():
    """There is no GPU here, or no such op: it ends with an error, and nothing is printed."""
    (process,) = warm.start([("no_such_op", 1, 16, 16)])
    assert process.wait(timeout=60) != 0
