"""Retention against the pieces of fla's layer."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from kit import assert_close_rms, gradients, tiny_config
from test_mixers import make

from config import UserError
from hybrid_layers import build_mixer
from mixers.retention import log_gamma


@pytest.mark.parametrize("length", [1, 67])
def test_equals_flas_layer(length):
    """Names and shapes by loading them, the numbers from its parts that run on a CPU."""
    pytest.importorskip("fla")
    from fla.layers import MultiScaleRetention
    from fla.modules.rotary.ops import rotary_embedding_ref
    from fla.ops.retention.naive import naive_retention

    mixer, x, seq, model = make(
        "retention", length=length, dtype=torch.float32, linear_value_head_dim=12, head_dim=6
    )
    assert model.config.rope_theta == 10000
    layer = MultiScaleRetention(
        hidden_size=24, num_heads=4, expand_k=1, expand_v=2, norm_eps=mixer.eps
    )
    layer.load_state_dict(mixer.state_dict(), strict=True)
    q, k, v = (p(x).unflatten(-1, (4, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    frequencies = 1 / layer.rotary.base ** (torch.arange(0, 6, 2) / 6)
    angles = torch.arange(length)[:, None] * frequencies
    q, k = (rotary_embedding_ref(t, angles.cos(), angles.sin()) for t in (q, k))
    o = naive_retention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    norm = layer.g_norm_swish_gate
    o = F.rms_norm(o, (12,), norm.weight, norm.eps)
    o = o * F.silu(layer.g_proj(x)).unflatten(-1, (4, -1))
    actual, expected = mixer(x, seq), layer.o_proj(o.flatten(-2))
    assert_close_rms(actual, expected)
    if length == 1:  # one token's scores are one factor, which the norm takes out
        return
    wanted = gradients(expected.square().sum(), layer)
    for what, gradient in gradients(actual.square().sum(), mixer).items():
        assert_close_rms(gradient, wanted[what], what=what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_decay_is_exact_for_many_heads(dtype):
    found = log_gamma(40, torch.zeros(1, dtype=dtype))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for h, g in enumerate(found.tolist()):
        exact = -sum(float(Fraction(1, 2 ** (5 + h)) ** n) / n for n in range(1, 14))  # the series
        assert math.isclose(g, exact, rel_tol=1e-12 if dtype == torch.float64 else 2e-7), h


def test_decay_is_no_parameter():
    mixer, x, seq, _ = make("retention", length=5)
    names = {name.split(".")[0] for name in mixer.state_dict()}
    assert names == {"q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "g_norm_swish_gate"}
    g = mixer.inputs(x, seq, {}, False)[0]["g"]
    assert g.shape == (1, 5, 4)
    torch.testing.assert_close(g[0, 3].exp(), 1 - 2.0 ** -(5 + torch.arange(4.0).double()))


def test_rope_is_always_on():
    results = []
    for rope in (False, True):
        mixer, x, seq, _ = make("retention", length=9, linear_rope=rope)
        results.append(mixer(x, seq))
    assert torch.equal(*results)
    still = seq._replace(cos=torch.ones_like(seq.cos), sin=torch.zeros_like(seq.sin))
    assert (mixer(x, still) - results[0]).abs().max() > 0.01


def test_other_key_sizes_are_refused():
    config = tiny_config("L", mixer=["retention"], linear_key_head_dim=6)
    with pytest.raises(UserError, match="linear_key_head_dim: 6 found"):
        build_mixer("retention", config)
