"""FLOP formulas against torch's own counter, MFU of known models, timer, console, log files."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import flops
import metrics
from config import ModelConfig, UserError

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
        "Tesla T4": None,
    }
    for name, peak in peaks.items():
        assert flops.peak_of_name(name, torch.bfloat16) == peak, name
    assert flops.peak_of_name("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12
    assert flops.peak_of_name("NVIDIA H100 80GB HBM3", torch.float64) is None
    assert flops.peak_flops("cpu", torch.bfloat16, None) is None
    assert flops.peak_flops("cpu", torch.bfloat16, 0.0) is None
    assert flops.peak_flops("cpu", torch.bfloat16, 5e12) == 5e12


# Time


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_timer_counts_all_tokens_over_the_whole_interval():
    clock = Clock()
    timer = metrics.StepTimer(total_steps=110, start_step=100, clock=clock)
    assert timer.read() == {}
    for _ in range(2):
        clock.now += 15.0  # slow: compiling
        timer.step(1000)
    assert timer.read() == {"tok/s": 2000 / 30, "time_per_step": 15.0, "eta": 8 * 15.0}
    for _ in range(3):
        clock.now += 2.0
        timer.step(1000)
    with timer.paused():
        clock.now += 9.0
    # The pause is no training time, but it is waited for: 15 s for 3 steps, 5 more steps to go.
    assert timer.read() == {"tok/s": 500.0, "time_per_step": 2.0, "eta": 5 * 5.0}
    clock.now += 4.0
    timer.step(1000)
    assert timer.read()["tok/s"] == 250.0


def test_memory_is_in_gib():
    before = metrics.memory_gib("cpu")
    block = torch.ones(2**28 // 4)  # 0.25 GiB
    assert 0.01 < before < metrics.memory_gib("cpu") + 1e-9 < 500
    assert metrics.memory_gib("cpu") >= block.nbytes / 2**30


# Console


def test_console_line():
    row = {
        "step": 120, "loss": 2.34567, "ce": 3.1, "kl": 4.2e-5, "lr": 1e-3, "grad_norm": 0.51,
        "tok/s": 636012.4, "mfu": 0.5512, "mem": 41.239, "eta": 3723, "unknown": 1,
    }  # fmt: skip
    assert metrics.header_line() == (
        "   step |     loss |       ce |       kl |       lr | grad_norm |     tok/s |"
        "    mfu |     mem |    eta"
    )
    assert metrics.format_line(row) == (
        "    120 |   2.3457 |   3.1000 |  4.2e-05 | 1.00e-03 |    0.5100 |   636,012 |"
        "  55.1% |  41.24G |  1h02m"
    )
    assert metrics.format_line(
        {"step": 1, "loss": math.nan, "kl": None, "grad_norm": 123456.0}
    ) == (
        "      1 |      nan |        - |        - |        - |   1.2e+05 |         - |"
        "      - |       - |      -"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (185, "3m05s"), (3599.7, "1h00m"), (183_600, "2d03h")],
)
def test_duration(seconds, text):
    assert metrics._duration(seconds) == text


# Log files


def rows(run_dir):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_log_writes_the_same_keys_to_console_and_file(tmp_path, capsys):
    logger = metrics.MetricsLogger(tmp_path)
    logger.log(1, "align", {"loss": torch.tensor(0.5), "tok/s": 10.0, "time_per_step": 2.0})
    assert rows(tmp_path)[0] == {
        "step": 1,
        "stage": "align",
        "loss": 0.5,
        "tok/s": 10.0,
        "time_per_step": 2.0,
        "tokens_per_sec": 10.0,
    }  # fmt: skip (read before close: every row is flushed)
    logger.log(2, "align", {"loss": math.nan, "kl": torch.tensor(math.inf), "n": torch.tensor(3)})
    logger.log_eval(2, "align", {"ppl": 12.5, "top1": torch.tensor(0.75)})
    logger.log(0, "distill", {"loss": 1.0})
    logger.table("Samples", [{"prompt": "a [b]", "loss": 1.5}, {"prompt": "c", "top1": 0.25}])
    logger.close()
    logger.close()
    assert rows(tmp_path)[1:] == [
        {"step": 2, "stage": "align", "loss": None, "kl": None, "n": 3.0},
        {"step": 2, "stage": "align", "eval/ppl": 12.5, "eval/top1": 0.75},
        {"step": 0, "stage": "distill", "loss": 1.0},
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["stage align", metrics.header_line()]
    assert lines[2] == metrics.format_line({"step": 1, "loss": 0.5, "tok/s": 10.0})
    assert lines[3] == metrics.format_line({"step": 2, "loss": math.nan, "kl": math.inf})
    assert lines[4] == "      2 | eval/ppl 12.5000 | eval/top1 0.7500"
    assert lines[5:7] == ["stage distill", metrics.header_line()]
    table = "\n".join(lines[8:])
    assert "Samples" in table and "a [b]" in table and "0.2500" in table and "-" in table


def test_other_ranks_are_silent(tmp_path, capsys):
    logger = metrics.MetricsLogger(tmp_path / "run", rank=1, wandb_enabled=True)
    logger.log(1, "align", {"loss": 1.0})
    logger.log_eval(1, "align", {"loss": 1.0})
    logger.table("t", [{"a": 1}])
    logger.say("hello")
    logger.close()
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_tensors_cost_one_host_copy_per_step(tmp_path, monkeypatch):
    copies = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copies.append(1) or original(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a copy per value"))
    logger = metrics.MetricsLogger(tmp_path)
    values = {name: torch.rand(()) for name in ("loss", "ce", "kl", "grad_norm")}
    logger.log(1, "distill", values)
    logger.close()
    assert len(copies) == 1 and rows(tmp_path)[0]["kl"] == original(values["kl"].double())


def log_steps(run_dir, stage, steps, **kwargs):
    logger = metrics.MetricsLogger(run_dir, **kwargs)
    for step in steps:
        logger.log(step, stage, {"loss": float(step)})
    logger.close()


def keys(run_dir):
    return [(r["stage"], r["step"]) for r in rows(run_dir)]


def test_resume_leaves_no_duplicate_steps(tmp_path):
    log_steps(tmp_path, "pretrain", range(1, 6))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "sta')  # the process died here
    log_steps(tmp_path, "pretrain", range(4, 8), resume_step=4)
    assert keys(tmp_path) == [("pretrain", s) for s in range(1, 8)]
    log_steps(tmp_path, "pretrain", [8])  # without resume_step: appended
    assert keys(tmp_path) == [("pretrain", s) for s in range(1, 9)]


def test_resume_within_stages_that_each_count_from_zero(tmp_path):
    log_steps(tmp_path, "align", range(4))
    log_steps(tmp_path, "distill", range(3))
    before = (tmp_path / "metrics.jsonl").read_text()
    log_steps(tmp_path, "distill", [1, 2], resume_step=1, resume_stage="distill")
    assert (tmp_path / "metrics.jsonl").read_text() == before
    log_steps(tmp_path, "align", [2, 3], resume_step=2, resume_stage="align")
    assert keys(tmp_path) == [("align", s) for s in range(4)]
    log_steps(tmp_path, "distill", [0], resume_step=0, resume_stage="distill")
    assert keys(tmp_path) == [*(("align", s) for s in range(4)), ("distill", 0)]


def test_env_file(tmp_path):
    path = tmp_path / ".env"
    path.write_text(
        "# comment\nWANDB_API_KEY=abc=def # mine\nexport WANDB_MODE='off line' # x\n"
        'WANDB_NAME = "a # b"\nSECRET=1\nWANDB_BROKEN\n  WANDB_EMPTY=\n'
    )
    assert metrics.read_env_file(path) == {
        "WANDB_API_KEY": "abc=def",
        "WANDB_MODE": "off line",
        "WANDB_NAME": "a # b",
        "WANDB_EMPTY": "",
    }
    assert metrics.read_env_file(tmp_path / "absent") == {}


def test_wandb_missing_is_a_users_mistake(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--wandb_enabled.*\[wandb\]") as error:
        metrics.MetricsLogger(tmp_path, wandb_enabled=True)
    assert "\n" not in str(error.value)
    metrics.MetricsLogger(tmp_path).close()  # and it is not needed otherwise


class FakeRun:
    def __init__(self, run_id):
        self.id, self.rows, self.finished = run_id or "fresh", [], False

    def define_metric(self, name, step_metric):
        assert step_metric == "step"

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


def test_wandb_gets_the_same_rows_and_the_env_file(tmp_path, monkeypatch, capsys):
    calls, error = [], type("Error", (Exception,), {})

    def init(**kwargs):
        calls.append(kwargs | {"key": metrics.os.environ.get("WANDB_API_KEY")})
        if kwargs["project"] == "broken":
            raise error("no key\nfound")
        return FakeRun(kwargs["id"])

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=error))
    monkeypatch.setenv("WANDB_API_KEY", "")  # restores the variable afterwards
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("WANDB_API_KEY=s3cret\n")
    options = dict(wandb_enabled=True, run_name="n", config={"lr": 1})
    logger = metrics.MetricsLogger(tmp_path / "run", **options)
    run = logger.wandb_run
    logger.log(1, "distill", {"loss": 1.5, "grad_norm": 2.0, "tok/s": 7.0, "mfu": None})
    logger.close()
    assert run.finished and run.rows == [
        {"step": 1, "stage": "distill", "loss": 1.5, "grad_norm": 2.0, "tok/s": 7.0,
         "tokens_per_sec": 7.0}
    ]  # fmt: skip
    assert calls[0]["key"] == "s3cret" and calls[0]["project"] == "retort"
    assert calls[0]["name"] == "n" and calls[0]["config"] == {"lr": 1} and calls[0]["id"] is None
    metrics.MetricsLogger(tmp_path / "run", resume_step=2, **options).close()
    assert calls[1]["id"] == "fresh"  # the same wandb run goes on
    with pytest.raises(UserError, match="wandb did not start: no key found"):
        metrics.MetricsLogger(tmp_path / "run", wandb_project="broken", **options)
    captured = capsys.readouterr()
    assert "s3cret" not in captured.out + captured.err
