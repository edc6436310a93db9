"""The ways to compute a step, what was measured of each, and the names they have on the command line."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ttt_lit.ttt.settings import KEEP_ALL, EngineConfig

POLICIES = {
    "recompute": EngineConfig(),
    "keep": KEEP_ALL,
    "factors": EngineConfig(fast_weights="factors"),
    "two_level": EngineConfig(fast_weights="two_level"),
    "offload": EngineConfig(fast_weights="offload"),
}
SEARCHED = ("equal_memory", "fill")
KINDS = {
    "dense": "none",
    "transformers": "none",
    "swa": "none",
    "swa_sinks": "none",
    "naive": "meta",
    "naive_recompute": "meta",
    "engine": "meta",
    "engine_sinks": "meta",
    "first_order": "first_order",
}
"""Arm → mode."""
ACCEPTED: dict[str, tuple[str, ...]] = {
    "dense": ("recompute",),
    "transformers": (),
    "swa": ("recompute",),
    "swa_sinks": ("recompute",),
    "naive": (),
    "naive_recompute": (),
    "engine": (*POLICIES, *SEARCHED),
    "engine_sinks": tuple(POLICIES),
    "first_order": (*POLICIES, *SEARCHED),
}
"""Arm → the policies it may name."""


@dataclass
class Arm:
    kind: str
    policy: str | None
    engine: EngineConfig | None = None
    """None: naive, transformers, or not chosen yet."""
    flops: float | None = None
    """Per token, as the arm's policy asks for."""
    first_seconds: float | None = None
    seconds: list[float | None] = field(default_factory=list)
    """One entry for every round."""
    peak: int | None = None
    error: float | None = None
    """Of the gradient, against the context's first arm that computes the same."""
    compared_with: str | None = None
    note: str | None = None
    failure: str | None = None

    @property
    def name(self) -> str:
        return self.kind if self.policy is None else f"{self.kind}:{self.policy}"

    @property
    def mode(self) -> Any:
        return KINDS[self.kind]

    @property
    def network(self) -> str:
        """The network that it reads, as ``make_specs`` names it."""
        if self.kind in ("dense", "transformers"):
            return "dense"
        return "sinks" if self.kind.endswith("_sinks") else "ttt"

    @property
    def computes(self) -> str:
        """What it must agree on with every arm that computes the same."""
        if self.mode == "meta":
            return f"exact {self.network}"
        return "dense" if self.network == "dense" else self.kind

    @property
    def median(self) -> float | None:
        times = [t for t in self.seconds if t is not None]
        return statistics.median(times) if times and self.failure is None else None


def make_arms(names: Iterable[str], policies: Sequence[str]) -> list[Arm]:
    """An arm of the engine that names no policy stands for one arm per policy."""
    arms = []
    for name in names:
        kind, _, policy = name.partition(":")
        chosen: Sequence[str | None] = [policy or None]
        if kind in ("engine", "engine_sinks", "first_order"):
            chosen = [policy] if policy else [p for p in policies if p in ACCEPTED[kind]]
        _require_known(name, kind, policy)
        arms += [Arm(kind, p) for p in chosen]
    return arms


def _require_known(name: str, kind: str, policy: str) -> None:
    """SystemExit that says what would be accepted instead."""
    if kind not in KINDS:
        raise SystemExit(f"--arms: got {name!r}, expected KIND or KIND:POLICY with KIND one of {', '.join(KINDS)}")
    accepted = ACCEPTED[kind]
    if policy and not accepted:
        raise SystemExit(f"--arms: got {name!r}, but {kind} takes no policy: write {kind}")
    if policy and policy not in accepted:
        raise SystemExit(f"--arms: got {name!r}, but {kind} accepts no policy except {', '.join(accepted)}")
