"""Loss by token position: the curve that shows whether context helps.

Sums are float64: bf16 spacing at a loss of 3 is 0.016, coarser than the differences that decide a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

# The first bucket is 1/128 of the context and the others grow by sqrt(2): 15 buckets, edges at a half, a quarter, …
_FIRST_SHARE = 128
_LOG_BUCKETS = 14


class PositionResult(NamedTuple):
    """What ``PositionLoss`` measured. ``curve``: (T,) float64 on CPU, nats per token at each position."""

    curve: Tensor
    nats_per_token: float
    bits_per_byte: float
    blocks: int
    tokens: int
    num_bytes: int


class PositionLoss(Metric):
    """Accumulates per-token losses of blocks of one context length; summed over ranks when computed.

    No target is masked, so every position has been seen once per block and one count serves all.
    """

    full_state_update = False
    nll_sum: Tensor
    blocks: Tensor
    num_bytes: Tensor

    def __init__(self, context: int) -> None:
        super().__init__()
        if context < 1:
            raise ValueError(f"PositionLoss: got context {context}, expected at least 1 token")
        self.context = context
        self.add_state("nll_sum", torch.zeros(context, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("blocks", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        """Follow the module to a device but never to a dtype: torchmetrics guards ``half()`` but not ``to(dtype)``."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)

    def update(self, token_nll: Tensor, num_bytes: int | Tensor) -> None:
        """Add a batch.

        Parameters:
            token_nll: (B, T) loss of each target in nats, any floating dtype; T must be the context.
            num_bytes: bytes of text of all the batch's targets, a number or a tensor that is summed.
        """
        if token_nll.ndim != 2 or token_nll.shape[1] != self.context:
            raise ValueError(
                f"PositionLoss: got losses of shape {tuple(token_nll.shape)}, expected (batch, {self.context})"
            )
        self.nll_sum += token_nll.detach().sum(0, dtype=torch.float64)
        self.blocks += token_nll.shape[0]
        self.num_bytes += num_bytes.sum() if isinstance(num_bytes, Tensor) else num_bytes

    def compute(self) -> PositionResult:
        """The mean curve, its mean, and bits per byte. Without a single block there is nothing to report: an error."""
        blocks, num_bytes = int(self.blocks), int(self.num_bytes)
        if blocks == 0 or num_bytes == 0:
            raise ValueError(
                f"PositionLoss: got {blocks} blocks with {num_bytes} bytes, expected at least one block of text"
            )
        total = float(self.nll_sum.sum())
        tokens = blocks * self.context
        return PositionResult(
            curve=(self.nll_sum / blocks).cpu(),
            nats_per_token=total / tokens,
            bits_per_byte=total / math.log(2) / num_bytes,
            blocks=blocks,
            tokens=tokens,
            num_bytes=num_bytes,
        )


def position_buckets(context: int) -> list[tuple[int, int]]:
    """Log-spaced ranges ``(start, stop)`` that cover 0 … context without gaps: 8 to 15 for a context of at least 16.

    Edges fall on context/2, context/4, … where these are whole, so a window of a quarter of the context ends a bucket.
    """
    if context < 1:
        raise ValueError(f"position_buckets: got context {context}, expected at least 1 token")
    first = max(1, context // _FIRST_SHARE)
    ratio = (context / first) ** (1 / _LOG_BUCKETS)
    edges = sorted({0, context} | {round(first * ratio**index) for index in range(_LOG_BUCKETS)})
    return list(zip(edges[:-1], edges[1:], strict=True))


def bucket_means(curve: Tensor, buckets: Sequence[tuple[int, int]]) -> list[float]:
    """Mean loss over each bucket of a (T,) curve, nats per token."""
    return [float(curve[start:stop].to(torch.float64).mean()) for start, stop in buckets]
