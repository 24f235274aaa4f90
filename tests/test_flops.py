"""FLOP formulas against torch's own counter, MFU of known models, peaks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import flops
from config import ModelConfig

# FLOPs: a stand-in whose every counted operation is an explicit matmul, run under torch's counter


class SoftmaxMixer(nn.Module):
    def __init__(self, c: ModelConfig, window: int):
        super().__init__()
        self.window = window
        self.shape_q, self.shape_kv = (c.num_attention_heads, c.head_dim), c.num_key_value_heads
        q_dim, kv_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q = nn.Linear(c.hidden_size, q_dim, bias=False)
        self.k = nn.Linear(c.hidden_size, kv_dim, bias=False)
        self.v = nn.Linear(c.hidden_size, kv_dim, bias=False)
        self.o = nn.Linear(q_dim, c.hidden_size, bias=False)

    def forward(self, x):  # [B, T, d]
        (h, d), groups = self.shape_q, self.shape_q[0] // self.shape_kv
        q = heads(self.q(x), h)  # [B*H, T, Q]
        k, v = (
            heads(p(x), self.shape_kv).repeat_interleave(groups, 0)
            if len(x) == 1
            else heads(p(x).unflatten(-1, (-1, d)).repeat_interleave(groups, 2).flatten(2), h)
            for p in (self.k, self.v)
        )
        rows = []
        for t in range(x.shape[1]):  # each query multiplies just the keys it may see
            seen = slice(max(0, t - self.window + 1), t + 1)
            scores = torch.bmm(q[:, t : t + 1], k[:, seen].transpose(1, 2))
            rows.append(torch.bmm(scores.softmax(-1), v[:, seen]))
        return self.o(merge(torch.cat(rows, 1), len(x)))


class LinearMixer(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.hk, self.hv = c.linear_num_key_heads, c.linear_num_value_heads
        q_dim, v_dim = self.hk * c.linear_key_head_dim, self.hv * c.linear_value_head_dim
        widths = {"q": q_dim, "k": q_dim, "v": v_dim, "g": v_dim, "a": self.hv, "b": self.hv}
        self.proj = nn.ModuleDict(
            {name: nn.Linear(c.hidden_size, width, bias=False) for name, width in widths.items()}
        )
        self.taps = nn.ParameterDict(
            {n: torch.randn(widths[n], c.linear_conv_kernel_dim, 1) for n in "qkv"}
        )
        self.o = nn.Linear(v_dim, c.hidden_size, bias=False)

    def conv(self, x, taps):  # depthwise, as one bmm over channels
        width = taps.shape[1]
        windows = F.pad(x, (0, 0, width - 1, 0)).unfold(1, width, 1)  # [B, T, C, W]
        flat = windows.permute(2, 0, 1, 3).flatten(1, 2)  # [C, B*T, W]
        return torch.bmm(flat, taps)[..., 0].t().reshape(x.shape)

    def forward(self, x):
        q, k, v = (self.conv(self.proj[n](x), self.taps[n]) for n in "qkv")
        groups = self.hv // self.hk
        q, k = (
            y.unflatten(-1, (self.hk, -1)).repeat_interleave(groups, 2).flatten(2) for y in (q, k)
        )
        q, k, v = (heads(y, self.hv) for y in (q, k, v))  # [B*H, T, .]
        decay, beta = (heads(self.proj[n](x).sigmoid(), self.hv) for n in "ab")
        # A leaf that wants its gradient where any is computed: every step then costs the same.
        wanted = x.requires_grad or self.o.weight.requires_grad
        state = torch.zeros(len(q), q.shape[2], v.shape[2], requires_grad=wanted)
        rows = []
        for t in range(x.shape[1]):
            q_t, k_t, v_t = (y[:, t : t + 1] for y in (q, k, v))
            state = state * decay[:, t : t + 1]
            error = (v_t - torch.bmm(k_t, state)) * beta[:, t : t + 1]
            state = state + torch.bmm(k_t.transpose(1, 2), error)
            rows.append(torch.bmm(q_t, state))
        return self.o(merge(torch.cat(rows, 1), len(x)) * self.proj["g"](x).sigmoid())


def heads(x, h):  # [B, T, H*K] -> [B*H, T, K]
    return x.unflatten(-1, (h, -1)).transpose(1, 2).flatten(0, 1)


def merge(x, batch):  # [B*H, T, K] -> [B, T, H*K]
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)


class StandIn(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed = nn.Embedding(c.vocab_size, c.hidden_size)
        windows = {"full_attention": 10**9, "sliding_attention": c.sliding_window}
        self.mixers = nn.ModuleList(
            LinearMixer(c) if kind == "linear_attention" else SoftmaxMixer(c, windows[kind])
            for kind in c.layer_types
        )
        d, f = c.hidden_size, c.intermediate_size
        self.mlps = nn.ModuleList(
            nn.ModuleDict(
                {
                    "gate": nn.Linear(d, f, bias=False),
                    "up": nn.Linear(d, f, bias=False),
                    "down": nn.Linear(f, d, bias=False),
                }
            )
            for _ in c.layer_types
        )

    def mlp(self, i, x):
        m = self.mlps[i]
        return m["down"](m["gate"](x).sigmoid() * m["up"](x))

    def forward(self, ids):
        x = self.embed(ids)
        for i, mixer in enumerate(self.mixers):
            x = x + mixer(x)
            x = x + self.mlp(i, x)
        return F.linear(x, self.embed.weight)  # tied head


SHAPE = dict(
    vocab_size=29, hidden_size=12, intermediate_size=20, num_hidden_layers=5, sliding_window=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=6, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=5, linear_value_head_dim=7,
    linear_conv_kernel_dim=3,
)  # fmt: skip
F_, S_, L_ = "full_attention", "sliding_attention", "linear_attention"
TEACHER = ModelConfig(**SHAPE, layer_types=[F_, F_, S_, F_, L_])
STUDENT = ModelConfig(**SHAPE, layer_types=[F_, L_, S_, L_, L_])  # converts 1 and 3
CONVERTED, B, T = (1, 3), 2, 7


def run_stage(stage: str, train: str, with_teacher: bool) -> None:
    teacher, student = StandIn(TEACHER).requires_grad_(False), StandIn(STUDENT)
    ids = torch.randint(SHAPE["vocab_size"], (B, T))
    if stage == "align":
        x = teacher.embed(ids)
        for i in range(CONVERTED[-1] + 1):
            target = teacher.mixers[i](x)
            if i in CONVERTED:
                (student.mixers[i](x) - target).square().mean().backward()
            if i < CONVERTED[-1]:
                x = x + target
                x = x + teacher.mlp(i, x)
        return
    if train == "mixers":
        student.requires_grad_(False)
        for i in CONVERTED:
            student.mixers[i].requires_grad_(True)
    targets = teacher(ids) if with_teacher else torch.zeros(())
    (student(ids) - targets).square().mean().backward()


@pytest.mark.parametrize(
    ("stage", "train", "with_teacher"),
    [
        ("pretrain", "all", False),
        ("align", "mixers", True),
        ("distill", "all", True),
        ("distill", "mixers", True),
        ("long", "all", False),
        ("long", "all", True),
    ],
)
def test_flops_per_token_is_what_torch_counts(stage, train, with_teacher):
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        run_stage(stage, train, with_teacher)
    teacher = TEACHER if with_teacher else None
    expected = flops.flops_per_token(stage, STUDENT, teacher, T, train)
    assert counter.get_total_flops() == pytest.approx(B * T * expected, rel=1e-12)


@pytest.mark.parametrize("train", ["mixers", "feature_maps"])
def test_what_trains_is_counted_where_the_teacher_does_not_run(train):
    teacher = ModelConfig(**SHAPE, layer_types=[S_, F_, F_, S_, F_])
    student = ModelConfig(**SHAPE, layer_types=[S_, F_, S_, S_, F_])  # --mixer sliding_window
    alone = flops.stage_flops("long", student, teacher, T, train, guided=False)
    guided = flops.stage_flops("long", student, teacher, T, train)
    assert alone == guided._replace(teacher=0) and alone.backward > 0


def test_blocks_that_both_share_are_counted_once():
    torch.manual_seed(0)
    model = StandIn(STUDENT)
    found = [flops.stage_flops("distill", STUDENT, TEACHER, T, "mixers", n).forward for n in (0, 1)]
    with FlopCounterMode(display=False) as counter:
        x = model.embed(torch.randint(SHAPE["vocab_size"], (B, T)))
        x = x + model.mixers[0](x)
        model.mlp(0, x)
    assert counter.get_total_flops() == pytest.approx(B * T * (found[0] - found[1]), rel=1e-12)


def test_matmul_params_are_those_of_the_modules():
    model = StandIn(STUDENT)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)  # the taps have three
    assert flops.matmul_params(STUDENT) == matrices
    untied = ModelConfig(**SHAPE, layer_types=STUDENT.layer_types, tie_word_embeddings=False)
    assert flops.matmul_params(untied) == matrices  # no embedding lookup


# The shape of GPT-2 124M: its MLP, 2 matrices of 4 d, is as large as 3 SwiGLU ones of 8/3 d.
GPT2 = ModelConfig(
    vocab_size=50257, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
    num_attention_heads=12, num_key_value_heads=12, head_dim=64,
)  # fmt: skip
QWEN_1_5B = ModelConfig(
    vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
    num_attention_heads=12, num_key_value_heads=2, head_dim=128,
)  # fmt: skip


def palm(config, seq_len):
    n = flops.matmul_params(config)
    return flops.model_flops_per_token(config, seq_len, num_matmul_params=n)


def test_mfu_of_gpt2_is_the_published_figure():
    """0.855 GFLOP/token; 636k tok/s are 55 % of an H100. Causal halving takes 57 MFLOP off."""
    assert palm(GPT2, 1024) == pytest.approx(0.855e9, rel=1e-3)
    peak = flops.peak_of_name("NVIDIA H100 80GB HBM3", torch.bfloat16)
    assert flops.mfu(636e3, palm(GPT2, 1024), 1, peak) == pytest.approx(0.55, abs=1e-3)
    assert flops.mfu(636e3, palm(GPT2, 1024), 8, peak) == pytest.approx(0.55 / 8, abs=1e-3)
    useful = flops.flops_per_token("pretrain", GPT2, None, 1024)
    assert palm(GPT2, 1024) - useful == 6 * 12 * 768 * (1024 - 1)
    assert flops.mfu(636e3, palm(GPT2, 1024), 1, None) is None


def test_distillation_of_a_1_5b_model_is_the_published_figure():
    """15.2 GFLOP/token with full attention counted, 1.87 of it in the two heads."""
    forward = 2 * flops.matmul_params(QWEN_1_5B) + 4 * 28 * 1536 * 4096
    assert palm(QWEN_1_5B, 4096) + forward == pytest.approx(15.2e9, rel=5e-3)
    useful = flops.flops_per_token("distill", QWEN_1_5B, QWEN_1_5B, 4096)
    assert palm(QWEN_1_5B, 4096) + forward - useful == 8 * 28 * 1536 * (4096 - 1)
    headless = ModelConfig(**{**vars(QWEN_1_5B), "vocab_size": 1})
    head = useful - flops.flops_per_token("distill", headless, headless, 4096)
    assert head == pytest.approx(1.867e9, rel=1e-3)


def test_linear_and_sliding_layers_lower_the_attention_term():
    attention = palm(GPT2, 1024) - 6 * flops.matmul_params(GPT2)
    sliding = ModelConfig(**{**vars(GPT2), "sliding_window": 128, "layer_types": [S_, F_] * 6})
    n = flops.matmul_params(sliding)
    found = flops.model_flops_per_token(sliding, 1024, num_matmul_params=n) - 6 * n
    assert found == attention / 2 + attention / 16
    assert palm(sliding, 64) == palm(GPT2, 64)  # the window is longer than the row
    linear = ModelConfig(**{**vars(GPT2), "layer_types": [L_] * 12, "mixer": None})
    assert palm(linear, 1024) == palm(linear, 9) == 6 * flops.matmul_params(linear)


def test_cheaper_stages_count_less():
    count = lambda *args: flops.flops_per_token(*args)  # noqa: E731
    full = count("distill", STUDENT, TEACHER, 64, "all")
    mixers = count("distill", STUDENT, TEACHER, 64, "mixers")
    align = count("align", STUDENT, TEACHER, 64)
    assert full > mixers > align > 0


def test_peak_flops():
    peaks = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA B200": 2.25e15,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA GeForce RTX 4090": 165e12,
        "NVIDIA GB200": 2.5e15,
        "NVIDIA GH200 480GB": 989e12,
        "AMD Instinct MI300X": 1307e12,
        "NVIDIA RTX A1000": None,
        "Tesla T4": None,
    }
    for name, peak in peaks.items():
        assert flops.peak_of_name(name, torch.bfloat16) == peak, name
    assert flops.PEAK_FLOPS.keys() == flops.MEMORY_GIB.keys()
    assert flops.peak_of_name("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
    assert flops.peak_of_name("NVIDIA H100 80GB HBM3", torch.float64) is None
    assert flops.peak_flops("cpu", torch.bfloat16, None) is None
    assert flops.peak_flops("cpu", torch.bfloat16, 0.0) is None
    assert flops.peak_flops("cpu", torch.bfloat16, 5e12) == 5e12
