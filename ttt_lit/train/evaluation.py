"""Validation: the loss of held-out blocks by token position, with the inner loop on and off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ttt_lit.metrics import Inner
from ttt_lit.model.spec import Mode
from ttt_lit.train.position import PositionLoss, PositionResult


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """How much is measured, when."""

    blocks: int = 64
    """Held-out long blocks at every stage end, spread evenly over the validation split."""
    subset: int = 8
    """Evenly spread blocks among those, measured while a stage runs; must divide ``blocks``."""
    every_share: float = 0.05
    """Share of a stage's budget between two measurements of the subset; 0: none."""
    during: tuple[Literal["A", "B0", "B1", "B2", "C"], ...] = ("C",)
    """Stages in which the subset is measured."""

    def __post_init__(self) -> None:
        if self.subset < 1 or self.blocks % self.subset or not 0 <= self.every_share <= 1:
            raise ValueError(
                f"validation: got blocks {self.blocks}, subset {self.subset} and every_share {self.every_share}, expected a subset that "
                "divides blocks and an every_share from 0 to 1"
            )


class Evaluation(nn.Module):
    """Position-loss sums of one pass over validation blocks, for each setting of the inner loop that the model has."""

    def __init__(self, context: int, *, has_inner_loop: bool) -> None:
        super().__init__()
        settings: list[Inner] = ["off", "on"] if has_inner_loop else ["off"]
        self.metrics = nn.ModuleDict({inner: PositionLoss(context) for inner in settings})

    def reset(self) -> None:
        for metric in self.metrics.values():
            metric.reset()  # type: ignore[operator]

    def update(self, losses: dict[Inner, Tensor], num_bytes: Tensor) -> None:
        """Add token losses (B, T) per setting, and the bytes of the batch's targets."""
        for inner, nll in losses.items():
            self.metrics[inner].update(nll, num_bytes)  # type: ignore[operator]

    def compute(self) -> dict[Inner, PositionResult]:
        """Results per setting, summed over ranks (a collective call)."""
        return {inner: metric.compute() for inner, metric in self.metrics.items()}  # type: ignore[operator,misc]


def evaluation_modes(training: Mode, *, has_inner_loop: bool) -> dict[Inner, Mode]:
    """In which mode each setting reads. Off is the trained network without updates: ``none`` where prime MLPs are not trained yet."""
    off: Mode = "none" if training == "none" else "static"
    return {"off": off, "on": "meta"} if has_inner_loop else {"off": off}


def target_bytes(tokens: Tensor, table: Tensor) -> Tensor:
    """Bytes of text of the targets of tokens (B, T+1), a scalar int64; ``table`` holds bytes per token id."""
    return table.to(tokens.device)[tokens[:, 1:]].sum(dtype=torch.int64)
