"""Stacks of different mixers: one model with every one of them, trained, saved, loaded, decoded."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from conftest import call_script, metric_rows, run_python, tiny_config
from kit import assert_close_rms, random_ids

from hf import load_model, save_model
from hybrid_layers import MIXERS
from model import Transformer


def relative(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(abs(a[k] - b[k]) / abs(a[k]) for k in a)


def assert_decodes(folder) -> Transformer:
    """A saved model, loaded again: uneven prompts, then steps, give what full forwards give."""
    model = load_model(folder, dtype=torch.float64)
    lengths, more = (40, 1, 7), 5
    ids = random_ids(model, 3, max(lengths) + more)
    bounds = list(itertools.accumulate(lengths, initial=0))
    prompts = torch.cat([row[:n] for row, n in zip(ids, lengths, strict=True)])[None]
    cache = model.new_cache()
    with torch.no_grad():
        model(prompts, cache=cache, cu_seqlens=torch.tensor(bounds), max_seqlen=max(lengths))
        steps = [
            model(ids.gather(1, cache.lengths[:, None].clone()), cache=cache) for _ in range(more)
        ]
        for i, n in enumerate(lengths):
            alone = model(ids[i : i + 1, : n + more])[0, n:]
            assert_close_rms(torch.cat(steps, 1)[i], alone, what=f"prompt of {n}")
    return model


@pytest.fixture(scope="module")
def deep_teacher(tmp_path_factory) -> str:
    """A teacher with a layer for every mixer, and a softmax layer at its end."""
    torch.manual_seed(1)
    model = Transformer(tiny_config(num_hidden_layers=len(MIXERS) + 1, hidden_size=32, head_dim=8))
    model.init_weights()
    folder = tmp_path_factory.mktemp("models") / "deep"
    save_model(model, folder, tokenizer_from="byte")
    return str(folder)


@pytest.mark.slow
def test_every_mixer_in_one_student(deep_teacher, tiny_data, tmp_path):
    """Align and distill: two ranks give what one gives; the student comes back and decodes."""
    count = len(MIXERS)

    def flags(run, steps):
        return [
            f"--teacher={deep_teacher}", f"--data={tiny_data}", f"--save_model_dir={tmp_path}",
            f"--run_name={run}", f"--layers=0-{count - 1}", f"--mixer={','.join(MIXERS)}",
            "--linear_window=12", "--device=cpu", "--config=tests/kd.yaml", "--eval_tokens=256",
            "--sample_tokens=3", "--calibrate_tokens=256", "--distill_train=all",
            f"--max_steps={steps}", "--align_micro_batch=1", "--distill_micro_batch=1",
        ]  # fmt: skip

    call_script("train_kd", *flags("one", 5))
    run_python("train_kd.py", *flags("two", 5), ranks=2)
    for key in ("loss", *(f"layer_{i}" for i in range(count))):
        one, two = (metric_rows(tmp_path / run, key) for run in ("one", "two"))
        assert len(one) >= 5 and relative(one, two) <= 2e-5, key
    model = assert_decodes(tmp_path / "one" / "model")
    kinds = model.config.layer_map()
    assert kinds.count("L") == count - 1 and kinds.count("S") == 1 and kinds[-1] == "F"
    assert model.config.mixer == [name for name in MIXERS if name != "sliding_window"]


def test_a_mixed_stack_pretrains(tiny_data, tmp_path):
    call_script(
        "train", f"--data={tiny_data}", f"--save_model_dir={tmp_path}", "--run=a", "--device=cpu",
        "--num_blocks=3", "--num_heads=2", "--embedding_dim=32", "--layers=0,1",
        "--mixer=rwkv6,gla", "--context_len=32", "--batch_size=4", "--accumulation_steps=1",
        "--max_steps=40", "--lr=1e-2", "--warmup_steps=2", "--eval_tokens=256",
    )  # fmt: skip
    loss = metric_rows(tmp_path / "a")
    assert loss[40] < loss[1] - 1
    model = assert_decodes(tmp_path / "a" / "model")
    assert model.config.mixer == ["rwkv6", "gla"] and model.config.layer_map() == "LLF"


def test_sliding_window_students(tiny_teacher, tiny_data, tmp_path):
    """Windowed softmax layers are trained like any mixer, and taken up again by a second run."""
    common = [
        f"--teacher={tiny_teacher}", f"--data={tiny_data}", f"--save_model_dir={tmp_path}",
        "--linear_window=8", "--device=cpu", "--config=tests/kd.yaml", "--eval_tokens=256",
        "--sample_tokens=0", "--max_steps=6",
    ]  # fmt: skip
    call_script("train_kd", *common, "--run=a", "--layers=1,2", "--mixer=sliding_window")
    model = load_model(tmp_path / "a" / "model")
    assert model.config.layer_map() == "FSSF" and model.config.sliding_window == 8
    table = {r["model"]: r["KL"] for r in json.loads((tmp_path / "a" / "table.json").read_text())}
    assert table["student after distill"] < table["student after align"]
    call_script("train_kd", *common, "--run=b", f"--student={tmp_path / 'a' / 'model'}")
    assert {"layer_1", "layer_2"} <= metric_keys(tmp_path / "b")


def metric_keys(run) -> set[str]:
    return set().union(*map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))


def test_which_layers_of_a_student_are_converted(tiny_teacher, tiny_data, tmp_path, capsys):
    """A plain student is converted even if its teacher has other layer types; a student with
    linear layers is not, and says which flags it does not use."""
    torch.manual_seed(2)
    hybrid = Transformer(tiny_config(layer_types=["linear_attention"] + ["full_attention"] * 3))
    hybrid.init_weights()
    save_model(hybrid, tmp_path / "hybrid", tokenizer_from="byte")
    common = [
        f"--data={tiny_data}", f"--save_model_dir={tmp_path}", "--device=cpu", "--dry_run",
        "--config=tests/kd.yaml", "--layers=1,2", "--mixer=gla",
    ]  # fmt: skip
    call_script(
        "train_kd", *common, "--run=a", f"--teacher={tmp_path / 'hybrid'}",
        f"--student={tiny_teacher}",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "layers: FLLF" in out and "not used" not in out
    call_script(
        "train_kd", *common, "--run=b", f"--teacher={tiny_teacher}",
        f"--student={tmp_path / 'hybrid'}",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "layers: LFFF" in out and "note: --student is converted already" in out


def test_sliding_student_of_another_depth_is_refused(tiny_teacher, tmp_path, refused):
    model = Transformer(
        tiny_config(num_hidden_layers=3, layer_types=["sliding_attention"] * 3, sliding_window=8)
    )
    model.init_weights()
    save_model(model, tmp_path / "s", tokenizer_from="byte")
    err = refused("train_kd", f"--teacher={tiny_teacher}", f"--student={tmp_path / 's'}")
    assert "--student: 3 layers, some sliding, found" in err
