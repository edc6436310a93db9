"""Token losses of an imported network under another attention, and while it learns. Nothing is trained and nothing is kept.

Everything reads blocks as they are streamed: tokens (B, T + 1), input position p predicts token p + 1. Losses are nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import LayerSpec, ModelSpec
from ttt_lit.ops.cross_entropy import linear_nll
from ttt_lit.ttt.engine import read_suffix
from ttt_lit.ttt.scan import SequenceLoss, check_chunks
from ttt_lit.ttt.settings import EngineConfig

Layers = Sequence[LayerSpec]
Tables = list[tuple[Tensor, Tensor]]


@torch.no_grad()
def token_losses(decoder: Decoder, layers: Layers, tokens: Tensor, *, first: int = 0) -> Tensor:
    """(B, T − first): losses at input positions ``first`` and later, every layer attending as ``layers`` says, without prime MLPs."""
    x, tables = _embedded(decoder, tokens)
    return _score(decoder, _through(decoder, layers, x, tables, 0), tokens, first)


@torch.no_grad()
def losses_with_one_other(
    decoder: Decoder, layers: Layers, others: Mapping[int, LayerSpec], tokens: Tensor, *, first: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """For each index of ``others`` the ``token_losses`` of the network in which that layer alone attends as ``others`` says.

    What lies below that layer is computed once for all: half the work of as many whole passes.
    """
    x, tables = _embedded(decoder, tokens)
    for index in range(max(others) + 1):
        if index in others:
            branch = _block(decoder, index, x, tables, others[index])
            yield index, _score(decoder, _through(decoder, layers, branch, tables, index + 1), tokens, first)
        x = _block(decoder, index, x, tables, layers[index])


@torch.no_grad()
def fresh_context_losses(
    decoder: Decoder, layers: Layers, tokens: Tensor, *, window: int, stride: int, has_bos: bool
) -> Tensor:
    """(T − window − stride,): losses of one block's positions from window + stride on, of a model that has forgotten what lies far back.

    Pieces of ``stride`` positions are read on their own, each after the ``window`` tokens before it: a position has window to
    window + stride − 1 tokens before itself, and ``has_bos`` puts the block's first token in front of them. tokens (1, T + 1).
    """
    length, bos = tokens.shape[1] - 1, tokens[0, :1] if has_bos else tokens[0, :0]
    assert 0 < window + stride < length, "no position is cut"
    starts = range(window + stride, length, stride)
    pieces = [torch.cat([bos, tokens[0, start - window : min(start + stride, length) + 1]]) for start in starts]
    # As many together as the block itself has tokens; the last may be shorter and goes alone.
    together = max(1, length // len(pieces[0]))
    whole = len(pieces) if len(pieces[-1]) == len(pieces[0]) else len(pieces) - 1
    batches = [pieces[low : min(low + together, whole)] for low in range(0, whole, together)]
    batches += [pieces[whole:]] if whole < len(pieces) else []
    first = window + len(bos)
    return torch.cat([token_losses(decoder, layers, torch.stack(batch), first=first).flatten() for batch in batches])


@torch.no_grad()
def losses_while_learning(
    decoder: Decoder, spec: ModelSpec, tokens: Tensor, *, rates: Sequence[float], chunk: int, clip: float
) -> Iterator[tuple[float, SequenceLoss]]:
    """For each inner rate, what reading with updates gives; ``spec`` has the TTT layers. What does not learn is read once for all rates."""
    decoder.set_spec(spec)
    check_chunks(tokens.shape[1] - 1, chunk, decoder)
    x, tables = _embedded(decoder, tokens)
    start = spec.suffix_start
    for index in range(start):
        x = _block(decoder, index, x, tables, spec.layers[index])
    x = decoder.block(start).attend(x, *tables[start], layer=spec.layers[start])
    for rate in rates:
        nll, lengths = read_suffix(
            decoder,
            x,
            tokens[:, 1:],
            tables,
            exact=False,  # nobody differentiates through the updates
            chunk=chunk,
            inner_lr=rate,
            clip=clip,
            rule="sgd",
            engine=EngineConfig(compile=False),
        )
        yield rate, SequenceLoss(nll, lengths)


def _embedded(decoder: Decoder, tokens: Tensor) -> tuple[Tensor, Tables]:
    x = decoder.embed(tokens[:, :-1])
    return x, decoder.rope(x.shape[1], x)


def _block(decoder: Decoder, index: int, x: Tensor, tables: Tables, layer: LayerSpec) -> Tensor:
    return decoder.block(index)(x, *tables[index], layer=layer, use_prime=False)


def _through(decoder: Decoder, layers: Layers, x: Tensor, tables: Tables, start: int) -> Tensor:
    for index in range(start, len(layers)):
        x = _block(decoder, index, x, tables, layers[index])
    return x


def _score(decoder: Decoder, x: Tensor, tokens: Tensor, first: int) -> Tensor:
    return linear_nll(decoder.norm(x[:, first:]), decoder.head_weight, tokens[:, 1 + first :])
