"""Parts of a block on values, or on values together with their derivative along a direction of the fast weights.

A value without a tangent is constant along the direction, and then nothing is computed for it: the same code is the plain forward and
its derivative. Everything is ordinary differentiable arithmetic, so one reverse pass over a dual program gives exact second derivatives
and no gradient is ever differentiated by autograd. Only attention brings its own derivative (``ops/carried_attention.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_lit.model.mlp import MLPWeights, activate
from ttt_lit.model.norm import rms_norm, rms_norm_dual
from ttt_lit.model.spec import Activation
from ttt_lit.ops.known_linear import known_linear


class Dual(NamedTuple):
    """A value and its tangent of the same shape; None: the value does not change along the direction."""

    value: Tensor
    tangent: Tensor | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> Dual:
        """A linear function of both."""
        return Dual(function(self.value), None if self.tangent is None else function(self.tangent))


class FastMLP(NamedTuple):
    """Fast weights of one layer, (B, F, D) and (B, D, F), and what is asked of them."""

    weights: MLPWeights
    direction: MLPWeights | None = None
    """The direction along which tangents are taken; None: no tangents."""
    probes: MLPWeights | None = None
    """Zeros added to the outputs of the three products, (B, C, F) and (B, C, D): their gradients are those of the outputs."""


class Products:
    """The results of a chunk's matrix products: written down as they are made, or given back so that they need not be made again."""

    def __init__(self, known: Sequence[Tensor] | None = None) -> None:
        self.made: list[Tensor] = []
        self._known: Iterator[Tensor] | None = iter(known) if known is not None else None

    def linears(self, x: Dual, maps: Sequence[tuple[Tensor, Tensor | None]]) -> list[Dual]:
        """Linear maps (weight, bias) of one input, x (B, C, D)."""
        both = _stacked(x) if self._known is None else None
        return [self._linear(x, both, weight, bias) for weight, bias in maps]

    def fast(self, x: Dual, weight: Tensor, direction: Tensor | None, probe: Tensor | None) -> Dual:
        """x (B, C, D) through fast weights (B, F, D); along ``direction`` the weights move too."""
        y = self._linear(x, None if self._known is not None else _stacked(x), weight, None, probe)
        if direction is None:
            return y
        moved = (
            torch.bmm(x.value, direction.mT) if y.tangent is None else torch.baddbmm(y.tangent, x.value, direction.mT)
        )
        return Dual(y.value, moved)

    def _linear(
        self, x: Dual, both: Tensor | None, weight: Tensor, bias: Tensor | None, probe: Tensor | None = None
    ) -> Dual:
        if self._known is not None:
            y = next(self._known)
            value = known_linear(x.value.to(y.dtype), weight.to(y.dtype), bias, y)
            return Dual(value, None if x.tangent is None else _matmul(x.tangent, weight))
        if x.tangent is None:
            value, tangent = _matmul(x.value, weight, bias, probe), None
        else:
            assert both is not None
            assert probe is None
            value, tangent = _matmul(both, weight).chunk(2, dim=1)
            value = value if bias is None else value + bias.to(value.dtype)
        self.made.append(value)
        return Dual(value, tangent)


def norm(x: Dual, weight: Tensor | None, *, eps: float, unit_offset: bool) -> Dual:
    """RMSNorm, or nothing where the spec has no norm here."""
    if weight is None:
        return x
    if x.tangent is None:
        return Dual(rms_norm(x.value, weight, eps=eps, unit_offset=unit_offset))
    return Dual(*rms_norm_dual(x.value, x.tangent, weight, eps=eps, unit_offset=unit_offset))


def add(x: Dual, y: Dual) -> Dual:
    """x + y."""
    tangents = [t for t in (x.tangent, y.tangent) if t is not None]
    return Dual(x.value + y.value, sum(tangents[1:], tangents[0]) if tangents else None)


def gated_mlp(x: Dual, weights: MLPWeights, activation: Activation, products: Products) -> Dual:
    """An MLP with slow weights (F, D) and (D, F), of x (B, C, D)."""
    gate, up = products.linears(x, [(weights.gate, None), (weights.up, None)])
    return products.linears(_gated(gate, up, activation), [(weights.down, None)])[0]


def fast_mlp(x: Dual, fast: FastMLP, activation: Activation, products: Products) -> tuple[Dual, tuple[Tensor, Tensor]]:
    """The MLP that learns, and the inputs of its products: of gate and up (B, C, D), and of down (B, C, F)."""
    directions, probes = fast.direction or (None,) * 3, fast.probes or (None,) * 3
    gate, up = (products.fast(x, *of) for of in zip(fast.weights[:2], directions[:2], probes[:2], strict=True))
    inner = _gated(gate, up, activation)
    out = products.fast(inner, fast.weights.down, directions[2], probes[2])
    # As the products saw them: autocast has rounded the input.
    return out, (x.value.to(gate.value.dtype), inner.value)


def _stacked(x: Dual) -> Tensor | None:
    # One product over twice as many rows, in the forward and in the gradient of the weights.
    return None if x.tangent is None else torch.cat([x.value, x.tangent], dim=1)


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, probe: Tensor | None = None) -> Tensor:
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return torch.bmm(x, weight.mT) if probe is None else torch.baddbmm(probe, x, weight.mT)


def _gated(gate: Dual, up: Dual, activation: Activation) -> Dual:
    if gate.tangent is None and up.tangent is None:
        return Dual(activate(gate.value, activation) * up.value)
    assert gate.tangent is not None
    assert up.tangent is not None
    wide = torch.promote_types(gate.value.dtype, torch.float32)
    value, slope = _activation_and_slope(gate.value.to(wide), activation)
    tangent = slope * gate.tangent * up.value + value * up.tangent
    return Dual((value * up.value).to(gate.value.dtype), tangent.to(gate.value.dtype))


def _activation_and_slope(x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    if activation == "silu":
        share = torch.sigmoid(x)
        value = x * share
        return value, torch.addcmul(share, value, 1 - share)
    squared = x * x
    bend = torch.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * squared))
    half = 0.5 * (1 + bend)
    slope = 0.5 * x * (1 - bend * bend) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * squared)
    return x * half, half + slope
