"""Floating-point operations per token by an analytic count of the matrix multiplications, exact for causal windows.

A multiply-add is two operations. Norms, rotary embedding, softmax and the optimiser are not counted, nor are keys that
a kernel computes only to mask them: this is the work the method needs, so a wasteful kernel never looks fast.

A part's cost in training, as a multiple of its forward pass (forward + gradient of input + gradient of weights = 3):

=========================  ===========  ==========================  =====================================
part                       no updates   exact (``meta``)            ``first_order``
=========================  ===========  ==========================  =====================================
below the lowest TTT layer 3            3                           3
linear maps and head       3            6: forward + inner gradient 4: the inner gradient is not
                                        of the input, differentiated differentiated
fast weights               3            9: their gradient as well   5
attention scores           3            9: backward is twice        5
=========================  ===========  ==========================  =====================================

The last chunk's update would feed nothing: it is skipped, so its tokens count as "no updates".
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ttt_lit.model.spec import LayerSpec, Mode, ModelSpec

# Multiples of the forward pass: (static linear maps and head, fast weights, attention scores).
_PLAIN = (1, 1, 1)
_WITH_INNER_GRADIENT = (2, 3, 3)
_TRAINING = {"none": (3, 3, 3), "static": (3, 3, 3), "meta": (6, 9, 9), "first_order": (4, 5, 5)}


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

    @property
    def total(self) -> float:
        return self.head + sum(layer.total for layer in self.layers)

    def parts(self) -> dict[str, float]:
        """Sums over layers by part, and the head."""
        names = [field.name for field in dataclasses.fields(LayerFlops)]
        return {name: sum(getattr(layer, name) for layer in self.layers) for name in names} | {"head": self.head}


def key_count(start: int, stop: int, window: int | None) -> int:
    """Query-key pairs of the queries ``start … stop - 1`` under a causal mask; ``window`` includes the query itself."""
    return _keys_before(stop, window) - _keys_before(start, window)


def average_keys(context: int, window: int | None) -> float:
    """Keys per query, averaged over a sequence."""
    return key_count(0, context, window) / context


def forward_flops(spec: ModelSpec, *, context: int, mode: Mode, chunk: int | None = None) -> FlopCount:
    """One evaluation pass. In ``meta`` and ``first_order`` the inner loop runs, so its gradient is included.

    Parameters:
        spec: the model as this stage has it (windows).
        context: tokens per sequence.
        mode: what the inner loop does; ``none`` leaves prime MLPs out.
        chunk: inner mini-batch in tokens; needed where the inner loop runs.
    """
    updating = _WITH_INNER_GRADIENT if _updates(spec, mode) else _PLAIN
    return _count(spec, context, mode, chunk, prefix=_PLAIN, updating=updating, final=_PLAIN)


def training_flops(
    spec: ModelSpec, *, context: int, mode: Mode, chunk: int | None = None, recompute: bool = False
) -> FlopCount:
    """Training: forward, inner gradients and outer backward; parameters as in ``forward_flops``.

    ``recompute`` adds the second forward pass of activation checkpointing: every layer once, without the head; where
    the inner loop runs, each chunk's whole graph once, its head and inner gradient included.
    """
    updates = _updates(spec, mode)
    kind = _TRAINING[mode] if updates else _TRAINING["none"]
    count = _count(spec, context, mode, chunk, prefix=_TRAINING["none"], updating=kind, final=_TRAINING["none"])
    if not recompute:
        return count
    again = forward_flops(spec, context=context, mode=mode, chunk=chunk)
    layers = tuple(_add(once, twice) for once, twice in zip(count.layers, again.layers, strict=True))
    return FlopCount(layers=layers, head=count.head + (again.head if updates else 0.0))


def _updates(spec: ModelSpec, mode: Mode) -> bool:
    if mode not in _TRAINING:
        raise ValueError(f"flops: got mode {mode!r}, expected one of {tuple(_TRAINING)}")
    updates = mode in ("meta", "first_order")
    if updates and not spec.ttt_layers:
        raise ValueError(f"flops: mode {mode!r} needs a layer with fast weights, but the model has none")
    return updates


def _count(
    spec: ModelSpec,
    context: int,
    mode: Mode,
    chunk: int | None,
    *,
    prefix: tuple[int, int, int],
    updating: tuple[int, int, int],
    final: tuple[int, int, int],
) -> FlopCount:
    """Sum over the tokens before the last chunk (``updating``) and those of the last chunk (``final``), per token."""
    if context < 1:
        raise ValueError(f"flops: got context {context}, expected at least 1 token")
    boundary = _last_chunk_start(context, chunk) if updating != final else 0
    layers = []
    for index, layer in enumerate(spec.layers):
        if index < spec.suffix_start:
            layers.append(_scaled(_layer(spec, layer, mode, 0, context), layer, prefix, context))
            continue
        before = _scaled(_layer(spec, layer, mode, 0, boundary), layer, updating, context)
        last = _scaled(_layer(spec, layer, mode, boundary, context), layer, final, context)
        layers.append(_add(before, last))
    head = 2 * spec.hidden_size * spec.vocab_size
    head_tokens = boundary * updating[0] + (context - boundary) * final[0]
    return FlopCount(layers=tuple(layers), head=head * head_tokens / context)


def _layer(spec: ModelSpec, layer: LayerSpec, mode: Mode, start: int, stop: int) -> LayerFlops:
    """Forward operations of the tokens ``start … stop - 1``, summed."""
    tokens = stop - start
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    prime = layer.prime.intermediate_size if layer.prime is not None and mode != "none" else 0
    return LayerFlops(
        attention_projections=2 * spec.hidden_size * (2 * queries + 2 * keys) * tokens,
        attention_scores=4 * queries * key_count(start, stop, layer.window),
        mlp=6 * spec.hidden_size * spec.intermediate_size * tokens,
        prime=6 * spec.hidden_size * prime * tokens,
    )


def _scaled(flops: LayerFlops, layer: LayerSpec, factors: tuple[int, int, int], context: int) -> LayerFlops:
    static, fast, attention = (factor / context for factor in factors)
    return LayerFlops(
        attention_projections=flops.attention_projections * static,
        attention_scores=flops.attention_scores * attention,
        mlp=flops.mlp * (fast if layer.fast == "mlp" else static),
        prime=flops.prime * (fast if layer.fast == "prime" else static),
    )


def _add(left: LayerFlops, right: LayerFlops) -> LayerFlops:
    names = [field.name for field in dataclasses.fields(LayerFlops)]
    return LayerFlops(**{name: getattr(left, name) + getattr(right, name) for name in names})


def _last_chunk_start(context: int, chunk: int | None) -> int:
    if chunk is None or chunk < 1 or context % chunk:
        raise ValueError(f"flops: got chunk {chunk} for context {context}, expected a whole number of chunks")
    return context - chunk


def _keys_before(stop: int, window: int | None) -> int:
    width = stop if window is None else min(window, stop)
    return width * (width + 1) // 2 + (stop - width) * width
