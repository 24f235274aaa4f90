"""What a run would take, against what runs really take."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call_script
from kit import tiny_model
from test_runs import kd_flags, train_flags
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import cli
import footprint
import planner
import student as students
from budget import Budget, show_budget
from config import DistillConfig, PretrainConfig
from distributed import World
from flops import flops_per_token
from hf import load_model, read_config, save_model, tokenizer_spec
from hybrid_layers import MIXERS, convert_layers
from lora import add_lora, wants_lora
from ops.kd_head import buffer_bytes, buffers_alive, ce_head, kd_head
from tokenizer import load_tokenizer
from train import model_config
from trainer import compute_dtype, open_data

CPU = World(0, 1, torch.device("cpu"))
SHAPES = ROOT / "configs" / "shapes"


def config_of(cls, *argv):
    preset, flags = cli.parse_argv(list(argv))
    return cli.load_config(cls, flags, preset)


def kd_budget(*flags, full=True) -> Budget:
    cfg = config_of(DistillConfig, *flags)
    layers, _, shape, convert = students.preflight(cfg)
    return planner.distillation(cfg, layers, shape, convert, full)


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# ---- parameters, optimizer state, activations


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", ["all", "mixers", "feature_maps", "lora"])
def test_what_trains_and_its_state_are_those_of_the_real_models(
    tiny_teacher, tiny_data, tmp_path, train, dtype, muon
):
    if muon and dtype == "bfloat16":
        pytest.skip("refused")
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", f"--distill_train={train}")
    flags += ["--mixer=hedgehog_window", f"--dtype={dtype}", f"--distill_use_muon={muon}"]
    flags += [f"--trunk_dtype={dtype}"] * (train != "lora")
    budget, cfg = kd_budget(*flags), config_of(DistillConfig, *flags)
    layers, _, _, convert = students.preflight(cfg)
    kind = compute_dtype(cfg.dtype, CPU.device)
    teacher, _, student, shared = students.build_models(cfg, layers, convert, CPU, kind)
    if wants_lora(cfg):
        add_lora(student, cfg)
    theirs = {id(p) for p in teacher.parameters()}
    for stage in budget.stages:
        students.set_trainable(student, stage.plan.stage, layers)
        real = footprint.on_meta(stage.plan, student, layers)  # not on meta: it is the real one
        trained = [p for p in student.parameters() if p.requires_grad]
        assert stage.trained == sum(p.numel() for p in trained) > 0
        state = bytes_of(real.optimizer.state_tensors().values())
        assert stage.memory["optimizer state"] == state > 0
        own = [p for p in student.parameters() if not shared or id(p) not in theirs]
        assert stage.memory["student"] == bytes_of(own)
        assert stage.memory["teacher"] == bytes_of(teacher.parameters())
        assert stage.memory["gradients"] in (0, bytes_of(trained))
    assert shared == (train != "all")


def test_a_student_with_adapters_alone(tiny_teacher, tiny_data, tmp_path):
    """It is held in the compute type, checkpoints hold adapters, and FSDP2 loads pieces."""
    model = convert_layers(load_model(tiny_teacher), [1, 2])
    save_model(model, tmp_path / "s", tokenizer_from="byte")
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--stages=distill",
                     "--distill_train=lora", f"--student={tmp_path / 's'}")  # fmt: skip
    flags += ["--dtype=bfloat16"]
    flags[flags.index("--device=cpu")] = "--device=auto"
    (stage,) = kd_budget(*flags).stages
    cfg = config_of(DistillConfig, *flags)
    layers, _, _, convert = students.preflight(cfg)
    assert not convert
    _, _, student, _ = students.build_models(cfg, layers, convert, CPU, torch.bfloat16)
    students.narrow(student, torch.bfloat16)
    add_lora(student, cfg)
    assert stage.memory["student"] == bytes_of(student.parameters())
    assert stage.memory["student"] < 0.6 * bytes_of(p.float() for p in student.parameters())
    state = stage.memory["optimizer state"]
    assert state < stage.saves.size < 1.5 * state + planner.STATE_BYTES + 40_000
    two = kd_budget(*flags, "--parallel=fsdp", "--plan", "--plan_device=2xH100")
    assert "loading" not in two.moments
    whole = [f for f in flags if "--student" not in f]
    more = kd_budget(*whole, "--parallel=fsdp", "--plan", "--plan_device=2xH100")
    held = [sum(b.memory()[w][m] for m in ("teacher", "student")) for b, w in
            ((more, "loading"), (two, "distill"))]  # fmt: skip
    assert held[0] > 1.5 * held[1]


def test_pretraining_has_what_the_real_model_has(tiny_data, tmp_path):
    flags = train_flags(tiny_data, tmp_path, "p", "--use_muon")
    cfg = config_of(PretrainConfig, *flags)
    config = model_config(cfg, 257, 256)
    budget = planner.pretraining(cfg, config, None)
    model = footprint.Transformer(config)
    assert budget.stages[0].trained == model.num_params()
    plan = budget.stages[0].plan
    real = footprint.on_meta(plan, model, []).optimizer
    assert budget.stages[0].memory["optimizer state"] == bytes_of(real.state_tensors().values())
    assert real.muon is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", [*MIXERS, ""])
def test_activations_are_counted_as_autograd_keeps_them(mixer, dtype):
    """On tensors without storage as in a real forward."""
    kinds = "F" if mixer in ("", "sliding_window") else "L"
    model = tiny_model(kinds, dtype=torch.float32, mixer=[mixer] if kinds == "L" else None)
    block, kept = model.layers[0], {}
    found = footprint.counted(model.config, block, 2, 48, dtype, True)

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    for module in block.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(dtype)
    x = torch.randn(2, 48, model.config.hidden_size, dtype=dtype, requires_grad=True)
    seq = model.seq_info(48, dtype=dtype)
    with footprint.amp_context(CPU.device, dtype)(), saved_tensors_hooks(pack, lambda t: t):
        block(x, seq)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    assert found == real > 2 * 48 * model.config.hidden_size * dtype.itemsize


class Live(TorchDispatchMode):
    """The most bytes that tensors made within it had at once."""

    def __init__(self):
        super().__init__()
        self.known: dict[int, StorageWeakRef] = {}
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.known[storage._cdata] = StorageWeakRef(storage)
                self.sizes[storage._cdata] = storage.nbytes()
        self.known = {key: ref for key, ref in self.known.items() if not ref.expired()}
        self.most = max(self.most, sum(self.sizes[key] for key in self.known))
        return out


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "js", "mse", ""])
@pytest.mark.parametrize(("ce", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.0, 2.0)])
def test_the_heads_buffers_are_as_many_as_it_holds(loss, ce, temperature):
    n, vocab, d = 64, 8192, 8
    h, w = torch.randn(n, d, requires_grad=True), torch.randn(vocab, d)
    t, labels = torch.randn(n, d), torch.randint(vocab, (n,))
    with Live() as live:
        if loss:
            kd_head(h, w, t, w, labels, loss=loss, ce_weight=ce, temperature=temperature)
        else:
            ce_head(h, w, labels)
    count = buffers_alive(loss or "forward_kl", bool(loss), ce != 0, temperature != 1)
    one = buffer_bytes(n, vocab, "cpu", 4)
    assert one == n * vocab * 4
    assert count * one < live.most < (count + 0.5) * one


# ---- how it moves


def memory(*flags, device="H100", teacher=SHAPES / "llama-3.1-70b") -> dict[str, int]:
    """The parts of the distill stage."""
    common = [f"--teacher={teacher}", "--plan", f"--plan_device={device}", "--layers=3:1"]
    common += ["--distill_batch_tokens=131072", "--distill_micro_batch=1"]
    found = kd_budget(*common, *flags).memory()
    return found["distill"]


def total(*flags, **how) -> int:
    return sum(memory(*flags, **how).values())


@pytest.mark.slow
def test_more_of_anything_takes_more():
    plain = total()
    assert total("--distill_seq_len=8192") > plain
    assert total("--distill_micro_batch=2") > plain
    assert memory("--distill_micro_batch=2")["activations"] == 2 * memory()["activations"] > 0
    assert total("--trunk_dtype=bfloat16") < plain
    modes = [total(f"--activation_checkpointing={m}") for m in ("full", "selective", "none")]
    assert modes == sorted(modes) and modes[2] == plain and modes[0] < modes[1] < modes[2]
    trained = [total(f"--distill_train={t}") for t in ("lora", "mixers", "all")]
    assert trained == sorted(trained) and trained[2] == plain and trained[0] < trained[1]
    assert total("--distill_use_muon") < plain


def test_fsdp_cuts_what_it_cuts():
    """Weights, gradients and state by the number of ranks, but for what stays whole."""
    one = memory("--parallel=ddp", device="8xH100")
    eight = memory("--parallel=fsdp", device="8xH100")
    four = memory("--parallel=fsdp", "--shard_ranks=4", device="8xH100")
    for part in ("teacher", "student", "gradients", "optimizer state"):
        assert one[part] / 8 < eight[part] < 1.02 * one[part] / 8
        assert one[part] / 4 < four[part] < 1.02 * one[part] / 4
    held = "messages of gradients"  # between steps, by DDP, while micro-batches add up elsewhere
    assert one[held] == one["gradients"] and not {held} & (eight.keys() | memory().keys())
    once = memory("--parallel=ddp", "--distill_batch_tokens=32768", device="8xH100")
    assert held not in once
    assert eight["gathered blocks"] > 0 and "gathered blocks" not in one
    kept = memory("--parallel=fsdp", "--reshard_after_forward=never", device="8xH100")
    more = kept["gathered blocks"] - eight["gathered blocks"]
    assert 1.8 * one["teacher"] < more < 2.2 * one["teacher"]  # all blocks of teacher and student
    assert kept["teacher"] == eight["teacher"]


def test_kept_rows_and_copies_for_saves_are_counted(tiny_teacher, tiny_data, tmp_path):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a")
    plain = kd_budget(*flags).stages[0]
    kept = kd_budget(*flags, "--align_unique_tokens=960").stages[0]
    assert kept.memory["held rows"] == 960 * 2 * 2 * 48 * 2
    capped = kd_budget(*flags, "--align_unique_tokens=960", "--max_steps=2").stages[0]
    assert capped.memory["held rows"] == 2 * 64 * 2 * 2 * 48 * 2
    student = plain.per_token.forward + plain.per_token.backward
    assert plain.flops == 1920 * sum(plain.per_token)
    assert kept.flops == 960 * plain.per_token.teacher + 1920 * student
    copied = kd_budget(*flags, "--async_save").stages[0].memory
    assert copied["copy for --async_save"] > plain.memory["optimizer state"]


def test_hours_are_those_of_the_useful_flops(capsys):
    flags = [f"--teacher={SHAPES / 'llama-3.1-70b'}", "--plan", "--plan_device=16xH100"]
    flags += ["--config=configs/smollm2.yaml", "--distill_tokens=600_000_000"]
    call_script("train_kd", *flags, "--stages=distill", "--plan_mfu=0.5", "--peak_flops=1e15")
    out = capsys.readouterr().out
    stage = kd_budget(*flags, "--stages=distill").stages[0]
    config = read_config(SHAPES / "llama-3.1-70b")
    shape = students.preflight(config_of(DistillConfig, *flags))[2]
    each = flops_per_token("distill", shape, config, 2048)
    assert sum(stage.per_token) == each
    assert stage.flops == pytest.approx(each * (600_000_000 // 32_768 * 32_768), rel=1e-12)
    hours = stage.flops / (0.5 * 1e15 * 16) / 3600
    assert f"{hours:,.4g}" in out and "50% of 1,000 TFLOP/s on 16" in out


# ---- --plan


def test_a_stage_without_a_teacher_knows_what_it_trains():
    """Sliding layers that were full ones of the teacher, which this stage does not run."""
    flags = ("--teacher=configs/shapes/llama-3.1-70b", "--layers=60-79", "--mixer=sliding_window",
             "--stages=align,long", "--long_train=mixers", "--plan_device=H100")  # fmt: skip
    work = kd_budget("--config=configs/smollm2.yaml", *flags, "--plan").stages[-1].per_token
    assert work.teacher == 0 and work.backward > 0.25 * work.forward


def test_a_plan_writes_nothing_and_loads_nothing(tmp_path, capsys, monkeypatch):
    """Of a teacher that is a config.json alone."""
    (tmp_path / "teacher").mkdir()
    raw = json.loads((SHAPES / "llama-3.1-70b" / "config.json").read_text())
    text = json.dumps(raw | {"hidden_size": 1024, "num_hidden_layers": 4, "head_dim": 16})
    (tmp_path / "teacher" / "config.json").write_text(text)
    monkeypatch.setattr(planner, "load_tokenizer", None)
    before = sorted(tmp_path.rglob("*"))
    here = sorted(p.name for p in Path.cwd().iterdir())
    flags = [f"--teacher={tmp_path / 'teacher'}", f"--save_model_dir={tmp_path / 'runs' / 'x'}"]
    call_script("train_kd", *flags, "--plan", "--device=cpu", "--run=a")
    out = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert sorted(p.name for p in Path.cwd().iterdir()) == here
    for word in ("align", "distill", "evaluation", "optimizer state", "the saved model", "free"):
        assert word in out, word


@pytest.mark.parametrize(("name", "params"), [("70b", 70_553_706_496), ("405b", 405_853_388_800)])
def test_the_shapes_have_the_published_numbers_of_parameters(name, params):
    config = read_config(SHAPES / f"llama-3.1-{name}")
    assert footprint.meta_model(config).num_params() == params
    assert config.rope_scaling["factor"] == 8 and config.max_position_embeddings == 131_072


def test_a_length_that_the_data_decides(tiny_teacher, tiny_data, tmp_path, capsys):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a", "--epochs=2")
    budget = kd_budget(*flags, "--plan")
    assert budget.known
    call_script("train_kd", *flags, "--dry_run")
    out = capsys.readouterr().out
    steps = {s.name: int(re.search(rf"{s.name}: (\d+) steps", out)[1]) for s in budget.stages}
    assert steps == {s.name: s.plan.steps for s in budget.stages}
    tokens = int(re.search(r"data: ([\d,]+) tokens", out)[1].replace(",", ""))
    assert steps["distill"] == 2 * tokens // 64
    cfg = config_of(PretrainConfig, "--plan", "--device=cpu")
    unknown = planner.pretraining(cfg, model_config(cfg, 257, 256), None)
    assert not unknown.known
    show_budget(cfg, unknown)
    assert "by the data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--plan", "--plan_device=H1"], "--plan_device: 'H1' found, one of GB200"),
        (["--plan", "--plan_device=0xH100"], "--plan_device: '0xH100' found"),
        (["--plan_device=H100"], "--plan_device: H100 found, --plan expected"),
        (["--plan", "--plan_mfu=2"], "--plan_mfu: 2 found, at most 1"),
    ],
)
def test_what_cannot_be_planned_is_refused(refused, tiny_teacher, flags, says):
    assert says in refused("train_kd", f"--teacher={tiny_teacher}", *flags)


def test_searched_layers_are_planned_as_if_spread_evenly(tiny_teacher, tiny_data, tmp_path):
    flags = kd_flags(tiny_teacher, tiny_data, tmp_path, "a")
    flags[flags.index("--layers=1,2")] = "--layers=auto:0.5"
    align, distill = kd_budget(*flags).stages
    assert align.trained == 2 * distill.trained
    known = kd_budget(*kd_flags(tiny_teacher, tiny_data, tmp_path, "a")).stages[1]
    assert distill.trained == known.trained


# ---- real runs


START = """
import os, sys
pid = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(pid, 0)
assert os.waitstatus_to_exitcode(status) == 0
print("peak", usage.ru_maxrss * 1024)
"""


def peak_rss(*argv: str) -> int:
    """Peak resident bytes of a script in a process of its own. A small process starts it: Linux
    counts what the starting process held towards the new one's ru_maxrss."""
    run = subprocess.run(
        [sys.executable, "-c", START, *argv], capture_output=True, text=True, check=False
    )
    print(run.stdout)
    assert run.returncode == 0, run.stderr
    return int(run.stdout.rpartition("peak ")[2])


def test_peak_rss_is_not_that_of_the_tests():
    held = b"." * (400 << 20)
    assert peak_rss("-c", "pass") < len(held) // 2


REAL = {
    "mixers": ["train_kd.py", "--layers", "10,14,20", "--max_steps", "2"],
    "all in float32": [
        "train_kd.py", "--layers", "10,14,20", "--max_steps", "2", "--distill_train", "all",
        "--dtype", "float32",
    ],
    "pretraining": [
        "train.py", "--num_blocks", "8", "--num_heads", "8", "--embedding_dim", "512",
        "--context_len", "512", "--batch_size", "8", "--accumulation_steps", "2", "--max_steps",
        "3",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_memory_is_within_15_percent_of_a_real_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *flags = REAL[name]
    flags += ["--sample_tokens", "0", "--eval_tokens", "1024", "--device", "cpu"]
    flags += ["--save_model_dir", str(tmp_path), "--run", "a"]
    if script == "train_kd.py":
        flags = ["--config", "configs/smollm2-cpu.yaml", *flags]
        budget, cfg = kd_budget(*flags), config_of(DistillConfig, *flags)
        open_data(cfg, load_tokenizer(tokenizer_spec(cfg.teacher)), build=True)
    else:
        cfg = config_of(PretrainConfig, *flags)
        budget = planner.pretraining(cfg, model_config(cfg, 257, 256), None)
        open_data(cfg, load_tokenizer("byte"), build=True)
    # The embedded corpus is there by now: a run that has to make it first takes more.
    real = peak_rss(script, *flags)
    when, planned = budget.most()
    print(f"{name}: {planned / 2**30:.2f} GiB planned ({when}), {real / 2**30:.2f} real")
    assert planned == pytest.approx(real, rel=0.15), when
