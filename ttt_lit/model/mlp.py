"""Gated MLP, with its own weights or with weights handed in: the form in which an inner loop learns."""

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


def gated_mlp(x: Tensor, weights: MLPWeights, activation: Activation) -> Tensor:
    """down(act(gate x) · up x) for x (B, T, D) and weights shared by the batch or batched."""
    act = F.silu if activation == "silu" else _gelu_tanh
    return _linear(act(_linear(x, weights.gate)) * _linear(x, weights.up), weights.down)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if weight.ndim == 2 else x @ weight.mT


class GatedMLP(nn.Module):
    """The MLP's learned weights; ``forward`` uses them unless fast weights replace them."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def weights(self) -> MLPWeights:
        return MLPWeights(self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)

    def forward(self, x: Tensor, fast: MLPWeights | None = None) -> Tensor:
        return gated_mlp(x, self.weights() if fast is None else fast, self.activation)
