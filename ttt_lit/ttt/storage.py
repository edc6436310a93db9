"""Where the fast weights of all chunks stay between the sweep and its adjoint.

A store is filled chunk by chunk and read from the last chunk to the first, once: what has been read is freed. ``W_i`` scores chunk i;
``W_0`` is a view of the parameters and is never copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ttt_lit.model.mlp import MLPWeights
from ttt_lit.ttt.inner import Factors, FastWeights, undo_step
from ttt_lit.ttt.settings import FastWeightStorage

Resume = Callable[[int, FastWeights], FastWeights]
"""Take the inner step of chunk i again: W_i → W_{i+1}."""


class FastWeightStore(Protocol):
    def save(self, chunk: int, weights: FastWeights, step: tuple[dict[int, Factors], Tensor] | None) -> None:
        """Keep W of ``chunk``; ``step``: the factors and the rate of the inner step that made it (None: W_0)."""

    def load(self, chunk: int) -> FastWeights:
        """W of ``chunk``. Called for the last chunk first, then for every one before it in turn."""


def make_store(policy: FastWeightStorage, num_chunks: int, resume: Resume) -> FastWeightStore:
    if policy == "factors":
        return _Factors()
    if policy == "two_level":
        return _TwoLevel(num_chunks, resume)
    return _Every() if policy == "every" else _Offload()


class _Every:
    """Each chunk's copy."""

    def __init__(self) -> None:
        self._kept: dict[int, FastWeights] = {}

    def save(self, chunk: int, weights: FastWeights, step: tuple[dict[int, Factors], Tensor] | None) -> None:
        self._kept[chunk] = weights

    def load(self, chunk: int) -> FastWeights:
        return self._kept.pop(chunk)


class _Offload:
    """Each chunk's copy on the host, but for W_0. Copies wait in the queue of the computation; pinned memory makes them fast."""

    def __init__(self) -> None:
        self._kept: dict[int, FastWeights] = {}

    def save(self, chunk: int, weights: FastWeights, step: tuple[dict[int, Factors], Tensor] | None) -> None:
        self._kept[chunk] = weights if step is None else _mapped(weights, _to_host)

    def load(self, chunk: int) -> FastWeights:
        device = next(iter(self._kept[0].values())).gate.device
        return _mapped(self._kept.pop(chunk), lambda w: w.to(device, non_blocking=True))


class _Factors:
    """The last copy, and the update of every chunk as factors; weights are rebuilt by undoing one update after the other."""

    def __init__(self) -> None:
        self._steps: dict[int, tuple[dict[int, Factors], Tensor]] = {}
        self._first: FastWeights = {}
        self._last: tuple[int, FastWeights] = (0, {})
        self._current: tuple[int, FastWeights] = (0, {})

    def save(self, chunk: int, weights: FastWeights, step: tuple[dict[int, Factors], Tensor] | None) -> None:
        if step is None:
            self._first = weights
        else:
            self._steps[chunk] = step
        self._last = (chunk, weights)

    def load(self, chunk: int) -> FastWeights:
        if chunk == self._last[0]:
            self._current, self._last = self._last, (-1, {})
        elif chunk == 0:  # exact, whatever rounding the undone steps have left
            self._current = (0, self._first)
        else:
            above, weights = self._current
            assert above == chunk + 1, "weights are rebuilt from the last chunk to the first"
            self._current = (chunk, undo_step(weights, *self._steps.pop(above)))
        return self._current[1]


class _TwoLevel:
    """A copy at every k-th chunk, k = ceil(sqrt(chunks)); the steps between are taken again, one stretch at a time."""

    def __init__(self, num_chunks: int, resume: Resume) -> None:
        self._every = math.isqrt(max(0, num_chunks - 1)) + 1
        self._kept: dict[int, FastWeights] = {}
        self._stretch: dict[int, FastWeights] = {}
        self._resume = resume

    def save(self, chunk: int, weights: FastWeights, step: tuple[dict[int, Factors], Tensor] | None) -> None:
        if chunk % self._every == 0:
            self._kept[chunk] = weights

    def load(self, chunk: int) -> FastWeights:
        if chunk not in self._stretch:
            start = chunk - chunk % self._every
            self._stretch = {start: self._kept.pop(start)}
            for i in range(start, chunk):
                self._stretch[i + 1] = self._resume(i, self._stretch[i])
        return self._stretch.pop(chunk)


def _mapped(weights: FastWeights, function: Callable[[Tensor], Tensor]) -> FastWeights:
    return {i: MLPWeights(*(function(w) for w in matrices)) for i, matrices in weights.items()}


def _to_host(w: Tensor) -> Tensor:
    host = w.new_empty(w.shape, device="cpu", pin_memory=w.is_cuda)
    return host.copy_(w, non_blocking=True)
