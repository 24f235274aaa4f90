"""The fused distillation head against full logits and autograd: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ops.kd_head import LOSSES, ce_head, kd_head, naive_kd_head

N = 23  # tokens; odd, so that no chunk size but 1 and N divides it

# RMS(error) / RMS(reference)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}

SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 2.5},
    "ce": {"ce_weight": 0.3, "kd_weight": 0.7},
    "ce+temperature": {"ce_weight": 0.4, "temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_k+ce+temperature": {"top_k": 7, "ce_weight": 1.0, "temperature": 1.7},
    "widths": {"teacher_width": 17},
    "vocab": {"teacher_vocab": 53},
    "vocab+widths+ce": {"teacher_vocab": 71, "teacher_width": 5, "ce_weight": 0.5},
    "js_beta": {"js_beta": 0.1},
    "normalizer": {"normalizer": 31.5},
}


def make(n=N, width=11, vocab=61, teacher_width=11, teacher_vocab=61, dtype=torch.float64):
    """(h_s, w_s, h_t, w_t, labels): logits of about 2 (js is ill-conditioned where it saturates,
    at tens, in any float32 implementation); every fourth token masked."""
    h_s = torch.randn(n, width, dtype=dtype, requires_grad=True)
    w_s = (torch.randn(vocab, width, dtype=dtype) * 2 / width**0.5).requires_grad_()
    h_t = torch.randn(n, teacher_width, dtype=dtype)
    w_t = torch.randn(teacher_vocab, teacher_width, dtype=dtype) * 2 / teacher_width**0.5
    labels = torch.randint(0, min(vocab, teacher_vocab), (n,))
    labels[::4] = -100
    return h_s, w_s, h_t, w_t, labels


def like(inputs, dtype):
    """Fresh leaves with the same values in another dtype."""
    return [
        x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs
    ]


def gradients(out, inputs):
    return torch.autograd.grad(out.loss, inputs[:2])


def assert_close(got, want, dtype):
    error = (got.double() - want.double()).square().mean().sqrt()
    scale = want.double().square().mean().sqrt()
    assert error <= TOLERANCE[dtype] * scale, f"{error / scale:.2e} > {TOLERANCE[dtype]:.0e}"


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_full_logits(loss, settings):
    settings = dict(settings)
    shapes = {k: settings.pop(k) for k in ("teacher_width", "teacher_vocab") if k in settings}
    reference = make(**shapes)
    want = naive_kd_head(*reference, loss=loss, with_metrics=True, **settings)
    dh_want, dw_want = gradients(want, reference)
    assert dh_want.abs().max() > 0
    assert dw_want.abs().max() > 0
    for dtype in (torch.float64, torch.float32):
        for chunk_size in (0, 1, 7, N, N + 5):
            inputs = like(reference, dtype)
            out = kd_head(*inputs, loss=loss, chunk_size=chunk_size, with_metrics=True, **settings)
            dh, dw = gradients(out, inputs)
            assert dh.dtype == dw.dtype == out.kd.dtype == dtype
            for name in ("loss", "kd", "ce", "teacher_ce"):
                assert_close(getattr(out, name), getattr(want, name), dtype)
            assert out.agree == want.agree
            assert out.count == want.count == (reference[-1] != -100).sum()
            assert_close(dh, dh_want, dtype)
            assert_close(dw, dw_want, dtype)


@pytest.mark.parametrize("loss", LOSSES)
def test_values_against_torch(loss):
    """The reference itself, where torch has the formula."""
    h_s, w_s, h_t, w_t, labels = (x.detach() for x in make())
    z_s, z_t = ((h @ w.t())[labels != -100] for h, w in ((h_s, w_s), (h_t, w_t)))
    log_p, log_q = z_s.log_softmax(-1), z_t.log_softmax(-1)
    kl_div = torch.nn.functional.kl_div  # kl_div(a, b) is KL(b || a)
    log_m = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).double().log()
    want = {
        "forward_kl": lambda: kl_div(log_p, log_q, reduction="sum", log_target=True),
        "reverse_kl": lambda: kl_div(log_q, log_p, reduction="sum", log_target=True),
        "js": lambda: (
            kl_div(log_m, log_p, reduction="sum", log_target=True) / 2
            + kl_div(log_m, log_q, reduction="sum", log_target=True) / 2
        ),
        "mse": lambda: (z_s - z_t).square().mean(-1).sum(),
    }[loss]()
    assert_close(naive_kd_head(h_s, w_s, h_t, w_t, labels, loss=loss).kd, want, torch.float64)


class _Fresh(torch.autograd.Function):
    """kd_head with its gradients taken at once: gradcheck runs one backward many times."""

    @staticmethod
    def forward(ctx, h_s, w_s, h_t, w_t, labels, settings):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (h_s, w_s)]
            out = kd_head(*leaves, h_t, w_t, labels, **settings)
            ctx.save_for_backward(*torch.autograd.grad(out.loss, leaves))
        return out.loss.detach()

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.saved_tensors
        return grad * dh, grad * dw, None, None, None, None


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    inputs = make(n=5, width=3, vocab=7, teacher_width=4, teacher_vocab=6)
    settings = {"loss": loss, "temperature": 1.3, "ce_weight": 0.2, "chunk_size": 2}
    assert torch.autograd.gradcheck(_Fresh.apply, (*inputs, settings))


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operator returned."""

    def __init__(self):
        super().__init__()
        self.largest, self.multiplications = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        self.multiplications += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return out


# The vocabulary part, [V, H], must stay well below [chunk, V] for the limit to mean anything.
BIG = {"n": 64, "width": 5, "vocab": 50_021, "teacher_width": 7, "teacher_vocab": 50_021}


@pytest.mark.parametrize(
    ("loss", "settings"),
    [(loss, {}) for loss in LOSSES]
    + [("forward_kl", SETTINGS["top_k+ce+temperature"]), ("js", SETTINGS["ce"])],
)
def test_never_more_than_a_chunk_of_logits(loss, settings):
    chunk = 8
    inputs = make(**BIG, dtype=torch.float32)
    with LargestTensor() as seen:
        kd_head(*inputs, loss=loss, chunk_size=chunk, with_metrics=True, **settings).loss.backward()
    assert inputs[1].grad.shape == inputs[1].shape
    assert seen.largest == chunk * BIG["vocab"]
    assert seen.multiplications == 4 * BIG["n"] // chunk  # student, teacher, dh, dW


def test_memory_check_sees_full_logits():
    with LargestTensor() as seen:
        naive_kd_head(*make(**BIG, dtype=torch.float32))
    assert seen.largest >= BIG["n"] * 3 // 4 * BIG["vocab"]


def test_no_dw_for_a_frozen_weight():
    inputs = make(**BIG, dtype=torch.float32)
    inputs[1].requires_grad_(False)
    with LargestTensor() as seen:
        kd_head(*inputs, chunk_size=4).loss.backward()
    assert inputs[1].grad is None
    assert inputs[0].grad.abs().max() > 0
    assert seen.multiplications == 3 * BIG["n"] // 4


def test_no_dh_for_a_frozen_hidden_state():
    inputs = make()
    inputs[0].requires_grad_(False)
    want = torch.autograd.grad(naive_kd_head(*inputs).loss, inputs[1])[0]
    kd_head(*inputs, chunk_size=7).loss.backward()
    assert inputs[0].grad is None
    assert_close(inputs[1].grad, want, torch.float64)


@pytest.mark.parametrize("loss", LOSSES)
def test_evaluation_builds_no_graph(loss):
    inputs = make()
    want = kd_head(*inputs, loss=loss, ce_weight=0.5)
    with torch.no_grad(), LargestTensor() as seen:
        out = kd_head(*inputs, loss=loss, ce_weight=0.5)
    assert want.loss.requires_grad
    assert not out.loss.requires_grad
    assert seen.multiplications == 2  # student and teacher logits, neither dh nor dW
    assert_close(out.loss, want.loss.detach(), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_zero_for_equal_distributions(loss, dtype):
    """Also with the student's head and the teacher's one and the same tensor."""
    h_s, w_s, _, _, labels = make(dtype=dtype)
    out = kd_head(h_s, w_s, h_s, w_s, labels, loss=loss, chunk_size=7, with_metrics=True)
    dh, dw = gradients(out, (h_s, w_s))
    assert out.kd.abs() < 1e-6
    assert dh.abs().max() < 1e-6
    assert dw.abs().max() < 1e-6
    assert out.agree == out.count


def test_shared_head_has_the_students_gradient_only():
    h_s, w_s, h_t, _, labels = make()
    got = gradients(kd_head(h_s, w_s, h_t, w_s, labels, chunk_size=7), (h_s, w_s))
    h_t.requires_grad_()
    want = gradients(naive_kd_head(h_s, w_s, h_t, w_s.detach(), labels), (h_s, w_s))
    kd_head(h_s, w_s, h_t, w_s, labels).loss.backward()
    assert h_t.grad is None
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, torch.float64)


@pytest.mark.parametrize("loss", LOSSES)
def test_independent_of_micro_batches(loss):
    inputs = make()
    labels = inputs[-1]
    whole = kd_head(*inputs, loss=loss, ce_weight=0.5, chunk_size=7)
    want = gradients(whole, inputs)
    h_s, w_s = (x.detach().requires_grad_() for x in inputs[:2])
    total = 0
    for rows in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, N)):  # row 4 is masked
        part = kd_head(
            h_s[rows],
            w_s,
            inputs[2][rows],
            inputs[3],
            labels[rows],
            loss=loss,
            ce_weight=0.5,
            normalizer=(labels != -100).sum(),
            chunk_size=7,
        )
        part.loss.backward()
        total += part.loss.detach()
    assert_close(total, whole.loss.detach(), torch.float64)
    assert_close(h_s.grad, want[0], torch.float64)
    assert_close(w_s.grad, want[1], torch.float64)


@pytest.mark.parametrize("value", [3e4, float("nan")])
@pytest.mark.parametrize("loss", LOSSES)
def test_masked_tokens_count_for_nothing(loss, value):
    inputs = make(dtype=torch.float32)
    masked = inputs[-1] == -100
    settings = {"loss": loss, "ce_weight": 0.5, "chunk_size": 7, "with_metrics": True}
    want = kd_head(*inputs, **settings)
    want_grads = gradients(want, inputs)
    spoilt = like(inputs, torch.float32)
    with torch.no_grad():
        spoilt[0][masked] = value
        spoilt[2][masked] = -value
    out = kd_head(*spoilt, **settings)
    dh, dw = gradients(out, spoilt)
    for name in ("loss", "kd", "ce", "teacher_ce", "agree", "count"):
        assert torch.equal(getattr(out, name), getattr(want, name)), name
    assert torch.equal(dh, want_grads[0])
    assert torch.equal(dw, want_grads[1])
    assert (dh[masked] == 0).all()


@pytest.mark.parametrize("normalizer", [None, 0, torch.tensor(0), 7.0])
def test_no_valid_token(normalizer):
    inputs = make()
    labels = torch.full_like(inputs[-1], -100)
    out = kd_head(*inputs[:4], labels, ce_weight=0.5, normalizer=normalizer, chunk_size=7)
    dh, dw = gradients(out, inputs)
    assert out.loss == out.kd == out.ce == out.count == 0
    assert (dh == 0).all()
    assert (dw == 0).all()


def test_no_token_at_all():
    out = kd_head(*make(n=0))
    out.loss.backward()
    assert out.loss == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_logits_stay_finite(loss, temperature):
    h_s, w_s, _, _, labels = make(dtype=torch.float32)
    # Logits of some 1e4, and the two are certain of different entries on every token.
    h_s = (h_s.detach() * 5e3).requires_grad_()
    inputs = (h_s, w_s, -h_s.detach(), w_s.detach(), labels)
    out = kd_head(*inputs, loss=loss, temperature=temperature, ce_weight=0.1, chunk_size=7)
    tensors = (out.loss, out.kd, out.ce, *gradients(out, inputs))
    assert all(x.isfinite().all() for x in tensors)
    if loss == "js":  # bounded by ln 2 at beta = 1/2, and reaches it here
        assert_close(out.kd / out.count / temperature**2, torch.tensor(2.0).log(), torch.float32)


@pytest.mark.parametrize("loss", LOSSES)
def test_bf16(loss):
    """bf16 inputs, and float32 inputs under autocast, against the same values in float32."""
    half = make(
        n=65, width=32, vocab=301, teacher_width=24, teacher_vocab=301, dtype=torch.bfloat16
    )
    full = like(half, torch.float32)
    want = naive_kd_head(*full, loss=loss, ce_weight=0.5)
    want_grads = gradients(want, full)

    out = kd_head(*half, loss=loss, ce_weight=0.5, chunk_size=7)
    grads = gradients(out, half)
    assert grads[0].dtype == grads[1].dtype == torch.bfloat16
    assert out.loss.dtype == out.kd.dtype == torch.float32
    for got, ref in zip((out.loss, *grads), (want.loss, *want_grads), strict=True):
        assert_close(got, ref, torch.bfloat16)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = kd_head(*full, loss=loss, ce_weight=0.5, chunk_size=7)
    auto_grads = gradients(auto, full)
    assert auto_grads[0].dtype == auto_grads[1].dtype == torch.float32
    assert torch.equal(auto.loss, out.loss)  # the matmuls were indeed bf16
    for got, ref in zip(auto_grads, want_grads, strict=True):
        assert_close(got, ref, torch.bfloat16)


def test_backward_scales_and_runs_once():
    inputs = make()
    want = gradients(naive_kd_head(*inputs), inputs)
    out = kd_head(*inputs, chunk_size=7)
    scaled = torch.autograd.grad(out.loss * -2.5, inputs[:2], retain_graph=True)
    for got, ref in zip(scaled, want, strict=True):
        assert_close(got, -2.5 * ref, torch.float64)
    with pytest.raises(RuntimeError, match="already handed out"):
        out.loss.backward()


def test_leading_dimensions():
    inputs = make(n=24)
    want = kd_head(*inputs)
    dh, _ = gradients(want, inputs)
    h_s = inputs[0].detach().view(2, 12, -1).requires_grad_()
    out = kd_head(h_s, inputs[1], inputs[2].view(2, 12, -1), inputs[3], inputs[4].view(2, 12))
    out.loss.backward()
    assert torch.equal(out.loss, want.loss)
    assert torch.equal(h_s.grad.view(24, -1), dh)


@pytest.mark.parametrize("chunk_size", [0, 1, 7, N, N + 5])
def test_ce_head(chunk_size):
    h, w, _, _, labels = make()
    want = torch.nn.functional.cross_entropy(h @ w.t(), labels, ignore_index=-100)
    want_grads = torch.autograd.grad(want, (h, w))
    out = ce_head(h, w, labels, chunk_size=chunk_size)
    assert_close(out.loss, want, torch.float64)
    assert_close(out.ce, want * out.count, torch.float64)
    assert out.kd == 0
    for got, ref in zip(gradients(out, (h, w)), want_grads, strict=True):
        assert_close(got, ref, torch.float64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "kl"}, "forward_kl, reverse_kl, js, mse"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"loss": "js", "js_beta": 1.0}, "js_beta=1.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"chunk_size": -1}, "chunk_size=-1"),
    ],
)
def test_refuses_impossible_settings(settings, message):
    for head in (kd_head, naive_kd_head):
        with pytest.raises(ValueError, match=message):
            head(*make(), **settings)


def test_refuses_inputs_that_do_not_fit():
    h_s, w_s, h_t, w_t, labels = make(teacher_vocab=53)
    with pytest.raises(ValueError, match="teacher: hidden"):
        kd_head(h_s, w_s, h_t[:, 1:], w_t, labels)
    with pytest.raises(ValueError, match="student: hidden"):
        kd_head(h_s[1:], w_s, h_t, w_t, labels)
    with pytest.raises(ValueError, match="float32 but weight is"):
        kd_head(h_s.float(), w_s, h_t, w_t, labels)
    with pytest.raises(ValueError, match="int32"):
        kd_head(h_s, w_s, h_t, w_t, labels.int())
    for wrong in (53, -1):  # 53 is in the student's vocabulary but not in the common one
        labels[1] = wrong
        with pytest.raises(ValueError, match=f"label {wrong}"):
            kd_head(h_s, w_s, h_t, w_t, labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_cuda(loss, dtype):
    shapes = {"n": 257, "width": 96, "vocab": 5003, "teacher_width": 64, "teacher_vocab": 5011}
    inputs = [
        x.detach().cuda().requires_grad_(x.requires_grad) for x in make(**shapes, dtype=dtype)
    ]
    reference = like(inputs, torch.float64)
    for settings in ({}, SETTINGS["top_k+ce+temperature"]):
        want = naive_kd_head(*reference, loss=loss, **settings)
        out = kd_head(*inputs, loss=loss, chunk_size=100, **settings)
        assert_close(out.loss, want.loss, torch.float32)  # logits leave the matmul in float32
        for got, ref in zip(gradients(out, inputs), gradients(want, reference), strict=True):
            assert_close(got, ref, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_marks_unknown_labels_and_never_waits():
    inputs = [x.cuda() for x in make(dtype=torch.bfloat16)]
    inputs[-1][1] = 61  # one past the last
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = kd_head(*inputs, chunk_size=7, normalizer=5, with_metrics=True)
        gradients(out, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.ce.isnan()
    assert out.loss.isfinite()
