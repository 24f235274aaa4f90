"""DeltaNet against fla's layer: the same parameters, and the layer's formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kit import assert_close_rms, gradients, tiny_config
from test_mixers import make

from config import UserError
from hybrid_layers import build_mixer
from layers import apply_rope


def short(conv, projected, heads):
    """SiLU of fla's convolution, which itself needs Triton."""
    padded = F.pad(projected.mT, (conv.weight.shape[-1] - 1, 0))
    y = F.conv1d(padded, conv.weight, groups=conv.weight.shape[0]).mT
    return F.silu(y).unflatten(-1, (heads, -1))


def unit(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def formula(layer, x, seq, rope):
    """fla.layers.DeltaNet at its defaults, with its plain PyTorch recurrence."""
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    q, k, v = (
        short(getattr(layer, f"{n}_conv1d"), getattr(layer, f"{n}_proj")(x), layer.num_heads)
        for n in "qkv"
    )
    if rope:
        q, k = apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
    beta = layer.b_proj(x).sigmoid()
    o, _ = delta_rule_recurrence(*(t.transpose(1, 2) for t in (unit(q), unit(k), v, beta)))
    o = F.rms_norm(o.transpose(1, 2), o.shape[-1:], layer.o_norm.weight, layer.o_norm.eps)
    return layer.o_proj(o.flatten(-2))


@pytest.mark.parametrize(
    "shape",
    [{}, {"linear_rope": True}, {"linear_value_head_dim": 12}, {"linear_conv_kernel_dim": 2}],
    ids=["plain", "rope", "wide values", "short conv"],
)
@pytest.mark.parametrize("length", [1, 67])
def test_is_fla_s_layer(shape, length):
    pytest.importorskip("fla")
    from fla.layers import DeltaNet

    mixer, x, seq, model = make("deltanet", length=length, dtype=torch.float32, **shape)
    config = model.config
    peer = DeltaNet(
        hidden_size=config.hidden_size, num_heads=4, norm_eps=config.rms_norm_eps,
        expand_k=4 * config.linear_key_head_dim / config.hidden_size,
        expand_v=4 * config.linear_value_head_dim / config.hidden_size,
        conv_size=config.linear_conv_kernel_dim,
    )  # fmt: skip
    peer.load_state_dict(mixer.state_dict())
    actual, expected = mixer(x, seq), formula(peer, x, seq, mixer.rope)
    assert_close_rms(actual, expected)
    wanted = gradients(expected.square().sum(), peer)
    for what, gradient in gradients(actual.square().sum(), mixer).items():
        if wanted[what].abs().max() > 1e-6:
            assert_close_rms(gradient, wanted[what], what=what)
        else:  # the RMSNorm takes the size of a single token's q, k and beta out
            assert length == 1, what
            assert gradient.abs().max() < 1e-4, what


def test_more_value_heads_are_refused():
    with pytest.raises(UserError, match="linear_num_value_heads: 8 found, deltanet expects"):
        build_mixer("deltanet", tiny_config("L", mixer=["deltanet"], linear_num_value_heads=8))
