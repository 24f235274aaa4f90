"""Align and distill objectives on tiny models: identities, masks, splits, kept rows."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from conftest import tiny_config
from kit import assert_close_rms

import objectives
from config import StageConfig
from data import TokenDataset, pack_rows
from distributed import World
from hybrid_layers import convert_layers
from model import Transformer
from objectives import AlignObjective, BlockObjective, HeadObjective
from student import set_trainable

ONE = World(0, 1, torch.device("cpu"))
LAYERS = [1, 2]


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(5)
    model = Transformer(tiny_config())
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(4)
    return model.double().requires_grad_(False)


@pytest.fixture(scope="module")
def data(tiny_data):
    return TokenDataset.open(tiny_data, "train")


def make_student(teacher, **how):
    """Converted, with an open gate: uncalibrated it is shut and most gradients are zero."""
    student = convert_layers(teacher, LAYERS, **how)
    for i in LAYERS:
        mixer = student.layers[i].linear_attn.double()
        torch.manual_seed(i)
        torch.nn.init.normal_(mixer.g_proj.weight)
    return student if how else student.double()


def count(batches) -> torch.Tensor:
    return torch.tensor(float(sum(b.num_valid for b in batches)), dtype=torch.float64)


def gradients(objective, batches) -> tuple[dict, dict]:
    for p in objective.params.values():
        p.grad = None
    number = float(sum(map(objective.tokens, batches)))
    sums = objective.backward(batches, torch.tensor(number, dtype=torch.float64))
    return sums, {n: p.grad.clone() for n, p in objective.params.items()}


def test_align_gives_every_layer_the_teachers_input_and_output(teacher, data):
    """The teacher's own attention in the mixer's place has loss 0; any other layer's has not."""
    student = make_student(teacher)
    batches = [pack_rows(data, [0, 3], 40, True)]
    for source, right in ((LAYERS, True), ([2, 1], False)):
        for i, j in zip(LAYERS, source, strict=True):
            student.layers[i].linear_attn = copy.deepcopy(teacher.layers[j].self_attn)
            student.layers[i].linear_attn.requires_grad_(True)
        sums = AlignObjective(student, teacher, StageConfig(), LAYERS, ONE).backward(
            batches, count(batches)
        )
        losses = [sums[f"layer_{i}"].item() for i in LAYERS]
        assert max(losses) < 1e-12 if right else min(losses) > 1e-2


def test_align_layers_are_independent(teacher, data):
    """Ruining one mixer changes nothing for the other."""
    student = make_student(teacher)
    batches = [pack_rows(data, [1], 40, True)]
    objective = AlignObjective(student, teacher, StageConfig(), LAYERS, ONE)
    _, before = gradients(objective, batches)
    with torch.no_grad():
        student.layers[1].linear_attn.o_proj.weight.mul_(-3)
    _, after = gradients(objective, batches)
    for name in before:
        same = torch.equal(before[name], after[name])
        assert same == name.startswith("layers.2."), name
    assert objective.clip(1e-3) > 1e-3
    for i in LAYERS:
        grads = [p.grad for p in student.layers[i].linear_attn.parameters()]
        assert torch.stack([g.norm() for g in grads]).norm() == pytest.approx(1e-3, rel=1e-3)


def test_kept_rows_give_what_the_teacher_gave(teacher, data):
    student = make_student(teacher)
    objective = AlignObjective(student, teacher, StageConfig(), LAYERS, ONE, keep=True)
    first = gradients(objective, [pack_rows(data, [0, 3], 40, True)])
    assert sorted(objective.held) == [0, 3]
    broken = AlignObjective(student, None, StageConfig(), LAYERS, ONE, keep=True)
    broken.teacher, broken.held = copy.deepcopy(teacher), objective.held
    broken.teacher.layers = None  # must not be asked again
    again = gradients(broken, [pack_rows(data, [3, 0], 40, True)])  # in another order
    assert first[0]["loss"] == pytest.approx(again[0]["loss"].item(), rel=1e-12)
    for name, grad in first[1].items():
        assert_close_rms(again[1][name], grad, 1e-9, name)


def test_align_does_not_depend_on_micro_batches(teacher, data):
    student = make_student(teacher)
    objective = AlignObjective(student, teacher, StageConfig(), LAYERS, ONE)
    whole = gradients(objective, [pack_rows(data, [0, 1, 2, 3], 40, True)])
    split = gradients(objective, [pack_rows(data, [i], 40, True) for i in range(4)])
    assert whole[0]["loss"] == pytest.approx(split[0]["loss"].item(), rel=1e-12)
    for name, grad in whole[1].items():
        assert_close_rms(split[1][name], grad, 1e-9, name)


WEIGHTS = {
    "heads": {"hidden_weight": 0, "heads_weight": 1000.0},
    "maps": {"hidden_weight": 0, "maps_weight": 2.0},
    "sum": {"hidden_weight": 0.5, "heads_weight": 3.0, "maps_weight": 0.25},
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("doc_mask", [True, False], ids=["packed", "rows"])
def test_attention_transfer_losses(teacher, data, weights, doc_mask):
    """A window as long as the row is the teacher: nothing is lost. A shorter one loses, however
    rows are split and whether the teacher's part was kept; and the sum is the sum."""
    stage = StageConfig(**weights)
    how = {"mixer": "hedgehog_window"}
    rows = [pack_rows(data, [0, 3], 40, doc_mask)]
    for window, right in ((40, True), (4, False)):
        student = convert_layers(teacher, LAYERS, linear_window=window, **how).double()
        set_trainable(student, stage, LAYERS)
        objective = AlignObjective(student, teacher, stage, LAYERS, ONE)
        found, grads = gradients(objective, rows)
        assert found["loss"].abs() < 1e-9 if right else found["loss"] > 1e-3
    names = {name.split(".", 3)[-1] for name in grads}
    assert ("o_proj.weight" in names) == bool(weights["hidden_weight"])
    assert ("v_proj.weight" in names) == ("heads_weight" in weights)
    assert {"q_proj.weight", "feature_map_k.weight", "window_factors"} < names
    assert all(grad.any() for grad in grads.values())
    split = gradients(objective, [pack_rows(data, [i], 40, doc_mask) for i in (0, 3)])
    kept = AlignObjective(student, teacher, stage, LAYERS, ONE, keep=True)
    first, again = gradients(kept, rows), gradients(kept, rows)  # in bfloat16, both times
    assert first[0]["loss"].item() == pytest.approx(found["loss"].item(), rel=2e-2)
    for name, grad in grads.items():
        assert_close_rms(split[1][name], grad, 1e-9, name)
        assert_close_rms(again[1][name], first[1][name], 1e-9, name)
    if len(weights) < 3:
        return
    parts = dict.fromkeys(grads, 0)
    for name, weight in weights.items():
        one = StageConfig(**{"hidden_weight": 0, name: weight})
        set_trainable(student, one, LAYERS)
        one = AlignObjective(student, teacher, one, LAYERS, ONE)
        parts |= {n: parts[n] + g for n, g in gradients(one, rows)[1].items()}
    for name, grad in grads.items():
        assert_close_rms(grad, parts[name], 1e-9, name)


@pytest.mark.parametrize("doc_mask", [True, False], ids=["packed", "rows"])
def test_padding_is_no_target(teacher, data, doc_mask):
    """Gradients of the text and of the padding alone, each by its tokens, make those of all."""
    stage = StageConfig(**WEIGHTS["sum"])
    how = {"mixer": "hedgehog_window", "linear_window": 4}
    student = convert_layers(teacher, LAYERS, **how).double()
    set_trainable(student, stage, LAYERS)
    whole = pack_rows(data, [0, 3], 40, doc_mask)
    assert whole.text is None and whole.row_text == [40, 40]
    mask = torch.arange(40) < torch.tensor([[30], [24]])
    found = []
    for text, lengths in ((None, [40, 40]), (mask, [30, 24]), (~mask, [10, 16])):
        text = None if text is None else text.view(whole.input_ids.shape)
        for objective in (
            AlignObjective(student, teacher, stage, LAYERS, ONE),
            BlockObjective(student, teacher, LAYERS),
        ):
            batch = dataclasses.replace(whole, text=text, row_text=lengths)
            sums, grads = gradients(objective, [batch])
            found.append(({"loss": sums["loss"]} | grads, sum(lengths)))
    for all_, mine, rest in (found[::2], found[1::2]):
        for name, x in all_[0].items():
            parts = (mine[0][name] * mine[1] + rest[0][name] * rest[1]) / all_[1]
            assert_close_rms(parts, x, 1e-9, name)
        assert mine[0]["loss"] != rest[0]["loss"]


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba2"])
def test_only_what_the_loss_depends_on_is_trained(teacher, data, mixer):
    student = convert_layers(teacher, LAYERS, mixer=mixer).double()
    stage = StageConfig(hidden_weight=0, heads_weight=1)
    set_trainable(student, stage, LAYERS)
    objective = AlignObjective(student, teacher, stage, LAYERS, ONE)
    _, found = gradients(objective, [pack_rows(data, [0, 3], 40, True)])
    assert found and not any("o_proj" in name or "out_proj" in name for name in found)


def test_the_heads_are_those_before_o_proj(teacher, data):
    """1000 times the mean squared error, by hand."""
    student = convert_layers(teacher, LAYERS, linear_window=4, mixer="hedgehog_window").double()
    batch = pack_rows(data, [0, 3], 40, False)
    stage = StageConfig(hidden_weight=0, heads_weight=1000.0)
    set_trainable(student, stage, LAYERS)
    objective = AlignObjective(student, teacher, stage, LAYERS, ONE)
    sums, _ = gradients(objective, [batch])
    for i, x, _, seq in teacher.attention_taps(batch.input_ids, layers=LAYERS):
        seen = []
        soft = teacher.layers[i].self_attn
        with soft.o_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])):
            soft(x, seq)
        want = 1000 * (student.layers[i].linear_attn.mix(x, seq) - seen[0]).square().mean()
        assert sums[f"layer_{i}"].item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("kd_weight", [1.0, 0.0], ids=["distill", "cross-entropy"])
def test_head_losses_do_not_depend_on_micro_batches(teacher, data, kd_weight):
    """Rows with different numbers of valid labels: a mean of means would differ."""
    student = make_student(teacher)
    stage = StageConfig(kd_weight=kd_weight, ce_weight=0.3)
    rows = [0, 1, 2, 3]
    valid = {pack_rows(data, [i], 40, True).num_valid for i in rows}
    assert len(valid) > 1
    objective = HeadObjective(student, teacher, stage, ONE, LAYERS)
    whole = gradients(objective, [pack_rows(data, rows, 40, True)])
    split = gradients(objective, [pack_rows(data, [i], 40, True) for i in rows])
    assert whole[0]["loss"] == pytest.approx(split[0]["loss"].item(), rel=1e-9)
    for name, grad in whole[1].items():
        assert_close_rms(split[1][name], grad, 1e-7, name)


def selected(objective, batch) -> torch.Tensor:
    """Positions of the tokens that the head is given."""
    loss, seen = objective.module, []
    choose = loss._selected
    loss._selected = lambda *args: seen.append(choose(*args)) or seen[-1]
    loss(batch, torch.tensor(1.0))
    del loss._selected
    return seen[0]


KINDS = {"distill": (1.0, 0.3), "cross-entropy": (0.0, 1.0)}


@pytest.mark.parametrize(("kd_weight", "ce_weight"), KINDS.values(), ids=KINDS.keys())
def test_only_selected_tokens_take_part(teacher, data, kd_weight, ce_weight):
    """The tokens with the largest excess loss of each row; the rest as if masked."""
    student = make_student(teacher)
    stage = StageConfig(kd_weight=kd_weight, ce_weight=ce_weight, select_tokens=0.4)
    batch = pack_rows(data, [0, 1, 2], 40, True)
    objective = HeadObjective(student, teacher, stage, ONE, LAYERS)
    at = selected(objective, batch).tolist()
    logits = (m(**objectives.inputs(batch)) @ m.head_weight.T for m in (student, teacher))
    labels = batch.labels.flatten()
    losses = (torch.nn.functional.cross_entropy(z[0], labels, reduction="none") for z in logits)
    excess = next(losses) - next(losses)
    expected = []
    for row in range(3):
        valid = [i for i in range(40 * row, 40 * row + 40) if labels[i] >= 0]
        most = sorted(valid, key=lambda i: -excess[i].item())[: round(0.4 * len(valid))]
        expected += sorted(most)
    assert at == expected
    masked = copy.deepcopy(batch)
    others = [i for i in range(120) if i not in at]
    masked.labels.view(-1)[others] = -100
    plain = HeadObjective(student, teacher, StageConfig(kd_weight=kd_weight, ce_weight=ce_weight),
                          ONE, LAYERS)  # fmt: skip
    for p in plain.params.values():
        p.grad = None
    number = torch.tensor(float(len(at)), dtype=torch.float64)
    wanted = plain.backward([masked], number)
    grads = {n: p.grad.clone() for n, p in plain.params.items()}
    for p in plain.params.values():
        p.grad = None
    found = objective.backward([batch], number)
    for name in wanted:
        assert found[name] == pytest.approx(wanted[name].item(), rel=1e-9)
    for name, grad in grads.items():
        assert_close_rms(objective.params[name].grad, grad, 1e-9, name)


def test_selection_does_not_depend_on_micro_batches(teacher, data):
    student = make_student(teacher)
    stage = StageConfig(select_tokens=0.3)
    objective = HeadObjective(student, teacher, stage, ONE, LAYERS)
    number = sum(
        objectives.num_selected(pack_rows(data, [i], 40, True).row_valid, 0.3) for i in range(4)
    )
    results = []
    for micro in (4, 2, 1):
        batches = [pack_rows(data, range(i, i + micro), 40, True) for i in range(0, 4, micro)]
        assert sum(objectives.num_selected(b.row_valid, 0.3) for b in batches) == number
        for p in objective.params.values():
            p.grad = None
        sums = objective.backward(batches, torch.tensor(float(number), dtype=torch.float64))
        results.append((sums, {n: p.grad.clone() for n, p in objective.params.items()}))
    for sums, grads in results[1:]:
        assert sums["loss"] == pytest.approx(results[0][0]["loss"].item(), rel=1e-9)
        for name, grad in grads.items():
            assert_close_rms(grad, results[0][1][name], 1e-7, name)


def test_hidden_states_of_other_tokens_get_no_gradient(teacher, data, monkeypatch):
    student = make_student(teacher)
    objective = HeadObjective(student, teacher, StageConfig(select_tokens=0.2), ONE, LAYERS)
    batch, hidden = pack_rows(data, [0, 1], 40, True), []
    forward = student.forward

    def keep(**kwargs):
        hidden.append(forward(**kwargs))
        hidden[-1].retain_grad()
        return hidden[-1]

    monkeypatch.setattr(student, "forward", keep)
    at = selected(objective, batch)
    objective.module(batch, torch.tensor(1.0)).loss.backward()
    grad = hidden[-1].grad[0].abs().sum(-1)
    chosen = torch.zeros(80, dtype=torch.bool).index_fill(0, at, True)
    assert (grad[chosen] > 0).all() and (grad[~chosen] == 0).all() and 0 < chosen.sum() < 30


def test_distilling_the_teacher_into_itself_costs_nothing(teacher, data):
    student = copy.deepcopy(teacher).requires_grad_(True)
    batches = [pack_rows(data, [0, 1], 40, True)]
    sums, grads = gradients(HeadObjective(student, teacher, StageConfig(), ONE, LAYERS), batches)
    assert abs(sums["loss"].item()) < 1e-12
    assert max(g.abs().max().item() for g in grads.values()) < 1e-9


def test_a_shared_trunk_changes_nothing(teacher, data):
    """Blocks before the first converted layer computed once for both: same loss and gradients."""
    batches = [pack_rows(data, [0, 1], 40, True)]
    stage = StageConfig(train="mixers")
    alone = make_student(teacher)
    for name, p in alone.named_parameters():
        p.requires_grad_(".linear_attn." in name)
    shared = make_student(teacher, share_trunk=True)
    a = gradients(HeadObjective(alone, teacher, stage, ONE, LAYERS), batches)
    b = gradients(HeadObjective(shared, teacher, stage, ONE, LAYERS, first=min(LAYERS)), batches)
    assert a[1].keys() == b[1].keys() and all(".linear_attn." in n for n in a[1])
    assert a[0]["loss"] == pytest.approx(b[0]["loss"].item(), rel=1e-9)
    for name, grad in a[1].items():
        assert_close_rms(b[1][name], grad, 1e-7, name)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("size", [1, 2])
def test_the_head_adds_to_grad_by_itself_on_one_rank_only(teacher, monkeypatch, size):
    """DDP waits for a gradient of every parameter from the backward."""
    monkeypatch.setattr(objectives, "data_parallel", lambda params: None)
    world = World(0, size, torch.device("cpu"))
    objective = HeadObjective(make_student(teacher), teacher, StageConfig(), world, LAYERS)
    assert objective.module.unit_grad == (size == 1)
