"""Newton-Schulz and Muon against torch.optim.Muon; ranks against one process."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import leave
from torch import nn
from zoo import SHAPES, Zoo, give_grads, random_params, rms_error

import muon as muon_module
from config import UserError
from muon import Muon, newton_schulz, newton_schulz_ref, orthogonalise
from ops.multi_tensor import scale_
from optimizer import build_optimizer, clip_grad_norm

# Newton-Schulz


@pytest.mark.parametrize("coefficients", muon_module.COEFFICIENTS)
@pytest.mark.parametrize("steps", [1, 2, 5, 9])
@pytest.mark.parametrize("columns", [17, 29, 40], ids=["square", "plain", "gram"])
def test_batched_newton_schulz_equals_reference(coefficients, steps, columns):
    wide = torch.randn(3, 17, columns, dtype=torch.float64)
    for stack in (wide, wide.mT.contiguous()):
        batched = newton_schulz(stack, coefficients=coefficients, steps=steps)
        assert batched.shape == stack.shape and batched.is_contiguous()
        for matrix, got in zip(stack, batched, strict=True):
            want = newton_schulz_ref(matrix, coefficients=coefficients, steps=steps)
            assert rms_error(got, want) < 1e-12
            other = newton_schulz_ref(matrix.T, coefficients=coefficients, steps=steps)
            assert rms_error(other, want.T) < 1e-12


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [5, 7, 12])
@pytest.mark.parametrize("coefficients", muon_module.COEFFICIENTS)
def test_16_bit_newton_schulz_stays_bounded(coefficients, steps, dtype):
    rank_one = torch.randn(2, 32, 1) @ torch.randn(2, 1, 64)  # one singular value of exactly 1
    for stack in (rank_one, torch.randn(2, 32, 64)):
        stack = (stack / stack.norm(dim=(1, 2), keepdim=True)).to(dtype)
        update = newton_schulz(stack, coefficients=coefficients, steps=steps)
        assert torch.linalg.svdvals(update.float()).max() < 1.3
    zeros = newton_schulz(torch.zeros(1, 3, 4), coefficients=coefficients)
    assert zeros.equal(torch.zeros(1, 3, 4))


@pytest.mark.parametrize("columns", [96, 384], ids=["plain", "gram"])
@pytest.mark.parametrize("decay", [0, 1, 2], ids=["flat", "1/i", "1/i^2"])
@pytest.mark.parametrize("coefficients", muon_module.COEFFICIENTS)
def test_float16_is_more_exact_than_bfloat16(coefficients, decay, columns):
    """Both against float64, whatever the spectrum; bfloat16 always takes the plain iteration."""
    rows = 64
    u, _ = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64))
    spectrum = torch.arange(1, rows + 1, dtype=torch.float64) ** -decay
    matrix = (u * spectrum) @ v.T
    matrix = matrix / (matrix.norm() * muon_module.COEFFICIENTS[coefficients][1])
    exact = newton_schulz_ref(matrix, coefficients=coefficients)
    settings = {"coefficients": coefficients, "steps": 5}
    for m, want in ((matrix, exact), (matrix.T, exact.T)):
        errors = {}
        for dtype in (torch.float16, torch.bfloat16):
            update = orthogonalise(m[None].to(dtype), **settings)
            errors[dtype] = rms_error(update[0].double(), want)
        assert errors[torch.float16] < 0.5 * errors[torch.bfloat16], errors


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


@pytest.mark.parametrize("coefficients", muon_module.COEFFICIENTS)
def test_first_step_is_the_reference(coefficients):
    params = random_params()
    give_grads(params, seed=0)
    before = [p.detach().clone() for p in params]
    Muon(params, lr=1.0, adjust_lr="match_rms_adamw", coefficients=coefficients).step()
    for p, b in zip(params, before, strict=True):
        update = newton_schulz_ref(p.grad, coefficients=coefficients)
        update = update * muon_module.ADJUST_LR["match_rms_adamw"](*p.shape)
        assert rms_error(b - p.detach(), update) < 1e-4


def test_groups_that_share_stacks_equal_torch(monkeypatch):
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", float32_zeropower)
    pair = []
    for make, settings in (
        (Muon, dict(coefficients="quintic", ns_dtype=torch.float32)),
        (torch.optim.Muon, dict(adjust_lr_fn="original")),
    ):
        params = random_params([*SHAPES, *SHAPES])
        groups = [
            {"params": params[: len(SHAPES)], "lr": 0.02, "weight_decay": 0.3},
            {"params": params[len(SHAPES) :], "lr": 0.05, "weight_decay": 0.0},
        ]
        pair.append((params, make(groups, momentum=0.9, nesterov=True, **settings)))
    assert worst_error_over_steps(pair) < 1e-5
    stacks = muon_module._make_stacks(pair[0][1]._matrices())
    assert len(stacks) == len(set(SHAPES))
    assert all(len({m.scale for m in stack.matrices}) == 2 for stack in stacks)


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
    settings["shapes"] = [(576, 1536), (1536, 576), (576, 576), (192, 576), (100, 75)] * 3
    assert 0 < worst_error_over_steps(muon_pair(None, **settings)) < BF16_TOLERANCE
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", float32_zeropower)
    # Float32 sums in another order, over Gram matrices where they are wide: 1.1e-5 on an H100.
    assert worst_error_over_steps(muon_pair(torch.float32, **settings)) < 2e-5


def test_stack_size_does_not_change_the_result(monkeypatch):
    results = []
    for elements in (2**24, 2 * 24 * 40, 1):
        monkeypatch.setattr(muon_module, "STACK_ELEMENTS", elements)
        params = random_params()
        muon = Muon(params, lr=0.02)
        for step in range(3):
            give_grads(params, seed=step)
            muon.step()
        stacks = [s.matrices for s in muon_module._make_stacks(muon._matrices())]
        assert max(len(s) * s[0].param.numel() for s in stacks) <= max(elements, 32 * 32)
        assert all(len({m.param.shape for m in s}) == 1 for s in stacks)
        assert sum(map(len, stacks)) == len(params)
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
    stacks = [muon_module._Stack([m], muon_module.PLAIN) for m in muon._matrices()]
    rounds = muon_module._deal(stacks, 4)
    dealt = [id(stack.matrices[0].param) for r in rounds for _, stack in r]
    assert sorted(dealt) == sorted(map(id, params))
    assert all(len({owner for owner, _ in r}) == len(r) for r in rounds)
    shapes = [(owner, stack.matrices[0].param.shape) for r in rounds for owner, stack in r]
    owners_of_large = [owner for owner, shape in shapes if shape[0] == 64]
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
        return orthogonalise(stack, **settings)

    muon_module.orthogonalise, original = counting, orthogonalise
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
    muon_module.orthogonalise = original
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
    want = clip_grad_norm(plain, 0.5)
    with mock.patch("optimizer.scale_", wraps=scale_) as scale:  # it takes addresses of memory
        got = clip_grad_norm(mixed, 0.5)
    given = [t for call in scale.call_args_list for t in call.args[0]]
    assert len(given) == 4 and not any(hasattr(t, "full_tensor") for t in given)
    torch.testing.assert_close(got, want)
    for p, q in zip(plain[:3], mixed[:3], strict=True):
        torch.testing.assert_close(q.grad.redistribute(mesh, [Replicate()]).to_local(), p.grad)
    torch.testing.assert_close(mixed[3].grad, plain[3].grad)


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
    leave()


def test_two_ranks_equal_one_process_bitwise(tmp_path):
    mp.spawn(rank_main, (2, str(tmp_path / "rendezvous")), nprocs=2)
