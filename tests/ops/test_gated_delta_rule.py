"""The gated delta rule: chunk = naive = step = the paper's formula = transformers' own."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from kit import TOLERANCE, assert_close_rms

from ops.gated_delta_rule import (
    chunk_gated_delta_rule,
    naive_gated_delta_rule,
    step_gated_delta_rule,
)

LENGTHS = (1, 63, 64, 65, 100)
NAMES = ("q", "k", "v", "g", "beta", "initial_state")
# Odd bounds, a document longer than a chunk, one of one token, padded by repeats at the end.
BOUNDS = [0, 1, 38, 103, 110, 131, 131, 131]


def make(length, *, batch=2, states=None, dtype=torch.float64, seed=0, decay=1.0):
    """q, k [B, T, 3, 8], v [B, T, 3, 5], g, beta, and a state for each of `states`."""
    torch.manual_seed(seed)
    shape = (batch, length, 3)
    q, k = (F.normalize(torch.randn(*shape, 8, dtype=torch.float64), dim=-1) for _ in "qk")
    v = torch.randn(*shape, 5, dtype=torch.float64)
    g = decay * F.logsigmoid(torch.randn(shape, dtype=torch.float64) + 2)
    beta = torch.randn(shape, dtype=torch.float64).sigmoid()
    state = torch.randn(states or batch, 3, 8, 5, dtype=torch.float64)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(dtype).requires_grad_() for x in (q, k, v, g, beta)] + [
        state.to(state_dtype).requires_grad_()
    ]


def paper(q, k, v, g, beta, state, scale):
    """Equation 10 in the paper's layout, S [V, K]: S = S (a (I - b k k^T)) + b v k^T, o = S q."""
    s, outs = state.mT, []
    for t in range(q.shape[1]):
        column = k[:, t, :, :, None]
        b = beta[:, t, :, None, None]
        s = g[:, t, :, None, None].exp() * (s - b * (s @ column) @ column.mT)
        s = s + b * v[:, t, :, :, None] @ column.mT
        outs.append(scale * (s @ q[:, t, :, :, None])[..., 0])
    return torch.stack(outs, 1), s.mT


def loop_of_steps(q, k, v, g, beta, *, initial_state, **_):
    outs, state = [], initial_state
    for t in range(q.shape[1]):
        tokens = (x[:, t] for x in (q, k, v, g, beta))
        o, state = step_gated_delta_rule(*tokens, initial_state=state)
        outs.append(o)
    return torch.stack(outs, 1), state


def run(op, inputs, **kwargs):
    """Outputs and the gradients of a random function of both."""
    o, state = op(*inputs[:5], initial_state=inputs[5], output_final_state=True, **kwargs)
    loss = probe(o) + probe(state)
    return [o, state, *torch.autograd.grad(loss, inputs)]


def probe(x):
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return (x.double() * weight).sum()


def compare(actual, expected, tol=None):
    for what, a, b in zip(("o", "state", *NAMES), actual, expected, strict=True):
        assert_close_rms(a, b, tol, what)


def reference(inputs, scale=8**-0.5):
    inputs = [x.detach().double().requires_grad_() for x in inputs]
    o, state = paper(*inputs, scale)
    return [o, state, *torch.autograd.grad(probe(o) + probe(state), inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("op", [naive_gated_delta_rule, chunk_gated_delta_rule, loop_of_steps])
def test_every_form_is_the_formula(op, length, dtype):
    inputs = make(length, dtype=dtype)
    compare(run(op, inputs), reference(inputs))


@pytest.mark.parametrize("chunk_size", [16, 24, 128])
def test_chunk_size_does_not_matter(chunk_size):
    inputs = make(100)
    compare(run(chunk_gated_delta_rule, inputs, chunk_size=chunk_size), reference(inputs))


@pytest.mark.parametrize("op", [naive_gated_delta_rule, chunk_gated_delta_rule])
def test_scale_and_absent_states(op):
    inputs = make(70)
    expected, _ = paper(*inputs[:5], torch.zeros_like(inputs[5]), 0.7)
    o, state = op(*inputs[:5], scale=0.7)
    assert state is None
    assert_close_rms(o, expected)


@pytest.mark.parametrize("op", [naive_gated_delta_rule, chunk_gated_delta_rule])
def test_packed_documents_without_states_are_each_alone(op):
    """For `chunk` this is the masked path, where documents share chunks."""
    inputs = make(BOUNDS[-1], batch=1)[:5]
    o, state = op(*inputs, cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32))
    assert state is None
    actual = [o, *torch.autograd.grad(probe(o), inputs)]
    zero = torch.zeros(1, 3, 8, 5, dtype=torch.float64)
    alone = [
        paper(*(x[:, a:b] for x in inputs), zero, 8**-0.5)[0]
        for a, b in itertools.pairwise(BOUNDS)
        if b > a
    ]
    o = torch.cat(alone, 1)
    expected = [o, *torch.autograd.grad(probe(o), inputs)]
    for what, a, b in zip(("o", *NAMES), actual, expected, strict=False):
        assert_close_rms(a, b, what=what)


def test_packed_at_random_bounds():
    """Document ends on chunk borders, before and after them; empty documents in the middle."""
    torch.manual_seed(0)
    for seed in range(12):
        inputs = make(70, batch=1, seed=seed)[:5]
        ends = torch.randint(1, 70, (5,)).sort().values.tolist()
        bounds = torch.tensor([0, *(16 * (e // 16) if seed % 2 else e for e in ends), 70])
        for size in (16, 64):
            o, _ = chunk_gated_delta_rule(*inputs, cu_seqlens=bounds, chunk_size=size)
            assert_close_rms(o, naive_gated_delta_rule(*inputs, cu_seqlens=bounds)[0], what=bounds)


@pytest.mark.parametrize("op", [naive_gated_delta_rule, chunk_gated_delta_rule])
def test_one_state_per_packed_document(op):
    inputs = make(BOUNDS[-1], batch=1, states=len(BOUNDS) - 1)
    actual = run(op, inputs, cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32))
    outs, states = [], []
    for i, (a, b) in enumerate(itertools.pairwise(BOUNDS)):
        state = inputs[5][i : i + 1]
        if b > a:
            o, state = paper(*(x[:, a:b] for x in inputs[:5]), state, 8**-0.5)
            outs.append(o)
        states.append(state)
    o, state = torch.cat(outs, 1), torch.cat(states)
    compare(actual, [o, state, *torch.autograd.grad(probe(o) + probe(state), inputs)])


@pytest.mark.parametrize("op", [naive_gated_delta_rule, chunk_gated_delta_rule])
@pytest.mark.parametrize("cut", [1, 64, 77])
def test_carried_state(op, cut):
    inputs = make(100)

    def two_calls(*tensors, initial_state, output_final_state):
        first, state = op(
            *(x[:, :cut] for x in tensors), initial_state=initial_state, output_final_state=True
        )
        second, state = op(
            *(x[:, cut:] for x in tensors), initial_state=state, output_final_state=True
        )
        return torch.cat([first, second], 1), state

    compare(run(two_calls, inputs), run(op, inputs))


@pytest.mark.parametrize("length", [1, 65, 100])
def test_equals_transformers(length):
    qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    inputs = make(length, dtype=torch.float32)
    actual = run(chunk_gated_delta_rule, inputs)
    compare(actual, run(qwen.torch_recurrent_gated_delta_rule, inputs))
    compare(actual, run(qwen.torch_chunk_gated_delta_rule, inputs))


@pytest.mark.parametrize("op", [naive_gated_delta_rule, chunk_gated_delta_rule])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("g", [-50.0, 0.0, "mixed"])
def test_extreme_decays(op, packed, g):
    inputs = make(100, batch=1, dtype=torch.float32)
    mixed = torch.where(torch.rand(1, 100, 3) < 0.3, -50.0, 0.0)
    inputs[3] = (mixed if g == "mixed" else torch.full((1, 100, 3), g)).requires_grad_()
    bounds = [0, 30, 100] if packed else [0, 100]
    state = torch.zeros(1, 3, 8, 5, dtype=torch.float64)
    double = [x.detach().double().requires_grad_() for x in inputs[:5]]
    pieces = [
        paper(*(x[:, a:b] for x in double), state, 8**-0.5)[0]
        for a, b in itertools.pairwise(bounds)
    ]
    expected = torch.cat(pieces, 1)
    o, _ = op(*inputs[:5], cu_seqlens=torch.tensor(bounds) if packed else None)
    assert_close_rms(o, expected)
    wanted = torch.autograd.grad(probe(expected), double)
    for what, a, b in zip(NAMES, torch.autograd.grad(probe(o), inputs[:5]), wanted, strict=False):
        assert a.isfinite().all(), what
        if b.abs().max() > 1e-9:  # with g = -50 throughout, g itself has no gradient left
            assert_close_rms(a, b, what=what)


@pytest.mark.parametrize("op", [naive_gated_delta_rule, chunk_gated_delta_rule])
def test_bfloat16_keeps_a_float32_state(op):
    inputs = make(100, dtype=torch.bfloat16)
    o, state = op(*inputs[:5], initial_state=inputs[5], output_final_state=True)
    assert o.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    expected_o, expected_state = paper(*(x.detach().double() for x in inputs), 8**-0.5)
    assert_close_rms(o, expected_o)
    # Rounding q * scale is all that bfloat16 may cost: the state never saw it.
    assert_close_rms(state, expected_state, TOLERANCE[torch.float32])


@pytest.mark.parametrize("op", [naive_gated_delta_rule, chunk_gated_delta_rule, loop_of_steps])
def test_autocast_changes_nothing(op):
    inputs = make(100, dtype=torch.float32)
    plain = run(op, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = op(*inputs[:5], initial_state=inputs[5], output_final_state=True)
    assert torch.equal(o, plain[0])
    assert torch.equal(state, plain[1])


@pytest.mark.parametrize("op", [naive_gated_delta_rule, chunk_gated_delta_rule])
def test_strictly_causal_and_reaches_every_later_token(op):
    inputs = [x.detach() for x in make(100, batch=1)]
    before, _ = op(*inputs[:5])
    for i, t in itertools.product((1, 2, 3, 4), (3, 63, 64, 80)):  # k, v, g, beta
        changed = [x.clone() for x in inputs[:5]]
        changed[i][:, t] *= 0.5
        moved = (op(*changed)[0] - before).abs().amax((0, 2, 3))
        assert moved[:t].max() < 1e-14, (NAMES[i], t)
        assert moved[t:].min() > 1e-13, (NAMES[i], t)


@pytest.mark.parametrize("length", [48, 64, 75])
def test_rows_side_by_side_equal_one_long_row(length):
    """Packed rows of equal length give the same for rows=1 and rows=3, gradients included."""
    torch.manual_seed(length)
    bounds = [0, 5, length, length + 20, 2 * length, 3 * length, 3 * length, 3 * length]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    shape = (1, 3 * length, 2)
    q, k, v = (torch.randn(*shape, 8, dtype=torch.float64) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    g, beta = -torch.rand(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, g, beta)]
    weight = torch.randn(*shape, 8, dtype=torch.float64)
    results = []
    for rows in (1, 3):
        o, _ = chunk_gated_delta_rule(*inputs, cu_seqlens=cu_seqlens, rows=rows)
        results.append([o, *torch.autograd.grad((o * weight).sum(), inputs)])
    for one, side_by_side in zip(*results, strict=True):
        assert_close_rms(side_by_side, one)
