"""Mistakes that an implementation of the method could make, each planted in the running code by ``monkeypatch``.

None of them is silly: each leaves shapes, dtypes and most losses plausible.
"""

import torch

import ttt_lit.ops.attention as attention
import ttt_lit.ttt.inner as inner
import ttt_lit.ttt.scan as scan
from ttt_lit.model.attention import KeyValues
from ttt_lit.model.decoder import Decoder
from ttt_lit.model.mlp import MLPWeights


def _detach(weights_by_layer):
    return {i: MLPWeights(*(w.detach() for w in weights)) for i, weights in weights_by_layer.items()}


def first_order(patch):
    """The inner gradient is a constant to the outer one."""
    step = scan.sgd_step
    patch.setattr(scan, "sgd_step", lambda fast, gradients, **k: step(fast, _detach(gradients), **k))


def clip_without_derivative(patch):
    """The clip's factor is a constant to the outer gradient."""
    factor = inner.clip_factor
    patch.setattr(inner, "clip_factor", lambda squared, clip: factor(squared, clip).detach())


def clip_of_the_batch(patch):
    """One norm over all sequences of the batch."""
    factor = inner.clip_factor
    patch.setattr(inner, "clip_factor", lambda s, clip: factor(s.sum().expand_as(s), clip))


def window_off_by_one(patch):
    """Each query sees one token more than its window."""
    visible = attention.visible
    patch.setattr(attention, "visible", lambda q, k, window, d=None: visible(q, k, window and window + 1, d))


def updated_before_scored(patch):
    """A chunk is scored with weights that have learnt from it: the loss sees its own targets."""
    step = scan.inner_step

    def leak(decoder, x, targets, rope, past, fast, mode, lr, clip):
        _, _, new, norm = step(decoder, x, targets, rope, past, fast, mode, lr, clip)
        nll, carried = scan.chunk_loss(decoder, x, targets, rope, past, new, torch.is_grad_enabled())
        return nll, carried, new, norm

    patch.setattr(scan, "inner_step", leak)


def carried_keys_detached(patch):
    """Keys and values are constants to later chunks also for the outer gradient."""
    chunk_loss = scan.chunk_loss

    def cut(*args):
        nll, carried = chunk_loss(*args)
        return nll, {i: KeyValues(kv.keys.detach(), kv.values.detach()) for i, kv in carried.items()}

    patch.setattr(scan, "chunk_loss", cut)


def past_forgotten(patch):
    """The past is forgotten at every chunk."""
    chunk_loss = scan.chunk_loss
    patch.setattr(scan, "chunk_loss", lambda d, x, t, rope, past, *rest: chunk_loss(d, x, t, rope, {}, *rest))


def down_projection_stands_still(patch):
    """Two of the three matrices learn."""
    step = scan.sgd_step

    def partial(fast, gradients, **settings):
        new, norm = step(fast, gradients, **settings)
        return {i: MLPWeights(w.gate, w.up, fast[i].down) for i, w in new.items()}, norm

    patch.setattr(scan, "sgd_step", partial)


def positions_restart_with_every_chunk(patch):
    """Each chunk is rotated as if it began the text."""
    rope = Decoder.rope

    def restart(self, length, like):
        chunk = 8 if length % 8 == 0 else 4
        return [tuple(t[:chunk].repeat(length // chunk, 1) for t in tables) for tables in rope(self, length, like)]

    patch.setattr(Decoder, "rope", restart)


BUGS = [
    first_order,
    clip_without_derivative,
    clip_of_the_batch,
    window_off_by_one,
    updated_before_scored,
    carried_keys_detached,
    past_forgotten,
    down_projection_stands_still,
    positions_restart_with_every_chunk,
]
