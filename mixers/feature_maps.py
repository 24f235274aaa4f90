"""Feature maps of linear attention: what q and k go through so that their product is like a
softmax weight. `feature_map` makes one by name (`config.FEATURE_MAPS`).

Parameters have fla's names (`fla.modules.feature_map`). `scale` is that of q . k for the
recurrence, None for its default, F^-0.5.
Check: `pytest tests/test_mixer_linear_attention.py`.
Shapes: B batch, T time, H heads, K key size, F size of the features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixers.base import at_least_float32


class Identity(nn.Identity):
    """x itself; F = K."""

    scale = None

    def init_weights(self) -> None:
        """Nothing to set."""


class Elu(nn.Module):
    """elu(x) + 1 > 0 (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7); F = K. Written as
    x + 1 or exp(x): in bfloat16 the exp(x) - 1 of elu has lost what is below 0.004."""

    scale = None

    def init_weights(self) -> None:
        """Nothing to set."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, K] -> [B, T, H, K]."""
        # Not clamp: at 0 its gradient is that of torch's version.
        return x.relu() + x.masked_fill(x > 0, 0).exp()


class Hedgehog(nn.Module):
    """softmax([2 y, -2 y]) with y = W x + b, the same for all heads (Zhang et al. 2024, arXiv
    2402.04347; the factor 2 is fla's); F = 2 K. Starts with W = 1, b = 0.

    The features sum to one, so q . k is about 1 / F, and smaller still by the default scale: an
    output norm's eps would then outweigh the first tokens. A scale of F makes it about one."""

    def __init__(self, key_dim: int):
        super().__init__()
        self.scale = 2.0 * key_dim
        self.layer = nn.Linear(key_dim, key_dim)

    def init_weights(self) -> None:
        nn.init.eye_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, K] -> [B, T, H, 2 K], in float32 at least."""
        y = 2 * at_least_float32(self.layer(x))
        return torch.cat([y, -y], -1).softmax(-1)


def feature_map(name: str, key_dim: int) -> Identity | Elu | Hedgehog:
    """The map called `name`."""
    if name == "hedgehog":
        return Hedgehog(key_dim)
    maps = {"identity": Identity, "elu": Elu}
    if name not in maps:
        raise ValueError(f"feature map: '{name}' found, identity, elu or hedgehog expected")
    return maps[name]()
