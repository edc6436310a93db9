"""Runs one fit and writes what every optimiser step saw: the loss and every parameter's full gradient. Started by torchrun or alone."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch

from ttt_lit.train.parallel import gather
from ttt_lit.train.run import assemble


class Spy(L.Callback):
    def __init__(self) -> None:
        self.steps: list[dict] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        named = dict(module.model.decoder.named_parameters())
        gathered = gather({name: p.grad for name, p in named.items() if p.grad is not None})
        gradients = {name: gradient.clone() for name, gradient in gathered}  # clipping works in place
        self.steps.append({"stage": module.plan.name, "mode": module.plan.config.mode, "gradients": gradients})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if module.report is not None and self.steps:
            self.steps[-1]["loss"] = module.report.loss
            self.steps[-1]["norm"] = module.report.grad_norm


def main(output: str, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    parts = assemble(arguments, command="fit")
    spy = Spy()
    parts.trainer.callbacks.append(spy)
    parts.trainer.fit(parts.module, datamodule=parts.data)
    if parts.trainer.is_global_zero:
        sharded = sum(hasattr(p, "full_tensor") for p in parts.module.model.parameters())
        torch.save({"steps": spy.steps, "sharded": sharded, "history": parts.module.history.state_dict()}, Path(output))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
