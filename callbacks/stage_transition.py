"""Takes the network from one stage to the next and proves, on a fixed batch, what that did to its function."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from ttt_lit.model.spec import Mode, ModelSpec
from ttt_lit.train.divergence import stop_unless_finite
from ttt_lit.train.module import TTTModule
from ttt_lit.train.optim import zero_state
from ttt_lit.train.transition import TransitionProof, prove_transition


class StageTransition(L.Callback):
    """Enters each stage once; after a resume it only restores the stage that the run was in.

    Args:
        sequences: held-out sequences of the next stage's context on which a transition is proved.
    """

    def __init__(self, sequences: int = 2) -> None:
        if sequences < 1:
            raise ValueError(f"StageTransition.sequences: got {sequences}, expected at least 1")
        self.sequences = sequences

    def on_train_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        if module.entered >= 0:
            module.enter_stage(module.entered)

    def on_train_epoch_start(self, trainer: L.Trainer, module: TTTModule) -> None:  # type: ignore[override]
        index = trainer.current_epoch
        if index == module.entered:
            return
        plan = module.plans[index]
        with module.ledger.account("validation"):
            proof = self._prove(module, index)
        module.history.stage(plan.name).transition = proof.record(plan)
        # A conversion that must preserve the function and gives no number is wrong itself; that is said below.
        for when, loss in (("before", proof.before), *(() if proof.preserves else (("after", proof.after),))):
            what = f"loss of a fixed batch {when} the transition into stage {plan.name}"
            stop_unless_finite(trainer, module, what, context=plan.context, losses={"off": loss})
        text = f"stage {plan.name}: {proof.describe(plan.context)}"
        if not proof.holds:
            raise RuntimeError(f"{text}; a conversion that preserves the function must agree to {proof.tolerance}")
        if trainer.is_global_zero:
            trainer.print(text)
        if plan.config.carry == "params":
            zero_state(module.optimizers().optimizer)  # type: ignore[union-attr]
        module.enter_stage(index)

    def _prove(self, module: TTTModule, index: int) -> TransitionProof:
        plan = module.plans[index]
        tokens = self._fixed_batch(module, plan.context)
        if index == 0:
            # A checkpoint that came with prime MLPs computes them; freshly inserted ones are what is to be proved silent.
            known = module.came_with_prime
            before: tuple[ModelSpec, Mode] = (module.start.stored, "static" if known else "none")
        else:
            old = module.plans[index - 1]
            before = module.stage_spec(old), old.config.mode
        return prove_transition(
            module.model, tokens, before=before, after=(module.stage_spec(plan), plan.config.mode), piece=plan.chunk
        )

    def _fixed_batch(self, module: TTTModule, context: int) -> Tensor:
        """Held-out sequences, the same on every rank and for any number of ranks."""
        stream = module.datamodule.open(module.held_out(self.sequences))
        return torch.cat([batch["tokens"][:, : context + 1] for batch in stream]).to(module.device)
