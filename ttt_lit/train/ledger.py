"""The budget's ledger: what each stage has consumed, kept across resume.

Time is counted in device-seconds (seconds × devices; a device is a GPU, or a process on CPU) and belongs to exactly one
account at any moment, so validation, checkpoints and compilation never count as training, and no second is counted
twice or lost. Tokens, bytes and micro-batches are those of all ranks together. Decisions from time are taken on rank 0
and broadcast by the caller. Work after the last checkpoint is redone after a crash and counts once. Standard library
only.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

from ttt_lit.metrics import ACCOUNTS, Account
from ttt_lit.record.schema import Spent
from ttt_lit.train.budget import StageBudget

_FORMAT = 1


def nothing() -> Spent:
    """A zero in every account."""
    return Spent(gpu_seconds=dict.fromkeys(ACCOUNTS, 0.0))


def added(one: Spent, other: Spent) -> Spent:
    """The sum, account by account."""
    return Spent(
        tokens=one.tokens + other.tokens,
        bytes=one.bytes + other.bytes,
        optimizer_steps=one.optimizer_steps + other.optimizer_steps,
        micro_batches=one.micro_batches + other.micro_batches,
        gpu_seconds={account: one.gpu_seconds[account] + other.gpu_seconds[account] for account in ACCOUNTS},
    )


class Ledger:
    """Accounts per stage. ``start_stage`` starts the clock on ``compute``, ``switch`` or ``account`` moves it."""

    def __init__(self, *, devices: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        if devices < 1:
            raise ValueError(f"Ledger: got {devices} devices, expected at least 1")
        self.devices = devices
        self._clock = clock
        self._stages: dict[str, Spent] = {}
        self._stage: str | None = None
        self._account: Account = "compute"
        self._since = 0.0

    @property
    def stage(self) -> str | None:
        """The stage whose time is running, or None."""
        return self._stage

    def start_stage(self, name: str) -> None:
        """Close the stage that runs, if any, and start ``name`` on ``compute``; a known stage (resume) is continued."""
        self._settle()
        self._stages.setdefault(name, nothing())
        self._stage, self._account, self._since = name, "compute", self._clock()

    def stop(self) -> None:
        """Stop the clock. Harmless when it stands still."""
        self._settle()
        self._stage = None

    def switch(self, account: Account) -> Account:
        """From now on time belongs to ``account``; returns the account before. For hooks that come in pairs."""
        if account not in ACCOUNTS:
            raise ValueError(f"Ledger: got account {account!r}, expected one of {ACCOUNTS}")
        self._running()
        self._settle()
        previous, self._account = self._account, account
        return previous

    @contextmanager
    def account(self, name: Account) -> Iterator[None]:
        """Time inside the block belongs to ``name``, also when it raises; nested blocks take over and hand back."""
        previous = self.switch(name)
        try:
            yield
        finally:
            # A block may end the stage; then no clock is left to hand back.
            if self._stage is not None:
                self.switch(previous)

    def count_micro_batch(self, *, tokens: int, num_bytes: int) -> None:
        """One micro-batch on every rank: tokens and bytes are summed over ranks."""
        if tokens < 0 or num_bytes < 0:
            raise ValueError(f"Ledger: got {tokens} tokens and {num_bytes} bytes, expected no negative counts")
        spent = self._running()
        spent.micro_batches += 1
        spent.tokens += tokens
        spent.bytes += num_bytes

    def count_optimizer_step(self) -> None:
        self._running().optimizer_steps += 1

    def spent(self, stage: str) -> Spent:
        """A copy of one stage's accounts up to now; zeros for a stage that has not started."""
        self._settle()
        return added(nothing(), self._stages.get(stage, nothing()))

    def total(self) -> Spent:
        """The run's accounts: the sum over its stages."""
        self._settle()
        return reduce(added, self._stages.values(), nothing())

    def stages(self) -> tuple[str, ...]:
        """Names of the stages that have started, in that order."""
        return tuple(self._stages)

    def spent_fraction(self, stage: str, budget: StageBudget) -> float:
        """Share of the stage's budget that is spent: optimiser steps, or compute seconds (may pass 1 by a step)."""
        spent = self.spent(stage)
        return budget.fraction(optimizer_steps=spent.optimizer_steps, compute_seconds=spent.gpu_seconds["compute"])

    def stage_spent(self, stage: str, budget: StageBudget) -> bool:
        """Whether nothing is left. Ask only at optimiser-step boundaries."""
        return self.spent_fraction(stage, budget) >= 1.0

    def state_dict(self) -> dict[str, Any]:
        """Plain dicts, strings and numbers, time up to now included."""
        self._settle()
        return {"format": _FORMAT, "stages": {name: dataclasses.asdict(spent) for name, spent in self._stages.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved accounts. The clock stands still until ``start_stage``; devices may differ."""
        if state.get("format") != _FORMAT:
            raise ValueError(
                f"Ledger: got state of format {state.get('format')!r}, expected {_FORMAT}; start the run anew"
            )
        stages = {}
        for name, saved in state["stages"].items():
            # Runs begun before the record and the ledger shared one type have the older name.
            seconds = saved.get("gpu_seconds", saved.get("seconds"))
            if set(seconds) != set(ACCOUNTS):
                raise ValueError(f"Ledger: stage {name} has accounts {sorted(seconds)}, expected {sorted(ACCOUNTS)}")
            counts = {key: value for key, value in saved.items() if key not in ("seconds", "gpu_seconds")}
            stages[name] = Spent(**counts, gpu_seconds=dict(seconds))
        self._stage = None
        self._stages = stages

    def _running(self) -> Spent:
        if self._stage is None:
            raise RuntimeError("Ledger: no stage is running; call start_stage first")
        return self._stages[self._stage]

    def _settle(self) -> None:
        if self._stage is None:
            return
        now = self._clock()
        self._stages[self._stage].gpu_seconds[self._account] += (now - self._since) * self.devices
        self._since = now
