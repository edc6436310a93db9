"""Mistakes that an implementation of the method could make, each planted in the running code by ``monkeypatch``.

None of them is silly: each leaves shapes, dtypes and most losses plausible.
"""

import torch

import ttt_lit.ops.tiled_attention as tiled
import ttt_lit.ttt.dual as dual
import ttt_lit.ttt.engine as engine
import ttt_lit.ttt.reading as reading
from ttt_lit.model.decoder import Decoder
from ttt_lit.model.mlp import MLPWeights
from ttt_lit.ttt.reading import Reading


def first_order(patch):
    """The inner gradient is a constant to the outer one."""
    patch.setattr(engine, "step_adjoint", lambda *_: None)


def clip_without_derivative(patch):
    """The clip's factor is a constant to the outer gradient."""
    adjoint = engine.step_adjoint
    patch.setattr(
        engine,
        "step_adjoint",
        lambda a, w, v, step: adjoint(a, w, v, step._replace(bound=torch.zeros_like(step.bound))),
    )


def clip_of_the_batch(patch):
    """One norm over all sequences of the batch."""
    step = reading.sgd_step

    def together(fast, factors, *, lr, clip):
        _, free = step(fast, factors, lr=1.0, clip=0.0)
        norm = torch.linalg.vector_norm(free.length)
        rate = lr * (clip / norm if norm > clip else torch.ones_like(norm))
        return step(fast, factors, lr=float(rate), clip=0.0)

    patch.setattr(reading, "sgd_step", together)


def window_off_by_one(patch):
    """Each query sees one token more than its window."""
    tiles = tiled._tiles
    patch.setattr(tiled, "_tiles", lambda q, k, v, window, sinks: tiles(q, k, v, window and window + 1, sinks))
    spans = Reading._past_spans

    def wider(self, index, chunk):
        kinds = self._kinds
        self._kinds = {i: kind._replace(window=kind.window and kind.window + 1) for i, kind in kinds.items()}
        found = spans(self, index, chunk)
        self._kinds = kinds
        return found

    patch.setattr(Reading, "_past_spans", wider)


def updated_before_scored(patch):
    """A chunk is scored with weights that have learnt from it: the loss sees its own targets."""
    step, adjoint = Reading.inner_step, Reading.chunk_adjoint

    def leak(self, chunk, x, slow, fast, *, keep):
        _, new, *rest = step(self, chunk, x, slow, fast, keep=keep)
        return self.score(chunk, x, slow, new, keep=False), new, *rest

    def of_leak(self, chunk, x, slow, fast, *rest):
        new = fast if chunk.is_last else step(self, chunk, x, slow, fast, keep=False)[1]
        return adjoint(self, chunk, x, slow, new, *rest)

    patch.setattr(Reading, "inner_step", leak)
    patch.setattr(Reading, "chunk_adjoint", of_leak)


def carried_keys_detached(patch):
    """Keys and values are constants to later chunks also for the outer gradient."""
    patch.setattr(Reading, "_asked_by_later_chunks", lambda *_: [])


def past_forgotten(patch):
    """The past is forgotten at every chunk."""
    patch.setattr(Reading, "_past", lambda *_: None)


def down_projection_stands_still(patch):
    """Two of the three matrices learn."""
    step = reading.sgd_step

    def partial(fast, factors, **settings):
        new, taken = step(fast, factors, **settings)
        return {i: MLPWeights(w.gate, w.up, fast[i].down) for i, w in new.items()}, taken

    patch.setattr(reading, "sgd_step", partial)


def positions_restart_with_every_chunk(patch):
    """Each chunk is rotated as if it began the text."""
    rope = Decoder.rope

    def restart(self, length, like):
        chunk = 8 if length % 8 == 0 else 4
        return [tuple(t[:chunk].repeat(length // chunk, 1) for t in tables) for tables in rope(self, length, like)]

    patch.setattr(Decoder, "rope", restart)


def slope_of_the_gate_forgotten(patch):
    """The tangent of the gate passes its activation unchanged."""
    both = dual._activation_and_slope

    def flat(x, activation):
        value, slope = both(x, activation)
        return value, torch.ones_like(slope)

    patch.setattr(dual, "_activation_and_slope", flat)


def tangent_of_the_softmax_uncentred(patch):
    """The tangent of attention weights is not made to sum to zero."""
    jvp = tiled.jvp

    def uncentred(q, k, v, o, *rest):
        to, mu = jvp(q, k, v, o, *rest)
        return to + mu[..., None].to(o.dtype) * o, torch.zeros_like(mu)

    patch.setattr(tiled, "jvp", uncentred)


def adjoint_reads_the_weights_of_the_next_chunk(patch):
    """The adjoint rebuilds a chunk with fast weights that have already learnt from it."""
    kept = engine._Kept.__init__

    def shifted(self, reading_, *rest):
        kept(self, reading_, *rest)
        load, after = self.store.load, []

        def late(chunk):
            after.append(load(chunk))
            return after[max(0, len(after) - 2)]

        self.store.load = late

    patch.setattr(engine._Kept, "__init__", shifted)


def far_sinks_forgotten(patch):
    """Sinks are seen where they touch the carried window, and lost once they lie behind it."""
    spans = Reading._past_spans
    patch.setattr(Reading, "_past_spans", lambda self, index, chunk: (0, spans(self, index, chunk)[1]))


def near_sinks_seen_twice(patch):
    """Sinks are carried apart from a window that still holds them."""
    spans = Reading._past_spans

    def apart(self, index, chunk):
        sinks, near = spans(self, index, chunk)
        return max(sinks, min(self._kinds[index].sink_tokens, near.stop)), near

    patch.setattr(Reading, "_past_spans", apart)


def sinks_expire(patch):
    """Whole sequences and chunks: the window hides a sink that it has left behind."""
    tiles = tiled._tiles
    patch.setattr(tiled, "_tiles", lambda q, k, v, window, sinks: tiles(q, k, v, window, 0))


SINK_BUGS = [far_sinks_forgotten, near_sinks_seen_twice, sinks_expire]
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
    slope_of_the_gate_forgotten,
    tangent_of_the_softmax_uncentred,
    adjoint_reads_the_weights_of_the_next_chunk,
]
