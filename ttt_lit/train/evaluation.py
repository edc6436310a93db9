"""Validation: the loss of held-out blocks by token position, with the inner loop on and off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ttt_lit.metrics import Inner, position_buckets
from ttt_lit.model.spec import Mode
from ttt_lit.record.measured import Bucket, Validation
from ttt_lit.train.position import PositionLoss, PositionResult, bucket_means


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """How much is measured, when."""

    blocks: int = 64
    """Held-out long blocks at every stage end; a multiple of the number of ranks."""
    subset: int = 8
    """Evenly spread blocks among those, measured while a stage runs; must divide ``blocks``."""
    every_share: float = 0.05
    """Share of a stage's budget between two measurements of the subset; 0: none."""
    during: tuple[Literal["A", "B0", "B1", "B2", "C"], ...] = ("A", "C")
    """Stages in which the subset is measured."""
    damage_blocks: int = 8
    """Held-out blocks of each context, long and short, on which the loss above the imported model's is measured at both ends of every stage
    (docs/method.md); 0: none. Measured where the run starts from a model as imported, not from random weights or another run's checkpoint;
    the short context where ``data.short`` is set."""
    headline: Literal["as_trained", "with_updates", "without_updates"] = "as_trained"
    """Which loss of the last stage speaks for the run in a comparison. ``as_trained``: with inner updates exactly where the stage trains
    with them. ``with_updates``, ``without_updates``: always or never; the control that learns while reading without having been trained to
    sets the first."""
    probe: str | None = None
    """``probe.json`` that ``python cli.py probe`` made of the imported dense model on this run's ``data.long``. The record carries its
    ceiling (docs/decision.md): how much context beyond the window is worth. A probe of other data, of another context, of a model that the
    run was not made from (from random weights: of another shape) or without the window of the run's last stage is refused. null: no ceiling
    is known, and the verdict asks for more."""

    def __post_init__(self) -> None:
        if self.damage_blocks < 0:
            raise ValueError(f"validation.damage_blocks: got {self.damage_blocks}, expected 0 (none) or more")
        if self.subset < 1 or self.blocks % self.subset or not 0 <= self.every_share <= 1:
            raise ValueError(
                f"validation: got blocks {self.blocks}, subset {self.subset} and every_share {self.every_share}, expected a subset that "
                "divides blocks and an every_share from 0 to 1"
            )


class Evaluation(nn.Module):
    """Position-loss sums of one pass over validation blocks, for each setting of the inner loop that the model has.

    Args:
        context: tokens per block.
        short: the short context, whose positions are also averaged apart.
        has_inner_loop: whether there is anything to update.
    """

    def __init__(self, context: int, *, short: int, has_inner_loop: bool) -> None:
        super().__init__()
        settings: list[Inner] = ["off", "on"] if has_inner_loop else ["off"]
        self.metrics = nn.ModuleDict({inner: PositionLoss(context, short=short) for inner in settings})

    def reset(self) -> None:
        for metric in self.metrics.values():
            metric.reset()  # type: ignore[operator]

    def update(self, losses: dict[Inner, Tensor], num_bytes: Tensor, ids: Tensor, sources: Tensor) -> None:
        """Add token losses (B, T) per setting, with the bytes of each block's targets, its identity and its document, all (B,)."""
        for inner, nll in losses.items():
            self.metrics[inner].update(nll, num_bytes, ids, sources)  # type: ignore[operator]

    def compute(self) -> dict[Inner, PositionResult]:
        """Results per setting that was measured, which every rank knows alike; summed over ranks (a collective call)."""
        measured = [(inner, metric) for inner, metric in self.metrics.items() if metric.update_called]
        return {inner: metric.compute() for inner, metric in measured}  # type: ignore[operator,misc]


def validation(inner: Inner, result: PositionResult, *, curve: str | None = None) -> Validation:
    """One result as a record has it; ``curve`` names the array file with the loss at every position."""
    return Validation(
        inner=inner,
        context=len(result.curve),
        nats_per_token=result.nats_per_token,
        bits_per_byte=result.bits_per_byte,
        blocks=result.blocks,
        tokens=result.tokens,
        bytes=result.num_bytes,
        buckets=bucketed(result.curve),
        documents=list(result.documents),
        curve=curve,
    )


def bucketed(curve: Tensor) -> list[Bucket]:
    """Mean losses of a (T,) curve in ``position_buckets``."""
    ranges = position_buckets(len(curve))
    means = bucket_means(curve, ranges)
    return [Bucket(start=a, stop=b, nats_per_token=mean) for (a, b), mean in zip(ranges, means, strict=True)]


def evaluation_modes(training: Mode, *, has_inner_loop: bool) -> dict[Inner, Mode]:
    """In which mode each setting reads. Off is the trained network without updates: ``none`` where prime MLPs are not trained yet."""
    off: Mode = "none" if training == "none" else "static"
    return {"off": off, "on": "meta"} if has_inner_loop else {"off": off}


def trained_inner(training: Mode) -> Inner:
    """The setting of the inner loop that a mode trains the network in."""
    return "on" if training in ("meta", "first_order") else "off"


def headline_inner(config: ValidationConfig, last: Mode, *, can_update: bool) -> Inner:
    """Which loss of the last stage, trained in mode ``last``, speaks for the run.

    Raises:
        ValueError: updates are asked of a model that has nothing to update.
    """
    if config.headline == "as_trained":
        return trained_inner(last)
    if config.headline == "with_updates" and not can_update:
        raise ValueError("validation.headline: with_updates needs TTT layers; set model.ttt or choose as_trained")
    return "on" if config.headline == "with_updates" else "off"


def target_bytes(tokens: Tensor, table: Tensor) -> Tensor:
    """Bytes of text of the targets of each row of tokens (B, T+1): (B,) int64; ``table`` holds bytes per token id."""
    return table.to(tokens.device)[tokens[:, 1:]].sum(dim=1, dtype=torch.int64)
