"""Layer lists, coercion, presets, and every refusal of the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import call_script

import cli
from config import DistillConfig, ModelConfig, PretrainConfig, UserError
from layer_lists import parse_layers


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("10,14,20", [10, 14, 20]),
        ("20, 10", [10, 20]),
        ("(10,14)", [10, 14]),  # what fire users type as a tuple
        ("3", [3]),
        ("0-2,5", [0, 1, 2, 5]),
        ("all", list(range(24))),
        ("3:1", [i for i in range(24) if i % 4 != 3]),
        ("1:2", [0, 3, 6, 9, 12, 15, 18, 21]),
        ("", []),
    ],
)
def test_layer_lists(spec, expected):
    assert parse_layers(spec, 24) == expected


def test_keep_layers_is_the_complement():
    assert parse_layers("3:1", 6, keep="1,4") == [0, 2, 3, 5]
    assert parse_layers("", 4, keep="all") == []


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("24", "0 to 23"),
        ("1,2,1", "named twice"),
        ("3-1", "empty"),
        ("x", "10,14,20"),
        ("3:", "10,14,20"),
        ("0:1", "10,14,20"),
        ("-1", "10,14,20"),
        ("auto:0.75", "search"),
    ],
)
def test_bad_layer_lists(spec, says):
    with pytest.raises(UserError, match="--layers") as e:
        parse_layers(spec, 24)
    assert says in str(e.value)


def load(cls, *argv, preset=None):
    _, flags = cli.parse_argv(list(argv))
    return cli.load_config(cls, flags, preset)


def test_values_are_coerced_by_annotation():
    cfg = load(
        DistillConfig, "--torch_compile=false", "--doc_mask", "False", "--max_steps=1e3",
        "--align_lr", "2e-3", "--align-tokens=65_536", "--layers=3:1", "--profile",
    )  # fmt: skip
    assert cfg.torch_compile == "false" and cfg.doc_mask is False and cfg.max_steps == 1000
    assert cfg.align.lr == 2e-3 and cfg.align.tokens == 65536 and cfg.layers == "3:1"
    assert cfg.profile is True and cfg.distill.lr == DistillConfig().distill.lr


def test_flag_beats_yaml_beats_default(tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("layers: 3:1\nseed: 5\nalign:\n  lr: 1e-2\n  tokens: 4096\nmixer: [a, b]\n")
    cfg = load(DistillConfig, "--seed=7", "--align_tokens=1024", preset=preset)
    assert (cfg.seed, cfg.align.lr, cfg.align.tokens) == (7, 1e-2, 1024)
    assert cfg.layers == "3:1"  # YAML 1.1 alone would make this 181
    assert cfg.mixer == "a,b"


@pytest.mark.parametrize("text, line", [
    ("align:\n  lr: 1e-4\nseed: 1\nalign:\n  tokens: 5000\n", "align found twice"),
    ("align:\n  lr: 1e-4\n  lr: 1e-3\n", "lr found twice"),
    ("align_lr: 1e-4\nalign: {lr: 1e-3}\n", "align_lr found twice"),
    ("layers: [[1, 2]]\n", "layers: "), ("layers: [{a: 1}]\n", "layers: "),
    ("align:\n  lr: {a: 1}\n", "align_lr: "),
    ("layers: 1,2\nkeep_layers: 0\n", "complement"),
])  # fmt: skip
def test_a_preset_says_each_thing_once(text, line, tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text(text)
    with pytest.raises(UserError, match=line):
        load(DistillConfig, preset=preset)


def test_a_preset_that_is_no_text(tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_bytes(b"seed: 1 # \xff\n")
    with pytest.raises(UserError, match=r"p\.yaml is not YAML: 'utf-8' codec"):
        load(DistillConfig, preset=preset)


def test_a_flag_without_a_value():
    for argv in (["--run", "--lr", "1e-3"], ["--lr", "1e-3", "--run"], ["--save-model-dir"]):
        with pytest.raises(UserError, match="no value found"):
            load(PretrainConfig, *argv)
    assert load(PretrainConfig, "--run", "True", "--dry_run").run == "True"
    assert load(DistillConfig, "--torch_compile", "--plan").torch_compile == "true"
    preset = load(DistillConfig, "--keep_layers", "0", preset="configs/smoke-kd.yaml")
    assert preset.keep_layers == "0"


def test_every_shipped_preset_loads():
    for path in [*Path("configs").glob("*.yaml"), Path("tests/kd.yaml")]:
        cls = DistillConfig if "align:" in path.read_text() or "kd" in path.stem else PretrainConfig
        cli.load_config(cls, {}, path)


def test_shipped_presets_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(DistillConfig, preset="configs/try.yaml").max_steps == 2
    with pytest.raises(UserError, match=r"no file configs/try.yml; .* configs/try.yaml$"):
        load(DistillConfig, preset="configs/try.yml")
    Path("configs").mkdir()
    Path("configs/try.yaml").write_text("max_steps: 3\n")  # one's own comes first
    assert load(DistillConfig, preset="configs/try.yaml").max_steps == 3


@pytest.mark.parametrize("cls", [PretrainConfig, DistillConfig])
def test_help_names_every_field_with_a_comment(cls):
    text = cli.help_text(cls, "")
    for flag, (_, field, _) in cli._slots(cls).items():
        line = next(line for line in text.splitlines() if line.startswith(f"  --{flag} "))
        assert field.metadata["help"] in line


def test_old_flags_keep_working():
    cfg = load(
        PretrainConfig, "--num_blocks=2", "--num_heads=2", "--embedding_dim=64",
        "--context_len=128", "--lr=1e-3", "--epochs=2", "--max_steps=5", "--use_muon=True",
        "--accumulation_steps=2", "--tokenizer=byte", "--torch_compile=False", "--save_model=True",
        "--save_model_dir=runs", "--save_every=10", "--wandb_enabled=False", "--run=x",
    )  # fmt: skip
    assert cfg.num_blocks == 2 and cfg.use_muon and cfg.epochs == 2.0
    stage = cfg.stage(rows_in_data=160)
    assert stage.batch_tokens == 8 * 2 * 128 and stage.tokens == 20 * stage.batch_tokens
    assert stage.steps(cfg.max_steps) == 5


LONG = "--stages=align,distill,long"


def test_select_tokens_is_of_distill_and_long():
    cfg = load(DistillConfig, "--select_tokens=0.6", "--long_select_tokens=0.3", LONG)
    stages = (cfg.align, cfg.distill, cfg.long)
    assert [stage.select_tokens for stage in stages] == [1, 0.6, 0.3]
    assert "select_tokens" not in cfg.align.identity()  # nor has it an old checkpoint
    assert cfg.long.identity()["select_tokens"] == 0.3
    assert PretrainConfig(select_tokens=0.5).stage(80).select_tokens == 0.5


def test_a_stages_own_setting_wins_and_a_flag_over_a_preset(tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("distill: {seq_len: 64, micro_batch: 4, use_muon: true}\ncontext_len: 256\n")
    flags = {"context_len": "512", "long_seq_len": "2048", "accumulation_steps": "2"}
    flags |= {"stages": "align,distill,long"}
    cfg = cli.load_config(DistillConfig, flags | {"use_muon": "false"}, preset)
    assert [s.seq_len for s in (cfg.align, cfg.distill, cfg.long)] == [512, 512, 2048]
    assert cfg.distill.micro_batch == 0 and not cfg.distill.use_muon
    cfg = cli.load_config(DistillConfig, {}, preset)
    assert [s.seq_len for s in (cfg.align, cfg.distill)] == [256, 64]
    assert cfg.distill.micro_batch == 4 and cfg.distill.use_muon


NO_TEACHER = ["--teacher=none"]  # so that nothing starts where they are not refused
REFUSALS = [
    ("train_kd", ["--layer=3"], "did you mean --layers"),
    ("train_kd", ["--lr=1"], "--align_lr and --distill_lr"),
    ("train_kd", ["--max_steps=many"], "int expected"),
    ("train_kd", ["--max_steps=2.5"], "int expected"),
    ("train_kd", ["--seed=18446744073709551616"], "at most 4294967295"),
    ("train_kd", ["--align_lr=nan"], "float expected"),
    ("train_kd", ["--align_lr=-1"], "at least 0"),
    ("train_kd", ["--doc_mask=maybe"], "true or false"),
    ("train_kd", ["--device=tpu"], "one of auto, cpu, cuda, mps"),
    ("train_kd", ["--distill_loss=l7"], "forward_kl"),
    ("train_kd", ["--config=nowhere.yaml"], "no file nowhere.yaml"),
    ("train_kd", ["a.yaml", "b.yaml"], "one preset"),
    ("train_kd", ["--", "--seed"], "--name=value"),
    ("train_kd", ["--layers=1", "--keep_layers=2"], "complement"),
    ("train_kd", ["--stages=distill,align"], "in order"),
    ("train_kd", ["--align_batch_tokens=1000", "--align_seq_len=512"], "--align_seq_len"),
    ("train_kd", ["--teacher=models/none-such"], "scripts/download_model.py"),
    ("train_kd", ["--keep_checkpoints=1"], "at least 2"),
    ("train", ["--teacher=x"], "train_kd.py"),
    ("train", ["--embedding_dim=100", "--num_heads=3"], "--num_heads"),
    ("train", ["--tokenizer=nope"], "--tokenizer"),
    ("train", ["--mixer=nope", "--layers=all"], "gated_deltanet"),
    ("train", ["--resume=auto"], "--run"),
    ("train", ["--resume=runs/none-such"], "no checkpoint"),
    ("train", ["--num_blocks=0"], "at least 1"),
    ("train", ["--packing=tight"], "one of concatenate, best_fit"),
    ("train", ["--select_tokens=0.5"], "--reference, a model to compare with, expected"),
    ("train", ["--select_tokens=1.5"], "at most 1"),
    ("train", ["--select_tokens=0"], "at least 0.01"),
    ("train", ["--reference=x"], "--select_tokens below 1 expected"),
    ("train", ["--reference=x", "--select_tokens=0.5"], "--reference: no folder x"),
    ("train_kd", ["--align_select_tokens=0.5"], "align has a target for every token"),
    ("train_kd", ["--reference=x"], "unknown"),
    ("train", ["--layers=1", "--keep_layers=2"], "complement"),
    ("train", ["--wandb_enabled", "--tracker=tensorboard"], "one of them expected"),
    ("train_kd", ["--cria_step=collect", "--run=x"], "--cria_step: found without --cria"),
    ("train", ["--muon_lr=0.02", "--tokenizer=no"], "--muon_lr: found without --use_muon"),
    ("train_kd", [*NO_TEACHER, "--distill_muon_lr=0.02"], "found without --distill_use_muon"),
    (
        "train_kd",
        [*NO_TEACHER, "--align_muon_lr=0.02", "--use_muon"],
        "found without --align_use_muon",
    ),
    (
        "train_kd",
        [*NO_TEACHER, "--lora_rank=4"],
        "no stage of --stages trains lora",
    ),
    (
        "train_kd",
        [*NO_TEACHER, "--long_lr=1e-5"],
        "--long_lr: found, but --stages align,distill has no long",
    ),
    (
        "train_kd",
        [*NO_TEACHER, "--epochs=2", "--distill_tokens=640"],
        "--distill_tokens: found with --epochs",
    ),
    (
        "train_kd",
        [*NO_TEACHER, "--search_window=8", "--layers=3:1"],
        "--layers 3:1, auto:SHARE expected",
    ),
]


def test_flags_that_need_another_flag(tmp_path):
    """With it they are taken; a preset may hold them in case."""
    preset = tmp_path / "p.yaml"
    preset.write_text("distill: {muon_lr: 0.02}\nlora_rank: 4\nsearch: {window: 8}\n")
    cfg = load(DistillConfig, "--use_muon", "--long_muon_lr=0.01", LONG, preset=preset)
    assert (cfg.distill.muon_lr, cfg.long.muon_lr, cfg.lora_rank) == (0.02, 0.01, 4)
    assert load(DistillConfig, "--layers=auto:0.5", "--search_window=8").search.window == 8
    assert load(DistillConfig, "--distill_train=lora", "--lora_rank=4").lora_rank == 4
    blocks = ("--cria=1", "--stages=align,block", "--lora_rank=4")  # block trains lora
    assert load(DistillConfig, *blocks).lora_rank == 4
    (preset := tmp_path / "q.yaml").write_text("muon_lr: 0.02\n")
    assert load(PretrainConfig, preset=preset).muon_lr == 0.02


@pytest.mark.parametrize(("script", "argv", "says"), REFUSALS)
def test_refusals(refused, script, argv, says):
    assert says in refused(script, *argv)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--layers=4"], "0 to 3"),
        (["--layers=1,1"], "named twice"),
        (["--layers="], "at least one converted layer"),
        (["--layers=1", "--mixer=gated_deltanet,gated_deltanet"], "2 names found"),
        (["--layers=1", "--mixer=nope"], "gated_deltanet"),
        (["--layers=1", "--tokenizer=gpt2x"], "--tokenizer"),
        (["--layers=1", "--data=nowhere"], "--data"),
        (["--layers=1", "--kernel=fla"], "--kernel"),
        (["--layers=1", "--align_micro_batch=3"], "a multiple of 1 ranks x 3 rows"),
        (["--layers=1", "--accumulation_steps=3"], "--accumulation_steps"),
        (["--layers=1", "--align_loss=js"], "--align_loss: js found, which is for distill"),
        (["--layers=1", "--distill_kd_weight=0"], "--distill_ce_weight: 0 found, 1 expected"),
        (["--layers=1", "--distill_unique_tokens=64"], "which is for the stage align"),
        (["--layers=1", "--long_maps_weight=1", "--stages=long"], "for the stage align"),
    ],
)
def test_refusals_with_a_teacher(refused, tiny_teacher, tiny_data, tmp_path, argv, says):
    base = [f"--teacher={tiny_teacher}", f"--save_model_dir={tmp_path}", "--device=cpu"]
    data = [] if any(a.startswith("--data") for a in argv) else [f"--data={tiny_data}"]
    assert says in refused("train_kd", *base, *data, *argv)


def test_cuda_without_cuda_is_refused(refused, tiny_teacher, tiny_data):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    line = refused("train_kd", f"--teacher={tiny_teacher}", f"--data={tiny_data}", "--device=cuda")
    assert "--device" in line


def damaged(data: str, tmp_path: Path, change) -> str:
    folder = tmp_path / "damaged"
    shutil.copytree(data, folder)
    path = folder / "train-00000.bin"
    path.write_bytes(change(path.read_bytes()))
    return str(folder)


@pytest.mark.parametrize(
    "change", [lambda b: b[:-2], lambda b: b"none" + b[4:]], ids=["truncated", "bad magic"]
)
def test_damaged_data(refused, tiny_teacher, tiny_data, tmp_path, change):
    data = damaged(tiny_data, tmp_path, change)
    line = refused("train_kd", f"--teacher={tiny_teacher}", f"--data={data}", "--layers=1")
    assert "train-00000.bin" in line


def test_tokenizer_and_vocabulary_mismatch(refused, tiny_teacher, tiny_data, tmp_path):
    folder = tmp_path / "small-vocab"
    shutil.copytree(tiny_teacher, folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "vocab_size": 100}))
    assert "100 rows" in refused(
        "train_kd", f"--teacher={folder}", f"--data={tiny_data}", "--layers=1"
    )
    meta = tmp_path / "other-tokenizer"
    shutil.copytree(tiny_data, meta)
    for path in meta.glob("*.bin"):  # header word 8-9: tokenizer hash; its checksum is 16-17
        import xxhash

        head = np.frombuffer(path.read_bytes()[:1024], "<i4").copy()
        head[8] ^= 1
        head[16:18] = np.frombuffer(
            xxhash.xxh3_64(head[:16].tobytes()).intdigest().to_bytes(8, "little"), "<i4"
        )
        path.write_bytes(head.tobytes() + path.read_bytes()[1024:])
    line = refused("train_kd", f"--teacher={tiny_teacher}", f"--data={meta}", "--layers=1")
    assert "tokenizer" in line


@pytest.mark.parametrize(
    ("folder", "run", "says"),
    [
        ("file", "a", "--save_model_dir: {}/file is no folder"),
        (".", "file", "--run: {}/file is no folder"),
        ("file/deep", "a", "Not a directory; another path expected"),
        (".", "x" * 300, "File name too long; another path expected"),
    ],
)
def test_a_run_needs_a_folder(refused, tiny_data, tmp_path, folder, run, says):
    (tmp_path / "file").touch()
    argv = ["--num_blocks=1", "--num_heads=2", "--embedding_dim=16", "--context_len=32"]
    argv += [f"--data={tiny_data}", "--device=cpu", f"--save_model_dir={tmp_path / folder}"]
    assert says.format(tmp_path) in refused("train", *argv, f"--run={run}")


def test_a_run_is_never_overwritten(refused, tiny_data, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("precious\n")
    argv = [f"--save_model_dir={tmp_path}", "--run=old", f"--data={tiny_data}"]
    assert "exists already" in refused("train", *argv)
    (tmp_path / "other").mkdir()  # nor by what goes on with another one's checkpoint
    assert "exists already" in refused("train", *argv, f"--resume={tmp_path / 'other'}")
    assert (tmp_path / "old" / "metrics.jsonl").read_text() == "precious\n"


def test_other_ranks_let_rank_zero_speak_first(monkeypatch, capsys):
    """torchrun ends them while they wait; one that goes on living is the only one in trouble."""
    said = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli.time, "sleep", lambda s: said.append((s, capsys.readouterr().err)))
    with pytest.raises(SystemExit) as stop:
        call_script("train_kd", "--layer=3")
    assert stop.value.code == 2 and said == [(5, "")]
    assert capsys.readouterr().err.startswith("rank 1: error: --layer: unknown")


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": 3},
        {"head_dim": 7},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["full_attention"] * 5 + ["round_attention"]},
        {"layer_types": ["sliding_attention"] * 6},
        {"mixer": ["gated_deltanet"]},
        {"rope_scaling": {"rope_type": "yarn"}},
        {"vocab_size": 0},
    ],
)
def test_impossible_models(change):
    with pytest.raises(UserError):
        ModelConfig(**change)


def test_the_example_of_several_ranks_divides(refused):
    """The command of train.py's docstring, on as many GPUs; without its flag it names that."""
    argv = ["--config=configs/gpt2-124m.yaml", "--plan", "--plan_device=8xH100"]
    call_script("train", *argv, "--accumulation_steps=16")
    assert "--accumulation_steps: 64 rows" in refused("train", *argv)
