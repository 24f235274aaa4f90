"""Adapters: at the start nothing, merged the same, trained alone; feature maps alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import call_script, metric_rows, run_python
from kit import assert_close_rms, logits, random_ids, some_slow, tiny_model
from test_runs import kd_flags, weights
from torch import nn

import trainer
from checkpoint import tensor_names
from config import DistillConfig, StageConfig
from distributed import World
from hybrid_layers import MIXERS, cast_trunk
from lora import LoRALinear, add_lora, is_lora, lora_parameters, merge_lora
from optimizer import param_role
from student import set_trainable
from trainer import own_dropout


def adapted(model, **changes):
    """A copy with adapters that are not zero."""
    cfg = DistillConfig(**{"lora_rank": 3, "lora_alpha": 6.0, **changes})
    model = copy.deepcopy(model)
    add_lora(model, cfg)
    return model


def shaken(model):
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in lora_parameters(model).items():
            if name.endswith("lora_B"):
                p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    return model


@pytest.mark.parametrize("targets, count", [("q,k,v,o", 12), ("q,v", 6), ("o", 3)])
def test_a_fresh_adapter_changes_nothing(targets, count):
    model = tiny_model("FSL", dtype=torch.float32)
    ids, names = random_ids(model, 2, 19), {n for n, _ in model.named_parameters()}
    new = adapted(model, lora_targets=targets)
    assert new(ids).equal(model(ids))
    found = lora_parameters(new)
    assert len(found) == 2 * count and {n for n, _ in new.named_parameters()} == names | set(found)
    assert all(param_role(n, p) == "no_decay" for n, p in found.items())
    again = adapted(model, lora_targets=targets)
    assert all(p.equal(found[n]) for n, p in lora_parameters(again).items())
    other = adapted(model, lora_targets=targets, seed=1)
    assert not any(
        p.equal(found[n]) for n, p in lora_parameters(other).items() if n.endswith("lora_A")
    )


def test_it_is_what_the_paper_says():
    linear = nn.Linear(5, 7)
    lora = LoRALinear(linear, 2, 6.0, 0.0, 0)
    nn.init.normal_(lora.lora_B)
    x = torch.randn(3, 5)
    want = x @ (linear.weight + 3.0 * lora.lora_B @ lora.lora_A).T + linear.bias
    torch.testing.assert_close(lora(x), want)


def test_merged_is_the_same_and_leaves_a_shared_weight_alone():
    model = tiny_model("FSL", dtype=torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    new = shaken(adapted(model))
    new.layers[0].self_attn.q_proj.weight = model.layers[0].self_attn.q_proj.weight
    ids = random_ids(model, 2, 19)
    unmerged = new(ids)
    assert (unmerged - model(ids)).abs().max() > 0.1
    merge_lora(new)
    assert_close_rms(new(ids), unmerged, 1e-5)
    assert {n for n, _ in new.named_parameters()} == set(before) and not lora_parameters(new)
    assert all(p.equal(before[n]) for n, p in model.named_parameters())


def test_each_rank_drops_what_it_will():
    drawn = set()
    torch.manual_seed(5)
    wanted = torch.rand(())
    torch.manual_seed(5)
    for step, rank in ((7, 0), (7, 1), (8, 0), (8, 1), (7, 1)):
        world = World(rank, 2, torch.device("cpu"))
        with own_dropout(SimpleNamespace(cfg=DistillConfig(), world=world, step=step)):
            drawn.add(torch.rand(()).item())
    assert len(drawn) == 4
    assert torch.rand(()) == wanted  # what else draws does so alike on all ranks


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_adapter_of_every_mixer_counts(mixer):
    """Each of q, k, v and o by itself changes what comes out, learns, and is merged."""
    kinds = "FS" if mixer == "sliding_window" else "FL"
    model = tiny_model(kinds, dtype=torch.float32, mixer=[mixer] * kinds.count("L"))
    ids = random_ids(model, 2, 19)
    plain, names = model(ids), {n for n, _ in model.named_parameters()}
    for target in "qkvo":
        new = adapted(model, lora_targets=target)
        logits(new, ids).square().mean().backward()
        grads = {n: p.grad for n, p in lora_parameters(new).items() if n.endswith("lora_B")}
        assert len(grads) == 2 and all(g is not None and g.any() for g in grads.values()), target
        unmerged = shaken(new)(ids)
        assert (unmerged - plain).abs().max() > 1e-3, target
        merge_lora(new)
        assert_close_rms(new(ids), unmerged, 1e-5)
        assert {n for n, _ in new.named_parameters()} == names, target


def test_dropout_is_for_training_only():
    new = shaken(adapted(tiny_model("FL", dtype=torch.float32), lora_dropout=0.5)).train()
    ids = random_ids(new, 2, 19)
    assert not new(ids).equal(new(ids))
    with torch.no_grad():
        assert new(ids).equal(new(ids))
    set_trainable(new, StageConfig(train="mixers"), [1])  # a stage after the adapters' own
    assert new(ids).requires_grad and new(ids).equal(new(ids))


def test_a_stage_that_trains_all_or_the_trunks_type_leaves_adapters_alone():
    new = adapted(tiny_model("FL", dtype=torch.float32))
    set_trainable(new, StageConfig(train="all"), [1])
    trained = {n for n, p in new.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in new.named_parameters()} - set(lora_parameters(new))
    cast_trunk(new, [1], torch.bfloat16)
    assert {p.dtype for p in lora_parameters(new).values()} == {torch.float32}
    assert new.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


TARGETS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
LORA = ("--distill_train=lora", "--lora_rank=4", "--distill_lr=1e-2")


def test_a_stage_trains_adapters_alone(tiny_teacher, tiny_data, tmp_path, capsys):
    often = ("--save_every=10", "--keep_checkpoints=9", "--distill_mixer_lr=0.5")
    call_script("train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "a", *LORA, *often))
    out = capsys.readouterr().out
    assert "lora: 16 adapters of rank 4 on q,k,v,o" in out and "trains lora, lr 0.01\n" in out
    assert max(metric_rows(tmp_path / "a", "lr").values()) == 0.01  # not the mixers'
    only = ("--stages=align",)
    call_script("train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "align", *only))
    aligned, done = weights(tmp_path / "align" / "model"), weights(tmp_path / "a" / "model")
    for name, p in done.items():  # the saved student has no adapters, but what they came to
        assert p.equal(aligned[name]) != name.endswith(TARGETS), name
    kl = metric_rows(tmp_path / "a", "kl")
    assert sum(list(kl.values())[-5:]) < sum(list(kl.values())[:5])

    inside = tmp_path / "a" / "checkpoints" / "step-40"
    names = tensor_names(inside)
    state = {n.removeprefix("optim.").rpartition(".")[0] for n in names if n.startswith("optim.")}
    assert state and all(map(is_lora, state))
    kept = {n for n in names if n.startswith("model.")}
    assert all(".linear_attn." in n or is_lora(n) for n in kept)
    again = kd_flags(tiny_teacher, tiny_data, tmp_path, "b", *LORA, *often, f"--resume={inside}")
    call_script("train_kd", *again)
    resumed = weights(tmp_path / "b" / "model")
    assert all(p.equal(resumed[name]) for name, p in done.items())


def test_a_student_of_which_adapters_alone_are_trained(
    tiny_teacher, tiny_data, tmp_path, monkeypatch
):
    """All else stays in the compute type and out of checkpoints; what they come to is float32."""
    call_script("train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "s", "--stages=align"))
    more = (*LORA, f"--student={tmp_path / 's' / 'model'}", "--stages=distill", "--save_every=10",
            "--keep_checkpoints=9", "--dtype=bfloat16", "--lora_dropout=0.1")  # fmt: skip
    monkeypatch.setattr(trainer, "own_dropout", mock.Mock(wraps=own_dropout))
    call_script("train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "a", *more))
    assert trainer.own_dropout.call_count == len(metric_rows(tmp_path / "a")) > 10
    given, done = weights(tmp_path / "s" / "model"), weights(tmp_path / "a" / "model")
    assert given.keys() == done.keys()
    for name, p in done.items():
        if not name.endswith(TARGETS):
            assert p.dtype == (torch.bfloat16 if param_role(name, p) != "no_decay" else p.dtype)
            assert p.equal(given[name].to(p.dtype)), name
            continue
        change = p - given[name].bfloat16().float()
        assert p.dtype == torch.float32 and torch.linalg.matrix_rank(change, rtol=1e-3) == 4, name
    inside = tmp_path / "a" / "checkpoints" / "step-10"
    names = [n.removeprefix("model.") for n in tensor_names(inside) if n.startswith("model.")]
    assert len(names) == 2 * 16 and all(map(is_lora, names))
    again = kd_flags(tiny_teacher, tiny_data, tmp_path, "b", *more, f"--resume={inside}")
    call_script("train_kd", *again)
    resumed = weights(tmp_path / "b" / "model")
    assert all(p.equal(resumed[name]) for name, p in done.items())


def test_converted_in_a_run_that_trains_adapters_alone(tiny_teacher, tiny_data, tmp_path, capsys):
    """Transfer and calibration come before all is stored in the compute type."""
    more = (*LORA, "--stages=distill", "--dtype=bfloat16", "--save_every=10",
            "--keep_checkpoints=9")  # fmt: skip
    call_script("train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "a", *more))
    out = capsys.readouterr().out
    assert "transfer self-test: " in out and "calibrated on " in out
    done = weights(tmp_path / "a" / "model")
    assert {p.dtype for p in done.values()} == {torch.bfloat16, torch.float32}
    at = f"--resume={tmp_path / 'a' / 'checkpoints' / 'step-10'}"
    call_script("train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "b", *more, at))
    resumed = weights(tmp_path / "b" / "model")
    assert all(p.equal(resumed[name]) for name, p in done.items())


LOLCATS = ("--align_hidden_weight=0", "--align_heads_weight=1000", "--align_maps_weight=1")


@pytest.mark.parametrize("loss", some_slow({"hidden": ((),), "heads and maps": (LOLCATS,)},
                                           "heads and maps"))  # fmt: skip
def test_feature_maps_alone(tiny_teacher, tiny_data, tmp_path, loss):
    """LoLCATs' first stage; resumed inside it the rest of the mixer is as calibrated."""
    more = (*loss, "--mixer=hedgehog_window", "--align_train=feature_maps", "--stages=align",
            "--linear_window=8", "--save_every=10", "--keep_checkpoints=9")  # fmt: skip
    for name, rest in (("a", ()), ("start", ("--align_lr=0",))):
        flags = kd_flags(tiny_teacher, tiny_data, tmp_path, name, *more, *rest)
        call_script("train_kd", *flags)
    start, done = weights(tmp_path / "start" / "model"), weights(tmp_path / "a" / "model")
    for name, p in done.items():
        part = name.split(".")[-2 if name.endswith(".weight") else -1]
        assert p.equal(start[name]) != (part in ("feature_map_q", "feature_map_k",
                                                 "window_factors")), name  # fmt: skip
    at = f"--resume={tmp_path / 'a' / 'checkpoints' / 'step-10'}"
    call_script("train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "b", *more, at))
    resumed = weights(tmp_path / "b" / "model")
    assert all(p.equal(resumed[name]) for name, p in done.items())


def test_with_a_search(tiny_teacher, tiny_data, tmp_path):
    """Layers that are softmax again get adapters too."""
    more = (*LORA, "--layers=auto:0.5", "--search_tokens=512", "--search_seq_len=64",
            "--search_recall_samples=0")  # fmt: skip
    call_script("train_kd", *kd_flags(tiny_teacher, tiny_data, tmp_path, "a", *more))
    theirs, mine = weights(tiny_teacher), weights(tmp_path / "a" / "model")
    soft = [n for n in mine if ".self_attn.q_proj" in n]
    assert len(soft) == 2 and not any(mine[n].equal(theirs[n]) for n in soft)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_on_two_ranks_it_is_the_same(parallel, tiny_teacher, tiny_data, tmp_path):
    flags = {n: kd_flags(tiny_teacher, tiny_data, tmp_path, n, *LORA) for n in ("one", "two")}
    call_script("train_kd", *flags["one"])
    run_python("train_kd.py", *flags["two"], f"--parallel={parallel}", ranks=2)
    one, two = (metric_rows(tmp_path / n) for n in ("one", "two"))
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
    mine, theirs = (weights(tmp_path / n / "model") for n in ("two", "one"))
    for name, p in theirs.items():
        assert_close_rms(mine[name], p, 1e-4, name)


def test_wrong_flags_are_refused(tiny_teacher, tiny_data, tmp_path, refused):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "x")
    assert "--lora_targets: q,z found" in refused("train_kd", *flags, *LORA, "--lora_targets=q,z")
    for what in ("lora", "all"):
        assert f"--align_train: {what}" in refused("train_kd", *flags, f"--align_train={what}")
    dropout = ("--lora_dropout=0.1", "--activation_checkpointing=full")
    assert "--lora_dropout" in refused("train_kd", *flags, *LORA, *dropout)
    assert "feature_maps" in refused("train_kd", *flags, "--align_train=feature_maps")
    mixed = ("--mixer=hedgehog_window,gla", "--align_train=feature_maps")
    assert "gla of layer 2 has none" in refused("train_kd", *flags, *mixed)


def test_attention_transfer_that_cannot_be_is_refused(tiny_teacher, tiny_data, tmp_path, refused):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "x")
    for more, line in (
        (("--align_hidden_weight=0",), "--align_hidden_weight: no loss"),
        (("--align_maps_weight=1",), "--align_maps_weight: 1 found"),
        (("--align_maps_weight=1", "--mixer=sliding_window"), "sliding_window found"),
        (("--align_heads_weight=9",), "--transfer_scale false expected"),
        (("--transfer_gate=False", "--mixer=kda"), "--transfer_gate: false found, but --mixer kda"),
        (("--distill_heads_weight=9",), "--distill_heads_weight: 9 found"),
        ((*LOLCATS, "--mixer=hedgehog_window", "--align_unique_tokens=0", "--parallel=fsdp"),
         "--align_maps_weight"),
    ):  # fmt: skip
        assert line in refused("train_kd", *flags, *more), more
