"""Parameters to step: random matrices of awkward shapes, and a module with every kind of name."""

from __future__ import annotations

import torch
from torch import nn

# tall, wide, square, a vector-like one, and repeats that share a stack
SHAPES = [(24, 40), (40, 24), (24, 40), (32, 32), (32, 32), (7, 1), (40, 24), (5, 63)]


def rms_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def random_params(shapes=SHAPES, seed=0, device="cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]


def give_grads(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


class Zoo(nn.Module):
    """The parameter names of every kind of layer, in a module small enough to step."""

    def __init__(self, tied: bool = True):
        super().__init__()
        d, heads = 16, 2

        def attention():
            m = nn.Module()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(m, name, nn.Linear(d, d, bias=name == "q_proj"))
            m.q_norm = nn.RMSNorm(8)
            m.sinks = nn.Parameter(torch.randn(heads))
            return m

        def linear():
            m = nn.Module()
            for name in ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj"):
                setattr(m, name, nn.Linear(d, d, bias=False))
            m.a_proj = nn.Linear(d, heads, bias=False)
            m.b_proj = nn.Linear(d, heads, bias=False)
            m.q_conv1d = nn.Conv1d(d, d, 4, groups=d, bias=False)
            m.A_log = nn.Parameter(torch.randn(heads))
            m.dt_bias = nn.Parameter(torch.randn(heads))
            m.bonus = nn.Parameter(torch.randn(heads, 8))
            m.o_norm = nn.RMSNorm(8)
            return m

        def block(mixer):
            m = nn.Module()
            m.self_attn = mixer
            m.input_layernorm = nn.RMSNorm(d)
            m.mlp = nn.Module()
            m.mlp.gate_proj = nn.Linear(d, 24, bias=False)
            m.mlp.up_proj = nn.Linear(d, 24, bias=False)
            m.mlp.down_proj = nn.Linear(24, d, bias=False)
            return m

        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(10, d)
        self.model.layers = nn.ModuleList([block(attention()), block(linear())])
        self.model.norm = nn.RMSNorm(d)
        self.lm_head = nn.Linear(d, 10, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight
