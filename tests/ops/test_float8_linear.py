"""Float8 linear layers against the quantised numbers in float32, and how far those are off."""

from __future__ import annotations

import pytest
import torch
from kit import assert_close_rms, random_ids, tiny_model
from torch import nn

from hybrid_layers import MIXERS
from ops.float8_linear import (
    FLOAT8,
    Float8Linear,
    float8_copy,
    naive_float8_linear,
    quantise,
    supports_float8,
)

on_cpu = pytest.mark.skipif(
    torch.__version__ < "2.11", reason="on a CPU torch 2.10 knows no scale of each row"
)
DEVICES = [pytest.param("cpu", marks=on_cpu), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def device(request):
    if request.param == "cuda" and not (
        torch.cuda.is_available() and supports_float8(torch.device("cuda"))
    ):
        pytest.skip("needs a GPU with float8 matmuls")
    return request.param


def test_rows_are_scaled_to_the_largest_number():
    x = torch.tensor([[1.0, -4.0, 0.5], [0.0, 0.0, 0.0], [1e-3, 2e-3, -1e-3]])
    values, scale = quantise(x)
    assert values.dtype == FLOAT8 and values.float().abs().amax(1).tolist() == [448, 0, 448]
    torch.testing.assert_close(values.float() * scale, x, rtol=2**-4, atol=0)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_that_of_the_quantised_numbers(device, bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 48, bias=bias).to(device, torch.bfloat16)
    linear.weight.data[7] *= 100  # a row of its own scale
    x = torch.randn(2, 32, 96, device=device).bfloat16() * torch.logspace(-3, 3, 32)[:, None].to(
        device
    )
    x = x.bfloat16()
    small = Float8Linear(linear)
    out, exact = small(x), linear.double()(x.double())
    wanted = naive_float8_linear(x.float(), small.weight, small.scale, linear.bias.float() if bias
                                 else None)  # fmt: skip
    assert out.shape == exact.shape and out.dtype == torch.bfloat16
    near = (out.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    rest = [i for i in range(48) if i != 7]
    off = (out.double() - exact)[..., rest].norm(dim=-1) / exact[..., rest].norm(dim=-1)
    assert near.max() < 0.01 and 0.01 < off.mean() < 0.06


@on_cpu
def test_copy_shares_what_it_does_not_quantise():
    model = tiny_model("FF", hidden_size=32, intermediate_size=48, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=8, dtype=torch.bfloat16)  # fmt: skip
    before = {n: p.clone() for n, p in model.named_parameters()}
    replica = float8_copy(model)
    block = replica.layers[0]
    assert isinstance(block.mlp.up_proj, Float8Linear)
    assert isinstance(block.self_attn.k_proj, Float8Linear)
    assert replica.embed_tokens.weight is model.embed_tokens.weight
    assert block.input_layernorm.weight is model.layers[0].input_layernorm.weight
    assert type(model.layers[0].mlp.up_proj) is nn.Linear
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    ids = random_ids(model, 2, 16)
    with torch.no_grad():
        a, b = model(ids).float(), replica(ids).float()
    assert 0.001 < (a - b).norm() / a.norm() < 0.2


def test_odd_sizes_and_first_blocks_stay_as_they_are():
    model = tiny_model("F", dtype=torch.bfloat16)  # 24 wide
    assert not any(isinstance(m, Float8Linear) for m in float8_copy(model).modules())
    model = tiny_model("FF", hidden_size=32, intermediate_size=48, dtype=torch.bfloat16)
    replica = float8_copy(model, first=1)
    assert isinstance(replica.layers[1].mlp.up_proj, Float8Linear)
    assert type(replica.layers[0].mlp.up_proj) is nn.Linear


@on_cpu
@pytest.mark.parametrize("mixer", [m for m in MIXERS if m != "sliding_window"])
def test_copies_of_hybrids(mixer):
    """A mixer may take the weight of a Linear, which in float8 is nothing without its scale."""
    model = tiny_model(
        "LF", mixer=[mixer], dtype=torch.float32, hidden_size=64, intermediate_size=96, head_dim=16,
        linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    ids = random_ids(model, 1, 33)
    replica = float8_copy(model)
    assert any(isinstance(m, Float8Linear) for m in replica.layers[0].linear_attn.modules())
    with torch.no_grad():
        assert_close_rms(replica(ids), model(ids), 0.3)
