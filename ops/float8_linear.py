"""Linear layers of a frozen model in float8: faster matmuls, half the memory of bfloat16.

    replica = float8_copy(teacher)

Every row of a weight and every token of an input has a scale of its own, its largest magnitude over
448, the largest float8_e4m3fn number; the matmul adds up in float32 and multiplies both scales into
its result. Inputs are quantised as they come, so nothing is calibrated. Rounding is to 3 bits of
mantissa: the outputs of one layer err by about 4 % of their RMS on random numbers, and what that
does to a model is for an evaluation to tell.
No gradients. Check: `pytest tests/ops/test_float8_linear.py`.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max  # 448


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, K] -> (float8 [N, K], scale [N, 1] float32) with x ~ float8 * scale."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(FLOAT8), scale


def naive_float8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The tests' reference: the quantised numbers multiplied in float32."""
    values, scales = quantise(x.flatten(0, -2))
    out = F.linear(values.float() * scales, weight.float() * scale, bias)
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


class Float8Linear(nn.Module):
    """`nn.Linear` with its weight [out, in] in float8 and a scale [out, 1] in float32."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = quantise(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype."""
        values, scales = quantise(x.flatten(0, -2))
        out = torch._scaled_mm(
            values, self.weight.t(), scale_a=scales, scale_b=self.scale.t(), out_dtype=x.dtype,
            use_fast_accum=True,
        )  # fmt: skip
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return out.unflatten(0, x.shape[:-1])


def supports_float8(device: torch.device) -> bool:
    """NVIDIA GPUs from Ada and Hopper on."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )


@torch.no_grad()
def float8_copy(model: nn.Module, first: int = 0) -> nn.Module:
    """A frozen model once more, the Linears of its blocks from `first` on in float8 where both
    their sizes are multiples of 16; everything else, head and embedding among it, is the model's
    own. So are low-rank pairs, of which mixers take the weights and add the bias in float32."""
    replica = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for parent in [m for block in replica.layers[first:] for m in block.modules()]:
        if isinstance(parent, nn.Sequential):
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and not any(n % 16 for n in child.weight.shape):
                setattr(parent, name, Float8Linear(child))
    return replica
