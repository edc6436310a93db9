"""Runs one fit and writes what every optimiser step saw: the loss and every parameter's full gradient. Started by torchrun or alone."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import lightning as L
import torch

from callbacks.stage_checkpoint import StageCheckpoint
from ttt_lit.train.parallel import gather
from ttt_lit.train.resume import resume_file
from ttt_lit.train.run import assemble


class Spy(L.Callback):
    def __init__(self) -> None:
        self.steps: list[dict] = []
        self.rates: list[tuple] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        named = dict(module.model.decoder.named_parameters())
        gathered = gather({name: p.grad for name, p in named.items() if p.grad is not None})
        gradients = {name: gradient.clone() for name, gradient in gathered}  # clipping works in place
        self.rates.append((module.plan.name, dict(module.rates), module.inner_lr))
        self.steps.append({"stage": module.plan.name, "mode": module.plan.config.mode, "gradients": gradients})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if module.report is not None and self.steps:
            self.steps[-1]["loss"] = module.report.loss
            self.steps[-1]["norm"] = module.report.grad_norm


class SkewedClock(L.Callback):
    """Rank 1's clock runs twice as fast: decisions from time must still be the same on both ranks."""

    def on_train_start(self, trainer, module) -> None:
        module.ledger._clock = lambda: time.monotonic() * (1 + trainer.global_rank)


class Unplug(L.Callback):
    """Ends the process after a number of optimiser steps, as a lost machine does: nothing is cleaned up."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.steps and module.at_boundary:
            os._exit(0)


def main(output: str, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    stop = int(os.environ.get("TEST_UNPLUG_AFTER", "0"))
    parts = assemble(arguments, command="fit")
    spy = Spy()
    parts.trainer.callbacks.append(spy)
    for callback in parts.trainer.callbacks:
        if stop and isinstance(callback, StageCheckpoint):
            callback.every_seconds = 0
    if os.environ.get("TEST_SKEW_CLOCKS"):
        parts.trainer.callbacks.insert(0, SkewedClock())
    if stop:
        parts.trainer.callbacks.append(Unplug(stop))
    resume = resume_file(parts.run.folder)
    parts.trainer.fit(parts.module, datamodule=parts.data, ckpt_path=str(resume) if resume else None)
    torch.save(spy.rates, f"{output}.rates{parts.trainer.global_rank}")
    final = dict(gather(dict(parts.module.model.decoder.named_parameters())))
    if parts.trainer.is_global_zero:
        sharded = sum(hasattr(p, "full_tensor") for p in parts.module.model.parameters())
        history = parts.module.history.state_dict()
        torch.save({"steps": spy.steps, "sharded": sharded, "history": history, "final": final}, Path(output))
    if torch.distributed.is_initialized():
        # A rank that leaves with its group's threads running may be ended by them (seen once on a busy machine).
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
