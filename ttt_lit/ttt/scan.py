"""Token losses of sequences under TTT-E2E: what learns nothing once over the whole sequence, the rest chunk by chunk.

Every function works on a whole batch; fast weights carry a leading batch axis, so each sequence learns on its own. ``naive.py``
holds the same computation in its most obvious form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import Mode
from ttt_lit.ops.cross_entropy import linear_nll
from ttt_lit.ops.distillation import nll_and_kl
from ttt_lit.ttt.engine import read_suffix
from ttt_lit.ttt.inner import InnerRule, check_mode
from ttt_lit.ttt.settings import EngineConfig


class Teaching(NamedTuple):
    """What a frozen model says of the same tokens: constants to every gradient."""

    hidden: Tensor
    """(B, T, E) output of its final norm."""
    head: Tensor
    """(V, E)"""


@dataclass(frozen=True)
class SequenceLoss:
    """What reading a batch of sequences gives."""

    token_nll: Tensor
    """(B, T) nats; each token scored before the update of its own chunk."""
    update_norms: Tensor
    """(chunks − 1, B) ‖ΔW‖ of each inner step that a later chunk sees; no rows where nothing is updated."""
    token_kl: Tensor | None = None
    """(B, T) nats of KL(teacher ‖ model); None without a teacher."""

    @property
    def loss(self) -> Tensor:
        """Mean over tokens and sequences, summed in float64. Chunks are equally long, so it is the mean of chunk losses (eq. 6)."""
        return self.token_nll.mean(dtype=torch.float64)


def sequence_loss(
    decoder: Decoder,
    tokens: Tensor,
    *,
    mode: Mode,
    chunk: int,
    inner_lr: float,
    clip: float,
    rule: InnerRule = "sgd",
    engine: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
    teacher: Teaching | None = None,
) -> SequenceLoss:
    """Read tokens (B, T+1) and score each of the T next-token predictions.

    ``chunk`` tokens form one inner mini-batch and must divide T in the modes that update. ``engine`` says what is kept for the backward
    and changes no result. Without grad mode nothing is kept: updates are made and dropped. ``teacher``: what the model is compared with, in
    modes without updates.
    """
    check_mode(mode)
    assert teacher is None or mode in ("none", "static")
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    run = _checkpointed if engine.recompute_blocks and torch.is_grad_enabled() else _direct
    if mode in ("none", "static"):
        hidden, kl = read_whole(decoder, inputs, run=run, use_prime=mode != "none"), None
        if teacher is None:
            nll = linear_nll(hidden, decoder.head_weight, targets)
        else:
            nll, kl = nll_and_kl(hidden, decoder.head_weight, targets, *teacher)
        return SequenceLoss(nll, nll.new_zeros(0, nll.shape[0]), kl)
    check_chunks(inputs.shape[1], chunk, decoder)
    x = decoder.embed(inputs)
    tables = decoder.rope(inputs.shape[1], x)
    start = decoder.spec.suffix_start
    for index in range(start):
        x = run(_block, decoder, index, x, tables[index], True)
    # The lowest TTT layer's attention sees nothing that learns, so it belongs to what is read once.
    x = run(_attend, decoder, start, x, tables[start])
    nll, lengths = read_suffix(
        decoder,
        x,
        targets,
        tables,
        exact=mode == "meta",
        chunk=chunk,
        inner_lr=inner_lr,
        clip=clip,
        rule=rule,
        engine=engine,
    )
    return SequenceLoss(nll, lengths)


def _direct(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def read_whole(
    decoder: Decoder, inputs: Tensor, *, run: Callable[..., Any] = _direct, use_prime: bool = False
) -> Tensor:
    """The final norm's output (B, T, D) for tokens (B, T), nothing updated. ``run`` calls each block, or keeps its input alone."""
    x = decoder.embed(inputs)
    # Weights may be stored in half precision; the stream that layers add to is not.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    for index, table in enumerate(decoder.rope(inputs.shape[1], x)):
        x = run(_block, decoder, index, x, table, use_prime)
    hidden: Tensor = decoder.norm(x)
    return hidden


def check_chunks(length: int, chunk: int, decoder: Decoder) -> None:
    """ValueError unless ``length`` tokens are whole chunks and the network has TTT layers."""
    if chunk < 1 or length % chunk:
        raise ValueError(
            f"sequence length {length} is not a multiple of the chunk of {chunk} tokens: choose a context that the chunk divides"
        )
    if not decoder.spec.ttt_layers:
        raise ValueError(
            "the model has no TTT layers, so there is nothing to update: set ttt.layers, or use mode none or static"
        )


def _block(decoder: Decoder, index: int, x: Tensor, rope: tuple[Tensor, Tensor], use_prime: bool) -> Tensor:
    return decoder.block(index)(x, *rope, layer=decoder.spec.layers[index], use_prime=use_prime)


def _attend(decoder: Decoder, index: int, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    return decoder.block(index).attend(x, *rope, layer=decoder.spec.layers[index])


def _checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
