"""What only CUDA can show: varlen attention, bfloat16, compiled blocks, a whole run."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import call_script, metric_rows
from kit import rms_ratio
from test_runs import train_flags

import evaluate
import trainer
from config import ModelConfig
from data import TokenDataset, eval_batches
from distributed import compile_blocks
from evaluate import inputs
from generate import Decoder
from hybrid_layers import MIXERS, resolve_kernels, set_kernels
from layers import sdpa_priority
from model import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
CUDA = torch.device("cuda")


def hybrid(**changes) -> Transformer:
    fields = dict(
        vocab_size=257, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        layer_types=["full_attention", "linear_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(3)
    model = Transformer(ModelConfig(**{**fields, **changes}))
    model.init_weights()
    set_kernels(model, dict.fromkeys(MIXERS, "chunk"))
    return model


def loss_and_grads(model, batch, device, *, amp: bool):
    model = copy.deepcopy(model).to(device)
    batch = batch.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp), sdpa_priority(device):
        hidden = model(**inputs(batch)).float()
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(device)
    (hidden * weight).mean().backward()
    grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach().cpu(), grads


@pytest.mark.parametrize("doc_mask", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, {"attention_sink": True}], ids=["plain", "sink"])
def test_cuda_equals_cpu(tiny_data, doc_mask, amp, changes):
    data = TokenDataset.open(tiny_data, "train")
    batch = eval_batches(data, seq_len=160, max_tokens=480, micro_batch=3, doc_mask=doc_mask)[0]
    model = hybrid(**changes)
    expected, expected_grads = loss_and_grads(model, batch, torch.device("cpu"), amp=False)
    actual, grads = loss_and_grads(model, batch, CUDA, amp=amp)
    limit = 3e-2 if amp else 1e-4
    assert rms_ratio(actual, expected) <= limit
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        # bf16: gradients of single gates are sums of many cancelling terms
        assert rms_ratio(grad, expected_grads[name]) <= (0.15 if amp else 1e-3), name


@pytest.mark.parametrize("doc_mask", [True, False], ids=["packed", "rows"])
def test_compiled_blocks_equal_eager(tiny_data, doc_mask):
    data = TokenDataset.open(tiny_data, "train")
    batches = eval_batches(data, seq_len=160, max_tokens=960, micro_batch=3, doc_mask=doc_mask)
    model = hybrid().to(CUDA)
    fast = copy.deepcopy(model)
    compile_blocks(fast)
    for batch in batches:
        batch = batch.to(CUDA)
        with torch.autocast("cuda", torch.bfloat16), sdpa_priority(CUDA):
            a, b = model(**inputs(batch)), fast(**inputs(batch))
        assert rms_ratio(b.float(), a.float()) <= 2e-2


@pytest.mark.parametrize("compiled", ["true", "false"])
def test_a_whole_run(tiny_teacher, tiny_data, tmp_path, compiled):
    call_script(
        "train_kd", f"--teacher={tiny_teacher}", f"--data={tiny_data}", "--layers=1,2",
        f"--save_model_dir={tmp_path}", "--run=a", "--config=tests/kd.yaml",
        f"--torch_compile={compiled}", "--eval_tokens=512", "--sample_tokens=3",
        "--calibrate_tokens=256", "--distill_train=all", "--distill_lr=5e-4", "--peak_flops=1e12",
    )  # fmt: skip
    kl = {r["model"]: r["KL"] for r in json.loads((tmp_path / "a" / "table.json").read_text())}
    assert kl["student after distill"] < kl["student after align"] < kl["student after transfer"]
    assert all(0 < v < 1 for v in metric_rows(tmp_path / "a", "mfu").values())


@pytest.mark.parametrize("muon", [False, True])
def test_no_step_waits_for_the_device(muon, tiny_teacher, tiny_data, tmp_path, monkeypatch):
    """From its third step on, when all is compiled and every table is there, no stage does but to
    log. A host that waits in each step leaves the GPU idle while it launches the next."""
    step, checked = trainer.one_step, []

    def watched(run, plan, number, *args):
        if number < 2:
            return step(run, plan, number, *args)
        checked.append(plan.name)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(run, plan, number, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer, "one_step", watched)
    call_script(
        "train_kd", f"--teacher={tiny_teacher}", f"--data={tiny_data}", "--layers=1,2",
        f"--save_model_dir={tmp_path}", "--run=a", "--config=tests/kd.yaml", "--max_steps=4",
        "--eval_tokens=512", "--sample_tokens=0", "--calibrate_tokens=256", "--distill_train=all",
        f"--distill_use_muon={muon}", f"--align_use_muon={muon}", "--peak_flops=1e12",
    )  # fmt: skip
    call_script("train", *train_flags(tiny_data, tmp_path, "b", "--device=cuda", "--dtype=bfloat16",
                                      "--max_steps=4", f"--use_muon={muon}"))  # fmt: skip
    assert checked == ["align"] * 2 + ["distill"] * 2 + ["pretrain"] * 2


@pytest.mark.parametrize("scorer", ["swap", "drop", "window", "greedy", "gates"])
def test_a_search_and_an_evaluation(scorer, tiny_teacher, tiny_data, tmp_path):
    """Layers are chosen, and the student decodes in float32 as it reads; its recall is asked."""
    call_script(
        "train_kd", f"--teacher={tiny_teacher}", f"--data={tiny_data}", "--layers=auto:0.5",
        f"--save_model_dir={tmp_path}", "--run=a", "--config=tests/kd.yaml", "--eval_tokens=512",
        "--sample_tokens=0", "--calibrate_tokens=256", "--search_tokens=512",
        "--search_seq_len=512", "--search_recall_samples=2", f"--search_scorer={scorer}",
        "--search_gate_steps=4", "--peak_flops=1e12",
    )  # fmt: skip
    found = json.loads((tmp_path / "a" / "layer_scores.json").read_text())
    assert len(found["linear"]) == 2 and found["patterns"]["chosen"]["recall_ce"] > 0
    evaluate.main([
        str(tmp_path / "a" / "model"), "--teacher", tiny_teacher, "--data", tiny_data,
        "--seq_len", "64", "--recall_tasks", "copy", "--recall_lengths", "512",
        "--recall_samples", "1", "--out", str(tmp_path / "a"),
    ])  # fmt: skip
    assert json.loads((tmp_path / "a" / "eval.json").read_text())["dtype"] == "bfloat16"


# ---- every mixer, with the kernel that `auto` takes


def with_mixer(name: str, dtype: str = "auto", **changes) -> Transformer:
    """Full, then `name`, twice, no weight at its initial value."""
    kind = "sliding_attention" if name == "sliding_window" else "linear_attention"
    model = hybrid(
        layer_types=["full_attention", kind] * 2, mixer=[name] * 2 if kind[0] == "l" else [],
        sliding_window=40, linear_window=40, **changes,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    set_kernels(model, resolve_kernels(model.config, "auto", CUDA, dtype))
    return model


every_mixer = pytest.mark.parametrize("name", MIXERS)


@every_mixer
def test_every_mixer_equals_the_cpu(untimed_kernels, name, tiny_data):
    """Packed documents in bfloat16 on its own kernel, against float32 on the CPU. Some gradients
    cancel (a norm follows mamba2's D), so that bfloat16 leaves little of them in PyTorch too."""
    data = TokenDataset.open(tiny_data, "train")
    batch = eval_batches(data, seq_len=160, max_tokens=480, micro_batch=3)[0]
    model = with_mixer(name)
    actual, grads = loss_and_grads(model, batch, CUDA, amp=True)
    set_kernels(model, dict.fromkeys(MIXERS, "chunk"))
    expected, expected_grads = loss_and_grads(model, batch, torch.device("cpu"), amp=False)
    _, rounded = loss_and_grads(model, batch, torch.device("cpu"), amp=True)
    assert rms_ratio(actual, expected) <= 3e-2
    for n, grad in grads.items():
        if expected_grads[n].abs().max() > 1e-9:
            limit = max(0.2, 3 * rms_ratio(rounded[n], expected_grads[n]))
            assert rms_ratio(grad, expected_grads[n]) <= limit, n


@every_mixer
def test_no_graph_break_in_a_block(untimed_kernels, name, tiny_data):
    data = TokenDataset.open(tiny_data, "train")
    batch = eval_batches(data, seq_len=160, max_tokens=480, micro_batch=3)[0].to(CUDA)
    model = with_mixer(name).to(CUDA)
    if name != "sliding_window" and model.layers[1].linear_attn.kernel != "fla":
        pytest.skip("runs in PyTorch's chunked form")
    with torch.autocast("cuda", torch.bfloat16):
        expected = model(**inputs(batch))
        for block in model.layers:
            block.compile(fullgraph=True)
        actual = model(**inputs(batch))
    actual.float().square().mean().backward()
    assert rms_ratio(actual, expected) <= 5e-2  # rounding


@every_mixer
def test_a_recorded_step_decodes_the_same(untimed_kernels, name):
    """Compiled and recorded as a CUDA graph, against plain calls: float32, for compiled code rounds
    less often to bfloat16 than PyTorch's operations, which is 2e-2 on these weights."""
    model = with_mixer(name, "float32").to(CUDA).eval()
    compile_blocks(model)
    prompts = [[1, 2, 3, 4, 5] * 20, [7], [8, 9]]
    plain, recorded = Decoder(model), Decoder(model, 160, graph=True, compiled=True)
    first = plain.prefill(prompts)
    assert rms_ratio(recorded.prefill(prompts), first) <= 1e-3
    for i in range(30):
        tokens = torch.tensor([i, 40 + i, 80 + i], device=CUDA)
        expected = plain.step(tokens)
        assert rms_ratio(recorded.step(tokens), expected) <= 1e-3, i
