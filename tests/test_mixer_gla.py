"""GLA against fla's layer: its own forward, its Triton kernels replaced by plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kit import assert_close_rms, gradients
from test_mixers import converted, make
from torch import nn

from layers import apply_rope

SHAPES = {
    "plain": {},
    "bias+rope": {"linear_bias": True, "linear_rope": True},
    "other sizes": {"linear_num_key_heads": 2, "linear_value_head_dim": 5},
}


def peer_of(mixer, seq, monkeypatch):
    """fla.layers.GatedLinearAttention with the mixer's weights, able to run on a CPU."""
    pytest.importorskip("fla")
    from fla.layers import gla
    from fla.ops.gla.naive import naive_recurrent_gla

    def kernel(q, k, v, gk=None, g=None, output_final_state=False, **options):
        assert options.pop("initial_state") is options.pop("cu_seqlens") is None
        if mixer.rope:
            q, k = apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
        return naive_recurrent_gla(q, k, v, g if gk is None else gk)

    def norm_and_gate(x, g):
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps) * g * g.sigmoid()

    monkeypatch.setattr(gla, "fused_recurrent_gla", kernel)
    monkeypatch.setattr(gla, "chunk_gla", kernel)
    d, heads = mixer.hidden_size, mixer.num_heads
    peer = gla.GatedLinearAttention(
        hidden_size=d, num_heads=heads, expand_k=heads * mixer.key_dim / d,
        expand_v=heads * mixer.value_dim / d, norm_eps=mixer.eps,
    )  # fmt: skip
    norm = peer.g_norm_swish_gate
    assert mixer.g_norm_swish_gate.eps == norm.eps
    norm.forward = norm_and_gate
    if mixer.q_proj.bias is not None:  # fla's has none to carry a teacher's
        for linear in (peer.q_proj, peer.k_proj, peer.v_proj):
            linear.bias = nn.Parameter(torch.empty(linear.out_features))
    peer.load_state_dict(mixer.state_dict())
    return peer


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("length", [1, 67])
def test_equals_fla(shape, length, monkeypatch):
    mixer, x, seq, _ = make("gla", length=length, dtype=torch.float32, **shape)
    peer = peer_of(mixer, seq, monkeypatch)
    actual, expected = mixer(x, seq), peer(x)[0]
    assert_close_rms(actual, expected)
    if length > 1:  # a single token has no decay to learn from
        wanted = gradients(expected.square().sum(), peer)
        for what, gradient in gradients(actual.square().sum(), mixer).items():
            assert_close_rms(gradient, wanted[what], what=what)


def test_transfer_spreads_the_decays_over_the_heads():
    _, mixer, config = converted("gla")
    g = mixer.log_decay(torch.randn(1, 3, config.hidden_size))
    tokens = torch.tensor([4.0, 16.0, 64.0, 256.0])
    torch.testing.assert_close(g, (-1 / tokens)[:, None].expand_as(g))


def test_decay_keeps_its_bias_in_float32_under_autocast():
    """bfloat16 would round a bias of about 4 to 2^-6, and its decay with it."""
    _, mixer, config = converted("gla")
    x = torch.randn(1, 3, config.hidden_size)
    with torch.autocast("cpu", torch.bfloat16):
        g = mixer.log_decay(x)
    assert g.dtype == torch.float32
    torch.testing.assert_close(g, mixer.log_decay(x))
