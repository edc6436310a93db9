"""Measures at both ends of every stage how much worse than the imported model the network reads, and says so."""

from __future__ import annotations

from typing import Literal

import lightning as L

from ttt_lit import metrics
from ttt_lit.metrics import Inner
from ttt_lit.record.measured import Damage
from ttt_lit.train.damage import damage, damage_modes, describe, hiding_window, position_curves
from ttt_lit.train.divergence import stop_unless_finite
from ttt_lit.train.evaluation import trained_inner
from ttt_lit.train.module import TTTModule
from ttt_lit.train.stages import Context


class DamageLog(L.Callback):
    """Stands behind StageTransition, which enters the stage. Without the imported model's losses (StartValidation) it does nothing.

    Booked as validation.
    """

    def on_train_epoch_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        if module.history.imported and not module.history.stage(module.plan.name).damage:
            with module.ledger.account("validation"):
                self._measure(trainer, module, "start")

    def on_validation_epoch_end(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        if not module.history.imported:
            return
        self._measure(trainer, module, "end")
        entries = module.history.stage(module.plan.name).damage
        for inner in dict.fromkeys(entry.inner for entry in entries):
            what = f"stage {module.plan.name}: nats per token above the imported model, updates {inner}"
            trainer.print(f"{what}: {describe(entries, inner)}")

    def _measure(self, trainer: L.Trainer, module: TTTModule, when: Literal["start", "end"]) -> None:
        stage = module.history.stage(module.plan.name)
        stage.damage = [entry for entry in stage.damage if entry.when != when]
        for context in module.damage_contexts:
            self._measure_context(trainer, module, when, context)

    def _measure_context(
        self, trainer: L.Trainer, module: TTTModule, when: Literal["start", "end"], context: Context
    ) -> None:
        plan, tokens = module.plan, module.size.context(context)
        modes = damage_modes(module.evaluation_modes(), context=tokens, chunk=plan.chunk)
        curves = position_curves(trainer, module, context, modes)
        imported = module.history.imported[context]
        window = hiding_window(plan, module.start.spec, context=tokens)
        for inner, curve in curves.items():
            entry = Damage(when=when, context=context, inner=inner, **damage(curve, imported, window=window))
            module.history.stage(plan.name).damage.append(entry)
            self._log(trainer, context, inner, entry)
        # The other setting is not trained in this stage: a loss there that is no number is a finding, not the end of the run.
        trained = trained_inner(plan.config.mode)
        losses = {inner: float(curve.mean()) for inner, curve in curves.items() if inner == trained}
        stop_unless_finite(trainer, module, f"loss at the {when} of stage {plan.name}", context=tokens, losses=losses)

    def _log(self, trainer: L.Trainer, context: Context, inner: Inner, entry: Damage) -> None:
        if trainer.is_global_zero and trainer.logger is not None:
            parts = {part: value for part in metrics.DAMAGE_PARTS if (value := getattr(entry, part)) is not None}
            values = {metrics.damage(context, inner, part): value for part, value in parts.items()}
            trainer.logger.log_metrics(values, step=trainer.global_step)
