"""scripts/profile_table.py on hand-made traces whose times are known."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os

import pytest
from conftest import ROOT

_SPEC = importlib.util.spec_from_file_location(
    "profile_table", ROOT / "scripts" / "profile_table.py"
)
profile_table = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(profile_table)

GEMM, COPY = "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_NNT", "Memcpy HtoD (Pinned -> Device)"


def event(cat: str, name: str, ts: float, dur: float, tid: int = 7) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": tid}


def steps(*bounds: float) -> list[dict]:
    """ProfilerStep marks of the host and, as Kineto writes them, their copies on the GPU."""
    marks = []
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        marks.append(event("user_annotation", f"ProfilerStep#{i}", a, b - a, tid=1))
        marks.append(event("gpu_user_annotation", f"ProfilerStep#{i}", a, b - a))
    return marks


def write(folder, events: list[dict], name: str = "trace-5.json"):
    path = folder / name
    path.write_text(json.dumps({"traceEvents": [{"ph": "M", "name": "process_name"}, *events]}))
    return path


# Two steps of 1000 us; the last kernel ends 500 us after the second one's end. Busy: 200-700 (two
# streams), 1000-1400 and 2300-2500 = 1100 of 2500 us.
GPU_EVENTS = [
    *steps(0, 1000, 2000),
    event("kernel", "left over from the warm-up", -50, 20),
    event("kernel", GEMM, 200, 400),
    event("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL", 300, 400, tid=9),
    event("kernel", GEMM, 1000, 300),
    event("gpu_memcpy", COPY, 1300, 100),
    event("kernel", "kd_backward", 2300, 200),
    event("cpu_op", "aten::mm", 100, 10, tid=1),
    event("cuda_runtime", "cudaLaunchKernel", 105, 4, tid=1),
]


def test_gpu_numbers(tmp_path):
    found = profile_table.summarise(profile_table.read_events(write(tmp_path, GPU_EVENTS)))
    assert (found["gpu"], found["steps"]) == (True, 2)
    assert found["wall"] == pytest.approx(1.25)
    assert found["busy"] == pytest.approx(0.55)  # 0.65 if the streams' overlap counted twice
    assert found["collectives"] == pytest.approx(0.2)
    assert found["collectives alone"] == pytest.approx(0.05)  # 600-700
    assert found["slowed"] == pytest.approx(0.05)  # the first matmul, beside the second
    rows = {name: (ms, launches) for name, ms, launches in found["families"]}
    assert list(rows) == ["matmul", "collectives", "loss head", "copies and fills"]
    assert rows["matmul"] == (pytest.approx(0.35), 2)
    assert rows["collectives"] == (pytest.approx(0.2), 1)
    assert rows["loss head"] == (pytest.approx(0.1), 1)
    assert rows["copies and fills"] == (pytest.approx(0.05), 1)
    assert found["kernels"][0] == (GEMM, pytest.approx(0.35), 2)


def test_kernels_beside_collectives():
    """A long collective that began before a short one is not forgotten; other grids are other
    kernels; one that never ran alone is not counted."""
    kernel = lambda ts, dur, grid=1, name="a": {  # noqa: E731
        **event("kernel", name, ts, dur), "args": {"grid": [grid, 1, 1]}
    }  # fmt: skip
    work = [kernel(0, 10), kernel(20, 14), kernel(60, 13), kernel(100, 10), kernel(60, 99, 2),
            kernel(70, 50, name="b")]  # fmt: skip
    messages = [event("kernel", "nccl", 15, 60), event("kernel", "nccl", 22, 1)]
    assert profile_table.slowed(work, messages) == pytest.approx(4 + 3)
    assert profile_table.slowed(work, []) == profile_table.slowed([], messages) == 0


def test_console(tmp_path, capsys):
    old = write(tmp_path, GPU_EVENTS[:3], "trace-9.json")
    os.utime(old, (0, 0))  # older, though its name comes last
    new = write(tmp_path, GPU_EVENTS)
    profile_table.main([str(tmp_path), "--json", str(tmp_path / "numbers.json")])
    out = capsys.readouterr().out
    assert str(new) in out and "idle 0.700 ms = 56.0%" in out
    assert "collectives 0.200 ms, alone 0.050 ms; kernels beside them 0.050 ms longer" in out
    assert "63.6%" in out  # of matmul: 0.35 / 0.55
    assert json.loads((tmp_path / "numbers.json").read_text())["steps"] == 2


def test_cpu_self_times(tmp_path, capsys):
    events = [
        *steps(0, 100),
        event("cpu_op", "aten::linear", 10, 60, tid=1),
        event("cpu_op", "aten::addmm", 20, 40, tid=1),
        event("cpu_op", "aten::copy_", 25, 5, tid=1),
        event("cpu_op", "aten::mul", 30, 20, tid=2),  # another thread: not inside aten::addmm
    ]
    path = write(tmp_path, events)
    found = profile_table.summarise(profile_table.read_events(path))
    times = {name: ms for name, ms, _ in found["kernels"]}
    expected = {"aten::addmm": 0.035, "aten::linear": 0.02, "aten::mul": 0.02, "aten::copy_": 0.005}
    assert times == pytest.approx(expected)
    assert found["busy"] == pytest.approx(0.06) and found["families"] == []
    profile_table.main([str(path)])
    assert "no GPU kernels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matmul"),
        ("triton_tem_fused_mm_3", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "softmax attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "softmax attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "softmax attention"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_2", "compiled elementwise"),
        ("triton_red_fused_mm_rms_norm_1", "compiled elementwise"),
        ("chunk_gated_delta_rule_fwd_kernel_h_blockdim64", "linear attention"),
        ("merge_16x16_to_64x64_inverse_kernel", "linear attention"),
        ("kda_gate_fwd_kernel", "linear attention"),
        ("short_conv_backward_x", "linear attention"),
        ("kd_forward", "loss head"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", "copies and fills"),
        ("Memset (Device)", "copies and fills"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor>", "eager PyTorch"),
        ("my_kernel", "other"),
    ],
)
def test_families(name, expected):
    assert profile_table.family(name) == expected


@pytest.mark.parametrize("kind", ["missing", "empty folder", "not a trace", "no events"])
def test_bad_path_is_one_line(tmp_path, capsys, kind):
    path = tmp_path / "trace-5.json"
    if kind == "empty folder":
        path = tmp_path
    elif kind == "not a trace":
        path.write_text("[1, 2")
    elif kind == "no events":
        write(tmp_path, [])
    with pytest.raises(SystemExit) as stop:
        profile_table.main([str(path)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
