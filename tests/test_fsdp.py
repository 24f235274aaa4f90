"""FSDP2 on gloo ranks against DDP and one process: optimizers, whole runs, checkpoints."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import call_script, leave, metric_rows, run_python
from kit import assert_close_rms, random_ids, tiny_model
from processes import driver
from test_runs import kd_flags, train_flags, weights
from torch import nn

import distributed
import fsdp
import generate
from config import DistillConfig, UserError
from distributed import World
from fsdp import (
    add_pieces,
    average_whole_gradients,
    gathered,
    keeps_gathered,
    kept_whole,
    reshard,
    shard,
)
from hf import load_model, load_shape, save_model
from hybrid_layers import MIXERS
from lora import add_lora, lora_parameters
from muon import Muon
from muon_shards import Cut, is_sharded, local
from optimizer import build_optimizer, clip_grad_norm, param_role

# Over 10 steps in float32: AdamW; Muon with Newton-Schulz in float32, which sharpens rounding.
TOLERANCE = {"adamw": 1e-5, "muon": 1e-3}
optimizers = pytest.mark.parametrize(
    "optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "muon"]
)


def test_rows_are_cut_as_dtensor_cuts_them():
    for ranks in (1, 2, 3, 4, 7):
        for rows in (1, 2, 3, 5, 8, 12):
            chunks = [len(c) for c in torch.arange(rows).chunk(ranks)]
            chunks += [0] * (ranks - len(chunks))
            assert Cut(None, 0, ranks).rows(rows) == chunks


def give_grads(params, seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=draw) for p in params]


def muon_in_pieces(rank: int, ranks: int, rendezvous: str) -> None:
    """Muon and clipping on pieces give what they give on whole matrices: rows that do not divide,
    and fewer of them than ranks."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    how = {"init_method": f"file://{rendezvous}", "rank": rank, "world_size": ranks}
    dist.init_process_group("gloo", **how)
    mesh = init_device_mesh("cpu", (ranks,))
    shapes = [(7, 5), (7, 5), (2, 9), (6, 13), (1, 4), (8, 8), (8, 8), (8, 8)]
    whole = [nn.Parameter(p) for p in give_grads(map(torch.empty, shapes), 1)]
    pieces = [nn.Parameter(distribute_tensor(p.data.clone(), mesh, [Shard(0)])) for p in whole]
    settings = {"lr": 0.1, "weight_decay": 0.1, "ns_dtype": torch.float32}
    one, many = Muon(whole, **settings), Muon(pieces, **settings, rank=rank, world_size=ranks)
    for step in range(3):
        for p, q, g in zip(whole, pieces, give_grads(whole, 2 + step), strict=True):
            p.grad, q.grad = g, distribute_tensor(g.clone(), mesh, [Shard(0)])
        norms = clip_grad_norm(whole, 1.0), clip_grad_norm(pieces, 1.0)
        assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-6)
        go = torch.tensor(float(step != 1))  # the second step is refused
        before = [local(q).clone() for q in pieces]
        one.step(go)
        many.step(go)
        moved = [not a.equal(local(b)) for a, b in zip(before, pieces, strict=True) if a.numel()]
        assert all(moved) if step != 1 else not any(moved)
    for p, q in zip(whole, pieces, strict=True):
        torch.testing.assert_close(q.full_tensor(), p, rtol=0, atol=2e-6)
        mine, theirs = many.state[q]["momentum_buffer"], one.state[p]["momentum_buffer"]
        torch.testing.assert_close(mine.full_tensor(), theirs)
    leave()


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_muon_on_pieces_is_muon_on_matrices(ranks, tmp_path):
    mp.spawn(muon_in_pieces, (ranks, str(tmp_path / "rendezvous")), nprocs=ranks)


def gradients_in_pieces(rank: int, ranks: int, rendezvous: str) -> None:
    """Sums of whole gradients, twice, in pieces: rows that do not divide, fewer than ranks."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    how = {"init_method": f"file://{rendezvous}", "rank": rank, "world_size": ranks}
    dist.init_process_group("gloo", **how)
    mesh = init_device_mesh("cpu", (ranks,))
    whole = give_grads(map(torch.empty, [(7, 5), (2, 9), (6, 3), (1, 4)]), 1)
    pieces = [nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])) for p in whole]
    sums, mine = [torch.zeros_like(p) for p in whole], []
    for step in range(2):
        for r in range(ranks):
            theirs = give_grads(whole, 10 * step + r)
            sums = [a + b.bfloat16() for a, b in zip(sums, theirs, strict=True)]
            mine = theirs if r == rank else mine
        add_pieces(pieces, [g.bfloat16() for g in mine])
    for p, wanted in zip(pieces, sums, strict=True):
        assert p.grad.dtype == torch.float32 and p.grad.placements == p.placements
        torch.testing.assert_close(p.grad.full_tensor(), wanted, rtol=1e-6, atol=1e-6)
    leave()


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_come_to_the_pieces(ranks, tmp_path):
    mp.spawn(gradients_in_pieces, (ranks, str(tmp_path / "rendezvous")), nprocs=ranks)


def model_in_pieces(rank: int, ranks: int, rendezvous: str, keep: bool) -> None:
    """What is cut and what is not, in bfloat16: one step keeps whole parameters alike on all ranks,
    and the state has the pieces' shapes; put together it is the model again."""
    torch.set_num_threads(1)
    how = {"init_method": f"file://{rendezvous}", "rank": rank, "world_size": ranks}
    dist.init_process_group("gloo", **how)
    world = World(rank, ranks, torch.device("cpu"))
    model = tiny_model("LFLF", dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    never = DistillConfig(reshard_after_forward="never")
    assert keeps_gathered(never, world, []) and not keeps_gathered(DistillConfig(), world, [])
    roles = {name: param_role(name, p) for name, p in model.named_parameters()}
    names = {p: name for name, p in model.named_parameters()}
    whole = {names[p] for p in kept_whole(model)}
    assert {n.rpartition(".")[2] for n in whole} >= {"A_log", "dt_bias"} and len(whole) > 10
    amp = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    shard(model, world, dtype=torch.bfloat16, keep=keep, amp=amp)
    for name, p in model.named_parameters():
        assert is_sharded(p) == (name not in whole) == (roles[name] != "no_decay"), name
        assert p.dtype == torch.float32
    sharded = [n for n, p in model.named_parameters() if is_sharded(p)]
    again = gathered(model, world)
    assert (again is None) == (rank > 0)
    for name, p in again.named_parameters() if again is not None else ():
        assert p.equal(before[name]), name
    optimizer = build_optimizer(model.named_parameters(), lr=1e-2, use_muon=True, rank=rank,
                                world_size=ranks)  # fmt: skip
    seen = {}
    hook = model.layers[0].linear_attn.register_forward_pre_hook(
        lambda m, _: seen.update(q=m.q_proj.weight.dtype, decay=m.A_log.dtype)
    )
    with amp(), torch.no_grad():
        model(torch.randint(model.config.vocab_size, (1, 24)))
    hook.remove()
    in_blocks = [is_sharded(p) for b in model.layers for n, p in b.named_parameters()]
    assert any(in_blocks) == (not keep)
    reshard(model)
    assert sharded == [n for n, p in model.named_parameters() if is_sharded(p)]
    assert seen == {"q": torch.bfloat16, "decay": torch.float32}
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as sent, amp():
        model(torch.randint(model.config.vocab_size, (1, 24))).float().sum().backward()
    assert {call.args[1].dtype for call in sent.call_args_list} == {torch.bfloat16}
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    state = optimizer.state_tensors()
    assert any(is_sharded(t) for n, t in state.items() if n.endswith("momentum_buffer"))
    assert not any(is_sharded(t) for n, t in state.items() if ".A_log." in n)
    leave()


@pytest.mark.parametrize("keep", [False, True])
def test_what_is_cut_and_what_is_whole(keep, tmp_path):
    mp.spawn(model_in_pieces, (2, str(tmp_path / "rendezvous"), keep), nprocs=2)


def mixers_in_pieces(rank: int, ranks: int, rendezvous: str) -> None:
    """Every mixer in bfloat16: output and gradients of one batch are those of the whole model."""
    torch.set_num_threads(1)
    how = {"init_method": f"file://{rendezvous}", "rank": rank, "world_size": ranks}
    dist.init_process_group("gloo", **how)
    world = World(rank, ranks, torch.device("cpu"))
    amp = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    for name in MIXERS:
        kinds, how = ("SF", {}) if name == "sliding_window" else ("LF", {"mixer": [name]})
        model = tiny_model(kinds, dtype=torch.float32, **how)
        found = []
        for cut in (False, True):
            if cut:
                shard(model, world, dtype=torch.bfloat16, amp=amp)
            model.zero_grad()
            with amp():
                out = model(random_ids(model, 1, 40))
            out.float().square().mean().backward()
            if cut:
                average_whole_gradients(model.parameters(), world)
                average_whole_gradients([p for p in model.parameters() if is_sharded(p)], world)
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            whole = {n: g.full_tensor() if is_sharded(g) else g for n, g in grads.items()}
            found.append((out.detach().float(), {n: g.clone() for n, g in whole.items()}))
        (out, grads), (mine, others) = found
        assert_close_rms(mine, out, 2e-2, name)
        assert grads.keys() == others.keys()
        for n, g in grads.items():
            if g.norm() > 1e-4:
                assert_close_rms(others[n], g, 0.1, f"{name} {n}")
    leave()


def test_every_mixer_in_pieces(tmp_path):
    mp.spawn(mixers_in_pieces, (2, str(tmp_path / "rendezvous")), nprocs=2)


def decoding_in_pieces(rank: int, ranks: int, rendezvous: str) -> None:
    """A rank whose logits differ in a last bit picks another token, here the end of text."""
    torch.set_num_threads(1)
    how = {"init_method": f"file://{rendezvous}", "rank": rank, "world_size": ranks}
    dist.init_process_group("gloo", **how)
    model = tiny_model("LF", dtype=torch.float32)
    prompts = [[3, 1, 4], [1, 5]]
    wanted = generate.generate_batch(model, prompts, 6, stops={0})
    assert all(len(ids) == 6 and 0 not in ids for ids in wanted)
    shard(model, World(rank, ranks, torch.device("cpu")), dtype=torch.float32, amp=nullcontext)
    with mock.patch.object(generate, "pick", generate.pick if not rank else lambda *_: 0):
        assert generate.generate_batch(model, prompts, 6, stops={0}) == wanted
    leave()


def test_ranks_decode_the_same_tokens(tmp_path):
    mp.spawn(decoding_in_pieces, (2, str(tmp_path / "rendezvous")), nprocs=2)


def pieces_of_folders(rank: int, ranks: int, rendezvous: str, folders: list[str]) -> None:
    """What ranks read of a folder are the pieces of what `load_model` reads, adapters beside it."""
    torch.set_num_threads(1)
    how = {"init_method": f"file://{rendezvous}", "rank": rank, "world_size": ranks}
    dist.init_process_group("gloo", **how)
    world = World(rank, ranks, torch.device("cpu"))
    adapters = DistillConfig(lora_rank=2, lora_targets="q,o")
    for folder in folders:
        for dtype in (torch.float32, torch.bfloat16):
            narrow = dtype == torch.bfloat16
            amp = partial(torch.autocast, "cpu", torch.bfloat16, enabled=narrow)
            model, expected = load_shape(folder, dtype), load_model(folder, dtype=dtype)
            assert all(p.is_meta for p in model.parameters())
            add_lora(model, adapters)
            drawn = {name: p.clone() for name, p in lora_parameters(model).items()}
            model.eval().requires_grad_(False)
            shard(model, world, dtype=dtype, amp=amp, folder=folder)
            for name, p in model.named_parameters():
                kind = torch.float32 if name in drawn else expected.get_parameter(name).dtype
                assert not p.is_meta and p.dtype == kind and not p.requires_grad, name
            assert any(is_sharded(p) and local(p).shape != p.shape for p in model.parameters())
            assert all(p.equal(drawn[n]) for n, p in lora_parameters(model).items())
            assert any(p.any() for p in drawn.values())
            ids = random_ids(expected, 1, 9)
            with torch.no_grad(), amp():
                assert_close_rms(model(ids), expected(ids), 3e-2 if narrow else 1e-6)
            whole = gathered(model, world)
            for name, p in expected.named_parameters() if rank == 0 else ():
                assert dict(whole.named_parameters())[name].equal(p), name
    leave()


def test_every_rank_reads_its_own_pieces(tmp_path):
    """Of our format and another library's hybrid; 3 ranks: rows that do not divide."""
    folders = [str(tmp_path / name) for name in ("ours", "tied", "theirs")]
    for folder, kinds in zip(folders, ("LSF", "F", "LF"), strict=True):
        tied = folder.endswith("tied")
        model = tiny_model(kinds, dtype=torch.float32, tie_word_embeddings=tied)
        form = {"format": "qwen3_5_text"} if folder.endswith("theirs") else {}
        save_model(model, folder, tokenizer_from="byte", **form)
    spawned = (3, str(tmp_path / "rendezvous"), folders)
    mp.spawn(pieces_of_folders, spawned, nprocs=3)


def assert_same_run(one, two, tolerance: float, steps: int) -> None:
    losses = metric_rows(one), metric_rows(two)
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) == steps
    for step, loss in losses[0].items():
        # A divergence is a difference of log-probabilities near 6: it rounds as they do.
        assert losses[1][step] == pytest.approx(loss, rel=tolerance, abs=tolerance), step
    norms = metric_rows(one, "grad_norm"), metric_rows(two, "grad_norm")
    for step, norm in norms[0].items():
        assert norms[1][step] == pytest.approx(norm, rel=20 * tolerance), step
    mine, theirs = weights(one / "model"), weights(two / "model")
    for name, p in mine.items():
        # Ten times as much: where a gradient is near rounding AdamW moves by lr either way.
        error = (p - theirs[name]).norm() / p.norm()
        assert error < 10 * tolerance or p.norm() < 1e-6, (name, error)


@optimizers
def test_pretraining_is_that_of_one_process(optimizer, tiny_data, tmp_path):
    muon = optimizer == "muon"
    more = ("--max_steps=10", f"--use_muon={muon}")
    call_script("train", *train_flags(tiny_data, tmp_path, "one", *more))
    how = ("--parallel=fsdp", f"--reshard_after_forward={'never' if muon else 'always'}")
    flags = train_flags(tiny_data, tmp_path, "fsdp", *more, *how, "--eval_every=3")
    out = run_python("train.py", *flags, ranks=2).stdout
    assert "2 x cpu (fsdp over 2)" in out and out.count("sample: ") == 3
    assert_same_run(tmp_path / "one", tmp_path / "fsdp", TOLERANCE[optimizer], 10)


STEPS = ("--distill_train=all", "--align_tokens=640", "--distill_tokens=640", "--distill_lr=1e-3",
         "--distill_mixer_lr=3e-3")  # fmt: skip


@optimizers
def test_distillation_is_that_of_one_process(optimizer, tiny_teacher, tiny_data, tmp_path):
    muon = optimizer == "muon"
    more = (*STEPS, f"--use_muon={muon}", f"--align_use_muon={muon}", "--align_batch_tokens=128",
            "--align_tokens=1280")  # fmt: skip
    flags = {n: kd_flags(tiny_teacher, tiny_data, tmp_path, n, *more) for n in ("one", "fsdp")}
    call_script("train_kd", *flags["one"])
    how = ("--parallel=fsdp", f"--reshard_after_forward={'always' if muon else 'never'}")
    out = run_python("train_kd.py", *flags["fsdp"], *how, "--eval_every=3", ranks=2).stdout
    assert "2 x cpu (fsdp over 2)" in out and "greedy completions" in out
    assert_same_run(tmp_path / "one", tmp_path / "fsdp", TOLERANCE[optimizer], 20)


@pytest.mark.slow
def test_copies_of_pieces_and_ddp(tiny_teacher, tiny_data, tmp_path):
    """Two copies of two pieces each are DDP on two ranks, which has twice the micro-batches."""
    more = (*STEPS, "--distill_batch_tokens=256", "--distill_tokens=2560",
            "--align_batch_tokens=128", "--align_tokens=1280", "--distill_micro_batch=1",
            "--distill_use_muon=True", "--activation_checkpointing=full")  # fmt: skip
    flags = {n: kd_flags(tiny_teacher, tiny_data, tmp_path, n, *more) for n in ("ddp", "hybrid")}
    run_python("train_kd.py", *flags["ddp"], "--parallel=ddp", ranks=2)
    out = run_python("train_kd.py", *flags["hybrid"], "--parallel=fsdp", "--shard_ranks=2", ranks=4)
    assert "4 x cpu (fsdp over 2)" in out.stdout
    assert_same_run(tmp_path / "ddp", tmp_path / "hybrid", TOLERANCE["muon"], 20)


@pytest.mark.slow
def test_saved_by_two_resumed_by_one_and_four(tiny_teacher, tiny_data, tmp_path):
    more = (*STEPS, "--distill_batch_tokens=128", "--distill_tokens=1280", "--save_every=4",
            "--align_batch_tokens=128", "--align_tokens=1280", "--keep_checkpoints=9")  # fmt: skip
    two = kd_flags(tiny_teacher, tiny_data, tmp_path, "two", *more)
    run_python("train_kd.py", *two, "--parallel=fsdp", ranks=2)
    for step in (4, 14):  # inside align, inside distill
        at = f"--resume={tmp_path / 'two' / 'checkpoints' / f'step-{step}'}"
        one = kd_flags(tiny_teacher, tiny_data, tmp_path, f"one-{step}", *more, at)
        four = kd_flags(tiny_teacher, tiny_data, tmp_path, f"four-{step}", *more, at)
        call_script("train_kd", *one)
        run_python("train_kd.py", *four, "--parallel=fsdp", ranks=4)
        whole = metric_rows(tmp_path / "two")
        for n in ("one", "four"):
            rest = metric_rows(tmp_path / f"{n}-{step}")
            assert list(rest) == list(range(step + 1, 21))
            for k, loss in rest.items():
                assert loss == pytest.approx(whole[k], rel=1e-5), (n, k)


@pytest.mark.slow
def test_compiled_and_in_bfloat16(tiny_data, tmp_path):
    more = ("--max_steps=4", "--num_blocks=2")
    for name, how in (("plain", "--parallel=ddp"), ("fsdp", "--parallel=fsdp")):
        for kind in ("--torch_compile=true", "--dtype=bfloat16"):
            flags = train_flags(tiny_data, tmp_path, name + kind[2:4], *more, how, kind)
            run_python("train.py", *flags, ranks=2)
    for kind, tolerance in (("to", 1e-5), ("dt", 3e-3)):
        one, two = (metric_rows(tmp_path / f"{n}{kind}") for n in ("plain", "fsdp"))
        assert list(one.values()) == pytest.approx(list(two.values()), rel=tolerance)


def test_ranks_choose_the_same(monkeypatch):
    """By the memory of unlike GPUs they would not, and one would wait for the other."""
    world = World(0, 2, torch.device("cpu"))
    theirs = fsdp.parallel_flags(True, False) | {"--align_micro_batch": 8}
    monkeypatch.setattr(distributed, "everyone", lambda value, world: [value, theirs])
    distributed.require_same(dict(theirs), world)
    for flag, mine in (("--align_micro_batch", 4), ("--reshard_after_forward", "never")):
        with pytest.raises(UserError, match=f"{flag}: .* and .* found"):
            distributed.require_same(theirs | {flag: mine}, world)
    with pytest.raises(UserError, match="--parallel: ddp and fsdp found"):
        distributed.require_same(fsdp.parallel_flags(False, False), world)


def test_a_run_whose_ranks_chose_otherwise_is_refused(tiny_teacher, tiny_data, tmp_path):
    patch = """
import stage_plan
if os.environ["RANK"] == "1":
    stage_plan.MICRO_BATCH_TOKENS = 32
"""
    script = driver(tmp_path, patch, "train_kd")
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "x", "--align_batch_tokens=256")
    result = run_python(script, *flags, ranks=2, check=False, timeout=120)
    assert result.returncode and "error: --align_micro_batch: " in result.stderr
    assert not (tmp_path / "x").exists()


def test_what_needs_whole_models_is_refused(tiny_teacher, tiny_data, tmp_path, refused):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "x", "--parallel=fsdp")
    for more in ("--layers=auto:0.5", "--align_unique_tokens=64", "--teacher_float8=True",
                 "--trunk_dtype=bfloat16"):  # fmt: skip
        line = refused("train_kd", *flags, more)
        assert "--parallel: fsdp found with" in line and more.partition("=")[0] in line
    assert "--shard_ranks" in refused("train_kd", *flags, "--shard_ranks=3")
    assert "--shard_ranks" in refused("train", *train_flags(tiny_data, tmp_path, "x"),
                                      "--shard_ranks=1")  # fmt: skip


WHOLE = """
import student
def load_model(*_, **__):
    raise AssertionError("a whole model was read")
student.load_model = load_model
"""


def test_a_student_is_distilled_that_no_rank_holds_whole(tiny_teacher, tiny_data, tmp_path):
    """Neither it nor the teacher is read whole, and the run is that of one process."""
    more = ("--align_tokens=128", "--sample_tokens=0")
    call_script(
        "train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "a", *more, "--stages=align")
    )
    more = ("--stages=distill", f"--student={tmp_path / 'a' / 'model'}", "--distill_train=lora",
            "--distill_tokens=640", "--lora_rank=4", "--layers=3:1")  # fmt: skip
    flags = {n: kd_flags(tiny_teacher, tiny_data, tmp_path, n, *more) for n in ("one", "fsdp")}
    call_script("train_kd", *flags["one"])
    script = driver(tmp_path, WHOLE, "train_kd")
    run_python(script, *flags["fsdp"], "--parallel=fsdp", ranks=2)
    assert_same_run(tmp_path / "one", tmp_path / "fsdp", TOLERANCE["adamw"], 10)
