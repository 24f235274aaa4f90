"""Tuned configurations: the file, which entry serves which call, autotuners that take them, and a
tuner that outlives a configuration which does not.

pytest tests/ops/test_tuned.py
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from ops import tuned
from ops.tuned import TUNED, TunedConfigs, file_of, nearest, read_entries, use_tuned, write_entries

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "fla.ops.gla.chunk.chunk_gla_fwd_kernel_o"
BF16, FP32, INT = "torch.bfloat16", "torch.float32", "torch.int32"


def entry(*, heads=9, key_dim=64, varlen=True, dtypes=(BF16, FP32, INT), warps=4):
    key = {"H": heads, "K": key_dim, "IS_VARLEN": varlen, "USE_G": True}
    config = {"BK": 32, "BV": 64, "num_warps": warps, "num_stages": 3}
    return {"key": key, "dtypes": list(dtypes), "config": config}


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


def test_a_file_is_merged(tmp_path, installed, monkeypatch):
    path = tmp_path / "gpu.json"
    assert read_entries(path) == ({}, {})
    write_entries(path, {KERNEL: [entry(warps=1), entry(key_dim=128)]})
    write_entries(path, {KERNEL: [entry(warps=2)], "fla.other": [entry()]})
    found, kernels = read_entries(path)
    assert found == tuned.versions()
    assert sorted(kernels) == sorted([KERNEL, "fla.other"])
    assert {(e["key"]["K"], e["config"]["num_warps"]) for e in kernels[KERNEL]} == {
        (64, 2),
        (128, 4),
    }
    assert kernels["fla.other"] == [entry()]  # as it was given
    monkeypatch.setattr(tuned, "versions", lambda: {"fla": "0.6.0", "triton": "3.7.1"})
    write_entries(path, {KERNEL: [entry(warps=8)]})  # replaced, not merged
    assert read_entries(path) == (tuned.versions(), {KERNEL: [entry(warps=8)]})
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_the_same_in_any_order(tmp_path, installed):
    """One line per entry, in an order of their own: a diff shows what another tuning changed."""
    entries = [entry(), entry(key_dim=128), entry(heads=2)]
    write_entries(tmp_path / "a.json", {KERNEL: entries, "fla.other": [entry()]})
    for e in (entry(), *reversed(entries)):
        write_entries(tmp_path / "b.json", {"fla.other": [entry()]})
        write_entries(tmp_path / "b.json", {KERNEL: [e]})
    text = (tmp_path / "a.json").read_text()
    assert (tmp_path / "b.json").read_text() == text
    rows = [line.rstrip(",") for line in text.splitlines() if line.startswith('{"config"')]
    assert len(rows) == 4
    assert all(json.loads(row) for row in rows)
    assert list(json.loads(rows[0])["key"]) == list(entry()["key"])  # the autotuner's order


def test_an_autotuner_asks_no_more(tmp_path, installed):
    """The real autotuner of a real kernel: its entry is found under the key that it would build."""
    pytest.importorskip("fla.ops")
    autotuner = tuned.autotuners()[KERNEL]
    assert autotuner.keys == ["BT", "HV", "STATE_V_FIRST", "K", "V"]
    made = entry() | {"key": {"BT": 64, "HV": 9, "STATE_V_FIRST": False, "K": 64, "V": 64}}
    write_entries(file_of("NVIDIA H100 80GB HBM3", tmp_path), {KERNEL: [made]})
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
    search = "; first steps search for minutes (scripts/tune_kernels.py)"
    none = "tuned kernels: none for NVIDIA H100 80GB HBM3"
    assert use_tuned(cuda, tmp_path) == none + search
    write_entries(tmp_path / "NVIDIA_H100_80GB_HBM3.json", {KERNEL: [entry()]})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    line = "tuned kernels: NVIDIA_H100_80GB_HBM3, fla 0.6.0, triton 3.6.0"
    assert use_tuned(cuda, tmp_path) == line  # the same chip
    monkeypatch.setattr(tuned, "versions", lambda: {"fla": "0.6.3", "triton": "3.7.1"})
    assert use_tuned(cuda, tmp_path) == line
    monkeypatch.setattr(tuned, "versions", lambda: {"fla": "0.7.0", "triton": "3.7.1"})
    assert use_tuned(cuda, tmp_path) == (
        "tuned kernels: those of fla 0.6.0, triton 3.6.0 do not hold for fla 0.7.0, triton 3.7.1"
        + search
    )
    monkeypatch.setenv("FLA_CACHE_MODE", "strict")
    assert use_tuned(cuda, tmp_path) == "tuned kernels: left to FLA_CACHE_MODE=strict"
    monkeypatch.setitem(sys.modules, "fla", None)
    line = use_tuned(cuda, tmp_path)
    assert line == "tuned kernels: none, flash-linear-attention is not installed"
    assert use_tuned(torch.device("cpu"), tmp_path) == ""


def test_shipped_files():
    """Every file of tuned/ can be read, names kernels and keys that fla has, and complete ones."""
    pytest.importorskip("fla.ops")
    for path in TUNED.glob("*.json"):
        _, kernels = read_entries(path)
        for kernel, entries in kernels.items():
            autotuner = tuned.autotuners()[kernel]
            tiles = [set(c.kwargs) for c in autotuner.configs]
            for e in entries:
                assert list(e["key"]) == [n for n in autotuner.keys if n in e["key"]], kernel
                options = {"num_warps", "num_stages"}
                assert options <= e["config"].keys(), kernel
                assert e["config"].keys() - {*options, "num_ctas"} in tiles, kernel


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import tune_kernels

    return tune_kernels


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--ops=mamba", "--ops: 'mamba' found, some of gated_delta_rule, "),
        ("--head_dims=64,x", "--head_dims: '64,x' found, numbers like 64,128 expected"),
        ("--head_dims=72", "--head_dims: fla's gated_delta_rule kernel needs a key size in"),
        ("--jobs=1", "tuning needs a CUDA GPU, and there is none"),
    ],
)
def test_tune_refuses(tune, argv, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="^" + message):
        tune.parse([argv])


BAD = ("fla.ops.simple.kernel_h", "BK: 64, num_warps: 1")


def dies_of_bad(pipe, note_path):
    """In place of tune_kernels.serve: runs two configurations, of which BAD ends the process."""
    _, _, _, banned = pipe.recv()
    for kernel, config in (("fla.ops.simple.kernel_o", "BK: 32"), BAD):
        if (kernel, config) not in banned:
            Path(note_path).write_text(json.dumps([kernel, config]))
            if (kernel, config) == BAD:
                os._exit(9)
            Path(note_path).write_text("")
    pipe.send((2, 1, "error 2e-3", None))


def test_a_crash_bans_its_configuration(tune, tmp_path):
    timers = (tune.Timer(str(tmp_path), i, dies_of_bad) for i in range(2))
    assert tune.tune_safely("gla", 64, "unused", timers) == (
        2, 1,
        "error 2e-3; banned kernel_h (BK: 64, num_warps: 1): its process ended with code 9", True,
    )  # fmt: skip


class Failing:
    """A timer whose configurations fail one after the other; `known` says whether it is told."""

    def __init__(self, note, known):
        self.note, self.known = note, known

    def answer(self, task):
        banned = task[3]
        with pytest.raises(ZeroDivisionError), self.note.running("kernel", len(banned)):
            raise ZeroDivisionError
        if not self.known:
            self.note.path.write_text("")
        return 0, 0, "", "AcceleratorError: illegal memory access"


@pytest.mark.parametrize("known", [True, False])
def test_an_op_is_given_up(tune, tmp_path, known):
    note = tune.Note(tmp_path / "note")
    with note.running("kernel", "another"):
        assert note.read() == ("kernel", "another")
    assert note.read() is None
    timers = iter([Failing(note, known)] * 99)
    *_, remark, succeeded = tune.tune_safely("gla", 64, "unused", timers)
    assert not succeeded
    where = f" in kernel ({tune.MOST_BANNED})" if known else ""
    assert remark.startswith(f"FAILED{where}: AcceleratorError: illegal memory access")
    assert remark.count("banned") == (tune.MOST_BANNED if known else 0)


def test_a_banned_configuration_is_not_tried(tune):
    pytest.importorskip("fla.ops")
    every = tune.allowed(KERNEL, 64, frozenset())
    left = tune.allowed(KERNEL, 64, frozenset([(KERNEL, str(every[0])), ("other", str(every[1]))]))
    assert left == every[1:]
    texts = [str(c) for c in every]
    assert len(tune.allowed(KERNEL, 64, frozenset((KERNEL, t) for t in texts[1:]))) == 2
    with pytest.raises(ValueError, match=f"every configuration of {KERNEL} fails"):
        tune.allowed(KERNEL, 64, frozenset((KERNEL, t) for t in texts))
