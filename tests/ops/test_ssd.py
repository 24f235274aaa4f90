"""State space duality: groups, extreme steps, the wiring of Triton forms and their numbers."""

from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, draw
from kit import TOLERANCE, assert_close_rms, stock
from test_recurrences import BOUNDS, compare, leaves, make, outcome, reference, run

from ops import fla_kernels, fla_reference
from ops.ssd import KERNELS, mamba_ssm_ssd, naive_ssd

CASE = CASES["ssd"]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 65, 100])
def test_equals_transformers(groups, length):
    bamba = stock("transformers.models.bamba.modeling_bamba")
    tokens, fixed, state = make(CASE, length, dtype=torch.float32)
    for name in "BC":
        tokens[name] = draw(1)(2, length, groups, 8).float().requires_grad_()
    inputs = leaves(tokens, fixed, state)
    x, dt, B, C = (tokens[n] for n in ("x", "dt", "B", "C"))
    y, final = bamba.mamba2_chunk_scan(
        x, dt, fixed["A"], B, C, 32, D=fixed["D"], initial_states=state.mT,
        return_final_states=True,
    )  # fmt: skip
    expected = outcome(y, final.mT, inputs)
    for form in ("naive", "chunk", "step"):
        compare(run(CASE, form, tokens, fixed, state), expected)


@pytest.mark.parametrize("form", ["naive", "chunk"])
@pytest.mark.parametrize("packed", [False, True])
def test_extreme_steps(form, packed):
    """Tokens that forget everything (dt A = -80) beside tokens that change nothing (dt = 0)."""
    tokens, fixed, state = make(CASE, 100, batch=1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    chosen = torch.rand(tokens["dt"].shape, generator=generator) < 0.3
    tokens["dt"] = torch.where(chosen, 40.0, 0.0).requires_grad_()
    fixed["A"] = torch.full((4,), -2.0, requires_grad=True)
    double = {n: x.detach().double().requires_grad_() for n, x in {**tokens, **fixed}.items()}
    bounds = [0, 30, 100] if packed else [0, 100]
    zero = torch.zeros_like(state).double()
    per_token = ("x", "dt", "B", "C")
    outs = [
        CASE.formula({n: t[:, a:b] if n in per_token else t for n, t in double.items()}, zero, None)
        for a, b in itertools.pairwise(bounds)
    ]
    expected = outcome(torch.cat([o for o, _ in outs], 1), None, double)
    cu_seqlens = torch.tensor(bounds) if packed else None
    y, _ = KERNELS[form](**tokens, **fixed, cu_seqlens=cu_seqlens)
    actual = outcome(y, None, leaves(tokens, fixed))
    for what, a in actual.items():
        assert a.isfinite().all(), what
        if what != "d A":  # nothing in between a decay of one and of nil: no gradient but rounding
            assert_close_rms(a, expected[what], what=what)


def loops_as_fla(*tensors, scale, initial_state, output_final_state, cu_seqlens):
    """`ops.fla_kernels.linear_attention` without a GPU."""
    x = dict(zip("qkvg", tensors, strict=True))
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    o, final = fla_reference.naive("linear_attention", x, initial_state, scale=scale, bounds=bounds)
    return o, (final if output_final_state else None)


@pytest.mark.parametrize("packed", [False, True])
def test_fla_form_is_the_formula(monkeypatch, packed):
    monkeypatch.setattr(fla_kernels, "linear_attention", loops_as_fla)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32) if packed else None
    shape = {"batch": 1, "states": len(BOUNDS) - 1} if packed else {}
    tokens, fixed, state = make(CASE, BOUNDS[-1], dtype=torch.float32, **shape)
    results = []
    for kernel in ("fla", "naive"):
        y, final = KERNELS[kernel](
            **tokens, **fixed, initial_state=state, output_final_state=True, cu_seqlens=bounds
        )
        results.append(outcome(y, final, leaves(tokens, fixed, state)))
    compare(*results)


def loops_as_mamba_ssm(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
    cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
    return_varlen_states=False, state_dtype=None,
):  # fmt: skip
    """mamba-ssm's function as its docstring gives shapes and meanings: states [B, H, P, N]."""
    assert z is None and dt_bias is None and cu_seqlens is None
    assert not dt_softplus and not return_varlen_states and state_dtype == torch.float32
    shared = x.shape[2] // B.shape[2]
    h = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1])
    h = h if initial_states is None else initial_states
    ys = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t and seq_idx[0, t] != seq_idx[0, t - 1]:
            h = torch.zeros_like(h)
        b, c = (u[:, t].repeat_interleave(shared, 1)[:, :, None] for u in (B, C))
        dx = (dt[:, t, :, None] * x[:, t])[..., None]
        h = (dt[:, t] * A).exp()[..., None, None] * h + dx * b
        ys.append((h * c).sum(-1) + D[:, None] * x[:, t])
    return (torch.stack(ys, 1), h) if return_final_states else torch.stack(ys, 1)


@pytest.fixture
def fake_mamba_ssm(monkeypatch):
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    last = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    last.mamba_chunk_scan_combined = loops_as_mamba_ssm
    monkeypatch.setitem(sys.modules, last.__name__, last)


def test_mamba_ssm_form_is_the_formula(fake_mamba_ssm):
    tokens, fixed, state = make(CASE, 70, dtype=torch.float32)
    y, final = mamba_ssm_ssd(**tokens, **fixed, initial_state=state, output_final_state=True)
    actual = outcome(y, final, leaves(tokens, fixed, state))
    compare(actual, reference(CASE, tokens, fixed, state))


def test_mamba_ssm_form_packed(fake_mamba_ssm):
    """With states per document it is the chunked form that runs."""
    tokens, fixed, state = make(CASE, BOUNDS[-1], batch=1, states=len(BOUNDS) - 1)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    single = {n: x.float() for n, x in {**tokens, **fixed}.items()}
    y, final = mamba_ssm_ssd(**single, cu_seqlens=bounds)
    assert final is None
    assert_close_rms(y, naive_ssd(**single, cu_seqlens=bounds)[0])
    wanted = {"initial_state": state, "output_final_state": True, "cu_seqlens": bounds}
    pairs = zip(
        *(op(**tokens, **fixed, **wanted) for op in (mamba_ssm_ssd, naive_ssd)), strict=True
    )
    for actual, expected in pairs:
        assert_close_rms(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kernel", ["fla", "mamba_ssm"])
def test_triton_forms_on_a_gpu(untimed_kernels, kernel, packed):
    pytest.importorskip(kernel)
    random, bounds = draw(0), [0, 1, 130, 300, 300]
    x = {"x": random(1, 300, 4, 64), "dt": F.softplus(random(1, 300, 4) - 2)}
    x |= {n: 0.3 * random(1, 300, 2, 32) for n in "BC"}
    x |= {"A": -random(4).exp(), "D": random(4)}
    low = {n: t.cuda().to(torch.bfloat16 if n in "xBC" else torch.float32) for n, t in x.items()}
    low = {n: t.requires_grad_() for n, t in low.items()}
    wide = {n: t.detach().double().requires_grad_() for n, t in low.items()}
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda") if packed else None
    state = {} if packed else {"output_final_state": True}
    results = []
    for form, inputs in ((kernel, low), ("naive", wide)):
        y, final = KERNELS[form](**inputs, cu_seqlens=cu_seqlens, **state)
        generator = torch.Generator().manual_seed(5)
        loss = 0
        for out in (y, final):
            if out is not None:
                probe = torch.randn(out.shape, generator=generator, dtype=torch.float64)
                loss = loss + (out.double() * probe.to(out.device)).sum()
        grads = torch.autograd.grad(loss, list(inputs.values()))
        results.append([y, *([] if packed else [final]), *grads])
    for actual, expected in zip(*results, strict=True):
        assert_close_rms(actual, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_mamba_ssm_compiled_on_a_gpu(untimed_kernels):
    """A block around it compiles, and computes the same."""
    pytest.importorskip("mamba_ssm")
    random = draw(0)
    x = {"x": random(1, 300, 4, 64), "dt": F.softplus(random(1, 300, 4) - 2)}
    x |= {n: 0.3 * random(1, 300, 2, 32) for n in "BC"} | {"A": -random(4).exp(), "D": random(4)}
    x = {n: t.cuda().to(torch.bfloat16 if n in "xBC" else torch.float32) for n, t in x.items()}
    x = {n: t.requires_grad_() for n, t in x.items()}
    cu_seqlens = torch.tensor([0, 1, 130, 300, 300], dtype=torch.int32, device="cuda")

    def block(**x):
        return KERNELS["mamba_ssm"](**x, cu_seqlens=cu_seqlens)[0] * 2

    results = []
    for form in (torch.compile(block), block):
        y = form(**x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), list(x.values()))])
    for actual, expected in zip(*results, strict=True):
        assert_close_rms(actual, expected, TOLERANCE[torch.bfloat16])
