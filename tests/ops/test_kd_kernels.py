"""The head's Triton form against full logits: on a GPU, and on a CPU interpreted in a process of
its own (Triton decides when it is imported).

pytest tests/ops/test_kd_kernels.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_kd_head import SETTINGS, assert_close, gradients, like, make

from ops import kd_head as head
from ops.kd_head import LOSSES, ce_head, kd_head, naive_kd_head
from ops.token_select import token_losses

FIELDS = ("loss", "kd", "ce", "teacher_ce", "agree", "count")


def on(device, inputs):
    return [x.detach().to(device).requires_grad_(x.requires_grad) for x in inputs]


def check_losses(device: str, losses=tuple(LOSSES)) -> None:
    """Every loss and setting in float32, in several chunks and blocks of the vocabulary."""
    for loss in losses:
        for name, settings in SETTINGS.items():
            few = loss == "forward_kl" or name in ("plain", "ce+temperature", "vocab+widths+ce")
            if "top_k" in name or not (few or loss in name):
                continue
            settings = {**settings, "loss": loss, "with_metrics": True}
            shape = {
                k: settings.pop(k) for k in ("teacher_width", "teacher_vocab") if k in settings
            }
            torch.manual_seed(len(name))
            exact = on(device, make(**shape))
            inputs = like(exact, torch.float32)
            with mock.patch.object(head, "kd_chunk", side_effect=AssertionError):  # PyTorch's form
                out = kd_head(*inputs, chunk_size=9, **settings)
            want = naive_kd_head(*exact, **settings)
            for field in FIELDS:
                assert_close(getattr(out, field), getattr(want, field), torch.float32)
            pairs = zip(gradients(out, inputs), gradients(want, exact), strict=True)
            for got, ref in pairs:
                assert_close(got, ref, torch.float32)
    with torch.no_grad():
        out, want = kd_head(*inputs, **settings), naive_kd_head(*exact, **settings)
    assert_close(out.loss, want.loss, torch.float32)


def check_cross_entropy(device: str) -> None:
    h, w, _, _, labels = on(device, make(n=37, vocab=133, dtype=torch.float64))
    small = like([h, w], torch.float32)
    out = ce_head(*small, labels, chunk_size=10)
    want = F.cross_entropy(h @ w.t(), labels, ignore_index=-100)
    assert_close(out.loss, want, torch.float32)
    for got, ref in zip(gradients(out, small), torch.autograd.grad(want, [h, w]), strict=True):
        assert_close(got, ref, torch.float32)


def full_logits(h_s, w_s, h_t, w_t, labels):
    """What a loss on bfloat16 logits gives: a matmul, a softmax in float32, autograd."""
    keep = labels != -100
    log_p, log_q = ((h[keep] @ w.t()).float().log_softmax(-1) for h, w in ((h_s, w_s), (h_t, w_t)))
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def check_bfloat16(device: str) -> None:
    """Gradients no further from float64 than those of full bfloat16 logits. (Interpreted, the cast
    to bfloat16 cuts off instead of rounding.)"""
    torch.manual_seed(0)
    inputs = on(device, make(n=48, width=32, teacher_width=32, vocab=300, teacher_vocab=300))
    inputs = like(inputs, torch.bfloat16)
    exact = like(inputs, torch.float64)
    wanted = gradients(naive_kd_head(*exact), exact)
    ours = gradients(kd_head(*inputs, chunk_size=30), inputs)
    theirs = torch.autograd.grad(full_logits(*inputs), inputs[:2])
    for a, b, want in zip(ours, theirs, wanted, strict=True):
        error, limit = ((x.double() - want).norm().item() for x in (a, b))
        assert error <= (1.1 if device == "cuda" else 1.25) * limit, (error, limit)


def check_gradient_into_grad(device: str) -> None:
    """unit_grad: the second call adds to the weight's .grad in place, and hands out none."""
    h, w, h_t, w_t, labels = like(on(device, make()), torch.float32)
    for _ in range(2):
        kd_head(h, w, h_t, w_t, labels, chunk_size=9, normalizer=40).loss.backward()
    expected = [t.grad.clone() for t in (h, w)]
    h.grad = w.grad = None
    kd_head(h, w, h_t, w_t, labels, normalizer=40, unit_grad=True).loss.backward()
    held = w.grad
    out = kd_head(h, w, h_t, w_t, labels, chunk_size=9, normalizer=40, unit_grad=True)
    out.loss.backward()
    assert w.grad is held
    for got, want in zip((h.grad, w.grad), expected, strict=True):
        assert_close(got, want, torch.float32)


def check_masks_and_labels(device: str) -> None:
    """NaN under the mask does no harm; an unknown label makes the cross-entropy NaN, not KL."""
    inputs = like(on(device, make()), torch.float32)
    want = kd_head(*inputs)
    wanted = gradients(want, inputs)
    with torch.no_grad():
        inputs[0][inputs[4] == -100] = torch.nan
        inputs[2][inputs[4] == -100] = torch.nan
    out = kd_head(*inputs)
    assert torch.equal(out.loss, want.loss)
    for got, ref in zip(gradients(out, inputs), wanted, strict=True):
        assert torch.equal(got, ref)
    inputs[4][1] = 61
    out = kd_head(*inputs, ce_weight=0.0)
    assert out.ce.isnan() and out.loss.isfinite()
    inputs[4][:] = -100
    out = kd_head(*inputs, ce_weight=1.0)
    assert out.loss == 0 and not gradients(out, inputs)[1].any()


def check_token_losses(device: str) -> None:
    """Of each token by itself, on a part of the vocabulary; 0 under the mask."""
    h, w, _, _, labels = on(device, make(n=37, vocab=133, teacher_vocab=101))
    want = F.cross_entropy(h @ w[:101].t(), labels, ignore_index=-100, reduction="none")
    with mock.patch.object(F, "cross_entropy", side_effect=AssertionError):
        found = token_losses(*like([h, w], torch.float32), labels, vocab=101, chunk_size=10)
    assert_close(found, want, torch.float32)
    assert torch.equal(found == 0, labels == -100)


CHECKS = [
    check_losses, check_cross_entropy, check_bfloat16, check_gradient_into_grad,
    check_masks_and_labels, check_token_losses,
]  # fmt: skip


def interpret(name: str) -> None:
    """What the process of `test_interpreted` runs. Unknown labels pass, as on a GPU."""
    changes = {"uses_triton": lambda *a: True, "_check": lambda *a: None, "BLOCK": 32}
    with mock.patch.multiple(head, **changes):
        globals()[name]("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_interpreted(check):
    pytest.importorskip("triton")
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(str(p) for p in (here, here.parent, here.parents[1]))
    code = f"import test_kd_kernels as t; t.interpret('{check.__name__}')"
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=300)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_on_a_gpu(check, monkeypatch):
    monkeypatch.setattr(head, "TRITON", True)
    check("cuda")
