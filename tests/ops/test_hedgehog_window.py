"""The window plus linear attention of LoLCATs: what test_recurrences.py checks of the other
recurrences, for a state that is a tuple and for windows of every size."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import HEADS, KEY, VALUE, draw
from kit import TOLERANCE, assert_close_rms
from test_recurrences import BOUNDS, LENGTHS, outcome, pieces

from ops.hedgehog_window import (
    chunk_hedgehog_window,
    empty_state,
    naive_hedgehog_window,
    step_hedgehog_window,
)

FEATURES = 6
every_form = pytest.mark.parametrize("form", ["naive", "chunk"])
every_window = pytest.mark.parametrize("window", [1, 5, 64, 90, 200])


def make(length, *, batch=2, dtype=torch.float64, seed=0):
    """(token inputs, fixed inputs), leaves that want gradients."""
    random = draw(seed)
    tokens = {"q": random(batch, length, HEADS, KEY), "k": random(batch, length, HEADS, KEY)}
    tokens["v"] = random(batch, length, HEADS, VALUE)
    fixed = {n: random(HEADS, KEY, FEATURES) for n in ("map_q", "map_k")}
    fixed["gamma"] = random(HEADS).sigmoid()
    return tuple(
        {n: x.to(dtype).requires_grad_() for n, x in part.items()} for part in (tokens, fixed)
    )


def phi(x, weight):
    """[B, T, H, K] -> [B, T, H, 2 F], one head at a time."""
    heads = []
    for h in range(x.shape[2]):
        e = (x[:, :, h] @ weight[h]).exp()
        heads.append(torch.cat([e / e.sum(-1, True), (1 / e) / (1 / e).sum(-1, True)], -1))
    return torch.stack(heads, 2)


def formula(tokens, fixed, window, scale=KEY**-0.5):
    """The equation, one query at a time: o, and the state's sums, keys and values of T >= w."""
    q, k, v = (tokens[n].double() for n in "qkv")
    fixed = {n: x.double() for n, x in fixed.items()}
    phi_q, phi_k = phi(q, fixed["map_q"]), phi(k, fixed["map_k"])
    outs = []
    for i in range(q.shape[1]):
        cut = max(0, i - window + 1)  # the first token inside the window
        score = scale * (q[:, i : i + 1] * k[:, cut : i + 1]).sum(-1)  # [B, w, H]
        near = fixed["gamma"] * (score - score.max(1, keepdim=True).values).exp()
        far = (phi_q[:, i : i + 1] * phi_k[:, :cut]).sum(-1)
        weight = torch.cat([far, near], 1).unsqueeze(-1)
        outs.append((weight * v[:, : i + 1]).sum(1) / weight.sum(1))
    first = q.shape[1] - window
    if first < 0:
        return torch.stack(outs, 1), None
    values = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    sums = torch.einsum("bthm,bthv->bhmv", phi_k[:, :first], values[:, :first])
    held = (x[:, first:].transpose(1, 2) for x in (k, values))
    return torch.stack(outs, 1), (sums, *held)


def op(form):
    """naive or chunk, or a loop of steps in their place."""
    if form != "step":
        return {"naive": naive_hedgehog_window, "chunk": chunk_hedgehog_window}[form]

    def loop(q, k, v, *, output_final_state=False, initial_state=None, **options):
        state, outs = initial_state or empty_state(k, v, options["map_k"], options["window"]), []
        for t in range(q.shape[1]):
            o, state = step_hedgehog_window(
                q[:, t], k[:, t], v[:, t], initial_state=state, **options
            )
            outs.append(o)
        return torch.stack(outs, 1), state if output_final_state else None

    return loop


def everything(o, state, inputs):
    """Outputs, every part of the state, and the gradients of a random function of all."""
    parts = [o] if state is None else [o, *state]
    wide = torch.cat([x.flatten().double() for x in parts])
    out = outcome(wide, None, inputs)
    del out["o"]
    return {**{f"part {i}": x for i, x in enumerate(parts)}, **out}


def compare(actual, expected):
    """By RMS ratio. While no token has left the window, gamma cancels and nothing is far: what
    is then zero has to be, up to rounding."""
    assert actual.keys() == expected.keys()
    for what, a in actual.items():
        if expected[what].abs().max() < 1e-12:
            assert a.abs().max() < (1e-9 if a.dtype == torch.float64 else 1e-4), what
        else:
            assert_close_rms(a, expected[what], what=what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", ["naive", "chunk", "step"])
@every_window
def test_every_form_is_the_formula(form, length, window, dtype):
    tokens, fixed = make(length, dtype=dtype)
    final = length >= window
    actual = op(form)(**tokens, **fixed, window=window, output_final_state=final)
    inputs = {**tokens, **fixed}
    expected = everything(*formula(tokens, fixed, window), inputs)
    compare(everything(*actual, inputs), expected)


@pytest.mark.parametrize("chunk_size", [16, 24, 128])
@every_window
def test_chunk_size_does_not_matter(chunk_size, window):
    tokens, fixed = make(100)
    o, _ = chunk_hedgehog_window(**tokens, **fixed, window=window, chunk_size=chunk_size)
    expected, _ = formula(tokens, fixed, window)
    inputs = {**tokens, **fixed}
    compare(outcome(o, None, inputs), outcome(expected, None, inputs))


@every_form
def test_scale_and_short_states(form):
    """A state of fewer tokens than the window; a state asked for or not gives the same."""
    tokens, fixed = make(20)
    options = dict(fixed, window=30, scale=0.7)
    o, state = op(form)(**tokens, **options, output_final_state=True)
    again, none = op(form)(**tokens, **options)
    assert none is None
    expected, _ = formula(tokens, fixed, 30, 0.7)
    assert_close_rms(o, expected)
    assert_close_rms(again, expected)
    sums, keys, values = state
    assert not sums.any() and not keys[:, :, :10].any() and not values[:, :, :10].any()
    assert torch.equal(keys[:, :, 10:], tokens["k"].transpose(1, 2))
    assert (values[:, :, 10:, -1] == 1).all()


@every_form
@every_window
def test_packed_documents_without_states_are_each_alone(form, window):
    """For `chunk` this is the masked path, where documents share chunks."""
    tokens, fixed = make(BOUNDS[-1], batch=1)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    o, final = op(form)(**tokens, **fixed, window=window, cu_seqlens=bounds)
    assert final is None
    alone = [formula(part, fixed, window)[0] for _, part in pieces(tokens, BOUNDS)]
    inputs = {**tokens, **fixed}
    compare(outcome(o, None, inputs), outcome(torch.cat(alone, 1), None, inputs))


@pytest.mark.parametrize("window", [1, 7, 16, 40])
def test_packed_at_random_bounds(window):
    """Document ends on chunk borders, before and after them; empty documents in the middle."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(6):
        tokens, fixed = make(70, batch=1, seed=seed)
        ends = torch.randint(1, 70, (5,), generator=generator).sort().values.tolist()
        bounds = [0, *(16 * (e // 16) if seed % 2 else e for e in ends), 70]
        alone = [formula(part, fixed, window)[0] for _, part in pieces(tokens, bounds)]
        for size in (16, 64):
            o, _ = chunk_hedgehog_window(
                **tokens, **fixed, window=window, chunk_size=size, cu_seqlens=torch.tensor(bounds)
            )
            assert_close_rms(o, torch.cat(alone, 1), what=bounds)


@every_form
@pytest.mark.parametrize("window", [5, 64])
def test_one_state_per_packed_document(form, window):
    """Every document goes on from a prompt of its own, shorter or longer than the window."""
    tokens, fixed = make(BOUNDS[-1], batch=1)
    call = op(form)
    prompts, states = [], []
    for i in range(len(BOUNDS) - 1):
        prompts.append(make(3 + 20 * i, batch=1, seed=i + 1)[0])
        states.append(call(**prompts[i], **fixed, window=window, output_final_state=True)[1])
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    o, final = call(
        **tokens, **fixed, window=window, cu_seqlens=bounds, output_final_state=True,
        initial_state=tuple(map(torch.cat, zip(*states, strict=True))),
    )  # fmt: skip
    outs, finals = [], []
    for prompt, (a, b) in zip(prompts, itertools.pairwise(BOUNDS), strict=True):
        whole = {n: torch.cat([prompt[n], x[:, a:b]], 1) for n, x in tokens.items()}
        outs.append(formula(whole, fixed, window)[0][:, prompt["q"].shape[1] :])
        finals.append(call(**whole, **fixed, window=window, output_final_state=True)[1])
    leaves = {f"{n} {i}": x for i, prompt in enumerate(prompts) for n, x in prompt.items()}
    inputs = {**tokens, **fixed, **leaves}
    expected = torch.cat(outs, 1), tuple(map(torch.cat, zip(*finals, strict=True)))
    compare(everything(o, final, inputs), everything(*expected, inputs))


@every_form
@pytest.mark.parametrize("cut", [1, 64, 77])
@every_window
def test_carried_state(form, cut, window):
    tokens, fixed = make(100)
    call, options = op(form), {"output_final_state": True, "window": window, **fixed}
    head, tail = ({n: x[:, s] for n, x in tokens.items()} for s in (slice(cut), slice(cut, None)))
    first, middle = call(**head, **options)
    second, last = call(**tail, initial_state=middle, **options)
    inputs = {**tokens, **fixed}
    actual = everything(torch.cat([first, second], 1), last, inputs)
    whole, state = formula(tokens, fixed, window)
    if state is None:
        state = call(**tokens, **options)[1]
    compare(actual, everything(whole, state, inputs))


@every_form
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [1, 7, 200])
def test_extreme_scores(form, packed, window):
    """Scores of some thousands, in float32: the maximum of the window is taken out of each, and
    an exponential may vanish, but never all of one query."""
    tokens, fixed = make(100, batch=1, dtype=torch.float32)
    tokens = {n: (x * (1 if n == "v" else 30)).detach().requires_grad_() for n, x in tokens.items()}
    fixed = {n: (x * (1 if n == "gamma" else 0.01)).detach() for n, x in fixed.items()}
    bounds = [0, 30, 100] if packed else [0, 100]
    expected = [formula(part, fixed, window)[0] for _, part in pieces(tokens, bounds)]
    bounds = torch.tensor(bounds) if packed else None
    o, _ = op(form)(**tokens, **fixed, window=window, cu_seqlens=bounds)
    actual, wanted = (outcome(x, None, tokens) for x in (o, torch.cat(expected, 1)))
    for what, a in actual.items():
        assert a.isfinite().all(), what
        if wanted[what].abs().max() > 1e-9:
            # A score of 1000 has an error of 1e-4 in float32.
            assert_close_rms(a, wanted[what], 1e-3, what)


@every_form
@pytest.mark.parametrize("window", [9, 200])
def test_bfloat16_keeps_a_float32_state(form, window):
    tokens, fixed = make(100, dtype=torch.bfloat16)
    o, final = op(form)(**tokens, **fixed, window=window, output_final_state=True)
    assert o.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in final)
    expected, state = formula(tokens, fixed, window)
    assert_close_rms(o, expected)
    if state is not None:
        for mine, right in zip(final, state, strict=True):
            assert_close_rms(mine, right, TOLERANCE[torch.float32])


@pytest.mark.parametrize("form", ["naive", "chunk", "step"])
def test_autocast_changes_nothing(form):
    tokens, fixed = make(100, dtype=torch.float32)
    options = dict(fixed, window=9, output_final_state=True)
    plain = op(form)(**tokens, **options)
    with torch.autocast("cpu", torch.bfloat16):
        o, final = op(form)(**tokens, **options)
    assert torch.equal(o, plain[0])
    assert all(torch.equal(a, b) for a, b in zip(final, plain[1], strict=True))


@every_form
@every_window
def test_strictly_causal_and_reaches_every_later_token(form, window):
    tokens, fixed = make(100, batch=1)
    with torch.no_grad():
        before, _ = op(form)(**tokens, **fixed, window=window)
        for name, t in itertools.product(tokens, (3, 63, 64, 80)):
            changed = {n: x.clone() for n, x in tokens.items()}
            changed[name][:, t] *= 0.5
            moved = (op(form)(**changed, **fixed, window=window)[0] - before).abs().amax((0, 2, 3))
            assert moved[:t].max() < 1e-13, (name, t)
            assert name == "q" or moved[t + 1 :].min() > 1e-13, (name, t)


@pytest.mark.parametrize("length", [48, 64, 75])
@pytest.mark.parametrize("window", [5, 30, 200])
def test_rows_side_by_side_equal_one_long_row(length, window):
    """Packed rows of equal length give the same for rows=1 and rows=3, gradients included."""
    bounds = [0, 5, length, length + 20, 2 * length, 3 * length, 3 * length, 3 * length]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    tokens, fixed = make(3 * length, batch=1)
    inputs = {**tokens, **fixed}
    results = []
    for rows in (1, 3):
        o, _ = chunk_hedgehog_window(
            **tokens, **fixed, window=window, cu_seqlens=cu_seqlens, rows=rows
        )
        results.append(outcome(o, None, inputs))
    compare(*results)


def test_memory_of_the_chunked_form_is_linear():
    """No tensor kept for the backward has T x T entries: twice the tokens, twice the largest."""
    largest = []
    for length in (1024, 2048):
        tokens, fixed = make(length, batch=1, dtype=torch.float32)
        sizes = []

        def keep(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            chunk_hedgehog_window(**tokens, **fixed, window=16)
        largest.append(max(sizes))
    assert largest[1] < 2.1 * largest[0]
    assert largest[1] < HEADS * 2048**2 / 8
