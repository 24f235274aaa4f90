"""Every linear mixer: its formula, causality, documents, decode, and the transfer of weights.

A new mixer is one more entry of MIXERS; one with a reference elsewhere gets a test of its own.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from kit import assert_close_rms, gradients, randomise, rms_ratio, stock, tiny_config, tiny_model
from torch import nn

from cache import Cache
from config import UserError
from hybrid_layers import MIXERS, build_mixer, convert_config
from layers import Attention, apply_rope
from mixers.base import inverse_silu, inverse_softplus
from ops.gated_delta_rule import naive_gated_delta_rule

every_mixer = pytest.mark.parametrize("name", MIXERS)
# A softmax window starts as its teacher and has nothing else to initialise or calibrate.
every_linear = pytest.mark.parametrize("name", [n for n in MIXERS if n != "sliding_window"])
rope = pytest.mark.parametrize("rope", [False, True], ids=["", "rope"])
BOUNDS = [0, 1, 3, 70, 95, 95]


def make(name, *, length=0, cu_seqlens=None, dtype=torch.float64, **overrides):
    """A random mixer, an input [1, T, d], and what stands where in it."""
    if name == "sliding_window":
        model = tiny_model("S", dtype=dtype, **overrides)
    else:
        model = tiny_model("L", mixer=[name], dtype=dtype, **overrides)
    length = length or cu_seqlens[-1]
    bounds = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, length, model.config.hidden_size, generator=generator, dtype=dtype)
    return model.layers[0].attention, x, model.seq_info(length, cu_seqlens=bounds), model


def formula(mixer, x, seq):
    """The module docstring's equations, with PyTorch's own convolution and RMSNorm."""

    def short(what):
        conv, projected = getattr(mixer, f"{what}_conv1d"), getattr(mixer, f"{what}_proj")(x)
        padded = F.pad(projected.mT, (conv.weight.shape[-1] - 1, 0))
        y = F.conv1d(padded, conv.weight, groups=conv.weight.shape[0]).mT
        return F.silu(y).unflatten(-1, (-1, mixer.value_dim if what == "v" else mixer.key_dim))

    q, k, v = short("q"), short("k"), short("v")
    if mixer.rope:
        q, k = apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
    q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
    groups = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    g = -mixer.A_log.exp() * F.softplus(mixer.a_proj(x) + mixer.dt_bias)
    o, _ = naive_gated_delta_rule(q, k, v, g, mixer.b_proj(x).sigmoid())
    o = F.rms_norm(o, (mixer.value_dim,), mixer.o_norm.weight, mixer.o_norm.eps)
    gate = 1
    if mixer.g_proj is not None:
        gate = F.silu(mixer.g_proj(x)).unflatten(-1, (-1, mixer.value_dim))
    return mixer.o_proj((o * gate).flatten(-2))


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"linear_bias": True, "linear_rope": True},
        {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_value_head_dim": 5},
        {"linear_conv_kernel_dim": 1},
        {"linear_gate": False},
    ],
    ids=["plain", "bias+rope", "grouped", "no conv", "no gate"],
)
@pytest.mark.parametrize("length", [1, 67])
def test_gated_deltanet_is_its_formula(shape, length):
    mixer, x, seq, _ = make("gated_deltanet", length=length, **shape)
    actual, expected = mixer(x, seq), formula(mixer, x, seq)
    assert_close_rms(actual, expected)
    if length > 1:  # a single token has no decay to learn from
        wanted = gradients(expected.square().sum(), mixer)
        for what, gradient in gradients(actual.square().sum(), mixer).items():
            assert_close_rms(gradient, wanted[what], 1e-8, what)


def test_only_some_mixers_can_be_without_a_gate():
    plain = make("gated_deltanet", length=4, linear_gate=False)[0]
    assert not any(name.startswith("g_proj") for name, _ in plain.named_parameters())
    with pytest.raises(UserError, match=r"linear_gate: False found, which gla"):
        make("gla", length=4, linear_gate=False)


@pytest.mark.parametrize("heads", [(4, 4), (2, 6)], ids=["equal heads", "more value heads"])
def test_gated_deltanet_equals_transformers(heads):
    qwen = stock("transformers.models.qwen3_5.modeling_qwen3_5")
    from transformers import Qwen3_5TextConfig

    shape = dict(
        linear_num_key_heads=heads[0], linear_num_value_heads=heads[1], linear_key_head_dim=8,
        linear_value_head_dim=16, linear_conv_kernel_dim=4, hidden_size=24, rms_norm_eps=1e-6,
    )  # fmt: skip
    mixer, x, seq, _ = make("gated_deltanet", length=67, dtype=torch.float32, **shape)
    config = Qwen3_5TextConfig(
        **shape, num_hidden_layers=1, layer_types=["linear_attention"], hidden_act="silu"
    )
    peer = qwen.Qwen3_5GatedDeltaNet(config, 0)
    mine = {
        "in_proj_qkv.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
        "conv1d.weight": ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"),
        "in_proj_z.weight": ("g_proj.weight",),
        "in_proj_a.weight": ("a_proj.weight",),
        "in_proj_b.weight": ("b_proj.weight",),
        "out_proj.weight": ("o_proj.weight",),
        "norm.weight": ("o_norm.weight",),
        "A_log": ("A_log",),
        "dt_bias": ("dt_bias",),
    }
    weights = dict(mixer.named_parameters())
    assert sorted(n for names in mine.values() for n in names) == sorted(weights)
    peer.load_state_dict({k: torch.cat([weights[n] for n in v]) for k, v in mine.items()})
    actual, expected = mixer(x, seq), peer(x)
    assert_close_rms(actual, expected)
    wanted = gradients(expected.square().sum(), peer)
    found = gradients(actual.square().sum(), mixer)
    for key, names in mine.items():
        assert_close_rms(torch.cat([found[n] for n in names]), wanted[key], what=key)


@every_mixer
@rope
def test_strictly_causal_and_reaches_every_later_token(name, rope):
    mixer, x, seq, _ = make(name, length=70, linear_rope=rope, sliding_window=99)
    with torch.no_grad():
        before = mixer(x, seq)
        for t in (0, 1, 40, 63, 64, 69):
            changed = x.clone()
            changed[:, t] += 1
            moved = (mixer(changed, seq) - before).abs().amax((0, 2))
            assert t == 0 or moved[:t].max() < 1e-12, t
            assert moved[t:].min() > 1e-9, t


@every_mixer
@rope
def test_packed_documents_are_each_alone(name, rope):
    mixer, x, seq, model = make(name, cu_seqlens=BOUNDS, linear_rope=rope)
    alone = [
        mixer(x[:, a:b], model.seq_info(b - a)) for a, b in itertools.pairwise(BOUNDS) if b > a
    ]
    actual, expected = mixer(x, seq), torch.cat(alone, 1)
    assert_close_rms(actual, expected)
    wanted = gradients(expected.square().sum(), mixer)
    for what, gradient in gradients(actual.square().sum(), mixer).items():
        assert_close_rms(gradient, wanted[what], what=what)


@every_mixer
@rope
@pytest.mark.parametrize("prefill", [1, 2, 66])
def test_prefill_and_decode_is_the_full_forward(name, rope, prefill):
    mixer, x, seq, model = make(name, length=prefill + 9, linear_rope=rope)
    cache, outs = Cache(1), []
    cuts = [0, prefill, *range(prefill + 1, prefill + 6), prefill + 9]  # four at once at the end
    with torch.no_grad():
        for a, b in itertools.pairwise(cuts):
            assert cache.longest == a
            outs.append(mixer(x[:, a:b], model.seq_info(b - a, cache=cache), cache[0]))
            cache.advance(1, b - a, None, x.device)
        assert_close_rms(torch.cat(outs, 1), mixer(x, seq))


@every_mixer
def test_memory_does_not_grow_with_the_context(name):
    held = []
    for length in (5, 400):
        mixer, x, seq, _ = make(name, length=length, dtype=torch.float32)
        cache = Cache(1)
        with torch.no_grad():
            mixer(x, seq, cache[0])
        # Of the storage, since a view of a few rows keeps all of it.
        held.append(sum(t.untyped_storage().nbytes() for t in cache[0].tensors()))
        assert cache.num_bytes() == held[-1]
        state = cache[0].state
        for t in state if isinstance(state, tuple) else (state,):
            assert t is None or t.dtype == torch.float32
    assert held[0] == held[1] > 0


@every_mixer
def test_bfloat16_autocast_stays_near_float32(name):
    mixer, x, seq, _ = make(name, length=67, dtype=torch.float32)
    expected = mixer(x, seq)
    with torch.autocast("cpu", torch.bfloat16):
        actual = mixer(x, seq)
    assert actual.dtype == torch.bfloat16
    assert_close_rms(actual, expected)
    gradients(actual.float().square().sum(), mixer)


@every_linear
def test_init_weights_leaves_nothing_unset(name):
    with torch.device("meta"):
        mixer = build_mixer(name, tiny_config("L", mixer=[name], linear_bias=True))
    mixer.to_empty(device="cpu")
    for p in mixer.parameters():
        nn.init.constant_(p, torch.nan)
    torch.manual_seed(0)
    mixer.init_weights()
    for what, p in mixer.named_parameters():
        assert p.isfinite().all(), what


# ---- transfer


def converted(name, **overrides):
    """A random softmax layer and a mixer that was poisoned, then transferred from it."""
    config = tiny_config("F", **overrides)
    attention = randomise(Attention(config, 0), seed=3)
    new = convert_config(config, [0], name)
    mixer = build_mixer(name, new)
    for p in mixer.parameters():
        nn.init.constant_(p, torch.nan)
    mixer.from_attention(attention)
    return attention, mixer, new


TEACHERS = {
    "gqa": {"qk_norm": False},
    "mha": {"num_key_value_heads": 4, "qk_norm": False},
    "mqa + bias": {"num_key_value_heads": 1, "attention_bias": True, "qk_norm": False},
    "q/k-norm": {"qk_norm": True},
    "q/k-norm + bias": {"attention_bias": True, "qk_norm": True},
}


@every_mixer
@pytest.mark.parametrize("teacher", TEACHERS.values(), ids=TEACHERS)
def test_from_attention_keeps_q_k_v_of_every_head(name, teacher):
    attention, mixer, config = converted(name, **teacher)
    for what, p in mixer.named_parameters():
        assert p.isfinite().all(), f"{what} was left unset"
    x = torch.randn(1, 9, config.hidden_size, generator=torch.Generator().manual_seed(0))
    groups = config.num_attention_heads // config.num_key_value_heads
    for what, theirs, mine in zip("qkv", attention.project(x), mixer.qkv(x), strict=True):
        norm = getattr(attention, f"{what}_norm", None)
        theirs = theirs if norm is None else theirs * norm.weight
        for head in range(config.num_attention_heads):
            of = head if what == "q" else head // groups
            assert_close_rms(mine[:, :, head], theirs[:, :, of], 1e-6, f"{what} of head {head}")
    assert torch.equal(mixer.o_proj.weight, attention.o_proj.weight)


@every_linear
def test_from_attention_of_bfloat16_without_bias_into_biases(name):
    """A linear layer may have biases where the softmax layer has none: they become zero."""
    config = tiny_config("F")
    attention = randomise(Attention(config, 0)).bfloat16()
    mixer = build_mixer(name, tiny_config("L", mixer=[name], linear_bias=True))
    mixer.from_attention(attention)
    assert all(not p.any() for n, p in mixer.named_parameters() if n.endswith("proj.bias"))
    assert all(p.dtype == torch.float32 for p in mixer.parameters())


@every_linear
def test_from_attention_refuses_other_shapes(name):
    attention = Attention(tiny_config("F"), 0)
    shapes = [{"linear_value_head_dim": 6}]
    if MIXERS[name].grouped:
        shapes.append({"linear_num_value_heads": 8})
    for shape in shapes:
        mixer = build_mixer(name, tiny_config("L", mixer=[name], **shape))
        with pytest.raises(ValueError, match="from_attention"):
            mixer.from_attention(attention)


@every_linear
def test_calibrate_lowers_the_error(name):
    if name == "hedgehog_window":
        pytest.skip("its weights sum to one, as the teacher's: nothing to fit")
    attention, mixer, _ = converted(name)
    model = tiny_model("F", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    # A mean away from zero, as hidden states have, lets one row of the gate be near constant.
    x = torch.randn(2, 200, 24, generator=generator) + torch.randn(24, generator=generator)
    seq = model.seq_info(100)

    def error(part):
        target = attention(x[:, part], seq)
        return rms_ratio(mixer(x[:, part], seq), target)

    train, fresh = slice(0, 100), slice(100, 200)
    before = error(train), error(fresh)
    with torch.no_grad():
        returned = mixer.calibrate(x[:, train], attention(x[:, train], seq), seq)
    after = error(train), error(fresh)
    assert abs(returned - after[0]) < 1e-3
    for a, b in zip(after, before, strict=True):
        assert a < b - (0.05 if b > 0.5 else 0)  # one that starts near has less to gain
    if mixer.gate_to_fit() is not None:
        weight, value = mixer.gate_to_fit()
        assert 0.8 < F.linear(x, weight).mean() / value < 1.1


def test_calibrate_where_no_head_helps():
    """Scales of 0 would leave nothing to learn from."""
    _, mixer, _ = converted("gated_deltanet")
    x = torch.randn(1, 60, 24, generator=torch.Generator().manual_seed(0))
    seq = tiny_model("F", dtype=torch.float32).seq_info(60)
    with torch.no_grad():
        mixer.calibrate(x, -mixer(x, seq), seq)
    assert mixer.o_proj.weight.any()


@every_linear
def test_every_parameter_learns_after_the_transfer(name):
    """A product of two zero matrices never would."""
    attention, mixer, config = converted(name, linear_window=8)
    x = torch.randn(1, 40, config.hidden_size, generator=torch.Generator().manual_seed(0)) + 1
    seq = tiny_model("F", dtype=torch.float32).seq_info(40)
    with torch.no_grad():
        target = attention(x, seq)
        mixer.calibrate(x, target, seq)
    for _ in range(2):
        grads = gradients((mixer(x, seq) - target).square().mean(), mixer)
        with torch.no_grad():
            for what, p in mixer.named_parameters():
                p -= 0.01 * grads[what]
    for what, gradient in grads.items():
        assert gradient.abs().max() > 0, what


def test_inverses():
    y = torch.tensor([1e-3, 0.1, 1.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(F.softplus(inverse_softplus(y)), y)
    for value in (0.05, 1.0, 7.0):
        assert abs(F.silu(torch.tensor(inverse_silu(value), dtype=torch.float64)) - value) < 1e-12
