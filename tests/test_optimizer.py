"""Groups and roles, the two optimizers together, their state, clipping, schedules."""

from __future__ import annotations

import json
import math

import pytest
import torch
from kit import tiny_config
from torch import Tensor, nn
from zoo import Zoo, give_grads, random_params, rms_error

from config import UserError
from hybrid_layers import MIXERS, build_mixer
from muon import Muon
from optimizer import (
    SCHEDULES,
    AdamW,
    OptimizerSet,
    StepGuard,
    build_groups,
    build_optimizer,
    clip_grad_norm,
    lr_factor,
    param_role,
)

# Groups


def test_roles():
    want = {
        "model.layers.0.self_attn.q_proj.weight": "muon",
        "model.layers.0.self_attn.q_proj.bias": "no_decay",
        "model.layers.0.self_attn.q_norm.weight": "no_decay",
        "model.layers.0.self_attn.sinks": "no_decay",
        "model.layers.0.mlp.down_proj.weight": "muon",
        "model.layers.1.self_attn.g_proj.weight": "muon",
        "model.layers.1.self_attn.a_proj.weight": "adamw",
        "model.layers.1.self_attn.b_proj.weight": "adamw",
        "model.layers.1.self_attn.q_conv1d.weight": "no_decay",
        "model.layers.1.self_attn.A_log": "no_decay",
        "model.layers.1.self_attn.dt_bias": "no_decay",
        "model.layers.1.self_attn.bonus": "no_decay",  # 2-D, but no matrix that maps features
        "model.layers.1.input_layernorm.weight": "no_decay",
        "model.embed_tokens.weight": "adamw",
        "model.norm.weight": "no_decay",
        "lm_head.weight": "adamw",
    }
    params = dict(Zoo(tied=False).named_parameters())
    assert {name: param_role(name, params[name]) for name in want} == want


def test_roles_of_the_mixers():
    """Hidden matrices are Muon's; factors of low rank, gates of a head and feature maps are not."""
    roles: dict[str, dict[str, str]] = {}
    for name in MIXERS:
        config = tiny_config(
            "S" if name == "sliding_window" else "L", linear_feature_map="hedgehog",
            mixer=[] if name == "sliding_window" else [name],
        )  # fmt: skip
        named = build_mixer(name, config).named_parameters()
        roles[name] = {n: param_role(f"layers.0.linear_attn.{n}", p) for n, p in named}
    matrices = {name: {n for n, r in found.items() if r == "muon"} for name, found in roles.items()}
    qkvo = {f"{n}_proj.weight" for n in "qkvo"}
    assert matrices == {
        "gated_deltanet": qkvo | {"g_proj.weight"}, "deltanet": qkvo, "kda": qkvo,
        "mamba2": {"in_proj.weight", "out_proj.weight"}, "gla": qkvo | {"g_proj.weight"},
        "rwkv6": {f"{n}_proj.linear.weight" for n in "rkvg"} | {"o_proj.weight"},
        "linear_attention": qkvo, "retention": qkvo | {"g_proj.weight"}, "hedgehog_window": qkvo,
        "rwkv7": {f"{n}_proj.weight" for n in "rkvo"}, "sliding_window": qkvo,
    }  # fmt: skip
    kda = roles["kda"]
    assert {kda[f"{n}.{i}.weight"] for n in ("f_proj", "g_proj") for i in (0, 1)} == {"adamw"}
    assert kda["A_log"] == kda["q_conv1d.weight"] == kda["o_norm.weight"] == "no_decay"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("use_muon", [True, False])
def test_every_parameter_is_in_exactly_one_group(tied, use_muon):
    model = Zoo(tied)
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    named = list(model.named_parameters(remove_duplicate=False))
    mixer = {n for n, _ in named if n.startswith("model.layers.1.self_attn.")}
    groups = build_groups(
        named,
        lr=1.0,
        mixer_lr=2.0,
        mixer_params=mixer,
        embed_lr=3.0,
        muon_lr=4.0,
        weight_decay=0.1,
        use_muon=use_muon,
    )
    got = [p for g in groups for p in g["params"]]
    assert len({id(p) for p in got}) == len(got)
    assert {id(p) for p in got} == {id(p) for p in model.parameters()} - {id(frozen)}
    assert all(set(g) == {"params", "names", "role", "lr", "weight_decay"} for g in groups)
    by_name = {n: g for g in groups for n in g["names"]}
    assert all(
        p is dict(named)[n] for g in groups for n, p in zip(g["names"], g["params"], strict=True)
    )

    def seen(name):
        return by_name[name]["role"], by_name[name]["lr"], by_name[name]["weight_decay"]

    matrix = "muon" if use_muon else "adamw"
    assert seen("model.layers.1.self_attn.q_proj.weight") == (matrix, 2.0, 0.1)
    assert seen("model.layers.1.self_attn.A_log") == ("no_decay", 2.0, 0.0)
    assert seen("model.layers.0.self_attn.q_proj.weight") == (matrix, 4.0 if use_muon else 1.0, 0.1)
    assert seen("model.embed_tokens.weight") == ("adamw", 3.0, 0.1)
    assert seen("model.norm.weight") == ("no_decay", 1.0, 0.0)
    assert ("lm_head.weight" in by_name) is not tied
    with pytest.raises(AssertionError, match="no such parameters"):
        build_groups(named, lr=1.0, mixer_params={"model.layers.7.q_proj.weight"})


# OptimizerSet


def built(model: nn.Module, **overrides):
    settings = dict(lr=0.01, weight_decay=0.1, use_muon=True) | overrides
    return build_optimizer(model.named_parameters(), **settings)


def test_adamw_part_equals_torch():
    torch.manual_seed(0)
    ours, theirs = Zoo(), Zoo()
    theirs.load_state_dict(ours.state_dict())
    both = built(ours, use_muon=False)
    assert both.muon is None
    roles = {n: param_role(n, p) for n, p in theirs.named_parameters()}
    groups = [
        {
            "params": [
                p for n, p in theirs.named_parameters() if (roles[n] == "no_decay") is plain
            ],
            "weight_decay": 0.0 if plain else 0.1,
        }
        for plain in (True, False)
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=False)
    for step in range(5):
        give_grads(ours.parameters(), seed=step)
        give_grads(theirs.parameters(), seed=step)
        both.step()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert rms_error(a.detach(), b.detach()) < 1e-6
    both.zero_grad()
    assert all(p.grad is None for p in ours.parameters())


def test_lr_factor_scales_each_group_from_its_initial_lr():
    torch.manual_seed(0)
    model = Zoo()
    both = built(model, embed_lr=0.5, muon_lr=0.02)
    assert {g["role"] for g in both.param_groups} == {"muon", "adamw", "no_decay"}
    for factor in (0.5, 0.1):
        both.set_lr_factor(factor)
        assert {g["lr"] for g in both.param_groups} == {0.01 * factor, 0.5 * factor, 0.02 * factor}
    both.set_lr_factor(0.0)
    before = [p.detach().clone() for p in model.parameters()]
    give_grads(model.parameters(), seed=0)
    both.step()
    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))


def test_muon_without_its_own_lr_moves_weights_as_adamw_would():
    for muon_lr, want in ((None, 0.2 * 0.01), (0.02, 0.02 / math.sqrt(32))):
        model = nn.Module()
        model.q_proj = nn.Linear(32, 32, bias=False)
        both = built(model, muon_lr=muon_lr, weight_decay=0.0)
        before = model.q_proj.weight.detach().clone()
        give_grads(model.parameters(), seed=0)
        both.step()
        rms = (model.q_proj.weight.detach() - before).square().mean().sqrt().item()
        assert math.isclose(rms, want, rel_tol=0.1)


@pytest.mark.parametrize("use_muon", [True, False])
def test_restored_state_continues_bitwise(use_muon):
    torch.manual_seed(0)
    one = Zoo()
    first = built(one, use_muon=use_muon)
    for step in range(3):
        give_grads(one.parameters(), seed=step)
        first.step()
    two = Zoo()
    two.load_state_dict(one.state_dict())
    second = built(two, use_muon=use_muon)
    empty = second.state_tensors()  # complete before any step
    saved = {k: v.clone() for k, v in first.state_tensors().items()}
    assert {k: (v.shape, v.dtype) for k, v in empty.items()} == {
        k: (v.shape, v.dtype) for k, v in saved.items()
    }
    kinds = {"exp_avg", "exp_avg_sq", "step"} | ({"momentum_buffer"} if use_muon else set())
    assert {k.rsplit(".", 1)[1] for k in saved} == kinds
    assert "optim.model.embed_tokens.weight.exp_avg_sq" in saved
    second.load_state_tensors(saved)
    for step in range(3, 6):
        for model, both in ((one, first), (two, second)):
            give_grads(model.parameters(), seed=step)
            both.step()
    assert all(a.equal(b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    for key, tensor in first.state_tensors().items():
        assert tensor.equal(second.state_tensors()[key]), key
    assert not all(v.equal(saved[k]) for k, v in first.state_tensors().items())  # a real copy


def test_early_state_does_not_change_the_first_step():
    torch.manual_seed(0)
    one = Zoo()
    two = Zoo()
    two.load_state_dict(one.state_dict())
    first, second = built(one), built(two)
    second.init_state()
    for model, both in ((one, first), (two, second)):
        give_grads(model.parameters(), seed=0)
        both.step()
    assert all(a.equal(b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    a, b = first.state_tensors(), second.state_tensors()
    assert all(a[k].equal(b[k]) and a[k].device == b[k].device for k in a)


def test_state_that_does_not_fit_is_refused():
    both = built(Zoo())
    good = {k: v.clone() + 1 for k, v in both.state_tensors().items()}
    key = "optim.model.layers.0.mlp.up_proj.weight.momentum_buffer"
    for bad, message in (
        ({k: v for k, v in good.items() if k != key}, "1 missing"),
        (good | {"optim.other.exp_avg": torch.ones(1)}, "1 unexpected"),
        (good | {key: good[key].T}, "expected torch.float32"),
        (good | {key: good[key].double()}, "float64"),
    ):
        with pytest.raises(UserError, match=message):
            both.load_state_tensors(bad)
    assert not any(v.any() for v in both.state_tensors().values())  # nothing was half loaded


# Gradient norm


def test_clip_grad_norm():
    params = random_params([(5, 7), (11,), (3, 1, 4)])
    give_grads(params, seed=0)
    unused = nn.Parameter(torch.randn(3))
    expected = torch.cat([p.grad.flatten() for p in params]).double().norm()
    before = [p.grad.clone() for p in params]
    for measured in (clip_grad_norm(params, 0.0), clip_grad_norm(params, 100.0)):
        torch.testing.assert_close(measured, expected.float())
        assert all(p.grad.equal(b) for p, b in zip(params, before, strict=True))
    # an iterator, a tied parameter seen twice, and one without a gradient
    measured = clip_grad_norm(iter([*params, params[0], unused]), 0.5)
    torch.testing.assert_close(measured, expected.float())
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.grad, b * (0.5 / expected.float()), rtol=1e-5, atol=1e-7)
    assert clip_grad_norm([unused], 1.0) == 0
    params[1].grad[3] = math.nan
    assert clip_grad_norm(params, 0.0).isnan()


def test_norm_of_bf16_gradients_is_float32():
    params = [nn.Parameter(torch.randn(1000).bfloat16()) for _ in range(3)]
    for p in params:
        p.grad = torch.randn(1000).bfloat16()
    params.append(nn.Parameter(torch.randn(10)))
    params[-1].grad = torch.randn(10)
    want = torch.cat([p.grad.float() for p in params]).norm()
    assert params[0].grad.norm().dtype == torch.bfloat16
    torch.testing.assert_close(clip_grad_norm(params, 1.0), want)
    assert {p.grad.dtype for p in params[:3]} == {torch.bfloat16}
    after = torch.cat([p.grad.float() for p in params]).norm()
    assert abs(after - 1) < 5e-3


# Schedules


def curve(**settings) -> list[float]:
    return [lr_factor(step, **settings) for step in range(settings["total_steps"])]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_shape(schedule):
    settings = dict(schedule=schedule, total_steps=103, warmup_steps=10, min_ratio=0.1)
    factors = curve(**settings, decay_fraction=0.2)
    assert factors[:10] == [(i + 1) / 10 for i in range(10)]
    assert factors[-1] == 0.1 == lr_factor(500, **settings, decay_fraction=0.2)
    after = factors[9:]
    assert after == sorted(after, reverse=True)
    assert len(set(factors[82:])) == 21  # it falls at every step of the last 20 %
    if schedule == "cosine":
        assert factors[9] == 1.0 > factors[10]
        assert math.isclose(factors[9 + 31], 0.1 + 0.9 * 0.75)  # a third of the way: cos 60 deg
    else:
        assert set(factors[9:82]) == {1.0} and factors[82] < 1.0
        halfway = {"wsd": 1 - math.sqrt(11 / 21), "constant": 1 - 11 / 21}[schedule]
        assert math.isclose(factors[92], 0.1 + 0.9 * halfway)
        assert set(curve(**settings)[9:]) == {1.0}  # no decay_fraction, no decay


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedule_boundaries(schedule):
    def factors(total, warmup, fraction=1.0):
        return curve(
            schedule=schedule, total_steps=total, warmup_steps=warmup, decay_fraction=fraction
        )

    assert factors(1, 0) == [1.0]  # the only update is not thrown away
    assert factors(2, 0) == factors(2, 1) == [1.0, 0.0]
    assert factors(4, 4) == [0.25, 0.5, 0.75, 1.0]
    assert factors(3, 6) == [1 / 6, 2 / 6, 3 / 6]
    assert factors(5, 4) == [0.25, 0.5, 0.75, 1.0, 0.0]
    assert factors(50, 0, 1e-6)[-1] == 0.0  # a tiny fraction is still one update
    assert all(0 < f <= 1 for f in factors(50, 7)[:-1])


def test_schedule_errors():
    good = dict(schedule="wsd", total_steps=10)
    with pytest.raises(UserError, match="cosine, wsd, constant"):
        lr_factor(0, **(good | {"schedule": "linear"}))
    for bad in (
        {"total_steps": 0},
        {"warmup_steps": -1},
        {"min_ratio": 2},
        {"decay_fraction": 1.5},
    ):
        with pytest.raises(UserError):
            lr_factor(0, **(good | bad))


def test_bfloat16_weights_are_moved_by_our_adamw():
    """In float32 it is torch's; in bfloat16 small steps add up instead of being rounded away."""
    x = torch.linspace(-1, 1, 60).view(6, 10)
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        pairs = [nn.Parameter(x.to(dtype)) for _ in range(2)]
        kinds = (AdamW, torch.optim.AdamW)
        both = [k([p], lr=0.01, weight_decay=0.1) for k, p in zip(kinds, pairs, strict=True)]
        OptimizerSet(None, both[0]).init_state()
        for step in range(3):
            for p, optimizer in zip(pairs, both, strict=True):
                p.grad = (x * (step + 1)).cos().to(dtype)
                optimizer.step()
        torch.testing.assert_close(*pairs, rtol=rtol, atol=0)

    p = nn.Parameter(torch.ones(4000, 1, dtype=torch.bfloat16))
    optimizer = build_optimizer([("w", p)], lr=1e-4, weight_decay=0.0)
    for _ in range(20):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert abs(1 - p.double().mean().item() - 20e-4) < 2.7e-4


# Steps left out


def test_what_is_not_finite_is_refused():
    guard = StepGuard(0.0, torch.device("cpu"))
    norms = [1.0, math.nan, math.inf, 1e30, math.nan]
    assert [guard(torch.tensor(n)).item() for n in norms] == [1, 0, 0, 1, 0]
    assert (guard.skipped, guard.in_row) == (3, 1)


def test_spikes_are_told_from_the_norms_of_steps_taken():
    guard = StepGuard(4.0, torch.device("cpu"))
    go = lambda norm: bool(guard(torch.tensor(norm)))  # noqa: E731
    assert go(50.0)  # nothing to compare with yet
    assert all(go(1.0 + 0.01 * i) for i in range(StepGuard.LEAST))
    assert not go(math.nan)
    assert not any(go(8.0) for _ in range(3 * StepGuard.WINDOW))  # never becomes what is usual
    assert guard.in_row == 3 * StepGuard.WINDOW + 1
    assert go(3.9) and guard.in_row == 0
    assert all(go(1.01**i) for i in range(500))  # what grows slowly is followed, to 143 here


def test_a_guard_goes_on_where_it_was():
    norms = torch.rand(90, generator=torch.Generator().manual_seed(0)) + 1
    norms[::7], norms[40:43] = 9.0, math.nan  # refused
    whole, first = (StepGuard(4.0, torch.device("cpu")) for _ in range(2))
    expected = [whole(n).item() for n in norms]
    assert [first(n).item() for n in norms[:43]] == expected[:43]
    rest = StepGuard(4.0, torch.device("cpu"))
    rest.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert rest.in_row == first.in_row == 3
    assert [rest(n).item() for n in norms[43:]] == expected[43:]
    assert rest.skipped == whole.skipped > 10


@pytest.mark.parametrize("kind", ["adamw", "bfloat16", "muon"])
def test_a_refused_step_changes_nothing(kind):
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = Zoo(tied=True).to(dtype)
    optimizer = build_optimizer(model.named_parameters(), lr=0.1, use_muon=kind == "muon",
                                weight_decay=0.1)  # fmt: skip
    assert (kind == "bfloat16") == isinstance(optimizer.adamw, AdamW)

    def state() -> list[Tensor]:
        return [t.clone() for t in (*model.parameters(), *optimizer.state_tensors().values())]

    for go in (1.0, 0.0, 1.0):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
            p.grad.view(-1)[0] += 0 if go else math.nan
        before = state()
        optimizer.step(torch.tensor(go))
        same = [a.equal(b) for a, b in zip(before, state(), strict=True)]
        assert all(same) if not go else not any(same)


def test_without_triton_the_passes_look_at_go():
    for run in (AdamW([nn.Parameter(torch.ones(3))]), Muon([nn.Parameter(torch.ones(3, 2))])):
        wrapped = OptimizerSet(*([None, run] if isinstance(run, AdamW) else [run, None]))
        p = run.param_groups[0]["params"][0]
        run.param_groups[0] |= {"names": ["p"], "fused": False}
        p.grad = torch.full_like(p, math.nan)
        wrapped.init_state()
        run.step(torch.tensor(0.0))
        assert p.equal(torch.ones_like(p))
        assert all(not t.any() for t in wrapped.state_tensors().values())
