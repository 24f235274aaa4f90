"""Every recurrence: chunk = naive = step = the paper's formula; states, documents, causality."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CASES, draw
from kit import TOLERANCE, assert_close_rms

LENGTHS = (1, 63, 64, 65, 100)
# Odd bounds, a document longer than a chunk, one of one token, padded by repeats at the end.
BOUNDS = [0, 1, 38, 103, 110, 131, 131, 131]

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_form = pytest.mark.parametrize("form", ["naive", "chunk"])


def make(case, length, *, batch=2, states=None, dtype=torch.float64, seed=0):
    """(token inputs, fixed inputs, state), leaves that want gradients."""
    random = draw(seed)
    tokens, fixed = case.tokens(random, batch, length), case.fixed(random)
    state = random(states or batch, *case.state)
    state = state.to(torch.float64 if dtype == torch.float64 else torch.float32)
    tokens, fixed = (
        {n: x.to(dtype).requires_grad_() for n, x in part.items()} for part in (tokens, fixed)
    )
    return tokens, fixed, state.requires_grad_()


def op(case, form):
    """naive or chunk, or a loop of steps in their place."""
    forms = case.forms()
    if form != "step":
        return forms[form]

    def loop(*, initial_state, fixed, output_final_state=True, **tokens):
        outs, state = [], initial_state
        for t in range(next(iter(tokens.values())).shape[1]):
            token = {n: x[:, t] for n, x in tokens.items()}
            o, state = forms["step"](**token, **fixed, initial_state=state)
            outs.append(o)
        return torch.stack(outs, 1), state

    return lambda **kw: loop(fixed={n: kw.pop(n) for n in case.fixed(draw(0))}, **kw)


def probe(x):
    """A random linear function."""
    return (x.double() * draw(7)(*x.shape)).sum()


def leaves(tokens, fixed, state=None):
    return {**tokens, **fixed, **({} if state is None else {"initial_state": state})}


def outcome(o, state, inputs):
    """name -> outputs, and the gradients of a random function of both."""
    loss = probe(o) if state is None else probe(o) + probe(state)
    grads = torch.autograd.grad(loss, inputs.values(), allow_unused=True)
    out = {"o": o} if state is None else {"o": o, "state": state}
    for (name, x), grad in zip(inputs.items(), grads, strict=True):
        out[f"d {name}"] = torch.zeros_like(x) if grad is None else grad
    return out


def run(case, form, tokens, fixed, state, **kwargs):
    o, final = op(case, form)(
        **tokens, **fixed, initial_state=state, output_final_state=True, **kwargs
    )
    return outcome(o, final, leaves(tokens, fixed, state))


def reference(case, tokens, fixed, state, scale=None):
    tokens, fixed = (
        {n: x.detach().double().requires_grad_() for n, x in part.items()}
        for part in (tokens, fixed)
    )
    state = state.detach().double().requires_grad_()
    o, final = case.formula({**tokens, **fixed}, state, scale or case.scale)
    return outcome(o, final, leaves(tokens, fixed, state))


def compare(actual, expected, tol=None):
    assert actual.keys() == expected.keys()
    for what, a in actual.items():
        if expected[what].abs().max() < 1e-12:  # one token alone has no decay to learn from
            assert a.abs().max() < 1e-6, what
        else:
            assert_close_rms(a, expected[what], tol, what)


def pieces(tokens, bounds):
    """(index, tokens of the document) of the documents that have any."""
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        if b > a:
            yield i, {n: x[:, a:b] for n, x in tokens.items()}


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", ["naive", "chunk", "step"])
def test_every_form_is_the_formula(case, form, length, dtype):
    inputs = make(case, length, dtype=dtype)
    compare(run(case, form, *inputs), reference(case, *inputs))


@every_case
@pytest.mark.parametrize("chunk_size", [16, 24, 128])
def test_chunk_size_does_not_matter(case, chunk_size):
    inputs = make(case, 100)
    compare(run(case, "chunk", *inputs, chunk_size=chunk_size), reference(case, *inputs))


@every_case
@every_form
def test_scale_and_absent_states(case, form):
    tokens, fixed, state = make(case, 70)
    scale = {} if case.scale is None else {"scale": 0.7}
    expected, _ = case.formula({**tokens, **fixed}, torch.zeros_like(state), 0.7)
    o, final = op(case, form)(**tokens, **fixed, **scale)
    assert final is None
    assert_close_rms(o, expected)


@every_case
@every_form
def test_packed_documents_without_states_are_each_alone(case, form):
    """For `chunk` this is the masked path, where documents share chunks."""
    tokens, fixed, state = make(case, BOUNDS[-1], batch=1)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    o, final = op(case, form)(**tokens, **fixed, cu_seqlens=bounds)
    assert final is None
    zero = torch.zeros_like(state)
    alone = [
        case.formula({**part, **fixed}, zero, case.scale)[0] for _, part in pieces(tokens, BOUNDS)
    ]
    inputs = leaves(tokens, fixed)
    compare(outcome(o, None, inputs), outcome(torch.cat(alone, 1), None, inputs))


@every_case
def test_packed_at_random_bounds(case):
    """Document ends on chunk borders, before and after them; empty documents in the middle."""
    forms = case.forms()
    generator = torch.Generator().manual_seed(0)
    for seed in range(8):
        tokens, fixed, _ = make(case, 70, batch=1, seed=seed)
        ends = torch.randint(1, 70, (5,), generator=generator).sort().values.tolist()
        bounds = torch.tensor([0, *(16 * (e // 16) if seed % 2 else e for e in ends), 70])
        expected = forms["naive"](**tokens, **fixed, cu_seqlens=bounds)[0]
        for size in (16, 64):
            o, _ = forms["chunk"](**tokens, **fixed, cu_seqlens=bounds, chunk_size=size)
            assert_close_rms(o, expected, what=bounds)


@every_case
@every_form
def test_one_state_per_packed_document(case, form):
    tokens, fixed, state = make(case, BOUNDS[-1], batch=1, states=len(BOUNDS) - 1)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    actual = run(case, form, tokens, fixed, state, cu_seqlens=bounds)
    outs, finals = [], list(state.split(1))
    for i, part in pieces(tokens, BOUNDS):
        o, finals[i] = case.formula({**part, **fixed}, state[i : i + 1], case.scale)
        outs.append(o)
    expected = torch.cat(outs, 1), torch.cat(finals)
    compare(actual, outcome(*expected, leaves(tokens, fixed, state)))


@every_case
@every_form
@pytest.mark.parametrize("cut", [1, 64, 77])
def test_carried_state(case, form, cut):
    tokens, fixed, state = make(case, 100)
    call, options = op(case, form), {"output_final_state": True, **fixed}
    head, tail = ({n: x[:, s] for n, x in tokens.items()} for s in (slice(cut), slice(cut, None)))
    first, middle = call(**head, initial_state=state, **options)
    second, last = call(**tail, initial_state=middle, **options)
    actual = outcome(torch.cat([first, second], 1), last, leaves(tokens, fixed, state))
    compare(actual, run(case, form, tokens, fixed, state))


@every_case
@every_form
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("g", [-50.0, 0.0, "mixed", "some zero"])
def test_extreme_decays(case, form, packed, g):
    if not case.decay:
        pytest.skip("no decay among the inputs")
    tokens, fixed, state = make(case, 100, batch=1, dtype=torch.float32)
    shape = tokens[case.decay].shape
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    values = {
        "mixed": torch.where(drawn < 0.3, -50.0, 0.0),
        "some zero": (0.3 - drawn).clamp(max=0),
    }
    value = values[g] if g in values else torch.full(shape, g)
    tokens[case.decay] = value.requires_grad_()
    bounds = [0, 30, 100] if packed else [0, 100]
    double = {n: x.detach().double().requires_grad_() for n, x in tokens.items()}
    fixed_double = {n: x.detach().double().requires_grad_() for n, x in fixed.items()}
    zero = torch.zeros_like(state).double()
    expected = torch.cat(
        [
            case.formula({**part, **fixed_double}, zero, case.scale)[0]
            for _, part in pieces(double, bounds)
        ],
        1,
    )
    bounds = torch.tensor(bounds) if packed else None
    o, _ = op(case, form)(**tokens, **fixed, cu_seqlens=bounds)
    actual = outcome(o, None, leaves(tokens, fixed))
    wanted = outcome(expected, None, leaves(double, fixed_double))
    for what, a in actual.items():
        assert a.isfinite().all(), what
        if wanted[what].abs().max() > 1e-9:  # with -50 throughout, it has no gradient left
            assert_close_rms(a, wanted[what], what=what)


@every_case
@every_form
def test_bfloat16_keeps_a_float32_state(case, form):
    tokens, fixed, state = make(case, 100, dtype=torch.bfloat16)
    o, final = op(case, form)(**tokens, **fixed, initial_state=state, output_final_state=True)
    assert o.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    double = {n: x.detach().double() for n, x in {**tokens, **fixed}.items()}
    expected_o, expected_state = case.formula(double, state.detach().double(), case.scale)
    assert_close_rms(o, expected_o)
    # Rounding inputs is all that bfloat16 may cost: the state never saw it.
    assert_close_rms(final, expected_state, TOLERANCE[torch.float32])


@every_case
@pytest.mark.parametrize("form", ["naive", "chunk", "step"])
def test_autocast_changes_nothing(case, form):
    tokens, fixed, state = make(case, 100, dtype=torch.float32)
    plain = run(case, form, tokens, fixed, state)
    with torch.autocast("cpu", torch.bfloat16):
        o, final = op(case, form)(**tokens, **fixed, initial_state=state, output_final_state=True)
    assert torch.equal(o, plain["o"])
    assert torch.equal(final, plain["state"])


@every_case
@every_form
def test_strictly_causal_and_reaches_every_later_token(case, form):
    tokens, fixed, _ = make(case, 100, batch=1)
    with torch.no_grad():
        before, _ = op(case, form)(**tokens, **fixed)
        for name, t in itertools.product(tokens, (3, 63, 64, 80)):
            changed = {n: x.clone() for n, x in tokens.items()}
            changed[name][:, t] *= 0.5
            moved = (op(case, form)(**changed, **fixed)[0] - before).abs().amax((0, 2, 3))
            assert moved[:t].max() < 1e-13, (name, t)
            assert name in ("q", "r", "C") or moved[t + 1 :].min() > 1e-13, (name, t)


@every_case
@pytest.mark.parametrize("length", [48, 64, 75])
def test_rows_side_by_side_equal_one_long_row(case, length):
    """Packed rows of equal length give the same for rows=1 and rows=3, gradients included."""
    bounds = [0, 5, length, length + 20, 2 * length, 3 * length, 3 * length, 3 * length]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    tokens, fixed, _ = make(case, 3 * length, batch=1)
    inputs = leaves(tokens, fixed)
    results = []
    for rows in (1, 3):
        o, _ = op(case, "chunk")(**tokens, **fixed, cu_seqlens=cu_seqlens, rows=rows)
        results.append(outcome(o, None, inputs))
    compare(*results)
