"""Linear attention against the pieces of fla's layer, and the generic tests with every other
feature map."""

from __future__ import annotations

from functools import partial

import kit
import pytest
import test_mixers
import torch
import torch.nn.functional as F
from kit import assert_close_rms, gradients
from torch import nn

from config import FEATURE_MAPS
from mixers.feature_maps import Hedgehog, feature_map

every_map = pytest.mark.parametrize("name", FEATURE_MAPS)
# (function of test_mixers.py, its arguments after the mixer's name)
CHECKS = [
    *(
        (test_mixers.test_strictly_causal_and_reaches_every_later_token, (r,))
        for r in (False, True)
    ),
    *((test_mixers.test_packed_documents_are_each_alone, (r,)) for r in (False, True)),
    *((test_mixers.test_prefill_and_decode_is_the_full_forward, (True, n)) for n in (1, 66)),
    (test_mixers.test_memory_does_not_grow_with_the_context, ()),
    (test_mixers.test_bfloat16_autocast_stays_near_float32, ()),
    (test_mixers.test_init_weights_leaves_nothing_unset, ()),
    (test_mixers.test_from_attention_keeps_q_k_v_of_every_head, ({"qk_norm": True},)),
    (test_mixers.test_calibrate_lowers_the_error, ()),
]


def use(monkeypatch, **shape):
    """Every tiny config of the generic tests gets `shape`."""
    for module in (kit, test_mixers):
        monkeypatch.setattr(module, "tiny_config", partial(kit.tiny_config, **shape))


@pytest.mark.parametrize("name", [n for n in FEATURE_MAPS if n != "elu"])
@pytest.mark.parametrize("check, args", CHECKS)
def test_generic_with_other_maps(name, check, args, monkeypatch):
    use(monkeypatch, linear_feature_map=name)
    mixer = test_mixers.make("linear_attention", length=3)[0]
    assert (name == "hedgehog") == isinstance(mixer.feature_map_q, Hedgehog)
    check("linear_attention", *args)


@every_map
def test_equals_flas_layer(name):
    """Names and shapes by loading them, the numbers from its parts that run on a CPU."""
    pytest.importorskip("fla")
    from fla.layers import LinearAttention
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

    mixer, x, seq, _ = test_mixers.make(
        "linear_attention", length=67, dtype=torch.float32, linear_feature_map=name,
        linear_key_head_dim=6, linear_value_head_dim=12,
    )  # fmt: skip
    layer = LinearAttention(
        hidden_size=24, num_heads=4, expand_k=1, expand_v=2, feature_map=name,
        norm_eps=mixer.eps,
    )  # fmt: skip
    layer.load_state_dict(mixer.state_dict(), strict=True)
    factor = 12**1.5 if name == "hedgehog" else 1  # our scale / fla's
    q, k, v = (
        p(x).unflatten(-1, (4, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )  # fmt: skip
    if name == "elu":  # fla's is a Triton kernel
        q, k = nn.ELU()(q) + 1, nn.ELU()(k) + 1
    else:
        q, k = layer.feature_map_q(q), layer.feature_map_k(k)
    # A loop of its own: fla's naive code writes into a tensor that has no gradient.
    states = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(1)
    o = torch.einsum("bthk,bthkv->bthv", q * q.shape[-1] ** -0.5, states)
    with torch.no_grad():
        assert_close_rms(o, naive_recurrent_linear_attn(q, k, v)[0])
    o = F.rms_norm(o, (12,), layer.norm.weight, layer.norm.eps / factor**2)
    actual, expected = mixer(x, seq), layer.o_proj(o.flatten(-2))
    assert_close_rms(actual, expected)
    wanted = gradients(expected.square().sum(), layer)
    for what, gradient in gradients(actual.square().sum(), mixer).items():
        assert_close_rms(gradient, wanted[what], what=what)


def test_a_normaliser_would_change_nothing():
    """Up to the eps of the RMSNorm, from the first token on: the features are positive, and their
    products not small."""
    for name in ("elu", "hedgehog"):
        mixer, x, _, _ = test_mixers.make("linear_attention", length=50, linear_feature_map=name)
        mixer.feature_map_q.init_weights()
        mixer.feature_map_k.init_weights()
        q, k, v = mixer.qkv(0.3 * x)
        q, k = mixer.feature_map_q(q), mixer.feature_map_k(k)
        scale = mixer.options()["scale"] or q.shape[-1] ** -0.5
        weights = scale * torch.einsum("bihk,bjhk->bhij", q, k).tril()
        assert (weights >= 0).all()
        plain, normalised = weights, weights / weights.sum(-1, keepdim=True)
        outs = [mixer.norm((w @ v.transpose(1, 2)).transpose(1, 2)) for w in (plain, normalised)]
        assert_close_rms(*outs, 1e-3)


def test_elu_in_bfloat16_keeps_small_values():
    x = torch.tensor([-6.0, -0.1, 0.0, 2.0], dtype=torch.bfloat16)
    expected = torch.where(x > 0, x.float() + 1, x.float().exp())
    torch.testing.assert_close(feature_map("elu", 4)(x).float(), expected, rtol=2**-8, atol=0)


def test_slope_of_elu():
    x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    feature_map("elu", 3)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([-1.0, 0.0, 0.0]).exp())


def test_hedgehog_starts_as_a_softmax_of_both_signs():
    maps = feature_map("hedgehog", 5)
    maps.init_weights()
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    both = torch.cat([(2 * x).exp(), (-2 * x).exp()], -1)
    torch.testing.assert_close(maps(x), both / both.sum(-1, keepdim=True))


def test_unknown_map_is_refused():
    with pytest.raises(ValueError, match="'relu' found"):
        feature_map("relu", 4)
