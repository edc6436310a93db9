"""The proof of a stage transition: one fixed batch, read in float32 before and after."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ttt_lit.convert.windowed import preserves_function
from ttt_lit.model.spec import Mode, ModelSpec
from ttt_lit.record.measured import Transition
from ttt_lit.train.parallel import reshard
from ttt_lit.train.stages import StagePlan
from ttt_lit.ttt.model import TTTModel

TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class TransitionProof:
    """What a transition did to the loss of one batch. Losses in nats per token, without inner updates."""

    before: float
    after: float
    preserves: bool
    """Whether the conversion must not change the function on this context."""
    changed: tuple[str, ...] = ()
    """What makes it another function, in words."""
    tolerance: float = TOLERANCE

    @property
    def jump(self) -> float:
        return self.after - self.before

    @property
    def holds(self) -> bool:
        """Written so that a NaN on either side fails."""
        return not self.preserves or abs(self.jump) <= self.tolerance

    def describe(self, context: int) -> str:
        """One line: both losses, and whether a jump is a mistake or what the conversion costs."""
        losses = f"loss on a fixed batch of {context} tokens {self.before:.6f} before, {self.after:.6f} after"
        if self.preserves:
            return f"{losses} (unchanged, {self.jump:+.2e})"
        return f"{losses} (not function-preserving, {' and '.join(self.changed)}: a jump of {self.jump:+.4f} nats per token)"

    def record(self, plan: StagePlan) -> Transition:
        """As the run's record has it."""
        numbers = {name: getattr(self, name) for name in ("preserves", "before", "after", "tolerance")}
        return Transition(kind=conversion(plan), **numbers)


def conversion(plan: StagePlan) -> str:
    """What a stage converts the network to, in words."""
    sinks = f" with {plan.sink_tokens} sinks" if plan.sink_tokens else ""
    attention = "attention as imported" if plan.window is None else f"window {plan.window}{sinks}"
    return f"{attention}, mode {plan.config.mode}, context {plan.context}"


def still(mode: Mode) -> Mode:
    """The mode without inner updates in which a stage's network is compared: prime MLPs computed or not, never updated."""
    return "none" if mode == "none" else "static"


def prove_transition(
    model: TTTModel, tokens: Tensor, *, before: tuple[ModelSpec, Mode], after: tuple[ModelSpec, Mode], piece: int
) -> TransitionProof:
    """Read tokens (B, T+1) as the old stage would and as the new one will; leaves the model with the new description.

    The conversion preserves the function where every query sees the same keys on this context (windows and sinks), and the prime MLPs are
    either in the same mode or add exactly zero.
    """
    (old_spec, old_mode), (new_spec, new_mode) = before, after
    same_reach = preserves_function(old_spec, new_spec, tokens.shape[1] - 1)
    same_prime = still(old_mode) == still(new_mode) or _prime_is_silent(model)
    losses = [_loss(model, tokens, spec, still(mode), piece) for spec, mode in (before, after)]
    changes = {"queries see other keys": not same_reach, "prime MLPs add to the stream": not same_prime}
    changed = tuple(what for what, is_so in changes.items() if is_so)
    return TransitionProof(before=losses[0], after=losses[1], preserves=not changed, changed=changed)


@torch.no_grad()
def _loss(model: TTTModel, tokens: Tensor, spec: ModelSpec, mode: Mode, piece: int) -> float:
    model.decoder.set_spec(spec)
    with torch.autocast(tokens.device.type, enabled=False):
        loss: float = model(tokens, mode=mode, chunk=piece, inner_lr=0.0, clip=0.0).loss.item()
    reshard(model)
    return loss


def _prime_is_silent(model: TTTModel) -> bool:
    """Whether every prime MLP adds exactly zero: zero down-projection and no post-norm that could revive it."""
    for block, layer in zip(model.decoder.layers, model.decoder.spec.layers, strict=True):
        if layer.prime is None:
            continue
        down: Tensor = block.get_parameter("prime_mlp.down_proj.weight").detach()
        full = down.full_tensor() if isinstance(down, DTensor) else down
        if layer.prime.post_norm or bool(full.any()):
            return False
    return True
