"""Dense attention → sliding window: a change of the description that touches no tensor."""

from __future__ import annotations

import dataclasses

from ttt_lit.model.spec import ModelSpec


def windowed(spec: ModelSpec, window: int | None) -> ModelSpec:
    """The same model in which no layer sees further than ``window`` tokens (None: as imported).

    A layer that already has a smaller window keeps it, and every layer keeps its RoPE base: only what a query sees changes.
    """
    if window is None:
        return spec
    return spec.with_layers(
        tuple(
            dataclasses.replace(layer, window=window if layer.window is None else min(window, layer.window))
            for layer in spec.layers
        )
    )


def preserves_function(before: ModelSpec, after: ModelSpec, context: int) -> bool:
    """Whether two descriptions of the same weights compute the same function on ``context`` tokens: equal windows up to the context."""
    return all(
        _reach(a.window, context) == _reach(b.window, context) for a, b in zip(before.layers, after.layers, strict=True)
    )


def _reach(window: int | None, context: int) -> int:
    return context if window is None else min(window, context)
