"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 7), with mamba-ssm's parameters.

    z, xBC, dt = W x;   x, B, C = SiLU(conv(xBC));   dt = softplus(dt + dt_bias)
    y = ssd(x, dt, A = -exp(A_log), B, C, D)
    out = W_o GroupRMSNorm(y * SiLU(z))

The transfer from softmax attention takes C for q, B for k and x for v (Wang et al. 2024, "The Mamba
in the Llama", arXiv 2408.15237, section 2).
Check: `pytest tests/test_mixer_mamba2.py`, `pytest tests/test_mixers.py -k mamba2`.
Shapes: B batch, T time, d hidden size, H heads, P head size, G groups that share B, C and a norm,
N state size, W taps: linear value heads, value size, key heads and key size of the config are H, P,
G and N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from layers import RMSNorm, SeqInfo, ShortConvolution, apply_rope, last_tokens
from mixers.base import LinearMixer, at_least_float32, inverse_silu, inverse_softplus
from ops.ssd import KERNELS, step_ssd

# After the transfer. Small taps keep SiLU near x / 2, but C and B have no L2 norm here to take the
# scale out again, and with smaller ones the output norm's eps would be all that it divides by.
TAP = 0.1
START_DT = 0.1  # the step size of every head


class GatedRMSNorm(RMSNorm):
    """RMSNorm of y * SiLU(z), over each of `groups` equal parts of the last dimension."""

    def __init__(self, size: int, groups: int, eps: float):
        super().__init__(size, eps)
        self.groups = groups

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        h = at_least_float32(y) * F.silu(at_least_float32(z))
        h = h.unflatten(-1, (self.groups, -1))
        h = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)
        return (h * self.weight.to(h.dtype)).to(y.dtype)


class Mamba2(LinearMixer):
    """Parameter names and the order of rows are mamba-ssm's (`mamba_ssm.modules.mamba2.Mamba2`)."""

    name = "mamba2"
    kernels = KERNELS
    fla_op = "linear_attention"
    step = staticmethod(step_ssd)
    kept = 10
    grouped = True
    projections = {**dict.fromkeys("qkv", "in_proj"), "o": "out_proj"}

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        d, heads = config.hidden_size, self.num_value_heads
        inner, shared = heads * self.value_dim, self.num_heads * self.key_dim
        # Rows of in_proj, in this order; all from x on but dt go through the convolution.
        self.rows = {"z": inner, "x": inner, "B": shared, "C": shared, "dt": heads}
        self.in_proj = nn.Linear(d, sum(self.rows.values()), bias=config.linear_bias)
        self.conv1d = ShortConvolution(inner + 2 * shared, config.linear_conv_kernel_dim, bias=True)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(inner, self.num_heads, config.rms_norm_eps)
        self.out_proj = nn.Linear(inner, d, bias=False)

    @property
    def o_proj(self) -> nn.Linear:
        """The output projection, by the name it has in the other mixers."""
        return self.out_proj

    def init_weights(self) -> None:
        """mamba-ssm's ranges, D one."""
        super().init_weights()
        self.init_decay()
        nn.init.ones_(self.D)

    def inputs(self, x: Tensor, seq: SeqInfo, held: dict[str, Tensor], keep: bool):
        sizes = self.rows
        mixed = sizes["x"] + sizes["B"] + sizes["C"]
        z, xbc, dt = self.in_proj(x).split([sizes["z"], mixed, sizes["dt"]], -1)
        kept = {}
        if keep:
            kept["xBC"] = last_tokens(xbc, self.conv1d.weight.shape[-1] - 1, seq, held.get("xBC"))
        xbc = self.conv1d(xbc, seq, held.get("xBC"))
        u, b, c = xbc.split([sizes["x"], sizes["B"], sizes["C"]], -1)
        u, b, c = u.unflatten(-1, (-1, self.value_dim)), self.heads(b), self.heads(c)
        if self.rope:
            b, c = apply_rope(b, seq.cos, seq.sin), apply_rope(c, seq.cos, seq.sin)
        dt = at_least_float32(dt)
        dt = F.softplus(dt + self.dt_bias.to(dt.dtype))
        return {"x": u, "dt": dt, "B": b, "C": c}, z, kept

    def options(self) -> dict:
        return {"A": -at_least_float32(self.A_log).exp(), "D": self.D}

    def finish(self, o: Tensor, x: Tensor, aux: object) -> Tensor:
        return self.norm(o.flatten(-2), aux)

    # ---- transfer from softmax attention

    def parts(self, x: Tensor) -> dict[str, Tensor]:
        """The rows of in_proj's weight or bias by name, as views."""
        return dict(zip(self.rows, x.split(list(self.rows.values())), strict=True))

    def qkv_weights(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        bias = self.in_proj.bias
        weights, biases = self.parts(self.in_proj.weight), {}
        if bias is not None:
            biases = self.parts(bias)
        return {w: (weights[n], biases.get(n)) for w, n in (("q", "C"), ("k", "B"), ("v", "x"))}

    def init_transfer(self) -> None:
        """Small taps on the present token, no skip, one constant step size, decays spread by A."""
        nn.init.zeros_(self.in_proj.weight)
        if self.in_proj.bias is not None:
            nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.conv1d.weight)
        nn.init.zeros_(self.conv1d.bias)
        self.conv1d.weight[:, 0, -1] = TAP
        nn.init.zeros_(self.D)
        self.norm.init_weights()
        self.dt_bias.copy_(inverse_softplus(torch.full_like(self.dt_bias, START_DT)))

    def start_decays(self, rates: Tensor) -> None:
        self.A_log.copy_((rates / START_DT).log())

    def gate_to_fit(self) -> tuple[Tensor, float]:
        return self.parts(self.in_proj.weight)["z"], inverse_silu(1.0)
