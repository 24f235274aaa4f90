"""The LoLCATs mixer: its formula, its teacher's attention inside the window, short windows."""

from __future__ import annotations

from functools import partial

import kit
import pytest
import test_mixers
import torch
from kit import assert_close_rms, gradients, randomise, tiny_config
from test_mixers import BOUNDS, TEACHERS, converted, make

from cache import Cache
from config import UserError
from hybrid_layers import build_mixer, check_transfer, convert_layers
from layers import Attention, apply_rope
from ops.kernels import resolve_kernel

every_teacher = pytest.mark.parametrize("teacher", TEACHERS.values(), ids=TEACHERS)


def formula(mixer, x, seq, branches=("window", "linear")):
    """The equation over a full [T, T] of weights, one head at a time."""
    length, outs = x.shape[1], []
    q, k, v = (p(x).unflatten(-1, (4, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if mixer.q_norm is not None:
        size = q.shape[-1:]
        q = torch.nn.functional.rms_norm(q, size, mixer.q_norm.weight, mixer.q_norm.eps)
        k = torch.nn.functional.rms_norm(k, size, mixer.k_norm.weight, mixer.k_norm.eps)
    q, k = apply_rope(q, seq.cos, seq.sin), apply_rope(k, seq.cos, seq.sin)
    ahead = torch.arange(length)[:, None] - torch.arange(length)
    inside = (ahead >= 0) & (ahead < mixer.window)
    for h in range(4):
        q_h, k_h = q[:, :, h], k[:, :, h]
        near = (q_h @ k_h.mT / q.shape[-1] ** 0.5).masked_fill(~inside, -torch.inf)
        near = (near - near.max(-1, keepdim=True).values).exp()
        phi = [
            torch.cat([torch.softmax(s * t @ m.weight[h], -1) for s in (1, -1)], -1)
            for t, m in ((q_h, mixer.feature_map_q), (k_h, mixer.feature_map_k))
        ]
        far = phi[0] @ phi[1].mT * (ahead >= mixer.window)
        near = torch.sigmoid(mixer.window_factors[h]) * near
        if "window" not in branches:  # but where there is nothing else
            near = near * (far.sum(-1, keepdim=True) == 0)
        weights = near + far * ("linear" in branches)
        outs.append(weights @ v[:, :, h] / weights.sum(-1, keepdim=True))
    return mixer.o_proj(torch.cat(outs, -1))


@pytest.mark.parametrize("shape", [{"qk_norm": False, "linear_bias": True}, {"qk_norm": True}])
@pytest.mark.parametrize("window", [1, 5, 64])
def test_is_its_formula(window, shape):
    mixer, x, seq, _ = make("hedgehog_window", length=67, linear_window=window, **shape)
    actual, expected = mixer(x, seq), formula(mixer, x, seq)
    assert_close_rms(actual, expected)
    wanted = gradients(expected.square().sum(), mixer)
    for what, gradient in gradients(actual.square().sum(), mixer).items():
        assert_close_rms(gradient, wanted[what], 1e-8, what)


@pytest.mark.parametrize("branch", ["window", "linear"])
def test_a_branch_alone(branch):
    """Training form and decoding alike."""
    mixer, x, seq, _ = make("hedgehog_window", length=67, linear_window=5)
    expected = formula(mixer, x, seq, [branch])
    mixer.branch = branch
    assert_close_rms(mixer(x, seq), expected)
    mixer.kernel = "naive"
    assert_close_rms(mixer(x, seq), expected)


def test_parameters():
    mixer, *_ = make("hedgehog_window", length=1, qk_norm=False, linear_bias=False)
    shapes = {n: tuple(p.shape) for n, p in mixer.named_parameters() if "proj" not in n}
    maps = {f"feature_map_{x}.weight": (4, 8, 8) for x in "qk"}
    assert shapes == {**maps, "window_factors": (4,)}


@every_teacher
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_window_as_long_as_the_context_is_the_teacher(teacher, dtype):
    """Packed documents and long rows, after the transfer and whatever the maps are."""
    attention, mixer, _ = converted("hedgehog_window", linear_window=70, **teacher)
    attention, mixer = attention.to(dtype), mixer.to(dtype)
    torch.nn.init.normal_(mixer.feature_map_q.weight)
    torch.nn.init.normal_(mixer.window_factors)
    tol = 1e-6 if dtype == torch.float32 else 1e-12
    model = kit.tiny_model("F", dtype=dtype)
    for bounds in (None, BOUNDS):
        length = 70 if bounds is None else BOUNDS[-1]
        cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, length, 24, generator=generator, dtype=dtype)
        seq = model.seq_info(length, cu_seqlens=cu_seqlens)
        assert_close_rms(mixer(x, seq), attention(x, seq), tol)


@every_teacher
def test_tokens_whose_past_fits_the_window_are_the_teachers(teacher):
    attention, mixer, _ = converted("hedgehog_window", linear_window=11, **teacher)
    x = torch.randn(1, 40, 24, generator=torch.Generator().manual_seed(0))
    seq = kit.tiny_model("F", dtype=torch.float32).seq_info(40)
    actual, expected = mixer(x, seq), attention(x, seq)
    assert_close_rms(actual[:, :11], expected[:, :11], 1e-6)
    assert kit.rms_ratio(actual[:, 11:], expected[:, 11:]) > 0.01


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_converted_model_with_a_wide_window_has_the_teachers_logits(qk_norm):
    teacher = kit.tiny_model("FFF", dtype=torch.float32, qk_norm=qk_norm, linear_window=32)
    student = convert_layers(teacher, [0, 2], mixer="hedgehog_window")
    ids = kit.random_ids(teacher, 2, 32)
    check_transfer(teacher, student, [0, 2], ids)
    assert_close_rms(kit.logits(student, ids), kit.logits(teacher, ids), 1e-5)
    cache = student.new_cache()
    steps = [student(part, cache=cache) for part in ids.split([20, *[1] * 12], 1)]
    assert_close_rms(torch.cat(steps, 1), teacher(ids), 1e-5)


def test_start_of_the_transfer():
    mixer = converted("hedgehog_window")[1]
    assert (mixer.window_factors.sigmoid() == 0.5).all()
    for maps in (mixer.feature_map_q, mixer.feature_map_k):
        assert torch.equal(maps.weight, torch.eye(8).expand(4, 8, 8))


def test_calibrate_changes_nothing():
    attention, mixer, config = converted("hedgehog_window", linear_window=5)
    before = {n: p.clone() for n, p in mixer.named_parameters()}
    x = torch.randn(1, 40, config.hidden_size, generator=torch.Generator().manual_seed(0))
    seq = kit.tiny_model("F", dtype=torch.float32).seq_info(40)
    with torch.no_grad():
        target = attention(x, seq)
        error = mixer.calibrate(x, target, seq)
        assert abs(error - kit.rms_ratio(mixer(x, seq), target)) < 1e-6
    assert all(torch.equal(p, before[n]) for n, p in mixer.named_parameters())


SHORT = [
    *((test_mixers.test_prefill_and_decode_is_the_full_forward, (False, n)) for n in (1, 2, 66)),
    (test_mixers.test_packed_documents_are_each_alone, (False,)),
    (test_mixers.test_strictly_causal_and_reaches_every_later_token, (False,)),
    (test_mixers.test_memory_does_not_grow_with_the_context, ()),
    (test_mixers.test_bfloat16_autocast_stays_near_float32, ()),
]


@pytest.mark.parametrize("window", [1, 4, 66])
@pytest.mark.parametrize("check, args", SHORT)
def test_generic_with_other_windows(window, check, args, monkeypatch):
    """Decoding crosses the window's end inside the prompt, at its end, and after it."""
    monkeypatch.setattr(kit, "tiny_config", partial(tiny_config, linear_window=window))
    assert make("hedgehog_window", length=3)[0].window == window
    check("hedgehog_window", *args)


def test_static_cache_and_packed_prompts():
    """The state is updated in place, and documents become rows of the batch."""
    mixer, x, seq, model = make("hedgehog_window", cu_seqlens=[0, 2, 9, 20], linear_window=4)
    more = torch.randn(3, 6, 24, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    cache, outs = Cache(1, 40, static=True), []
    with torch.no_grad():
        mixer(x, seq, cache[0])
        cache.advance(1, 20, seq.cu_seqlens, x.device)
        held = [t.data_ptr() for t in cache[0].tensors()]
        for t in range(6):
            info = model.seq_info(1, cache=cache)
            outs.append(mixer(more[:, t : t + 1], info, cache[0]))
            cache.advance(3, 1, None, x.device)
        assert held == [t.data_ptr() for t in cache[0].tensors()]
        for row, (a, b) in enumerate([(0, 2), (2, 9), (9, 20)]):
            whole = torch.cat([x[:, a:b], more[row : row + 1]], 1)
            expected = mixer(whole, model.seq_info(whole.shape[1]))[:, -6:]
            assert_close_rms(torch.cat(outs, 1)[row : row + 1], expected)


def test_refuses_what_it_cannot_be():
    config = tiny_config("L", mixer=["hedgehog_window"], linear_key_head_dim=6)
    with pytest.raises(UserError, match="linear_key_head_dim: 6 found"):
        build_mixer("hedgehog_window", config)
    attention = randomise(Attention(tiny_config("F", qk_norm=True), 0))
    mixer = build_mixer("hedgehog_window", tiny_config("L", qk_norm=False))
    with pytest.raises(ValueError, match="qk_norm"):
        mixer.from_attention(attention)
    assert resolve_kernel("auto", torch.device("cpu"), type(mixer)) == "chunk"
    assert "fla" not in mixer.kernels
