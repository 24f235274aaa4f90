"""Tuned configurations: files, which entry serves which call, and Triton's autotuners taking them.

pytest tests/ops/test_tuned.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ops import tuned
from ops.tuned import TunedConfigs, gpu_folder, nearest, read_folder, use_tuned, write_entries

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "fla.ops.gla.chunk.chunk_gla_fwd_kernel_o"
BF16, FP32, INT = "torch.bfloat16", "torch.float32", "torch.int32"


def entry(*, heads=9, key_dim=64, varlen=True, dtypes=(BF16, FP32, INT), warps=4):
    key = {"H": heads, "K": key_dim, "IS_VARLEN": varlen, "USE_G": True}
    config = {"kwargs": {"BK": 32, "BV": 64}, "num_warps": warps, "num_stages": 3, "num_ctas": 1}
    return {"key": key, "dtypes": list(dtypes), "config": config, "ms": 0.1}


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(tuned, "versions", lambda: {"fla": "0.6.0", "triton": "3.6.0"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.delenv("FLA_CACHE_MODE", raising=False)


def call(heads=9, key_dim=64, varlen=True, use_g=True, dtypes=(BF16, FP32, INT)):
    return (heads, key_dim, varlen, use_g, *dtypes)


@pytest.mark.parametrize(
    "key",
    [
        call(),
        call(heads=32),
        call(varlen=False, dtypes=(BF16, FP32)),
        call(dtypes=(BF16, FP32, FP32, "torch.int64")),
    ],
    ids=["same", "heads", "not packed", "a state and int64 bounds"],
)
def test_served(key):
    assert nearest([entry()], key)["config"]["num_warps"] == 4


@pytest.mark.parametrize(
    "key",
    [
        call(key_dim=128),
        call(key_dim=True),
        call(use_g=False),
        call(use_g=1),
        call(dtypes=(FP32, FP32, INT)),
        call(dtypes=("torch.float16", FP32, INT)),
        call()[:3],
    ],
    ids=["key size", "bool for int", "flag", "int for bool", "float32", "float16", "shorter"],
)
def test_not_served(key):
    assert nearest([entry()], key) is None


def test_the_nearest_is_served():
    entries = [
        entry(heads=4, warps=1),
        entry(heads=16, warps=2),
        entry(heads=16, dtypes=(BF16, FP32, FP32, INT), warps=8),
    ]
    for heads, warps in ((3, 1), (6, 1), (12, 2), (64, 2)):
        assert nearest(entries, call(heads=heads))["config"]["num_warps"] == warps
    same = call(heads=4, dtypes=(BF16, FP32, FP32, INT))  # its tensors before its heads
    assert nearest(entries, same)["config"]["num_warps"] == 8


def test_files_merge(tmp_path, installed):
    path = tmp_path / "gla.json"
    write_entries(path, {KERNEL: [entry(warps=1), entry(key_dim=128)]})
    write_entries(path, {KERNEL: [entry(warps=2)], "fla.other": [entry()]})
    found, kernels = read_folder(tmp_path)
    assert found == tuned.versions()
    assert sorted(kernels) == sorted([KERNEL, "fla.other"])
    assert {(e["key"]["K"], e["config"]["num_warps"]) for e in kernels[KERNEL]} == {
        (64, 2),
        (128, 4),
    }
    write_entries(tmp_path / "kda.json", {KERNEL: [entry(warps=8), entry(heads=2)]})
    kernels = read_folder(tmp_path)[1]  # the first file's, and what only the second has
    assert [e["config"]["num_warps"] for e in kernels[KERNEL] if e["key"]["H"] == 9] == [4, 2]
    assert len(kernels[KERNEL]) == 3
    assert not list(tmp_path.glob("*.partial"))


def test_files_of_other_versions(tmp_path, installed, monkeypatch):
    write_entries(tmp_path / "gla.json", {KERNEL: [entry()]})
    monkeypatch.setattr(tuned, "versions", lambda: {"fla": "0.6.0", "triton": "3.7.1"})
    write_entries(tmp_path / "kda.json", {KERNEL: [entry()]})
    with pytest.raises(ValueError, match=r"kda.json: .*3.7.1.* found, .*3.6.0"):
        read_folder(tmp_path)
    write_entries(tmp_path / "gla.json", {"fla.other": [entry()]})  # replaced, not merged
    assert list(read_folder(tmp_path)[1]) == ["fla.other", KERNEL]


def test_an_autotuner_asks_no_more(tmp_path, installed):
    """The real autotuner of a real kernel: its entry is found under the key that it would build."""
    pytest.importorskip("fla.ops")
    autotuner = tuned.autotuners()[KERNEL]
    assert autotuner.keys == ["BT", "HV", "STATE_V_FIRST", "K", "V"]
    folder = tmp_path / "NVIDIA_H100_80GB_HBM3"
    made = entry() | {"key": {"BT": 64, "HV": 9, "STATE_V_FIRST": False, "K": 64, "V": 64}}
    write_entries(folder / "gla.json", {KERNEL: [made]})
    before = autotuner.cache
    try:
        line = use_tuned(torch.device("cuda"), tmp_path)
        assert line == "tuned kernels: NVIDIA_H100_80GB_HBM3, fla 0.6.0, triton 3.6.0"
        assert isinstance(autotuner.cache, TunedConfigs)
        key = (64, 3, False, 64, 64, BF16, FP32)
        assert key in autotuner.cache
        config = autotuner.cache[key]
        assert (config.kwargs, config.num_warps) == ({"BK": 32, "BV": 64}, 4)
        assert (64, 3, False, 96, 64, BF16, FP32) not in autotuner.cache
        autotuner.cache["tuned here"] = config  # what Triton finds itself stays, and wins
        use_tuned(torch.device("cuda"), tmp_path)
        assert "tuned here" in autotuner.cache
    finally:
        autotuner.cache = before


def test_other_answers(tmp_path, installed, monkeypatch):
    cuda = torch.device("cuda")
    line = use_tuned(cuda, tmp_path)
    assert line.startswith("no tuned kernels for NVIDIA H100 80GB HBM3: the first step autotunes")
    assert line.endswith("python scripts/tune_kernels.py saves that")
    write_entries(tmp_path / gpu_folder("NVIDIA H100 80GB HBM3") / "gla.json", {KERNEL: [entry()]})
    monkeypatch.setattr(tuned, "versions", lambda: {"fla": "0.6.0", "triton": "3.7.1"})
    line = use_tuned(cuda, tmp_path)
    assert "are of fla 0.6.0, triton 3.6.0, not fla 0.6.0, triton 3.7.1: the first step" in line
    monkeypatch.setenv("FLA_CACHE_MODE", "strict")
    assert use_tuned(cuda, tmp_path) == "tuned kernels: left to FLA_CACHE_MODE=strict"


def test_shipped_files():
    """Every file of tuned/ can be read, names kernels and keys that fla has, and complete ones."""
    pytest.importorskip("fla.ops")
    for folder in ROOT.glob("tuned/*/"):
        _, kernels = read_folder(folder)
        for kernel, entries in kernels.items():
            autotuner = tuned.autotuners()[kernel]
            for e in entries:
                assert set(e["key"]) <= set(autotuner.keys), kernel
                assert list(e["key"]) == [n for n in autotuner.keys if n in e["key"]], kernel
                assert e["config"].keys() == {"kwargs", "num_warps", "num_stages", "num_ctas"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--ops=mamba", "--ops: 'mamba' found, some of gated_delta_rule, "),
        ("--head_dims=64,x", "--head_dims: '64,x' found, numbers like 64,128 expected"),
        ("--head_dims=72", "--head_dims: fla's gated_delta_rule kernel needs a key size in"),
        ("--jobs=1", "tuning needs a CUDA GPU, and there is none"),
    ],
)
def test_tune_refuses(argv, message, monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("tune", ROOT / "scripts" / "tune_kernels.py")
    tune = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tune)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="^" + message):
        tune.parse([argv])


def test_json_is_one_line_per_entry(tmp_path, installed):
    path = tmp_path / "gla.json"
    write_entries(path, {KERNEL: [entry(), entry(key_dim=128)]})
    rows = [line for line in path.read_text().splitlines() if line.startswith('{"key"')]
    assert len(rows) == 2
    assert all(json.loads(row.rstrip(",")) for row in rows)
