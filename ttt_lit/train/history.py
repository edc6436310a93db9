"""What a run has seen so far, kept with its checkpoints so that a record written after a resume tells the whole story."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ttt_lit.record.codec import decode
from ttt_lit.record.measured import Damage, EvaluationPoint, Transition, Validation
from ttt_lit.train.stages import Context
from ttt_lit.train.window import StepReport


@dataclass
class StageHistory:
    """One stage: what its record is made from."""

    transition: Transition | None = None
    losses: list[float] = field(default_factory=list)
    """Loss of every optimiser step, nats per token."""
    gpu_seconds: list[float] = field(default_factory=list)
    """Compute device-seconds of the whole run at the end of every optimiser step."""
    norm_sums: list[float] = field(default_factory=list)
    """Sum over steps of the mean ‖ΔW‖ of each inner step, in the order of the chunks."""
    norm_range: list[float] = field(default_factory=list)
    """Smallest, largest and last mean ‖ΔW‖ over an optimiser step's chunks."""
    validations: list[Validation] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)
    """At the stage's start and end."""
    peak_gib: float = 0.0

    def add_step(self, report: StepReport, gpu_seconds: float) -> None:
        """One optimiser step, after which the run has computed for ``gpu_seconds`` device-seconds."""
        self.losses.append(report.loss)
        self.gpu_seconds.append(round(gpu_seconds, 3))
        norms = report.update_norms
        if not norms:
            return
        self.norm_sums = [a + b for a, b in zip(self.norm_sums or [0.0] * len(norms), norms, strict=True)]
        mean = sum(norms) / len(norms)
        low, high = (self.norm_range[0], self.norm_range[1]) if self.norm_range else (mean, mean)
        self.norm_range = [min(low, *norms), max(high, *norms), mean]

    @property
    def update_norm_by_chunk(self) -> list[float]:
        """Mean ‖ΔW‖ over the stage's steps of each inner step."""
        return [total / len(self.losses) for total in self.norm_sums]


@dataclass
class History:
    """All stages that have been entered, and the series measured while they ran."""

    stages: dict[str, StageHistory] = field(default_factory=dict)
    evaluations: list[EvaluationPoint] = field(default_factory=list)
    start_validation: Validation | None = None
    """The start checkpoint, as it came."""
    imported: dict[Context, list[float]] = field(default_factory=dict)
    """Context → the imported model's mean loss at each position of the blocks that damage is measured on; empty: it is not measured."""

    def stage(self, name: str) -> StageHistory:
        return self.stages.setdefault(name, StageHistory())

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``. Of a proof whatever the record does not hold is dropped: older files have more."""
        names = {each.name for each in dataclasses.fields(Transition)}
        stages = {name: dataclasses.asdict(StageHistory()) | stage for name, stage in state["stages"].items()}
        for stage in stages.values():
            if stage["transition"] is not None:
                stage["transition"] = {"kind": ""} | {k: v for k, v in stage["transition"].items() if k in names}
        vars(self).update(
            vars(decode(History, dataclasses.asdict(History()) | state | {"stages": stages}, "history", True))
        )
