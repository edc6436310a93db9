"""Loss by token position: the curve that shows whether context helps.

Sums are float64: bf16 spacing at a loss of 3 is 0.016, coarser than the differences that decide a comparison.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from ttt_lit.record.measured import Document

DECILES = 10
_ID_BITS = 48  # exact in float64, in which ranks exchange their rows


class PositionResult(NamedTuple):
    """What ``PositionLoss`` measured. ``curve``: (T,) float64 on CPU, nats per token at each position."""

    curve: Tensor
    nats_per_token: float
    bits_per_byte: float
    blocks: int
    tokens: int
    num_bytes: int
    documents: tuple[Document, ...]
    """Every block, sorted by id: the same for any number of ranks."""


class PositionLoss(Metric):
    """Accumulates per-token losses of blocks of one context length; summed over ranks when computed.

    No target is masked, so every position has been seen once per block and one count serves all.
    """

    full_state_update = False
    nll_sum: Tensor
    blocks: Tensor
    num_bytes: Tensor
    rows: list[Tensor]

    def __init__(self, context: int, *, short: int | None = None) -> None:
        super().__init__()
        self.short = short or context
        if context < 1 or not 1 <= self.short <= context:
            raise ValueError(f"PositionLoss: got context {context} and short {short}, expected 1 ≤ short ≤ context")
        self.context = context
        self.add_state("nll_sum", torch.zeros(context, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("blocks", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("rows", [], dist_reduce_fx="cat")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        """Follow the module to a device but never to a dtype: torchmetrics guards ``half()`` but not ``to(dtype)``."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)

    def update(self, token_nll: Tensor, num_bytes: Tensor, ids: Tensor, sources: Tensor) -> None:
        """Add a batch.

        Parameters:
            token_nll: (B, T) loss of each target in nats, any floating dtype; T must be the context.
            num_bytes: (B,) bytes of text of each block's targets.
            ids: (B,) ``block_ids`` of the blocks.
            sources: (B,) numbers of the documents that the blocks were cut from.
        """
        if token_nll.ndim != 2 or token_nll.shape[1] != self.context:
            raise ValueError(
                f"PositionLoss: got losses of shape {tuple(token_nll.shape)}, expected (batch, {self.context})"
            )
        nll = token_nll.detach().to(torch.float64)
        self.nll_sum += nll.sum(0)
        self.blocks += nll.shape[0]
        self.num_bytes += num_bytes.sum()
        columns = [ids.to(nll), sources.to(nll), num_bytes.to(nll), nll.mean(1), nll[:, : self.short].mean(1)]
        columns += [nll[:, start:stop].mean(1) for start, stop in deciles(self.context)]
        self.rows.append(torch.stack(columns, dim=1))

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
            documents=self._documents(),
        )

    def _documents(self) -> tuple[Document, ...]:
        # A list where one process computed, one tensor where ranks exchanged theirs.
        rows = torch.cat(self.rows) if isinstance(self.rows, list) else self.rows
        return tuple(
            Document(
                id=f"{int(block):012x}",
                source=int(source),
                bytes=int(num_bytes),
                nats_per_token=mean,
                short=short,
                deciles=tenths,
            )
            for block, source, num_bytes, mean, short, *tenths in sorted(rows.tolist())
        )


def block_ids(tokens: Tensor) -> Tensor:
    """Identity of each row of tokens (B, N) int64: (B,) int64 on CPU, the first 48 bits of the SHA-256 of its little-endian ids."""
    rows = tokens.detach().to("cpu", torch.int64).contiguous()
    digests = [hashlib.sha256(row.numpy().astype("<i8").tobytes()).digest() for row in rows]
    return torch.tensor([int.from_bytes(digest[: _ID_BITS // 8], "big") for digest in digests])


def deciles(context: int) -> list[tuple[int, int]]:
    """Ten equal ranges ``(start, stop)`` of positions, as equal as whole numbers allow; a context below 10 repeats positions."""
    edges = [context * part // DECILES for part in range(DECILES + 1)]
    return [(start, max(stop, start + 1)) for start, stop in zip(edges[:-1], edges[1:], strict=True)]


def bucket_means(curve: Tensor, buckets: Sequence[tuple[int, int]]) -> list[float]:
    """Mean loss over each bucket of a (T,) curve, nats per token."""
    return [float(curve[start:stop].to(torch.float64).mean()) for start, stop in buckets]
