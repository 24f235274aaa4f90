"""Kimi Delta Attention against fla's layer: the same parameters, and the layer's formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kit import assert_close_rms, gradients
from test_mixer_deltanet import short, unit
from test_mixers import converted, make

from layers import apply_rope
from mixers.base import DECAY_TOKENS


def formula(layer, x, seq, rope):
    """fla.layers.KimiDeltaAttention at its defaults, with its plain PyTorch recurrence."""
    from fla.ops.kda.naive import naive_recurrent_kda

    heads = {"q": layer.num_heads, "k": layer.num_heads, "v": layer.num_v_heads}
    q, k, v = (
        short(getattr(layer, f"{n}_conv1d"), getattr(layer, f"{n}_proj")(x), heads[n])
        for n in "qkv"
    )
    if rope:
        q, k = apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
    dt = F.softplus(layer.f_proj(x) + layer.dt_bias).unflatten(-1, (layer.num_v_heads, -1))
    g = -layer.A_log.exp()[:, None] * dt
    beta = layer.b_proj(x).sigmoid()
    o, _ = naive_recurrent_kda(unit(q), unit(k), v, g, beta)  # repeats q and k itself
    o = F.rms_norm(o, o.shape[-1:], layer.o_norm.weight, layer.o_norm.eps)
    return layer.o_proj(o.flatten(-2) * layer.g_proj(x).sigmoid())


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"linear_rope": True},
        {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_value_head_dim": 12},
        {"linear_conv_kernel_dim": 2},
    ],
    ids=["plain", "rope", "grouped", "short conv"],
)
@pytest.mark.parametrize("length", [1, 67])
def test_is_fla_s_layer(shape, length):
    pytest.importorskip("fla")
    from fla.layers import KimiDeltaAttention

    mixer, x, seq, model = make("kda", length=length, dtype=torch.float32, **shape)
    config = model.config
    peer = KimiDeltaAttention(
        hidden_size=config.hidden_size, head_dim=config.linear_key_head_dim,
        expand_v=config.linear_value_head_dim / config.linear_key_head_dim,
        num_heads=config.linear_num_key_heads, num_v_heads=config.linear_num_value_heads,
        conv_size=config.linear_conv_kernel_dim, norm_eps=config.rms_norm_eps,
    )  # fmt: skip
    peer.load_state_dict(mixer.state_dict())
    actual, expected = mixer(x, seq), formula(peer, x, seq, mixer.rope)
    assert_close_rms(actual, expected)
    wanted = gradients(expected.square().sum(), peer)
    for what, gradient in gradients(actual.square().sum(), mixer).items():
        if wanted[what].abs().max() > 1e-6:
            assert_close_rms(gradient, wanted[what], what=what)
        else:  # a single token has no decay, and the RMSNorm takes the size of its q and k out
            assert length == 1, what
            assert gradient.abs().max() < 1e-4, what


def test_transfer_spreads_decays_over_heads_and_lets_everything_learn():
    _, mixer, config = converted("kda")
    x = torch.randn(1, 40, config.hidden_size, generator=torch.Generator().manual_seed(0))
    tokens = -1 / mixer.log_decay(x)  # [B, T, J, K], e-folding times
    torch.testing.assert_close(tokens[0, 0, [0, -1], 0], torch.tensor(DECAY_TOKENS))
    assert torch.equal(tokens, tokens[:, :1, :, :1].expand_as(tokens))
    # The first halves of the low-rank projections move as soon as the second have.
    second = [mixer.f_proj[1].weight, mixer.g_proj[1].weight]
    seq = make("kda", length=40, dtype=torch.float32)[2]
    for p, gradient in zip(second, torch.autograd.grad(mixer(x, seq).sum(), second), strict=True):
        assert gradient.abs().max() > 0
        p.data -= gradient
    for what, gradient in gradients(mixer(x, seq).sum(), mixer).items():
        assert gradient.abs().max() > 0, what
