"""RWKV-7 against fla's layer: the same weights, its own modules, plain code where it has Triton."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from kit import assert_close_rms, gradients, tiny_config, tiny_model
from test_mixers import converted, make

from hybrid_layers import build_mixer
from layers import apply_rope
from ops.rwkv7 import naive_rwkv7

SHAPE = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "rms_norm_eps": 1e-5}


def fla_layer(mixer=None):
    """fla's RWKV7Attention of SHAPE, with the weights of `mixer`."""
    pytest.importorskip("fla")
    from fla.layers import RWKV7Attention

    with pytest.warns(UserWarning, match="According to Bo"):
        layer = RWKV7Attention(
            hidden_size=64, head_dim=16, norm_eps=1e-5, layer_idx=0, num_hidden_layers=2
        )
    if mixer is not None:
        layer.load_state_dict(mixer.state_dict())
    return layer


def fla_formula(layer, x):
    """The forward of fla's layer for layer_idx 0, its Triton functions written out."""
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
    from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref

    def heads(t):
        return t.unflatten(-1, (layer.num_heads, -1))

    change = layer.time_shift(x) - x
    xr, xw, xk, xv, xa, xg = (x + change * getattr(layer, f"x_{i}") for i in "rwkvag")
    r, k, v = layer.r_proj(xr), layer.k_proj(xk), layer.v_proj(xv)
    w = -math.exp(-0.5) * layer.w_lora(xw).sigmoid()
    a, g = layer.a_lora(xa).sigmoid(), layer.g_lora(xg)
    kk = heads(k * layer.k_k)
    kk = kk / kk.norm(dim=-1, keepdim=True)
    k = k + k * (a - 1) * layer.k_a
    r, w, k, v, a = map(heads, (r, w, k, v, a))
    tokens = (16**0.5 * r, k, v, -kk, kk * a, w)
    o, _ = dplr_recurrence(*(t.transpose(1, 2) for t in tokens))
    o = layer.g_norm(o.transpose(1, 2).reshape(-1, 64)).view(x.shape)
    return layer.o_proj(gate_output_correction_ref(o, r, k, layer.r_k, v, g))


@pytest.mark.parametrize("length", [1, 67])
def test_equals_fla(length):
    mixer, x, seq, _ = make("rwkv7", length=length, dtype=torch.float32, **SHAPE)
    layer = fla_layer(mixer)
    actual, expected = mixer(x, seq), fla_formula(layer, x)
    assert_close_rms(actual, expected)
    wanted = gradients(expected.square().sum(), layer)
    found = gradients(actual.square().sum(), mixer)
    assert found.keys() == wanted.keys()
    for what, gradient in found.items():
        if length > 1 or wanted[what].abs().max() > 1e-9:  # one token reads no state
            assert_close_rms(gradient, wanted[what], what=what)


def test_init_weights_is_fla_s():
    """All that is not random; the norm's weight is 1 instead of a power of the depth."""
    torch.manual_seed(0)
    mixer, layer = build_mixer("rwkv7", tiny_config("L", mixer=["rwkv7"], **SHAPE)), fla_layer()
    mixer.init_weights()
    wanted = dict(layer.named_parameters())
    for name, p in mixer.named_parameters():
        if name.startswith("x_") or name.endswith(("k_k", "k_a", "r_k", "bias", "lora.0.weight")):
            torch.testing.assert_close(p, wanted[name], atol=1e-6, rtol=1e-5, msg=name)
        elif name.endswith("lora.2.weight") or name in ("r_proj.weight", "k_proj.weight"):
            for x in (p, wanted[name]):  # orthogonal: all singular values equal
                singular = torch.linalg.svdvals(x.detach())
                torch.testing.assert_close(singular, singular[:1].expand_as(singular))
            assert_close_rms(p.norm(), wanted[name].norm(), 1e-4, name)
    assert (mixer.g_norm.weight == 1).all()


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"linear_bias": True, "linear_rope": True},
        {"linear_num_key_heads": 3, "linear_value_head_dim": 12},
    ],
    ids=["plain", "bias+rope", "heads x size is not d"],
)
def test_is_its_formula(shape):
    mixer, x, seq, _ = make("rwkv7", length=67, **shape)
    past = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    mixed = {i: x + (past - x) * getattr(mixer, f"x_{i}") for i in "rwkvag"}

    def heads(t):
        return t.unflatten(-1, (mixer.num_heads, -1))

    def lora(i, inner):
        first, _, last = getattr(mixer, f"{i}_lora").lora
        return F.linear(inner(mixed[i] @ first.weight.T), last.weight, last.bias)

    r, k, v = (heads(getattr(mixer, f"{i}_proj")(mixed[i])) for i in "rkv")
    if mixer.rope:
        r, k = apply_rope(r, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
    w = heads(-math.exp(-0.5) * lora("w", torch.tanh).sigmoid())
    a, g = heads(lora("a", lambda t: t).sigmoid()), lora("g", torch.sigmoid)
    kk = k * heads(mixer.k_k)
    kk = kk / kk.square().sum(-1, keepdim=True).sqrt()
    k = k * (1 + (a - 1) * heads(mixer.k_a))
    o, _ = naive_rwkv7(r, w, k, v, -kk, kk * a)
    mean, var = o.mean(-1, keepdim=True), o.var(-1, keepdim=True, correction=0)
    o = (o - mean) / (var + mixer.key_dim * 1e-6).sqrt()
    o = o * heads(mixer.g_norm.weight) + heads(mixer.g_norm.bias)
    o = o + (r * mixer.r_k * k).sum(-1, keepdim=True) * v
    expected, actual = mixer.o_proj(o.flatten(-2) * g), mixer(x, seq)
    assert_close_rms(actual, expected, 1e-6)  # -0.6065306597126334 is e^-0.5 to 16 digits
    wanted = gradients(expected.square().sum(), mixer)
    for what, gradient in gradients(actual.square().sum(), mixer).items():
        assert_close_rms(gradient, wanted[what], 1e-6, what)


@pytest.mark.parametrize(("hidden", "head"), [(24, 8), (576, 64), (1024, 128), (4096, 64)])
def test_low_ranks_are_fla_s(hidden, head):
    """From hidden_size and head size, for heads that fill hidden_size."""
    pytest.importorskip("fla")
    from fla.layers import RWKV7Attention

    with torch.device("meta"), pytest.warns(UserWarning, match="According to Bo"):
        layer = RWKV7Attention(hidden_size=hidden, head_dim=head)
        shape = {"hidden_size": hidden, "head_dim": head, "num_attention_heads": hidden // head}
        config = tiny_config("L", mixer=["rwkv7"], num_key_value_heads=1, **shape)
        mixer = build_mixer("rwkv7", config)
    for i, rank in (("w", "decay"), ("a", "a"), ("g", "gate")):
        wanted = getattr(layer, f"{rank}_low_rank_dim")
        assert getattr(mixer, f"{i}_lora").lora[0].weight.shape[0] == wanted, i


def test_transfer_starts_open_and_can_learn():
    """Gate one, rate one half, decays 4 to 256 tokens, no shift. What stands behind a zero matrix
    learns from the second step on, and no two inner channels learn the same."""
    _, mixer, _ = converted("rwkv7")
    x = torch.randn(1, 50, 24, generator=torch.Generator().manual_seed(0))
    seq = tiny_model("F").seq_info(50)
    args, (_, _, _, gate), _ = mixer.inputs(x, seq, {}, False)
    torch.testing.assert_close(gate, torch.ones_like(gate), atol=1e-6, rtol=0)
    torch.testing.assert_close(args["b"], -0.5 * args["a"])
    tokens = -1 / args["w"][0, 0, :, 0]
    torch.testing.assert_close(tokens[[0, -1]], torch.tensor([4.0, 256.0]))
    torch.testing.assert_close(mixer.qkv(x), (args["r"], args["k"], args["v"]))
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = gradients((mixer(x, seq) - target).square().mean(), mixer)
    for i in "wag":
        singular = torch.linalg.svdvals(found[f"{i}_lora.lora.0.weight"])
        assert singular[1] > 1e-2 * singular[0] > 0, i
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p -= 0.01 * found[name]
    found = gradients((mixer(x, seq) - target).square().mean(), mixer)
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_slow_decays_keep_their_digits_under_autocast():
    """Rounded to bfloat16, a logit of -5.7 steps by 3 %, and stands still where x moves it less."""
    _, mixer, config = converted("rwkv7")
    with torch.no_grad():
        mixer.start_decays(1 / torch.tensor([4.0, 20.0, 100.0, 500.0]))
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(mixer.w_lora.lora[0].weight, std=0.05, generator=generator)
    x = torch.randn(1, 200, config.hidden_size, generator=generator)
    seq = tiny_model("F").seq_info(200)
    exact = mixer.inputs(x, seq, {}, False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = mixer.inputs(x, seq, {}, False)[0]
    assert found["w"].dtype == torch.float32
    assert {found[name].dtype for name in "rkvab"} == {torch.bfloat16}
    torch.testing.assert_close(found["w"], exact["w"], rtol=0.01, atol=0)
    for head in range(4):
        assert len(found["w"][0, :, head, 0].unique()) > 100, head
