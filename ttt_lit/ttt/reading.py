"""One reading of a batch, chunk by chunk: what chunks hand to one another, one chunk's inner step, and one chunk's adjoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ttt_lit.model.decoder import Decoder
from ttt_lit.model.mlp import MLPWeights
from ttt_lit.ops.carried_attention import Attended
from ttt_lit.ops.cross_entropy import linear_nll, nll_adjoint, nll_with_gradient
from ttt_lit.ops.wide import without_autocast
from ttt_lit.ttt.chunk import KeyValues, LayerInput, LayerResult, RunLayer, layer_kind
from ttt_lit.ttt.dual import Dual, FastMLP, norm
from ttt_lit.ttt.inner import Factors, FastWeights, InnerRule, Step, normalised_step, sgd_step
from ttt_lit.ttt.sums import HEAD, GradientSums, Key


class Slow(NamedTuple):
    """The weights that do not change while reading, cut from the outer graph."""

    layers: dict[int, dict[str, Tensor]]
    """Suffix layer → parameters by name inside the block."""
    norm: Tensor
    head: Tensor

    def named(self) -> Iterator[tuple[Key, Tensor]]:
        """All but the head, whose gradient the loss gives directly."""
        yield (None, "norm.weight"), self.norm
        for i, of_layer in self.layers.items():
            for name, w in of_layer.items():
                yield (i, name), w


class Chunk(NamedTuple):
    number: int
    span: slice
    """Its tokens."""
    is_last: bool
    """Nobody would see its update, so none is made."""


class Reading:
    """Settings of one reading, and what it leaves behind: keys and values, attention's results, products of matrices.

    Calls are not re-entrant: one thread, one sweep, then its adjoints.
    """

    def __init__(
        self,
        decoder: Decoder,
        targets: Tensor,
        tables: list[tuple[Tensor, Tensor]],
        *,
        chunk: int,
        lr: float,
        clip: float,
        rule: InnerRule,
        residual_bytes: float,
        run: RunLayer,
    ) -> None:
        assert rule in get_args(InnerRule)
        spec = decoder.spec
        self._spec, self._targets, self._tables, self._run = spec, targets, tables, run
        self._lr, self._clip, self._rule, self._chunk = lr, clip, rule, chunk
        self._dtype = _compute_dtype(decoder.norm.weight.dtype, targets.device)
        self._kinds = {
            i: layer_kind(spec, i, device=targets.device, dtype=self._dtype)
            for i in range(spec.suffix_start, spec.num_layers)
        }
        self._keys: dict[int, KeyValues] = {}
        self._attended: dict[tuple[int, int], Attended] = {}
        self._products: dict[int, dict[int, list[Tensor]]] = {}
        self._bytes_left = residual_bytes
        self._device = targets.device.type
        self._autocast = (torch.get_autocast_dtype(self._device), torch.is_autocast_enabled(self._device))

    @property
    def num_chunks(self) -> int:
        return self._targets.shape[1] // self._chunk

    def chunk(self, index: int) -> Chunk:
        return Chunk(index, slice(index * self._chunk, (index + 1) * self._chunk), index == self.num_chunks - 1)

    def chunks(self) -> Iterator[Chunk]:
        return map(self.chunk, range(self.num_chunks))

    # Forward ------------------------------------------------------------------------------------------------------------------

    def score(self, chunk: Chunk, x: Tensor, slow: Slow, fast: FastWeights, *, keep: bool) -> Tensor:
        """Token losses (B, C) of a chunk that learns nothing."""
        with torch.no_grad(), self._as_called():
            inputs = self._inputs(chunk, {i: FastMLP(w) for i, w in fast.items()})
            hidden, results = self._read(x[:, chunk.span], slow, inputs)
            self._remember(chunk, results, keep=keep)
            return linear_nll(hidden.value, slow.head, self._targets[:, chunk.span])

    def inner_step(
        self, chunk: Chunk, x: Tensor, slow: Slow, fast: FastWeights, *, keep: bool
    ) -> tuple[Tensor, FastWeights, Step, dict[int, Factors]]:
        """Score a chunk, then take one step on its mean loss: (token losses (B, C), new fast weights, the step, its factors).

        The inner gradient is with respect to the fast weights alone: carried keys and values are constants inside it.
        """
        span = chunk.span
        with torch.enable_grad(), self._as_called():
            probes = {i: self._probes(w, x[:, span]) for i, w in fast.items()}
            learning = {i: FastMLP(w, probes=probes[i]) for i, w in fast.items()}
            hidden, results = self._read(x[:, span], slow, self._inputs(chunk, learning))
        with torch.no_grad(), self._as_called():
            nll, d_hidden = nll_with_gradient(hidden.value, slow.head, self._targets[:, span], 1 / self._chunk)
        flat = torch.autograd.grad(hidden.value, [p for of_layer in probes.values() for p in of_layer], d_hidden)
        factors = {}
        for n, i in enumerate(probes):
            inputs = results[i].inputs
            assert inputs is not None
            factors[i] = Factors(*(t.detach() for t in inputs), *flat[3 * n : 3 * n + 3])
        with without_autocast(self._device):  # the weights and their steps stay in float32
            if self._rule == "sgd":
                new, step = sgd_step(fast, factors, lr=self._lr, clip=self._clip)
            else:
                new, step = normalised_step(fast, factors, lr=self._lr)
        self._remember(chunk, results, keep=keep)
        return nll, new, step, factors

    # Backward -----------------------------------------------------------------------------------------------------------------

    def carried_cotangents(self) -> dict[int, KeyValues]:
        """Zeros, to sum up what later chunks ask of the keys and values of earlier ones; float32 at least."""
        return {
            i: KeyValues(*(torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in kv))
            for i, kv in self._keys.items()
        }

    def chunk_adjoint(
        self,
        chunk: Chunk,
        x: Tensor,
        slow: Slow,
        fast: FastWeights,
        direction: FastWeights | None,
        d_nll: Tensor,
        carried: dict[int, KeyValues],
        sums: GradientSums,
    ) -> tuple[Tensor, FastWeights]:
        """Gradient of Σ d_nll · nll + ⟨direction, inner gradient⟩ + ⟨carried, keys and values⟩ in x and in the fast weights.

        d_nll (B, C). The gradient of slow weights goes to ``sums``, that of the chunk's past is added to ``carried``.
        """
        x = x[:, chunk.span].detach().requires_grad_()
        leaves = {i: MLPWeights(*(w.detach().requires_grad_() for w in weights)) for i, weights in fast.items()}
        learning = {i: FastMLP(w, None if direction is None else direction[i]) for i, w in leaves.items()}
        with torch.enable_grad(), self._as_called():
            inputs = self._inputs(chunk, learning, again=True)
            hidden, results = self._read(x, slow, inputs)
        head = slow.head
        with torch.no_grad(), self._as_called():
            cotangents = nll_adjoint(
                *hidden,
                head,
                self._targets[:, chunk.span],
                d_nll,
                seed=1 / self._chunk,
                d_head=sums.running(HEAD, head) if head.requires_grad else None,
            )
        self._forget(chunk)
        outputs = [(out, c) for out, c in zip(hidden, cotangents, strict=True) if out is not None and c is not None]
        if not chunk.is_last:
            outputs += self._asked_by_later_chunks(chunk, results, carried)
        return self._distribute(chunk, x, leaves, slow, inputs, outputs, carried, sums)

    def _asked_by_later_chunks(
        self, chunk: Chunk, results: dict[int, LayerResult], carried: dict[int, KeyValues]
    ) -> list[tuple[Tensor, Tensor]]:
        pairs = []
        for i, cotangents in carried.items():
            state = results[i].attention
            assert state is not None
            pairs += [(t, c[:, :, chunk.span].to(t.dtype)) for t, c in zip(state.new, cotangents, strict=True)]
        return pairs

    def _distribute(
        self,
        chunk: Chunk,
        x: Tensor,
        leaves: FastWeights,
        slow: Slow,
        inputs: dict[int, LayerInput],
        outputs: list[tuple[Tensor, Tensor]],
        carried: dict[int, KeyValues],
        sums: GradientSums,
    ) -> tuple[Tensor, FastWeights]:
        """One reverse pass, and each gradient to where it belongs."""
        learning = [(key, w) for key, w in slow.named() if w.requires_grad]
        pasts = [(i, given.past) for i, given in inputs.items() if given.past is not None]
        wanted = [x, *(w for weights in leaves.values() for w in weights)]
        wanted += [t for _, past in pasts for t in past]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in outputs],
                [*wanted, *(w for _, w in learning)],
                [c for _, c in outputs],
                allow_unused=True,
                materialize_grads=False,
            )
        )
        d_x = next(found)
        d_fast = {i: MLPWeights(*(next(found) for _ in weights)) for i, weights in leaves.items()}
        for i, _ in pasts:
            sinks, near = self._past_spans(i, chunk)
            for total in carried[i]:
                gradient = next(found)
                total[:, :, :sinks] += gradient[:, :, :sinks]
                total[:, :, near] += gradient[:, :, sinks:]
        for (key, _), gradient in zip(learning, found, strict=True):
            sums.add(key, gradient)
        return d_x, d_fast

    # Shared -------------------------------------------------------------------------------------------------------------------

    def _as_called(self) -> AbstractContextManager[None]:
        """The autocast under which the reading was begun. Its cache of casts would hand a cast made without graph to a graph."""
        dtype, enabled = self._autocast
        return torch.autocast(self._device, dtype=dtype, enabled=enabled, cache_enabled=False)

    def _read(self, x: Tensor, slow: Slow, inputs: dict[int, LayerInput]) -> tuple[Dual, dict[int, LayerResult]]:
        """x (B, C, D) through the suffix: what the head reads (B, C, D), and each layer's result."""
        stream, results = Dual(x), {}
        for i, given in inputs.items():
            results[i] = self._run(self._kinds[i], slow.layers[i], stream, given)
            stream = results[i].x
        return norm(stream, slow.norm, eps=self._spec.norm_eps, unit_offset=self._spec.norm_unit_offset), results

    def _inputs(self, chunk: Chunk, fast: dict[int, FastMLP], *, again: bool = False) -> dict[int, LayerInput]:
        """What every layer reads. ``again``: the carried tensors get gradients of their own, and known results are used."""
        inputs = {}
        for i, kind in self._kinds.items():
            past = self._past(i, chunk) if kind.with_attention else None
            if again and past is not None:
                past = KeyValues(*(t.detach().requires_grad_() for t in past))
            products = self._products.get(chunk.number, {}).get(i) if again else None
            cos, sin = (table[chunk.span] for table in self._tables[i])
            # A step that is taken again finds its attention's result too.
            attended = self._attended.get((chunk.number, i))
            inputs[i] = LayerInput((cos, sin), past, attended, fast.get(i), products)
        return inputs

    def _past(self, index: int, chunk: Chunk) -> KeyValues | None:
        """The carried keys and values that the chunk's first query still sees, and none that it does not; sinks come first."""
        sinks, near = self._past_spans(index, chunk)
        if not sinks and near.start == near.stop:
            return None
        pieces = ((t[:, :, :sinks], t[:, :, near]) for t in self._keys[index])
        return KeyValues(*(torch.cat(both, dim=2) if sinks else both[1] for both in pieces))

    def _past_spans(self, index: int, chunk: Chunk) -> tuple[int, slice]:
        """The tokens whose keys are carried: so many sinks, and those of the window; all of the latter where no gap is between them."""
        kind, stop = self._kinds[index], chunk.span.start
        start = 0 if kind.window is None else max(0, stop - (kind.window - 1))
        return (kind.sink_tokens, slice(start, stop)) if kind.sink_tokens < start else (0, slice(0, stop))

    def _remember(self, chunk: Chunk, results: dict[int, LayerResult], *, keep: bool) -> None:
        """Keys and values for later chunks; with ``keep`` also what spares the adjoint computation."""
        for i, result in results.items():
            if result.attention is None:
                continue
            if i not in self._keys:
                length = self._targets.shape[1]
                self._keys[i] = KeyValues(
                    *(t.new_empty(*t.shape[:2], length, t.shape[3]) for t in result.attention.new)
                )
            for whole, new in zip(self._keys[i], result.attention.new, strict=True):
                whole[:, :, chunk.span] = new.detach()
            if keep:
                self._attended[chunk.number, i] = Attended(*(t.detach() for t in result.attention.attended))
        if keep:
            made = {i: [t.detach() for t in result.products] for i, result in results.items()}
            size = sum(t.nbytes for of_layer in made.values() for t in of_layer)
            if size <= self._bytes_left:
                self._bytes_left -= size
                self._products[chunk.number] = made

    def _forget(self, chunk: Chunk) -> None:
        """What spared the adjoint computation is of no further use."""
        self._products.pop(chunk.number, None)
        for i in self._kinds:
            self._attended.pop((chunk.number, i), None)

    def _probes(self, weights: MLPWeights, x: Tensor) -> MLPWeights:
        """Zeros without memory, one for the output of each product."""
        batch, tokens = x.shape[:2]
        zero = torch.zeros((), dtype=self._dtype, device=x.device)
        return MLPWeights(*(zero.expand(batch, tokens, w.shape[1]).requires_grad_() for w in weights))


def _compute_dtype(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """What matrix products are computed in: autocast leaves float64 alone."""
    if weights != torch.float64 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return weights
