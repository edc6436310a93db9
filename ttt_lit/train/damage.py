"""Damage: by how much a network reads worse than the imported model, on the same held-out tokens, inside its window and beyond it.

A conversion breaks something before it can gain anything, and training on heals before it teaches. Measured at both ends of every stage,
the two can be told apart. Few blocks suffice, since the difference is taken token by token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ttt_lit.metrics import Inner
from ttt_lit.model.spec import Mode
from ttt_lit.train.module import TTTModule
from ttt_lit.train.parallel import sum_over_ranks
from ttt_lit.train.stages import Context


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


def damage(curve: Tensor, imported: Sequence[float], *, window: int | None) -> dict[str, float | None]:
    """``inside``, ``beyond`` and ``nats`` of the record's ``Damage``, from mean losses at each position.

    ``window``: tokens that the stage's narrowed layers see; None, or one that spans the context, leaves nothing beyond.
    """
    difference = curve - torch.tensor(imported, dtype=torch.float64)
    spans = window is None or window >= len(difference)
    return {
        "inside": float(difference[:window].mean()),
        "beyond": None if spans else float(difference[window:].mean()),
        "nats": float(difference.mean()),
    }


def describe(entries: Sequence[dict[str, Any]], inner: Inner) -> str:
    """For the console, in one setting of the inner loop: each context's damage at the start of a stage → at its end."""
    found = {(entry["context"], entry["when"]): entry for entry in entries if entry["inner"] == inner}
    said = []
    for context in dict.fromkeys(context for context, _ in found):
        start, end = found[context, "start"], found[context, "end"]
        if end["beyond"] is None:
            said.append(f"{context} {start['nats']:+.3f} → {end['nats']:+.3f}")
            continue
        inside, beyond = (f"{start[part]:+.3f} → {end[part]:+.3f}" for part in ("inside", "beyond"))
        said.append(f"{context} {inside} inside the window, {beyond} beyond it")
    return "; ".join(said)
