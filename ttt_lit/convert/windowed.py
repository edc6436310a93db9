"""Dense attention → sliding window: a change of the description that touches no tensor, and learned sinks, which begin without effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from ttt_lit.model.spec import LayerSpec, ModelSpec


def windowed(spec: ModelSpec, window: int | None, *, sink_tokens: int = 0, keep: Collection[int] = ()) -> ModelSpec:
    """The same model in which no layer sees further than ``window`` tokens (None: as imported).

    A layer that already has a smaller window keeps it, and every layer keeps its RoPE base: only what a query sees changes. Sinks are for
    layers that had full attention: one that was trained with a window never saw keys so far away, and is hurt by them.

    Args:
        spec: the model as imported.
        window: tokens that a query sees, itself included.
        sink_tokens: tokens from the first on that stay visible, at their true distance, in the full-attention layers that are narrowed.
        keep: indices of layers that are left as they are.

    Raises:
        ValueError: sinks or kept layers without a window, or a layer that the model has not.
    """
    if window is None:
        if sink_tokens or keep:
            raise ValueError(
                f"windowed: got sink_tokens {sink_tokens} and keep {sorted(keep)} without a window, expected a window beside them"
            )
        return spec
    if unknown := sorted(set(keep) - set(range(spec.num_layers))):
        raise ValueError(f"windowed: keep has layers {unknown}, expected indices from 0 to {spec.num_layers - 1}")
    return spec.with_layers(
        tuple(
            layer if index in keep else _narrowed(layer, window, sink_tokens) for index, layer in enumerate(spec.layers)
        )
    )


def with_sink_logits(spec: ModelSpec, layers: Collection[int]) -> ModelSpec:
    """The same model with a learned sink for each query head of these layers; at zero it changes nothing."""
    return spec.with_layers(
        tuple(
            dataclasses.replace(layer, sink_logit=True) if index in layers else layer
            for index, layer in enumerate(spec.layers)
        )
    )


def with_windows(spec: ModelSpec, windows: Collection[int | None]) -> ModelSpec:
    """The same model with these windows, one for each layer, and without sinks: no imported model has any."""
    pairs = zip(spec.layers, windows, strict=True)
    return spec.with_layers(tuple(dataclasses.replace(layer, window=window, sink_tokens=0) for layer, window in pairs))


def preserves_function(before: ModelSpec, after: ModelSpec, context: int) -> bool:
    """Whether two descriptions of the same weights compute the same function on ``context`` tokens: every query sees the same keys."""
    return all(_reach(a, context) == _reach(b, context) for a, b in zip(before.layers, after.layers, strict=True))


def _narrowed(layer: LayerSpec, window: int, sink_tokens: int) -> LayerSpec:
    if layer.window is not None and layer.window <= window:
        return layer
    return dataclasses.replace(layer, window=window, sink_tokens=sink_tokens if layer.window is None else 0)


def _reach(layer: LayerSpec, context: int) -> tuple[int, int]:
    """Window and sinks as far as they matter on ``context`` tokens: together they may cover everything."""
    if layer.window is None or layer.window + layer.sink_tokens >= context:
        return context, 0
    return layer.window, layer.sink_tokens
