"""Floating-point operations per token: an exact count of the matrix products that the code makes, under the policy in use.

A multiply-add is two operations. Norms, rotary embedding, softmax, activation functions and the optimiser are not counted. Of attention,
masked pairs are not counted, nor are matrices of scores that a backward makes again because its forward did not keep them: a wasteful
kernel never looks fast. What a policy computes twice to save memory is counted.

Every product belongs to one kind (``_Kind``), and the tables below say how often the chunk-by-chunk reading makes it, in units of its
forward. A map of matrices alone costs one unit forward, one for the gradient of its input, one for that of its weights. With a tangent
along the fast weights there are two rows for each token, so each of the three doubles. docs/method.md derives the tables.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from ttt_lit.model.spec import LayerSpec, Mode, ModelSpec

Storage = Literal["every", "factors", "two_level", "offload"]
"""How the fast weights of all chunks are kept for the backward; two of the ways compute something again."""

_Kind = Literal["still", "slow", "first_fast", "fast", "head"]
"""``still``: a slow map below every fast weight. ``slow``: one whose input moves with the fast weights. ``first_fast``: gate and up of
the lowest fast MLP, whose input learns nothing. ``fast``: every other fast matrix."""


class _Pairs(NamedTuple):
    """Products of queries with keys: in units of all visible pairs, and of the pairs inside the chunk. A product is 2 d a pair and head."""

    visible: int
    inside: int = 0


class _Table(NamedTuple):
    """How often each kind of product is made for one chunk."""

    products: dict[_Kind, int]
    pairs: _Pairs


# Forward, and backward to the fast weights: the gradient of carried keys is not taken.
_SWEEP = _Table({"still": 1, "slow": 2, "first_fast": 2, "fast": 3, "head": 2}, _Pairs(4, 2))
_LAST_SWEEP = _Table({"still": 1, "slow": 1, "first_fast": 1, "fast": 1, "head": 1}, _Pairs(2))
# A step taken once more finds the results of its attention.
_STEP_AGAIN = _Table(_SWEEP.products, _Pairs(2, 2))
_STEP_UNDONE = _Table({"first_fast": 1, "fast": 1}, _Pairs(0))
# The primal products of an adjoint, which are not made where the sweep has kept their results.
_PRIMAL = _Table({"still": 1, "slow": 1, "first_fast": 1, "fast": 1}, _Pairs(0))
# Tangents and the reverse pass; the head's has the logits again.
_ADJOINT = _Table(
    {"still": 0 + 2, "slow": 1 + 4, "first_fast": 1 + 3, "fast": 2 + 5, "head": 2 + 4}, _Pairs(2 + 8, 2 + 4)
)
# A reverse pass without tangents: that of the last chunk, and of every chunk in first order.
_PLAIN_ADJOINT = _Table({"still": 2, "slow": 2, "first_fast": 2, "fast": 2, "head": 3}, _Pairs(4))


@dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """Floating-point operations of one layer."""

    attention_projections: float = 0.0
    attention_scores: float = 0.0
    mlp: float = 0.0
    prime: float = 0.0

    @property
    def total(self) -> float:
        return self.attention_projections + self.attention_scores + self.mlp + self.prime


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """Floating-point operations per token, averaged over a sequence."""

    layers: tuple[LayerFlops, ...]
    head: float
    teacher: float = 0.0
    """Of a second network that reads the same tokens and does not learn."""

    @property
    def total(self) -> float:
        return self.head + self.teacher + sum(layer.total for layer in self.layers)

    def parts(self) -> dict[str, float]:
        """Sums over layers by part, the head, and the teacher."""
        names = [field.name for field in dataclasses.fields(LayerFlops)]
        parts = {name: sum(getattr(layer, name) for layer in self.layers) for name in names}
        return parts | {"head": self.head, "teacher": self.teacher}


def key_count(start: int, stop: int, window: int | None, sink_tokens: int = 0) -> int:
    """Query-key pairs of the queries ``start … stop - 1`` under a causal mask; ``window`` includes the query itself.

    The first ``sink_tokens`` tokens are seen from outside of the window too.
    """
    return _keys_before(stop, window, sink_tokens) - _keys_before(start, window, sink_tokens)


def average_keys(context: int, window: int | None, sink_tokens: int = 0) -> float:
    """Keys per query, averaged over a sequence."""
    return key_count(0, context, window, sink_tokens) / context


def forward_flops(spec: ModelSpec, *, context: int, mode: Mode, chunk: int | None = None) -> FlopCount:
    """One evaluation pass. In ``meta`` and ``first_order`` the inner loop runs, so its gradient is included.

    Parameters:
        spec: the model as this stage has it (windows).
        context: tokens per sequence.
        mode: what the inner loop does; ``none`` leaves prime MLPs out.
        chunk: inner mini-batch in tokens; needed where the inner loop runs.
    """
    whole = _Whole(multiple=1, again=False, head=1)
    if not _updates(spec, context, mode):
        return _count(spec, context, mode, whole, None)
    size, chunks = _chunks(context, chunk)
    return _count(spec, context, mode, whole, _Reading(size, [*[[_SWEEP]] * (chunks - 1), [_LAST_SWEEP]]))


def training_flops(
    spec: ModelSpec,
    *,
    context: int,
    mode: Mode,
    chunk: int | None = None,
    recompute_blocks: bool = False,
    kept_chunks: int = 0,
    fast_weights: Storage = "every",
    teacher: ModelSpec | None = None,
) -> FlopCount:
    """Training: forward, inner gradients and outer backward; parameters as in ``forward_flops``, and the policy of the engine.

    Parameters:
        recompute_blocks: whether blocks that read whole sequences run again in the backward.
        kept_chunks: chunks, from the first on, whose matrix products the sweep keeps (``chunks_kept``).
        fast_weights: how the fast weights are kept.
        teacher: a model whose distribution is compared with, in modes without updates.
    """
    whole = _Whole(multiple=3, again=recompute_blocks, head=1 + 3)
    if not _updates(spec, context, mode):
        student = _count(spec, context, mode, whole, None)
        return student if teacher is None else dataclasses.replace(student, teacher=_teaching(teacher, context))
    if teacher is not None:
        raise ValueError(f"flops: got a teacher with mode {mode!r}, expected none or static")
    size, chunks = _chunks(context, chunk)
    if not 0 <= kept_chunks <= chunks:
        raise ValueError(f"flops: got {kept_chunks} kept chunks, expected 0 to {chunks}")
    work = [[_SWEEP, _ADJOINT if mode == "meta" else _PLAIN_ADJOINT] for _ in range(chunks - 1)]
    work.append([_LAST_SWEEP, _PLAIN_ADJOINT])
    for tables in work[kept_chunks:]:
        tables.append(_PRIMAL)
    for index, table in _repeated(fast_weights, chunks).items():
        work[index].append(table)
    return _count(spec, context, mode, whole, _Reading(size, work))


def _teaching(teacher: ModelSpec, context: int) -> float:
    """One forward; its logits are made again for the student's backward."""
    forward = forward_flops(teacher, context=context, mode="none")
    return forward.total + forward.head


def chunks_kept(spec: ModelSpec, *, tokens: int, chunks: int, number_bytes: int, budget_bytes: float) -> int:
    """Chunks whose matrix products fit into ``budget_bytes``; all are equally large, and the first ones are kept.

    Parameters:
        tokens: tokens of one chunk over all sequences of a micro-batch.
        number_bytes: bytes of one number in the results of matrix products.
    """
    return int(min(chunks, budget_bytes / (product_numbers(spec) * tokens * number_bytes)))


def product_numbers(spec: ModelSpec) -> int:
    """Numbers that the matrix products of the chunk-by-chunk reading give for one token, without head and attention."""
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    total = 0
    for index in range(spec.suffix_start, spec.num_layers):
        prime = spec.layers[index].prime
        total += 2 * spec.intermediate_size + spec.hidden_size
        total += 0 if prime is None else 2 * prime.intermediate_size + spec.hidden_size
        total += queries + 2 * keys + spec.hidden_size if index > spec.suffix_start else 0
    return total


class _Whole(NamedTuple):
    """How often the parts that read whole sequences are made."""

    multiple: int
    again: bool
    """Their forward once more, up to the last result that the backward needs."""
    head: int
    """Where nothing is read by chunks: in a backward the logits are made again."""


class _Reading(NamedTuple):
    """What is done chunk by chunk."""

    size: int
    work: list[list[_Table]]
    """For each chunk the tables that apply to it."""

    def products(self, kind: _Kind) -> int:
        """Times a product of this kind is made, for as many tokens as a chunk has."""
        return sum(table.products.get(kind, 0) for tables in self.work for table in tables)

    def pairs(self, layer: LayerSpec) -> int:
        """Query-key pairs, once for each product that is made of them."""
        total = 0
        for index, tables in enumerate(self.work):
            start, stop = index * self.size, (index + 1) * self.size
            visible = key_count(start, stop, layer.window, layer.sink_tokens)
            inside = key_count(0, self.size, layer.window, max(0, layer.sink_tokens - start))
            total += sum(table.pairs.visible * visible + table.pairs.inside * inside for table in tables)
        return total


def _repeated(storage: Storage, chunks: int) -> dict[int, _Table]:
    """Inner steps that a way of keeping the fast weights takes again or undoes, by chunk."""
    if storage not in get_args(Storage):
        raise ValueError(f"flops: got fast_weights {storage!r}, expected one of {get_args(Storage)}")
    if storage == "factors":
        return dict.fromkeys(range(1, chunks - 1), _STEP_UNDONE)
    if storage == "two_level":
        stretch = math.isqrt(chunks - 1) + 1
        return {index: _STEP_AGAIN for index in range(chunks - 1) if (index + 1) % stretch}
    return {}


def _updates(spec: ModelSpec, context: int, mode: Mode) -> bool:
    if mode not in get_args(Mode):
        raise ValueError(f"flops: got mode {mode!r}, expected one of {get_args(Mode)}")
    if context < 1:
        raise ValueError(f"flops: got context {context}, expected at least 1 token")
    updates = mode in ("meta", "first_order")
    if updates and not spec.ttt_layers:
        raise ValueError(f"flops: mode {mode!r} needs a layer with fast weights, but the model has none")
    return updates


def _chunks(context: int, chunk: int | None) -> tuple[int, int]:
    if chunk is None or chunk < 1 or context % chunk:
        raise ValueError(f"flops: got chunk {chunk} for context {context}, expected a whole number of chunks")
    return chunk, context // chunk


def _count(spec: ModelSpec, context: int, mode: Mode, whole: _Whole, reading: _Reading | None) -> FlopCount:
    start = spec.num_layers if reading is None else spec.suffix_start
    layers = []
    for index, layer in enumerate(spec.layers):
        if reading is None or index < start:
            layers.append(_whole_layer(spec, layer, context, mode, whole))
        elif index == start:
            below = _whole_attention(spec, layer, context, whole, ends=True)
            above = _read_mlps(spec, layer, reading, context, first=True)
            layers.append(dataclasses.replace(below, mlp=above.mlp, prime=above.prime))
        else:
            layers.append(_read_layer(spec, layer, reading, context))
    head = 2 * spec.hidden_size * spec.vocab_size
    times = whole.head if reading is None else reading.products("head") / len(reading.work)
    return FlopCount(layers=tuple(layers), head=head * times)


def _whole_layer(spec: ModelSpec, layer: LayerSpec, context: int, mode: Mode, whole: _Whole) -> LayerFlops:
    attention = _whole_attention(spec, layer, context, whole, ends=False)
    times = whole.multiple + whole.again
    # Nothing after the last product needs its result, unless it is normalised: then running again stops before it.
    spared = _matrix(spec, spec.intermediate_size) if whole.again and not spec.post_norms else 0
    prime = layer.prime.intermediate_size if layer.prime is not None and mode != "none" else 0
    return dataclasses.replace(
        attention,
        mlp=3 * _matrix(spec, spec.intermediate_size) * times - spared,
        prime=3 * _matrix(spec, prime) * times,
    )


def _whole_attention(spec: ModelSpec, layer: LayerSpec, context: int, whole: _Whole, *, ends: bool) -> LayerFlops:
    """``ends``: what is read whole ends with this attention."""
    times = whole.multiple + whole.again
    queries = spec.num_heads * spec.head_dim
    spared = _matrix(spec, queries) if ends and whole.again and not spec.post_norms else 0
    return LayerFlops(
        attention_projections=_projections(spec) * times - spared,
        attention_scores=4 * queries * average_keys(context, layer.window, layer.sink_tokens) * times,
    )


def _read_layer(spec: ModelSpec, layer: LayerSpec, reading: _Reading, context: int) -> LayerFlops:
    return dataclasses.replace(
        _read_mlps(spec, layer, reading, context, first=False),
        attention_projections=_projections(spec) * reading.products("slow") * reading.size / context,
        attention_scores=2 * spec.num_heads * spec.head_dim * reading.pairs(layer) / context,
    )


def _read_mlps(spec: ModelSpec, layer: LayerSpec, reading: _Reading, context: int, *, first: bool) -> LayerFlops:
    """``first``: of the lowest TTT layer."""

    def mlp(inner: int, into: _Kind, out: _Kind) -> float:
        times = 2 * reading.products(into) + reading.products(out)
        return _matrix(spec, inner) * times * reading.size / context

    fast: tuple[_Kind, _Kind] = ("first_fast" if first else "fast", "fast")
    below: _Kind = "still" if first and layer.fast == "mlp" else "slow"
    inner = layer.prime.intermediate_size if layer.prime is not None else 0
    return LayerFlops(
        mlp=mlp(spec.intermediate_size, *(fast if layer.fast == "mlp" else ("slow", "slow"))),
        prime=mlp(inner, *(fast if layer.fast == "prime" else (below, below))),
    )


def _matrix(spec: ModelSpec, inner: int) -> int:
    """One product of a token with a matrix between the residual stream and ``inner`` features."""
    return 2 * spec.hidden_size * inner


def _projections(spec: ModelSpec) -> int:
    """Queries, keys, values and output."""
    return _matrix(spec, 2 * (spec.num_heads + spec.num_kv_heads) * spec.head_dim)


def _keys_before(stop: int, window: int | None, sink_tokens: int = 0) -> int:
    width = stop if window is None else min(window, stop)
    near = width * (width + 1) // 2 + (stop - width) * width
    # The query ``window + r`` sees r + 1 tokens less, of which the sinks come back: a causal mask that is ``sink_tokens`` wide.
    return near + (_keys_before(stop - width, sink_tokens) if sink_tokens else 0)
