"""RMSNorm, RoPE, short convolution, the softmax-attention paths, and the cache."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from kit import TOLERANCE, assert_close_rms, tiny_config

from cache import Cache
from layers import (
    RMSNorm,
    SeqInfo,
    ShortConvolution,
    apply_rope,
    attention_kernel,
    cached_attention,
    causal_mask,
    last_tokens,
    project,
    rope_frequencies,
    softmax_attention,
    token_shift,
)

BOUNDS = [0, 1, 3, 20, 27, 27]
WINDOWS = (0, 2, 5, 100)


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def sequence(length, bounds=None, *, masked=False):
    """A SeqInfo for softmax_attention alone: documents, but no rotations."""
    zero = torch.zeros(1, length, 1, 1)
    if bounds is None:
        return SeqInfo(torch.arange(length)[None], zero, zero)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    doc = torch.searchsorted(cu_seqlens, torch.arange(length), right=True)
    return SeqInfo(
        (torch.arange(length) - cu_seqlens[doc - 1])[None], zero, zero, cu_seqlens, length,
        tuple(b - a for a, b in itertools.pairwise(bounds) if b > a),
        doc[:, None] == doc[None] if masked else None,
    )  # fmt: skip


def make_qkv(length, *, batch=1, dtype=torch.float64, seed=0):
    """q [B, T, 6, 8] and k, v [B, T, 2, 8]."""
    shapes = ((batch, length, h, 8) for h in (6, 2, 2))
    return [randn(*s, seed=seed + i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes)]


def attend(q, k, v, window=0, sink=None):
    """By the definition, one query at a time; the sink as out * sigmoid(lse - s)."""
    rows = []
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    for t in range(q.shape[1]):
        first = max(0, t + 1 - window) if window else 0
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, first : t + 1]) / q.shape[-1] ** 0.5
        out = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, first : t + 1])
        if sink is not None:
            out = out * (scores.logsumexp(-1) - sink).sigmoid()[..., None]
        rows.append(out)
    return torch.stack(rows, 1)


def compare(actual, expected, inputs, tol=None):
    """Values, and the gradients of a random function of them."""
    assert_close_rms(actual, expected, tol)
    weight = randn(*actual.shape, seed=9)
    grads = [torch.autograd.grad((x.double() * weight).sum(), inputs) for x in (actual, expected)]
    for i, (a, b) in enumerate(zip(*grads, strict=True)):
        assert_close_rms(a, b, tol, f"gradient of input {i}")


# ---- norm and positions


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rms_norm_equals_torch(dtype):
    norm = RMSNorm(10, 1e-3).double()
    with torch.no_grad():
        norm.weight.copy_(randn(10))
    x = (0.02 * randn(3, 7, 10)).to(dtype).requires_grad_()  # small, so that eps matters
    actual = norm(x)
    assert actual.dtype == dtype
    expected = F.rms_norm(x.double(), (10,), norm.weight.double(), 1e-3)
    compare(actual, expected, [x, norm.weight], TOLERANCE[dtype])


def llama3(factor):
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_equals_transformers(theta, factor):
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = tiny_config(head_dim=64, rope_theta=theta, rope_scaling=llama3(factor))
    peer = LlamaConfig(
        head_dim=64, rope_parameters={**llama3(factor), "rope_theta": theta},
        max_position_embeddings=4096,
    )  # fmt: skip
    expected, scale = ROPE_INIT_FUNCTIONS["llama3"](peer, "cpu")
    assert scale == 1.0
    actual = rope_frequencies(config)
    torch.testing.assert_close(actual, expected)
    plain = rope_frequencies(tiny_config(head_dim=64, rope_theta=theta))
    kept, slowed = (actual == plain).sum(), (actual == plain / factor).sum()
    assert kept > 0 and slowed > 0 and kept + slowed < 32, "all three regimes must occur"


def test_apply_rope_rotates_pairs_half_a_head_apart():
    config = tiny_config(head_dim=8)
    positions = torch.tensor([0, 1, 7])
    angles = positions[:, None] * rope_frequencies(config).double()
    x = randn(1, 3, 2, 8)
    actual = apply_rope(x, angles.cos()[None, :, None], angles.sin()[None, :, None])
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles)[None, :, None]
    assert_close_rms(actual, torch.cat([pairs.real, pairs.imag], -1))


# ---- short convolution


def make_conv(taps):
    conv = ShortConvolution(5, taps).double()
    torch.nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(2))
    return conv


@pytest.mark.parametrize("taps", [1, 4])
def test_short_convolution_carries_its_inputs(taps):
    """Also in pieces shorter than what is held."""
    conv, x = make_conv(taps), randn(2, 17, 5)
    outs, held = [], None
    for a, b in itertools.pairwise((0, 1, 2, 4, 11, 17)):
        outs.append(conv(x[:, a:b], sequence(b - a), held))
        held = last_tokens(x[:, a:b], taps - 1, sequence(b - a), held)
        assert held.shape == (2, taps - 1, 5)
    assert_close_rms(torch.cat(outs, 1), conv(x, sequence(17)))


def test_token_shift_and_last_tokens_of_documents():
    x = randn(1, 27, 5)
    moved, last = (
        token_shift(x, sequence(27, BOUNDS)),
        last_tokens(x, 3, sequence(27, BOUNDS), None),
    )
    for i, (a, b) in enumerate(itertools.pairwise(BOUNDS)):
        alone = F.pad(x[:, a:b], (0, 0, 3, 0))
        assert torch.equal(last[i], alone[0, -3:])
        assert torch.equal(moved[:, a:b], alone[:, 2:-1])
    whole = token_shift(x, sequence(27))
    held = last_tokens(x[:, :9], 1, sequence(9), None)
    assert torch.equal(token_shift(x[:, 9:], sequence(18), held), whole[:, 9:])


# ---- softmax attention


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_is_its_definition(window, dtype):
    inputs = make_qkv(27, batch=2, dtype=dtype)
    actual = softmax_attention(*inputs, sequence(27), window=window)
    assert actual.dtype == dtype
    compare(actual, attend(*(x.double() for x in inputs), window=window), inputs)


@pytest.mark.parametrize("window", [1, 5, 64])
def test_window_is_hugging_faces(window):
    pytest.importorskip("transformers")
    from transformers.masking_utils import sliding_window_causal_mask_function

    allowed = sliding_window_causal_mask_function(window)
    for length in (1, 5, 6, 70):
        time = torch.arange(length)
        expected = allowed(0, 0, time[:, None], time[None])
        assert torch.equal(causal_mask(length, length, window, "cpu"), expected.expand(length, -1))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sink", [False, True])
def test_prefix_does_not_change_with_the_length(window, sink):
    inputs = [x.detach() for x in make_qkv(27)]
    sink = randn(6) if sink else None
    whole = softmax_attention(*inputs, sequence(27), window=window, sink=sink)
    for n in range(1, 27):
        part = (x[:, :n] for x in inputs)
        alone = softmax_attention(*part, sequence(n), window=window, sink=sink)
        assert_close_rms(alone, whole[:, :n])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_sink_is_the_output_times_a_sigmoid(dtype, window, packed):
    """The reference is autograd's, through the log-sum-exp, which SDPA's own lacks."""
    inputs = [*make_qkv(27, dtype=dtype), (2 * randn(6, seed=5)).requires_grad_()]
    bounds = BOUNDS if packed else [0, 27]
    seq = sequence(27, BOUNDS, masked=True) if packed else sequence(27)
    actual = softmax_attention(*inputs[:3], seq, window=window, sink=inputs[3])
    double = [x.double() for x in inputs]
    expected = torch.cat(
        [
            attend(*(x[:, a:b] for x in double[:3]), window=window, sink=double[3])
            for a, b in itertools.pairwise(bounds)
            if b > a
        ],
        1,
    )
    compare(actual, expected, inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("compiled", [False, True], ids=["segments", "masked"])
def test_packed_documents_are_each_alone(window, compiled):
    inputs = make_qkv(27)
    kernel = attention_kernel(
        torch.device("cpu"), torch.float64, packed=True, sink=False, compiled=compiled
    )
    assert kernel == ("masked" if compiled else "segments")
    seq = sequence(27, BOUNDS, masked=compiled)
    actual = softmax_attention(*inputs, seq, window=window, compiled=compiled)
    alone = [
        attend(*(x[:, a:b] for x in inputs), window=window)
        for a, b in itertools.pairwise(BOUNDS)
        if b > a
    ]
    compare(actual, torch.cat(alone, 1), inputs)


# ---- cache


def calls(cuts, batch, cache=None):
    """(a, b, SeqInfo) of calls on a cache that is advanced after each."""
    cache = Cache(1) if cache is None else cache
    for a, b in itertools.pairwise(cuts):
        seq = sequence(b - a)
        if cache.lengths is not None:
            where = cache.lengths[:, None] + torch.arange(b - a)
            seq = seq._replace(
                positions=where, past=cache.lengths, held=cache.longest, even=cache.even
            )
        yield a, b, seq, cache[0]
        cache.advance(batch, b - a, None, "cpu")


@pytest.mark.parametrize("window", [1, *WINDOWS])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_decode_sees_what_prefill_sees(window, sink, static):
    """One token at a time, and several at once onto a cache that holds something."""
    q, k, v = (x.detach() for x in make_qkv(27, batch=2))
    sink = randn(6) if sink else None
    expected = attend(q, k, v, window=window, sink=sink)
    outs = []
    for a, b, seq, cache in calls((0, 1, 2, 9, 10, 11, 16, 27), 2, Cache(1, 27, static)):
        parts = (x[:, a:b] for x in (q, k, v))
        if not a:
            cache.fill(k[:, a:b], v[:, a:b], seq, window)
            outs.append(softmax_attention(*parts, seq, window=window, sink=sink))
        else:
            held = cache.append(k[:, a:b], v[:, a:b], seq, window)
            outs.append(cached_attention(q[:, a:b], *held, sink))
    assert_close_rms(torch.cat(outs, 1), expected)


@pytest.mark.parametrize("window", [1, *WINDOWS])
@pytest.mark.parametrize("sink", [False, True])
def test_rows_of_different_length(window, sink):
    """Packed prompts become the rows of a cache; each then sees its own past only."""
    lengths, more = (9, 1, 4), 8
    q, k, v = (x.detach() for x in make_qkv(max(lengths) + more, batch=3))
    sink = randn(6) if sink else None
    expected = attend(q, k, v, window=window, sink=sink)
    bounds = list(itertools.accumulate(lengths, initial=0))
    prompts = [torch.cat([x[i, :n] for i, n in enumerate(lengths)])[None] for x in (q, k, v)]
    cache, seq = Cache(1), sequence(bounds[-1], bounds)._replace(max_seqlen=max(lengths))
    cache[0].fill(*prompts[1:], seq, window)
    cache.advance(1, bounds[-1], seq.cu_seqlens, "cpu")
    assert (cache.longest, cache.even, cache.lengths.tolist()) == (9, False, list(lengths))
    row = torch.arange(3)[:, None]
    for _, _, seq, layer in calls((0, 1, 2, 5, 6), 3, cache):
        parts = [x[row, seq.positions] for x in (q, k, v)]
        out = cached_attention(parts[0], *layer.append(*parts[1:], seq, window), sink)
        assert_close_rms(out, expected[row, seq.positions])


def test_cache_grows_and_keeps_everything():
    k, v = randn(2, 300, 3, 4), randn(2, 300, 3, 4, seed=1)
    capacities = set()
    for a, b, seq, cache in calls((0, 5, 6, 63, 64, 65, 66, 200, 300), 2):
        if not a:
            cache.fill(k[:, a:b], v[:, a:b], seq, 0)
        else:
            keys, values, _ = cache.append(k[:, a:b], v[:, a:b], seq, 0)
            assert torch.equal(keys, k[:, :b])
            assert torch.equal(values, v[:, :b])
        capacities.add(cache.k.shape[2])
    assert capacities == {64, 128, 256, 512}  # few reallocations


def test_window_cache_holds_a_window():
    k, v = randn(1, 300, 3, 4), randn(1, 300, 3, 4, seed=1)
    for cuts in ((0, 300), (0, 2, 9, 10, 300), range(40)):
        whole = Cache(1)
        for a, b, seq, cache in calls(cuts, 1, whole):
            add = cache.fill if not a else cache.append
            add(k[:, a:b], v[:, a:b], seq, 7)
        order = torch.arange(b - 7, b) % 7
        assert torch.equal(cache.k[:, :, order], k[:, b - 7 : b].transpose(1, 2))
        assert torch.equal(cache.v[:, :, order], v[:, b - 7 : b].transpose(1, 2))
        held = cache.k.untyped_storage().nbytes() + cache.v.untyped_storage().nbytes()
        assert held == whole.num_bytes() == 2 * 7 * 3 * 4 * 8


@pytest.mark.parametrize(("bias", "sizes"), [(False, (24, 8, 8)), (True, (24, 8, 8)), (False, (3,)),
                                             (False, (24, 9, 7))])  # fmt: skip
def test_projections_are_joined_where_weights_are_cast(bias, sizes):
    linears = torch.nn.ModuleList(torch.nn.Linear(16, size, bias=bias) for size in sizes)
    x = torch.randn(2, 5, 16).bfloat16()

    def apart(x, *linears):
        return torch.cat([linear(x) for linear in linears], -1)

    def grads(run, amp):
        linears.zero_grad()
        inner = (x if amp else x.float()).clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = run(inner, *linears)
        if out is None:
            return None
        (out.float() * torch.arange(sum(sizes))).sin().sum().backward()
        return [out, inner.grad, *(p.grad for p in linears.parameters())]

    compiled = torch.compile(project, backend="aot_eager")
    found, plain, exact = grads(compiled, True), grads(apart, True), grads(apart, False)
    for a, b, c in zip(found, plain, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - c).norm() < max(0.02 * c.norm(), 1.5 * (b - c).norm())
    assert grads(compiled, False) is None  # nothing is cast: each weight stays where it is
    assert grads(project, True) is None
