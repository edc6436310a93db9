"""Keeps the ledger: what each stage consumed, to the token, and where every second went. The first callback of a run."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from ttt_lit.train.compile_clock import CompileClock
from ttt_lit.train.module import TTTModule


class FairnessBudget(L.Callback):
    """Counts tokens, bytes, steps and device-seconds, and refuses a stage that ends anywhere but on its budget.

    The data stream ends a stage: after exactly its micro-batches for a token budget; for a GPU-hour budget at an optimiser step, the
    one during which its time ran out or the next, because the stream is read one micro-batch ahead. Compute includes waiting for
    data; validation, checkpoints and compilation have accounts of their own.
    """

    def __init__(self) -> None:
        self._compile_clock: CompileClock | None = None

    def on_fit_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        self._compile_clock = CompileClock(module.ledger)

    def teardown(self, trainer: L.Trainer, module: TTTModule, stage: str) -> None:  # type: ignore[override]
        if self._compile_clock is not None:
            self._compile_clock.detach()
            self._compile_clock = None

    def on_train_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        if module.entered >= 0 and trainer.current_epoch == module.entered:  # resumed in the middle of a stage
            module.ledger.start_stage(module.plan.name)

    def on_train_epoch_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        module.ledger.start_stage(module.plans[trainer.current_epoch].name)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, module: TTTModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        ledger, plan, report = module.ledger, module.plan, module.report
        closes = (ledger.spent(plan.name).micro_batches + 1) % plan.accumulate == 0
        tokens = batch["tokens"].shape[0] * plan.context * trainer.world_size
        # Bytes are summed over ranks once an optimiser step, so the whole step's are booked with its last micro-batch.
        ledger.count_micro_batch(tokens=tokens, num_bytes=report.num_bytes if closes and report is not None else 0)
        if closes:
            assert report is not None
            if report.tokens != plan.tokens_per_step:
                raise RuntimeError(
                    f"stage {plan.name}: a step saw {report.tokens} tokens, expected {plan.tokens_per_step}"
                )
            ledger.count_optimizer_step()

    def on_validation_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        if module.ledger.stage is not None:
            module.ledger.switch("validation")

    def on_validation_end(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        if module.ledger.stage is not None:
            module.ledger.switch("compute")

    def on_train_epoch_end(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        plan, spent = module.plan, module.ledger.spent(module.plan.name)
        if plan.tokens is not None and spent.tokens != plan.tokens:
            raise RuntimeError(f"stage {plan.name} ended after {spent.tokens} tokens, expected exactly {plan.tokens}")
        if not module.history.stage(plan.name).validations:
            raise RuntimeError(
                f"stage {plan.name} ended without its validation; remove the run's folder and run it again"
            )

    def on_train_end(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        module.ledger.stop()
