"""Logits of one tile of tokens × vocabulary at a time: the tiles' sizes, products, sums over them, and entries at targets."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_lit.ops.wide import add_wide_matmul, wide_matmul

# A tile of a CPU stays near its caches (4 MiB in float32) at any vocabulary, with rows enough that reading the head costs little beside
# the products. An accelerator's has whole rows and is large enough for full speed: 441 tokens at a vocabulary of 152k, 256 MiB.
_CPU_TOKENS, _CPU_COLUMNS = 512, 2048
_NUMBERS_ELSEWHERE = 1 << 26


def tile_shape(vocab_size: int, device: str) -> tuple[int, int]:
    """Tokens, and columns of the vocabulary, whose logits are made together. Sweeps hold at most four such tiles at once."""
    if device != "cpu":
        return max(1, _NUMBERS_ELSEWHERE // vocab_size), vocab_size
    columns = min(vocab_size, _CPU_COLUMNS)
    return _CPU_TOKENS * _CPU_COLUMNS // columns, columns


def under_autocast(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """What autocast would make of the operands of a product: operators of our own are not on its list."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return hidden.to(dtype), head.to(dtype)
    return hidden, head


def all_logits(hidden: Tensor, head: Tensor) -> Tensor:
    logits = F.linear(hidden, head)
    return logits.to(wide_dtype(logits.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def statistics(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[:-1], dtype=wide_dtype(hidden.dtype))


def empty_contiguous(x: Tensor) -> Tensor:
    """Contiguous whatever x is: results are written row by row."""
    return x.new_empty(x.shape)


def wide_zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=wide_dtype(x.dtype), device=x.device)


def wide_full(rows: Tensor, value: float) -> Tensor:
    """A number a row."""
    return rows.new_full(rows.shape[:1], value, dtype=wide_dtype(rows.dtype))


def scores_of(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows matrixᵀ in float32 at least: logits, or their tangents."""
    return wide_matmul(rows, matrix.mT, wide_dtype(rows.dtype))


def pieces_of(rows: Tensor, head: Tensor) -> list[slice]:
    """Of the tokens."""
    return _cut(rows.shape[0], tile_shape(head.shape[0], head.device.type)[0])


def columns_of(head: Tensor) -> list[slice]:
    """Of the vocabulary."""
    return _cut(head.shape[0], tile_shape(head.shape[0], head.device.type)[1])


def _cut(stop: int, size: int) -> list[slice]:
    return [slice(low, min(low + size, stop)) for low in range(0, stop, size)]


def _place(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Index of each target in a tile, and whether it is there."""
    index, width = targets - columns.start, columns.stop - columns.start
    return index.clamp(0, width - 1), (index >= 0) & (index < width)


def picked(matrix: Tensor, targets: Tensor, columns: slice, before: Tensor) -> Tensor:
    """Entries of a tile at the targets; those of ``before`` (n,) where the target is in another tile."""
    index, here = _place(targets, columns)
    return torch.where(here, matrix.gather(1, index[:, None])[:, 0], before)


def add_at(matrix: Tensor, targets: Tensor, columns: slice, amount: Tensor | float) -> Tensor:
    """Add to the targets' entries of a tile, in place."""
    index, here = _place(targets, columns)
    matrix[torch.arange(matrix.shape[0], device=matrix.device), index] += amount * here
    return matrix


class LogSumExp:
    """Of rows whose entries come a tile at a time."""

    def __init__(self, rows: Tensor) -> None:
        self.value = wide_full(rows, -torch.inf)

    def add(self, scores: Tensor) -> Tensor:
        """Take in a tile (n, columns). Returns what sums weighted by the softmax so far are to be multiplied with, (n,)."""
        before, self.value = self.value, torch.logaddexp(self.value, scores.logsumexp(dim=1))
        return before.sub_(self.value).exp_()

    def softmax_(self, scores: Tensor) -> Tensor:
        """In place."""
        return scores.sub_(self.value[:, None]).exp_()


def add_gradients(
    d_scores: Tensor, rows: Tensor, head: Tensor, columns: slice, d_rows: Tensor, d_head: Tensor | None
) -> None:
    """Add what a tile's cotangents give to the gradients of rows and head."""
    d_scores = d_scores.to(head.dtype)
    add_wide_matmul(d_rows, d_scores, head[columns])
    if d_head is not None:
        add_wide_matmul(d_head[columns], d_scores.mT, rows)


def refuse_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("the loss is differentiable once; create_graph asks for more: token_nll and token_kl have it")
