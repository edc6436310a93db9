"""Damage: by how much a network reads worse than the imported model, on the same held-out tokens, inside its window and beyond it.

A conversion breaks something before it can gain anything, and training on heals before it teaches. Measured at both ends of every stage,
the two can be told apart. Few blocks suffice, since the difference is taken token by token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import lightning as L
import torch
from torch import Tensor

from ttt_lit.convert.windowed import preserves_function
from ttt_lit.metrics import DAMAGE_PARTS, Inner
from ttt_lit.model.spec import Mode, ModelSpec
from ttt_lit.record.measured import Damage
from ttt_lit.train.module import TTTModule
from ttt_lit.train.parallel import sum_over_ranks
from ttt_lit.train.stages import Context, StagePlan


@torch.no_grad()
def position_curves(
    trainer: L.Trainer, module: TTTModule, context: Context, modes: Mapping[Inner, Mode]
) -> dict[Inner, Tensor]:
    """Mean loss at each position, (T,) float64 on CPU, of the network as it stands, over all ranks (a collective call)."""
    tokens, blocks = module.size.context(context), module.validation.damage_blocks
    sums: dict[Inner, Tensor] = {
        inner: torch.zeros(tokens, dtype=torch.float64, device=module.device) for inner in modes
    }
    request = module.validation_request(blocks, context)
    for batch in module.datamodule.open(request, rank=trainer.global_rank, world_size=trainer.world_size):
        with trainer.precision_plugin.val_step_context():
            for inner, mode in modes.items():
                out = module.read(batch["tokens"].to(module.device), mode=mode, inner_lr=module.inner.lr)
                sums[inner] += out.token_nll.sum(0, dtype=torch.float64)
    return {inner: sum_over_ranks(total).cpu() / blocks for inner, total in sums.items()}


def damage_modes(modes: Mapping[Inner, Mode], *, context: int, chunk: int) -> dict[Inner, Mode]:
    """Those in which a context can be read: updates need whole chunks, and a chunk after the first."""
    chunked = context % chunk == 0 and context > chunk
    return {inner: mode for inner, mode in modes.items() if inner == "off" or chunked}


def hiding_window(plan: StagePlan, imported: ModelSpec, *, context: int) -> int | None:
    """The stage's window, or None where it hides nothing on that many tokens: alone, or together with its sinks, it spans them."""
    return None if preserves_function(imported, plan.network(imported), context) else plan.window


def damage(curve: Tensor, imported: Sequence[float], *, window: int | None) -> dict[str, float | None]:
    """``inside``, ``beyond`` and ``nats`` of the record's ``Damage``, from mean losses at each position; None for one that is not finite.

    ``window``: positions before which the stage's layers see all that the imported model's see; None leaves nothing beyond.
    """
    difference = curve - torch.tensor(imported, dtype=torch.float64)
    parts = {"inside": difference[:window], "nats": difference} | (
        {} if window is None else {"beyond": difference[window:]}
    )
    means = {name: float(part.mean()) for name, part in parts.items()}
    return {name: mean if math.isfinite(mean := means.get(name, math.nan)) else None for name in DAMAGE_PARTS}


def describe(entries: Sequence[Damage], inner: Inner) -> str:
    """For the console, in one setting of the inner loop: each context's damage at the start of a stage → at its end."""
    found = {(entry.context, entry.when): entry for entry in entries if entry.inner == inner}
    said = []
    for context in dict.fromkeys(context for context, _ in found):
        start, end = found[context, "start"], found[context, "end"]
        inside, beyond, nats = (
            " → ".join(_signed(getattr(each, part)) for each in (start, end)) for part in DAMAGE_PARTS
        )
        spans = start.beyond is None and end.beyond is None
        said.append(f"{context} {nats}" if spans else f"{context} {inside} inside the window, {beyond} beyond it")
    return "; ".join(said)


def _signed(value: float | None) -> str:
    return "not finite" if value is None else f"{round(value, 3) + 0.0:+.3f}"  # no "-0.000"
