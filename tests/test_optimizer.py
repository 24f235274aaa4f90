"""Muon against torch.optim.Muon, ranks against one process, state, groups, clipping, schedules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import muon as muon_module
from config import UserError
from muon import Muon, newton_schulz, newton_schulz_ref
from optimizer import (
    SCHEDULES,
    build_groups,
    build_optimizer,
    clip_grad_norm,
    lr_factor,
    param_role,
)

# tall, wide, square, a vector-like one, and repeats that share a stack (tall ones transposed)
SHAPES = [(24, 40), (40, 24), (24, 40), (32, 32), (32, 32), (7, 1), (40, 24), (5, 63)]


def rms_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def random_params(shapes=SHAPES, seed=0, device="cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]


def give_grads(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


class Zoo(nn.Module):
    """The parameter names of every kind of layer, in a module small enough to step."""

    def __init__(self, tied: bool = True):
        super().__init__()
        d, heads = 16, 2

        def attention():
            m = nn.Module()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(m, name, nn.Linear(d, d, bias=name == "q_proj"))
            m.q_norm = nn.RMSNorm(8)
            m.sinks = nn.Parameter(torch.randn(heads))
            return m

        def linear():
            m = nn.Module()
            for name in ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"):
                setattr(m, name, nn.Linear(d, d, bias=False))
            m.a_proj = nn.Linear(d, heads, bias=False)
            m.b_proj = nn.Linear(d, heads, bias=False)
            m.q_conv1d = nn.Conv1d(d, d, 4, groups=d, bias=False)
            m.A_log = nn.Parameter(torch.randn(heads))
            m.dt_bias = nn.Parameter(torch.randn(heads))
            m.bonus = nn.Parameter(torch.randn(heads, 8))
            m.o_norm = nn.RMSNorm(8)
            return m

        def block(mixer):
            m = nn.Module()
            m.self_attn = mixer
            m.input_layernorm = nn.RMSNorm(d)
            m.mlp = nn.Module()
            m.mlp.gate_proj = nn.Linear(d, 24, bias=False)
            m.mlp.up_proj = nn.Linear(d, 24, bias=False)
            m.mlp.down_proj = nn.Linear(24, d, bias=False)
            return m

        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(10, d)
        self.model.layers = nn.ModuleList([block(attention()), block(linear())])
        self.model.norm = nn.RMSNorm(d)
        self.lm_head = nn.Linear(d, 10, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight


# Newton-Schulz


@pytest.mark.parametrize("coefficients", muon_module.COEFFICIENTS)
@pytest.mark.parametrize("steps", [1, 5, 9])
def test_batched_newton_schulz_equals_reference(coefficients, steps):
    stack = torch.randn(3, 17, 29, dtype=torch.float64)
    batched = newton_schulz(stack, coefficients=coefficients, steps=steps)
    for matrix, got in zip(stack, batched, strict=True):
        want = newton_schulz_ref(matrix, coefficients=coefficients, steps=steps)
        assert rms_error(got, want) < 1e-12
        tall = newton_schulz_ref(matrix.T, coefficients=coefficients, steps=steps)
        assert rms_error(tall, want.T) < 1e-12


def test_singular_values_after_newton_schulz():
    u, _ = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(80, 48, dtype=torch.float64))
    # from 0.004 of the Frobenius norm up, so inside the interval the coefficients are made for
    spectrum = torch.logspace(-2, 0, 48, dtype=torch.float64)
    matrix = u @ torch.diag(spectrum) @ v.T
    for steps, spread in ((5, 0.15), (6, 0.02), (8, 1e-3)):
        update = newton_schulz_ref(matrix, coefficients="polar_express", steps=steps)
        assert (torch.linalg.svdvals(update) - 1).abs().max() < spread
        assert rms_error(update, u @ v.T) < spread
    quintic = torch.linalg.svdvals(newton_schulz_ref(matrix, coefficients="quintic"))
    assert quintic.min() > 0.5 and quintic.max() < 1.3


@pytest.mark.parametrize("coefficients", muon_module.COEFFICIENTS)
def test_bf16_newton_schulz_stays_bounded(coefficients):
    rank_one = torch.randn(2, 32, 1) @ torch.randn(2, 1, 64)  # one singular value of exactly 1
    for stack in (rank_one, torch.randn(2, 32, 64)):
        update = newton_schulz(stack.bfloat16(), coefficients=coefficients, steps=7)
        assert torch.linalg.svdvals(update.float()).max() < 1.3
    zeros = newton_schulz(torch.zeros(1, 3, 4), coefficients=coefficients)
    assert zeros.equal(torch.zeros(1, 3, 4))


# Muon


def float32_zeropower(grad, ns_coefficients, ns_steps, eps):
    """torch's Newton-Schulz without its cast to bfloat16."""
    a, b, c = ns_coefficients
    x = grad.T.clone() if grad.size(0) > grad.size(1) else grad.clone()
    x.div_(x.norm().clamp(min=eps))
    for _ in range(ns_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if grad.size(0) > grad.size(1) else x


def muon_pair(ns_dtype, *, adjust_lr, nesterov, weight_decay, device="cpu", shapes=SHAPES):
    ours, theirs = random_params(shapes, device=device), random_params(shapes, device=device)
    settings = dict(lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=weight_decay)
    return (
        (
            ours,
            Muon(ours, adjust_lr=adjust_lr, coefficients="quintic", ns_dtype=ns_dtype, **settings),
        ),
        (theirs, torch.optim.Muon(theirs, adjust_lr_fn=adjust_lr, **settings)),
    )


def worst_error_over_steps(pair, steps: int = 6) -> float:
    """RMS error of the total change of the weights, worst matrix and step."""
    (ours, _), (theirs, _) = pair
    start = [p.detach().clone() for p in theirs]
    worst = 0.0
    for step in range(steps):
        for params, muon in pair:
            give_grads(params, seed=100 + step)
            before = [p.grad.clone() for p in params]
            muon.step()
            assert all(p.grad.equal(b) for p, b in zip(params, before, strict=True))
        for a, b, s in zip(ours, theirs, start, strict=True):
            worst = max(worst, rms_error(a.detach() - s, b.detach() - s))
    return worst


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_equals_torch_in_float32(monkeypatch, adjust_lr, nesterov, weight_decay):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", float32_zeropower)
    settings = dict(adjust_lr=adjust_lr, nesterov=nesterov, weight_decay=weight_decay)
    assert worst_error_over_steps(muon_pair(torch.float32, **settings)) < 1e-5


# Five iterations of slope 3.4 amplify the 8-bit rounding: torch's own bf16 differs from float32 by
# 0.02 on these matrices.
BF16_TOLERANCE = 4e-2


def test_muon_equals_torch_in_bfloat16(monkeypatch):
    settings = dict(adjust_lr="original", nesterov=True, weight_decay=0.1)
    assert 0 < worst_error_over_steps(muon_pair(torch.bfloat16, **settings)) < BF16_TOLERANCE
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", float32_zeropower)
    assert 0 < worst_error_over_steps(muon_pair(torch.bfloat16, **settings)) < BF16_TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_muon_equals_torch_on_cuda(monkeypatch):
    settings = dict(adjust_lr="match_rms_adamw", nesterov=True, weight_decay=0.1, device="cuda")
    settings["shapes"] = [(576, 1536), (1536, 576), (576, 576), (192, 576)] * 3
    assert 0 < worst_error_over_steps(muon_pair(None, **settings)) < BF16_TOLERANCE
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", float32_zeropower)
    assert worst_error_over_steps(muon_pair(torch.float32, **settings)) < 1e-5


def test_stack_size_does_not_change_the_result(monkeypatch):
    results = []
    for elements in (2**24, 2 * 24 * 40, 1):
        monkeypatch.setattr(muon_module, "STACK_ELEMENTS", elements)
        params = random_params()
        muon = Muon(params, lr=0.02)
        for step in range(3):
            give_grads(params, seed=step)
            muon.step()
        sizes = [
            len(s) * s[0].param.numel() for s in muon_module._make_stacks(muon._update_momentum())
        ]
        assert max(sizes) <= max(elements, 32 * 32)
        results.append(params)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert rms_error(b.detach(), a.detach()) < 1e-6


def test_parameters_without_gradient_are_left_alone():
    params = random_params()
    before = [p.detach().clone() for p in params]
    muon = Muon(params, lr=0.02, weight_decay=0.1)
    muon.step()
    give_grads(params, seed=1)
    params[2].grad = None
    params[3].grad.zero_()
    muon.step()
    assert params[2].equal(before[2])
    torch.testing.assert_close(params[3], before[3] * (1 - 0.02 * 0.1))  # decay only
    assert not any(
        p.equal(b) for i, (p, b) in enumerate(zip(params, before, strict=True)) if i != 2
    )


def test_deal_is_balanced_and_complete():
    params = random_params([(16, 16)] * 9 + [(64, 64)] * 3 + [(8, 24)] * 5)
    give_grads(params, seed=0)
    muon = Muon(params)
    muon.init_state()
    stacks = [[m] for m in muon._update_momentum()]
    rounds = muon_module._deal(stacks, 4)
    dealt = [id(stack[0].param) for r in rounds for _, stack in r]
    assert sorted(dealt) == sorted(map(id, params))
    assert all(len({owner for owner, _ in r}) == len(r) for r in rounds)
    owners_of_large = [o for r in rounds for o, stack in r if stack[0].param.shape[0] == 64]
    assert len(set(owners_of_large)) == 3
    assert muon_module._deal([], 4) == []


def test_user_errors_name_the_choices():
    params = random_params()
    with pytest.raises(UserError, match="quintic, polar_express"):
        Muon(params, coefficients="cubic")
    with pytest.raises(UserError, match="original, match_rms_adamw"):
        Muon(params, adjust_lr="none")
    with pytest.raises(UserError, match="2-D"):
        Muon([nn.Parameter(torch.randn(3))])
    with pytest.raises(UserError, match="no trainable"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False).named_parameters(), lr=1.0)


# Ranks


def run_steps(world_size: int, rank: int) -> tuple[list[torch.Tensor], int]:
    """Weights and momentum after three steps, and how many matrices this rank orthogonalised."""
    computed = 0

    def counting(stack, **settings):
        nonlocal computed
        computed += len(stack)
        return newton_schulz(stack, **settings)

    muon_module.newton_schulz, original = counting, newton_schulz
    model = Zoo()
    for p, fresh in zip(
        model.parameters(), random_params([p.shape for p in model.parameters()]), strict=True
    ):
        p.data.copy_(fresh.data)
    both = build_optimizer(
        model.named_parameters(),
        lr=0.01,
        weight_decay=0.1,
        use_muon=True,
        ns_dtype=torch.bfloat16,
        rank=rank,
        world_size=world_size,
    )
    for step in range(3):
        give_grads(model.parameters(), seed=step)
        next(
            p for n, p in model.named_parameters() if n.endswith("0.mlp.up_proj.weight")
        ).grad = None
        both.step()
    muon_module.newton_schulz = original
    return [*(p.data for p in model.parameters()), *both.state_tensors().values()], computed


def check_sharded_norm(world_size: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world_size,))
    plain = random_params([(6, 5), (7,), (4, 3), (2, 3)])
    mixed = [nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)])) for p in plain[:3]]
    mixed.append(nn.Parameter(plain[3].data.clone()))
    give_grads(plain, seed=3)
    for p, q in zip(plain, mixed, strict=True):
        q.grad = p.grad.clone()
        if hasattr(q, "full_tensor"):
            q.grad = distribute_tensor(p.grad, mesh, [Shard(0)])
    want, got = clip_grad_norm(plain, 0.5), clip_grad_norm(mixed, 0.5)
    torch.testing.assert_close(got, want)
    for p, q in zip(plain[:3], mixed[:3], strict=True):
        torch.testing.assert_close(q.grad.redistribute(mesh, [Replicate()]).to_local(), p.grad)
    torch.testing.assert_close(mixed[3].grad, plain[3].grad)
    with pytest.raises(UserError, match="FSDP2"):
        Muon(mixed[:1])


def rank_main(rank: int, world_size: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
    muon_module.STACK_ELEMENTS = 600  # several stacks per shape, or there is nothing to deal out
    alone, all_matrices = run_steps(1, 0)
    shared, own_matrices = run_steps(world_size, rank)
    assert all(a.equal(b) for a, b in zip(alone, shared, strict=True))
    counts = [None] * world_size
    dist.all_gather_object(counts, own_matrices)
    assert sum(counts) == all_matrices and min(counts) > 0, counts
    check_sharded_norm(world_size)
    dist.destroy_process_group()


def test_two_ranks_equal_one_process_bitwise(tmp_path):
    mp.spawn(rank_main, (2, str(tmp_path / "rendezvous")), nprocs=2)


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
