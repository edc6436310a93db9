"""Gated MLP, and the form of its weights in which an inner loop learns."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ttt_lit.model.spec import Activation


class MLPWeights(NamedTuple):
    """The three matrices of a gated MLP: gate and up (F, D), down (D, F); fast weights lead with a batch axis, one copy a sequence."""

    gate: Tensor
    up: Tensor
    down: Tensor


class GatedMLP(nn.Module):
    """down(act(gate x) · up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def weights(self) -> MLPWeights:
        return MLPWeights(self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(activate(self.gate_proj(x), self.activation) * self.up_proj(x))


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The gate's non-linearity."""
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")
