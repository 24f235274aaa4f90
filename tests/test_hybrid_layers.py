"""Conversion of softmax layers, and the self-test that must catch a wrong one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kit import assert_close_rms, logits, random_ids, tiny_config, tiny_model

import hybrid_layers
from config import UserError
from hybrid_layers import (
    MIXERS,
    build_mixer,
    check_transfer,
    convert_config,
    convert_layers,
    mixer_names,
    mixer_parameters,
    resolve_kernels,
    use_kernels,
)
from ops import kernels

TEACHERS = {
    "llama": {"qk_norm": False},
    "qwen2": {"qk_norm": False, "attention_bias": True},
    "qwen3": {"qk_norm": True, "num_key_value_heads": 1},
    "sink": {"attention_sink": True},
}
every_teacher = pytest.mark.parametrize("settings", TEACHERS.values(), ids=TEACHERS)


def make_teacher(kinds="FFSF", dtype=torch.float32, **settings):
    return tiny_model(kinds, dtype=dtype, **settings)


def copies(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_unchanged(module, before):
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]), name


@every_teacher
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conversion_touches_only_its_layers(settings, share, dtype):
    teacher = make_teacher(dtype=dtype, **settings)
    before = copies(teacher)
    student = convert_layers(teacher, [1, 2], share_trunk=share)
    assert teacher.config.layer_map() == "FFSF"
    assert student.config.layer_map() == "FLLF"
    assert_unchanged(teacher, before)
    mixers = mixer_parameters(student, [1, 2])
    assert {name.split(".")[1] for name in mixers} == {"1", "2"}
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in mixers.values())
    for name, p in student.named_parameters():
        if name not in mixers:
            assert torch.equal(p, before[name].to(p.dtype)), name
            assert p.dtype == (dtype if share else torch.float32)
            assert (p is teacher.get_parameter(name)) == share, name
            assert p.requires_grad != share, name
    assert all(p.requires_grad for p in mixers.values())
    assert not any("self_attn" in name for name in student.state_dict() if ".1." in name)
    assert all(p.requires_grad != share for p in teacher.parameters())


def test_training_the_student_leaves_the_teacher_alone():
    for share in (False, True):
        teacher = make_teacher()
        before, ids = copies(teacher), random_ids(teacher, 1, 20)
        student = convert_layers(teacher, [0, 3], share_trunk=share)
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        logits(student, ids).sin().sum().backward()
        assert all(p.grad is not None for p in mixer_parameters(student, [0, 3]).values())
        optimizer.step()
        assert_unchanged(teacher, before)
        assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("share", [False, True])
def test_other_layers_compute_what_they_did(share):
    """Up to the first converted layer the same, and with the teacher's attention output put in
    place of the mixer's, the same logits."""
    teacher = make_teacher("FFFF")
    ids = random_ids(teacher, 1, 20)
    outputs = {i: out for i, _, out, _ in teacher.attention_taps(ids, layers=[1, 2])}
    expected, kept = teacher(ids, keep=1)
    student = convert_layers(teacher, [1, 2], share_trunk=share)
    own, own_kept = student(ids, keep=1)
    assert torch.equal(own_kept, kept)
    assert (own - expected).abs().max() > 0.01
    for i, out in outputs.items():
        student.layers[i].linear_attn.forward = lambda x, seq, cache, out=out: out
    assert torch.equal(student(ids), expected)


def test_converted_model_decodes_and_packs():
    teacher = make_teacher("FFFF", dtype=torch.float32)
    student = convert_layers(teacher, [0, 2], linear_rope=True).double()
    ids = random_ids(teacher, 1, 30)
    cache = student.new_cache()
    steps = [student(part, cache=cache) for part in ids.split([17, *[1] * 13], 1)]
    assert_close_rms(torch.cat(steps, 1), student(ids))
    packed = student(ids, cu_seqlens=torch.tensor([0, 11, 30], dtype=torch.int32))
    assert_close_rms(packed, torch.cat([student(ids[:, :11]), student(ids[:, 11:])], 1))


# ---- the self-test


@every_teacher
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_check_passes_on_a_right_conversion(settings, dtype):
    teacher = make_teacher("FFFF", dtype=dtype, **settings)
    before = copies(teacher)
    student = convert_layers(teacher, [0, 2, 3])
    worst = check_transfer(teacher, student, [0, 2, 3], random_ids(teacher, 1, 30))
    assert sorted(worst) == [0, 2, 3]
    assert max(worst.values()) < 1e-5  # bfloat16 weights too: both sides multiply in float32
    assert_unchanged(teacher, before)


def repeat_rows(weight, groups):
    """KV heads expanded by repeating every row: row r of the result is row r // groups."""
    return weight.repeat_interleave(groups, 0)


def modulo_heads(weight, groups):
    """Query head h reads KV head h mod n_kv."""
    return weight.repeat(groups, *[1] * (weight.dim() - 1))


@pytest.mark.parametrize("wrong", [repeat_rows, modulo_heads])
@pytest.mark.parametrize("what", ["k", "v"])
def test_check_catches_wrongly_expanded_heads(wrong, what):
    teacher = make_teacher("FF", qk_norm=False)
    student = convert_layers(teacher, [1])
    theirs = getattr(teacher.layers[1].self_attn, f"{what}_proj").weight
    mine = getattr(student.layers[1].linear_attn, f"{what}_proj").weight
    with torch.no_grad():
        mine.copy_(wrong(theirs, 2))
    with pytest.raises(RuntimeError, match=f"layer 1, {what} of head"):
        check_transfer(teacher, student, [1], random_ids(teacher, 1, 30))


@pytest.mark.parametrize("what", "qkv")
@pytest.mark.parametrize("size", [1.0, 0.03])
def test_check_catches_a_dropped_bias(what, size):
    """A small one too, which leaves the correlation above .99."""
    teacher = make_teacher("FF", qk_norm=False, attention_bias=True)
    with torch.no_grad():
        getattr(teacher.layers[1].self_attn, f"{what}_proj").bias.mul_(size)
    student = convert_layers(teacher, [0, 1])
    torch.nn.init.zeros_(getattr(student.layers[1].linear_attn, f"{what}_proj").bias)
    with pytest.raises(RuntimeError, match=f"layer 1, {what} of head 0"):
        check_transfer(teacher, student, [0, 1], random_ids(teacher, 1, 30))


def test_check_catches_forgotten_norm_weights():
    teacher = make_teacher("FF", qk_norm=True)
    student = convert_layers(teacher, [1])
    with torch.no_grad():
        student.layers[1].linear_attn.q_proj.weight.copy_(teacher.layers[1].self_attn.q_proj.weight)
    with pytest.raises(RuntimeError, match="layer 1, q of head"):
        check_transfer(teacher, student, [1], random_ids(teacher, 1, 30))


def test_check_catches_every_parameter_left_unset():
    teacher = make_teacher("FF")
    for name, _ in convert_layers(teacher, [1]).layers[1].linear_attn.named_parameters():
        student = convert_layers(teacher, [1])
        with torch.no_grad():
            student.layers[1].linear_attn.get_parameter(name).view(-1)[-1] = torch.nan
        with pytest.raises(RuntimeError, match=f"{name} of layer 1 was left unset"):
            check_transfer(teacher, student, [1], random_ids(teacher, 1, 30))


def test_check_catches_a_random_layer():
    teacher = make_teacher("FF")
    student = convert_layers(teacher, [1])
    torch.manual_seed(0)
    student.layers[1].linear_attn.init_weights()
    with pytest.raises(RuntimeError, match="layer 1, q of head 0"):
        check_transfer(teacher, student, [1], random_ids(teacher, 1, 30))


# ---- names and configs


def test_mixer_names():
    name = next(iter(MIXERS))
    assert mixer_names(name, 3) == [name] * 3
    assert mixer_names(f"{name}, {name}", 2) == [name, name]
    with pytest.raises(UserError, match="2 names found, 1 or 3"):
        mixer_names(f"{name},{name}", 3)
    for spec in ("mamba9", f"{name},mamba9", ""):
        with pytest.raises(UserError, match=name):
            mixer_names(spec, 2)
    with pytest.raises(UserError, match=r"mamba9.*gated_deltanet"):
        build_mixer("mamba9", tiny_model("L").config)


def test_convert_config_keeps_earlier_mixers_in_order():
    config = make_teacher("LFFL").config
    assert convert_config(config, [1], "gated_deltanet").layer_map() == "LLFL"
    old = dataclasses.replace(config, mixer=["first", "last"])
    new = convert_config(old, [1, 2], "gated_deltanet")
    assert new.mixer == ["first", "gated_deltanet", "gated_deltanet", "last"]
    assert config.layer_map() == "LFFL"
    with pytest.raises(UserError, match="layer 3 of the teacher is linear already"):
        convert_config(config, [3], "gated_deltanet")


def test_converting_more_layers_of_a_hybrid():
    teacher = make_teacher("LFFF")
    student = convert_layers(teacher, [2])
    assert student.config.layer_map() == "LFLF"
    check_transfer(teacher, student, [2], random_ids(teacher, 1, 30))
    assert mixer_parameters(student, [2]).keys() < mixer_parameters(student, [0, 2]).keys()
    assert all(name.startswith("layers.2.") for name in mixer_parameters(student, [2]))


@pytest.mark.parametrize(
    "settings", [{"linear_num_value_heads": 8}, {"linear_bias": True}, {"linear_rope": True}]
)
def test_hybrid_teacher_whose_linear_layers_are_another_shape(settings):
    """One config holds one shape for all linear layers; its file would not load again."""
    teacher = make_teacher("LFFF", **settings)
    with pytest.raises(UserError, match=next(iter(settings))):
        convert_layers(teacher, [2])


def test_bias_on_o_proj_is_refused():
    teacher = make_teacher("FF", attention_bias=True, attention_output_bias=True)
    with pytest.raises(UserError, match="o_proj"):
        convert_layers(teacher, [1])


# ---- kernels


@pytest.mark.parametrize(
    ("mixer", "sizes", "kernel", "dtype", "found"),
    [
        ("gated_deltanet", {}, "auto", "auto", "fla"),
        ("hedgehog_window", {}, "auto", "auto", "chunk"),
        ("hedgehog_window", {}, "fla", "auto", "fla found, but there is none for hedgehog_window"),
        ("gla", {"linear_key_head_dim": 24}, "auto", "auto", "chunk"),
        (
            "gla",
            {"linear_key_head_dim": 24},
            "fla",
            "auto",
            "a key size in multiples of 16, not 24",
        ),
        ("kda", {"linear_key_head_dim": 512}, "fla", "auto", "at most 256, not 512"),
        ("linear_attention", {"linear_key_head_dim": 256}, "auto", "auto", "fla"),
        ("deltanet", {}, "auto", "float32", "chunk"),
        ("deltanet", {}, "fla", "float32", "takes bfloat16, not float32"),
        ("rwkv7", {}, "naive", "auto", "naive"),
        ("mamba2", {}, "mamba_ssm", "auto", "needs CUDA .* and the package mamba-ssm"),
        ("gla", {}, "mamba_ssm", "auto", "needs CUDA"),
    ],
)
def test_kernels_on_a_gpu_with_fla(mixer, sizes, kernel, dtype, found, monkeypatch):
    """Every refusal is one line that names the flag; under auto our own form runs instead."""
    monkeypatch.setitem(kernels.PACKAGES, "fla", ("flash-linear-attention", lambda: True))
    monkeypatch.setitem(kernels.PACKAGES, "mamba_ssm", ("mamba-ssm", lambda: False))
    shape = {"head_dim": 64, "linear_key_head_dim": 64, "linear_value_head_dim": 64, **sizes}
    config = tiny_config("FLL", mixer=[mixer] * 2, **shape)
    if found in ("fla", "chunk", "naive"):
        assert resolve_kernels(config, kernel, torch.device("cuda"), dtype) == {mixer: found}
        return
    with pytest.raises(UserError, match=found) as error:
        resolve_kernels(config, kernel, torch.device("cuda"), dtype)
    assert str(error.value).startswith("--kernel: ") and "\n" not in str(error.value)


def test_kernels_without_a_gpu():
    config = tiny_config("LL", mixer=["rwkv6", "gla"])
    assert resolve_kernels(config, "auto", torch.device("cpu")) == {
        "rwkv6": "chunk",
        "gla": "chunk",
    }
    with pytest.raises(UserError, match="--kernel: fla found, but it needs CUDA"):
        resolve_kernels(config, "fla", torch.device("cpu"))


def test_short_convolutions_follow_the_kernel(monkeypatch):
    monkeypatch.setattr(hybrid_layers, "use_tuned", lambda device: "tuned kernels: none")
    model, device = tiny_model("FLL", mixer=["gla", "mamba2"]), torch.device("cpu")
    for kernel, conv in (("fla", "triton"), ("chunk", "plain"), ("mamba_ssm", "triton")):
        line = use_kernels(model, {"gla": "chunk", "mamba2": kernel}, device)
        assert model.layers[1].linear_attn.kernel == "chunk"
        assert model.layers[2].linear_attn.kernel == kernel
        assert model.layers[2].linear_attn.conv1d.kernel == conv
        assert line.startswith(f"linear kernel: gla chunk, mamba2 {kernel}")
        assert ("short convolution triton" in line) == (conv == "triton")


def test_hedgehog_features_double_the_key_size():
    config = tiny_config(
        "L", mixer=["linear_attention"], linear_feature_map="hedgehog", linear_key_head_dim=256,
        linear_value_head_dim=64,
    )  # fmt: skip
    assert MIXERS["linear_attention"].state_key_dim(config) == 512
