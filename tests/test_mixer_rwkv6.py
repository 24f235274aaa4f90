"""RWKV-6 against fla's layer: its own forward, its Triton kernels replaced by plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kit import assert_close_rms, gradients, tiny_config, tiny_model
from test_mixers import converted, make
from torch import nn

from hybrid_layers import build_mixer
from layers import Attention, apply_rope

SHAPES = {
    "plain": {},
    "bias+rope": {"linear_bias": True, "linear_rope": True},
    "other sizes": {"linear_num_key_heads": 2, "linear_value_head_dim": 5},
}


def peer_of(mixer, seq, monkeypatch):
    """fla.layers.RWKV6Attention with the mixer's weights, able to run on a CPU."""
    pytest.importorskip("fla")
    from fla.layers import rwkv6
    from fla.modules.norm.layernorm import GroupNormRef
    from fla.modules.token_shift import token_shift_ref
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    def kernel(r, k, v, w, u, *, scale, output_final_state, **options):
        assert options.pop("initial_state") is options.pop("cu_seqlens") is None
        if mixer.rope:
            r, k = apply_rope(r, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
        o, _ = naive_recurrent_rwkv6(*(x.transpose(1, 2) for x in (r, k, v, w)), u, scale=scale)
        return o.transpose(1, 2), None

    monkeypatch.setattr(rwkv6, "fused_recurrent_rwkv6", kernel)
    monkeypatch.setattr(rwkv6, "chunk_rwkv6", kernel)
    monkeypatch.setattr(rwkv6, "token_shift", token_shift_ref)
    d, heads = mixer.hidden_size, mixer.num_heads
    values = heads * mixer.value_dim
    peer = rwkv6.RWKV6Attention(
        hidden_size=d, num_heads=heads, expand_k=heads * mixer.key_dim / d, expand_v=values / d
    )
    assert mixer.g_norm.eps == peer.g_norm.eps
    peer.g_norm = GroupNormRef(heads, values, bias=True, eps=peer.g_norm.eps)
    peer.gate_fn = F.silu
    if mixer.r_proj.linear.bias is not None:  # fla's has none to carry a teacher's
        for projection in (peer.r_proj, peer.k_proj, peer.v_proj):
            linear = projection.linear
            linear.bias = nn.Parameter(torch.empty(linear.out_features))
    peer.load_state_dict(mixer.state_dict())
    return peer


@pytest.mark.filterwarnings("ignore:According to Bo")  # whom fla quotes on its RWKV layers
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("length", [1, 67])
def test_equals_fla(shape, length, monkeypatch):
    mixer, x, seq, _ = make("rwkv6", length=length, dtype=torch.float32, **shape)
    peer = peer_of(mixer, seq, monkeypatch)
    actual, expected = mixer(x, seq), peer(x)[0]
    assert_close_rms(actual, expected)
    if length > 1:  # a single token has no decay to learn from
        wanted = gradients(expected.square().sum(), peer)
        for what, gradient in gradients(actual.square().sum(), mixer).items():
            assert_close_rms(gradient, wanted[what], what=what)


def test_init_weights_spreads_the_decays():
    mixer = build_mixer("rwkv6", tiny_config("L", mixer=["rwkv6"]))
    mixer.init_weights()
    x = torch.randn(1, 2, 24)
    w = mixer.inputs(x, tiny_model("F").seq_info(2), {}, False)[0]["w"].flatten(-2)
    torch.testing.assert_close(w[0, 0, 0], -torch.tensor(-6.0).exp())
    torch.testing.assert_close(w[0, 1, -1], -torch.tensor(-1.0).exp())


def test_transfer_spreads_the_decays_over_the_heads():
    _, mixer, config = converted("rwkv6")
    w = -mixer.heads(mixer.w_proj(torch.randn(1, 3, config.hidden_size))).exp()
    tokens = torch.tensor([4.0, 16.0, 64.0, 256.0])
    torch.testing.assert_close(w, (-1 / tokens)[:, None].expand_as(w))


def test_transfer_reads_the_token_itself():
    _, mixer, config = converted("rwkv6")
    x = torch.randn(1, 9, config.hidden_size)
    args, gate, _ = mixer.inputs(x, tiny_model("F").seq_info(9), {}, False)
    assert torch.equal(gate, x)
    for mine, projected in zip("rkv", mixer.qkv(x), strict=True):
        assert torch.equal(args[mine], projected), mine


def test_transfer_without_bias_into_biases():
    mixer = build_mixer("rwkv6", tiny_config("L", mixer=["rwkv6"], linear_bias=True))
    for p in mixer.parameters():
        nn.init.constant_(p, torch.nan)
    mixer.from_attention(Attention(tiny_config("F"), 0))
    for what in "rkv":
        bias = getattr(mixer, f"{what}_proj").linear.bias
        assert torch.equal(bias, torch.zeros_like(bias)), what


def test_decay_keeps_its_bias_in_float32_under_autocast():
    """bfloat16 would round a bias of about -5.5 to 2^-6, and its decay with it."""
    _, mixer, config = converted("rwkv6")
    x = torch.randn(1, 3, config.hidden_size)
    with torch.autocast("cpu", torch.bfloat16):
        w = mixer.w_proj(x)
    assert w.dtype == torch.float32
    torch.testing.assert_close(w, mixer.w_proj(x))
