"""Mamba-2 against transformers' own layer, weights mapped one to one; what its transfer sets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kit import assert_close_rms, gradients, stock, tiny_config, tiny_model
from test_mixers import converted, make

from cache import Cache
from hybrid_layers import build_mixer
from layers import apply_rope
from ops.ssd import naive_ssd

# (groups, heads): B and C shared by all heads, by two each, by none
GROUPS = pytest.mark.parametrize("heads", [(1, 4), (2, 4), (4, 4)], ids=str)


def layer(heads, *, length=67, dtype=torch.float32, **overrides):
    """d_inner = 48 = 2 hidden_size, as BambaMixer wants it."""
    shape = dict(
        linear_num_key_heads=heads[0], linear_num_value_heads=heads[1], linear_key_head_dim=8,
        linear_value_head_dim=12, linear_conv_kernel_dim=4, hidden_size=24, rms_norm_eps=1e-5,
    )  # fmt: skip
    return make("mamba2", length=length, dtype=dtype, **{**shape, **overrides})


@GROUPS
@pytest.mark.parametrize("length", [1, 67])
def test_equals_transformers(heads, length):
    bamba = stock("transformers.models.bamba.modeling_bamba")
    from transformers import BambaConfig

    mixer, x, seq, model = layer(heads, length=length)
    config = BambaConfig(
        vocab_size=8, hidden_size=24, num_hidden_layers=1, rms_norm_eps=1e-5, mamba_n_heads=4,
        mamba_d_head=12, mamba_n_groups=heads[0], mamba_d_state=8, mamba_d_conv=4, mamba_expand=2,
        mamba_chunk_size=16, mamba_conv_bias=True, mamba_proj_bias=False, attn_layer_indices=[],
    )  # fmt: skip
    peer = bamba.BambaMixer(config, 0)
    peer.load_state_dict(mixer.state_dict())
    actual, expected = mixer(x, seq), peer(x)
    assert_close_rms(actual, expected)
    names = [n for n, _ in mixer.named_parameters() if length > 1 or n != "A_log"]
    wanted = gradients(expected.square().sum(), peer)
    found = gradients(actual.square().sum(), mixer)
    for what in names:  # a single token has no decay to learn from
        assert_close_rms(found[what], wanted[what], what=what)

    cache = Cache(1)
    with torch.no_grad():
        mixer(x, seq, cache[0])
        cache.advance(1, length, None, x.device)
        more = torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(2))
        step = mixer(more, model.seq_info(1, cache=cache), cache[0])
        assert_close_rms(step, peer(torch.cat([x, more], 1))[:, -1:])


def formula(mixer, x, seq):
    """The module docstring's equations, written out with PyTorch's own functions."""
    groups, inner = mixer.num_heads, mixer.num_value_heads * mixer.value_dim
    shared = groups * mixer.key_dim
    rows = [inner, inner + 2 * shared, mixer.num_value_heads]
    z, xbc, dt = mixer.in_proj(x).split(rows, -1)
    conv = mixer.conv1d
    padded = F.pad(xbc.mT, (conv.weight.shape[-1] - 1, 0))
    xbc = F.silu(F.conv1d(padded, conv.weight, conv.bias, groups=xbc.shape[-1]).mT)
    u, b, c = xbc.split([inner, shared, shared], -1)
    b, c = (t.unflatten(-1, (groups, -1)) for t in (b, c))
    if mixer.rope:
        b, c = apply_rope(b, seq.cos, seq.sin), apply_rope(c, seq.cos, seq.sin)
    u, dt = u.unflatten(-1, (-1, mixer.value_dim)), F.softplus(dt + mixer.dt_bias)
    y, _ = naive_ssd(u, dt, -mixer.A_log.exp(), b, c, mixer.D)
    y = (y.flatten(-2) * F.silu(z)).unflatten(-1, (groups, -1))
    y = F.rms_norm(y, y.shape[-1:], eps=mixer.norm.eps).flatten(-2) * mixer.norm.weight
    return mixer.out_proj(y)


@GROUPS
@pytest.mark.parametrize(
    "shape",
    [{}, {"linear_bias": True, "linear_rope": True}, {"linear_conv_kernel_dim": 1}],
    ids=["plain", "bias+rope", "no conv"],
)
def test_is_its_formula(heads, shape):
    mixer, x, seq, _ = layer(heads, dtype=torch.float64, **shape)
    actual, expected = mixer(x, seq), formula(mixer, x, seq)
    assert_close_rms(actual, expected)
    wanted = gradients(expected.square().sum(), mixer)
    for what, gradient in gradients(actual.square().sum(), mixer).items():
        assert_close_rms(gradient, wanted[what], 1e-8, what)


def test_names_shapes_and_order_of_rows_are_mamba_ssm_s():
    """d = 24, G = 2 groups of N = 8, H = 4 heads of P = 12: rows z, x, B, C, dt."""
    mixer, x, *_ = layer((2, 4))
    assert {n: tuple(p.shape) for n, p in mixer.state_dict().items()} == {
        "in_proj.weight": (48 + 48 + 16 + 16 + 4, 24), "conv1d.weight": (80, 1, 4),
        "conv1d.bias": (80,), "A_log": (4,), "D": (4,), "dt_bias": (4,), "norm.weight": (48,),
        "out_proj.weight": (24, 48),
    }  # fmt: skip
    whole = mixer.in_proj(x)
    for (first, last), mine in zip([(112, 128), (96, 112), (48, 96)], mixer.qkv(x), strict=True):
        assert_close_rms(mine.flatten(-2), whole[..., first:last], 1e-6)


def test_init_weights_is_in_mamba_ssm_s_ranges():
    torch.manual_seed(0)
    mixer = build_mixer("mamba2", tiny_config("L", mixer=["mamba2"]))
    mixer.init_weights()
    a, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= a.min() < a.max() <= 16
    assert 1e-3 * 0.99 <= dt.min() < dt.max() <= 0.1 * 1.01
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()


def test_transfer_starts_as_decaying_linear_attention():
    """Before the norm and up to SiLU's curvature, y_t is sum_s e^(-(t - s) r) (q_t . k_s) v_s."""
    _, mixer, _ = converted("mamba2", head_dim=16, num_attention_heads=2, num_key_value_heads=2)
    x = 0.3 * torch.randn(1, 40, 24, generator=torch.Generator().manual_seed(0))
    q, k, v = mixer.qkv(x)
    time = torch.arange(40)
    decay = (-(time[:, None] - time) * mixer.decay_rates()[:, None, None]).exp().tril()
    expected = torch.einsum("hts,bthk,bshk,bshv->bthv", decay, q, k, v)
    args, _, _ = mixer.inputs(x, tiny_model("F").seq_info(40), {}, False)
    y, _ = naive_ssd(**args, **mixer.options())
    cosine = F.cosine_similarity(y.flatten(2), expected.flatten(2), dim=-1)
    assert cosine.min() > 0.95, cosine.min()
    assert cosine.mean() > 0.99
