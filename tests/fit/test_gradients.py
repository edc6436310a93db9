"""What ``fit`` trains with is the method: its gradient is the naive twin's, and stops being it when the method is broken."""

import lightning as L
import pytest
import tiny
import torch
from helpers.bugs import down_projection_stands_still, first_order, updated_before_scored

from ttt_lit.train.run import assemble
from ttt_lit.ttt.naive import sequence_nll_naive


class FirstStepOfC(L.Callback):
    """Weights, tokens and gradient of the first optimiser step of stage C."""

    def __init__(self):
        self.tokens, self.weights, self.gradients = [], None, None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.plan.name == "C" and self.gradients is None:
            self.tokens.append(batch["tokens"])
            if self.weights is None:
                self.spec, self.inner = module.stage_spec(module.plan), module.inner
                self.weights = {n: p.detach().clone() for n, p in module.model.decoder.named_parameters()}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if module.plan.name == "C" and self.gradients is None:
            self.gradients = {n: p.grad.clone() for n, p in module.model.decoder.named_parameters()}


def largest_error(world, runs):
    parts = assemble(tiny.arguments(world, runs, "--model.validation.every_share=0", steps=10), command="fit")
    spy = FirstStepOfC()
    parts.trainer.callbacks.append(spy)
    parts.trainer.fit(parts.module, datamodule=parts.data)
    weights = {name: value.double().requires_grad_() for name, value in spy.weights.items()}
    losses = [
        sequence_nll_naive(
            weights, spy.spec, row, mode="meta", chunk=tiny.CHUNK, inner_lr=spy.inner.lr, clip=spy.inner.clip
        )
        for row in torch.cat(spy.tokens)
    ]
    torch.stack(losses).mean().backward()
    return max(
        float((spy.gradients[name] - w.grad).norm() / w.grad.norm()) for name, w in weights.items() if w.grad.norm() > 0
    )


def test_the_gradient_of_an_optimiser_step_is_the_naive_twins(world, tmp_path):
    """Over two micro-batches of two sequences, in float32."""
    assert largest_error(world, tmp_path) < 1e-4


@pytest.mark.parametrize("bug", [first_order, down_projection_stands_still, updated_before_scored])
def test_a_broken_method_shows_in_what_fit_trains_with(world, tmp_path, monkeypatch, bug):
    bug(monkeypatch)
    assert largest_error(world, tmp_path) > 1e-3
