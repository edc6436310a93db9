"""Token losses of sequences under TTT-E2E: the prefix once, then the suffix chunk by chunk with fast weights.

Every function works on a whole batch; fast weights carry a leading batch axis, so each sequence learns on its own. ``naive.py``
holds the same computation in its most obvious form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ttt_lit.model.attention import KeyValues
from ttt_lit.model.decoder import Decoder
from ttt_lit.model.mlp import MLPWeights
from ttt_lit.model.spec import Mode
from ttt_lit.ops.cross_entropy import token_nll, token_nll_in_pieces
from ttt_lit.ttt.inner import FastWeights, check_mode, sgd_step
from ttt_lit.ttt.rerun import rerun

Past = dict[int, KeyValues]
"""Layer index → carried keys and values of the suffix."""


@dataclass(frozen=True)
class SequenceLoss:
    """What reading a batch of sequences gives."""

    token_nll: Tensor
    """(B, T) nats; each token scored before the update of its own chunk."""
    update_norms: Tensor
    """(chunks − 1, B) ‖ΔW‖ of each inner step that a later chunk sees; no rows where nothing is updated."""

    @property
    def loss(self) -> Tensor:
        """Mean over tokens and sequences, summed in float64. Chunks are equally long, so it is the mean of chunk losses (eq. 6)."""
        return self.token_nll.mean(dtype=torch.float64)


def sequence_loss(
    decoder: Decoder, tokens: Tensor, *, mode: Mode, chunk: int, inner_lr: float, clip: float, recompute: bool
) -> SequenceLoss:
    """Read tokens (B, T+1) and score each of the T next-token predictions.

    ``chunk`` tokens form one inner mini-batch and must divide T in the modes that update. ``recompute`` drops each prefix block's and
    each chunk's graph after its forward and rebuilds it in the backward: memory then grows per chunk by one copy of the fast weights
    and the carried keys only. Without grad mode nothing is kept: updates are made and their graph is dropped.
    """
    check_mode(mode)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = decoder.embed(inputs)
    tables = decoder.rope(inputs.shape[1], x)
    updates = mode in ("meta", "first_order")
    if updates:
        check_chunks(inputs.shape[1], chunk, decoder)
    start = decoder.spec.suffix_start if updates else decoder.spec.num_layers
    run_block = _checkpointed if recompute and torch.is_grad_enabled() else _direct
    for index in range(start):
        x = run_block(_block, decoder, index, x, tables[index], mode != "none")
    if not updates:
        nll = token_nll_in_pieces(decoder.norm(x), decoder.head_weight, targets, piece=chunk)
        return SequenceLoss(nll, nll.new_zeros(0, nll.shape[0]))
    return _scan_chunks(
        decoder, x, targets, tables, mode=mode, chunk=chunk, inner_lr=inner_lr, clip=clip, recompute=recompute
    )


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


def _scan_chunks(
    decoder: Decoder,
    x: Tensor,
    targets: Tensor,
    tables: list[tuple[Tensor, Tensor]],
    *,
    mode: Mode,
    chunk: int,
    inner_lr: float,
    clip: float,
    recompute: bool,
) -> SequenceLoss:
    fast = initial_fast_weights(decoder, x.shape[0])
    past: Past = {}
    losses, norms = [], []
    run = functools.partial(rerun, parameters=_suffix_parameters(decoder)) if recompute and x.requires_grad else _direct
    bounds = range(0, x.shape[1], chunk)
    for low in bounds:
        span = slice(low, low + chunk)
        rope = {
            i: (tables[i][0][span], tables[i][1][span])
            for i in range(decoder.spec.suffix_start, decoder.spec.num_layers)
        }
        args = (decoder, x[:, span], targets[:, span], rope, past, fast)
        if low == bounds[-1]:  # the last update would be seen by nobody
            nll, _ = run(chunk_loss, *args, False)
        else:
            nll, past, fast, norm = run(inner_step, *args, mode, inner_lr, clip)
            norms.append(norm.detach())
        losses.append(nll)
    nll = torch.cat(losses, dim=1)
    return SequenceLoss(nll, torch.stack(norms) if norms else nll.new_zeros(0, nll.shape[0]))


def initial_fast_weights(decoder: Decoder, batch: int) -> FastWeights:
    """W0 of every TTT layer, seen once per sequence."""
    layers = decoder.spec.layers
    return {
        index: MLPWeights(*(w.expand(batch, -1, -1) for w in decoder.block(index).fast_mlp(layers[index]).weights()))
        for index in decoder.spec.ttt_layers
    }


def chunk_loss(
    decoder: Decoder,
    x: Tensor,
    targets: Tensor,
    rope: dict[int, tuple[Tensor, Tensor]],
    past: Past,
    fast: FastWeights,
    twice: bool,
) -> tuple[Tensor, Past]:
    """Token losses (B, C) of one chunk from the prefix's output x (B, C, D), and the keys and values that the next chunk carries."""
    carried: Past = {}
    for index, (cos, sin) in rope.items():
        x, carried[index] = decoder.block(index).read(
            x, cos, sin, past.get(index), layer=decoder.spec.layers[index], fast=fast.get(index), twice=twice
        )
    return token_nll(decoder.norm(x), decoder.head_weight, targets), carried


def inner_step(
    decoder: Decoder,
    x: Tensor,
    targets: Tensor,
    rope: dict[int, tuple[Tensor, Tensor]],
    past: Past,
    fast: FastWeights,
    mode: Mode,
    lr: float,
    clip: float,
) -> tuple[Tensor, Past, FastWeights, Tensor]:
    """Score a chunk, then take one SGD step on its mean loss. Returns (token losses, carried past, new fast weights, ‖ΔW‖ (B,)).

    The inner gradient is with respect to the fast weights alone: carried keys and values are constants inside it. In mode ``meta``
    with grad mode on, the step itself is differentiable in everything: the weights, the clip, the chunk and the carried past.
    """
    outer = torch.is_grad_enabled()
    exact = outer and mode == "meta"
    with torch.enable_grad():
        if not outer:  # evaluation: a graph of this chunk only
            fast = {i: MLPWeights(*(w.detach().requires_grad_() for w in weights)) for i, weights in fast.items()}
        nll, carried = chunk_loss(decoder, x, targets, rope, past, fast, exact)
        flat = [w for weights in fast.values() for w in weights]
        gradients = torch.autograd.grad(nll.mean(dim=1).sum(), flat, create_graph=exact, retain_graph=outer)
    grouped = {i: MLPWeights(*gradients[3 * n : 3 * n + 3]) for n, i in enumerate(fast)}
    new, norm = sgd_step(fast, grouped, lr=lr, clip=clip)
    if not outer:
        nll = nll.detach()
        carried = {i: KeyValues(kv.keys.detach(), kv.values.detach()) for i, kv in carried.items()}
    return nll, carried, new, norm


def _block(decoder: Decoder, index: int, x: Tensor, rope: tuple[Tensor, Tensor], use_prime: bool) -> Tensor:
    return decoder.block(index)(x, *rope, layer=decoder.spec.layers[index], use_prime=use_prime)


def _checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _direct(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _suffix_parameters(decoder: Decoder) -> list[Tensor]:
    """What a chunk reads by itself: the suffix, the final norm and the head."""
    suffix = decoder.layers[decoder.spec.suffix_start :]
    return [*suffix.parameters(), *decoder.norm.parameters(), decoder.head_weight]
