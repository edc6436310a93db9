"""Config fields that several families spell alike: activations, kinds of layers, the rotary base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttt_lit.families.config_fields import read_float
from ttt_lit.model.spec import ModelSpec

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' name -> ours."""
FULL, SLIDING = LAYER_KINDS = ("full_attention", "sliding_attention")


def activation_name(ours: str) -> str:
    """transformers' name of one of our activations."""
    return next(theirs for theirs, activation in ACTIVATIONS.items() if activation == ours)


def read_layer_types(config: Mapping[str, Any], count: int) -> list[str] | None:
    """The kind of each of ``count`` layers, or None where the config does not list them."""
    kinds = config.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in LAYER_KINDS for kind in kinds):
        raise ValueError(f"config.json: layer_types needs {count} entries of {LAYER_KINDS}, got {str(kinds)[:200]}")
    return kinds


def read_rope_object(rope: Any, name: str) -> float | None:
    """The base that a rope object states, or None. Refuses every kind of scaling.

    Args:
        rope: value of ``rope_scaling``, ``rope_parameters`` or one layer type's part of it; null states nothing.
        name: what it is called in config.json.
    """
    if rope is None:
        return None
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: {name} is {rope!r}, expected an object or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("type", kind) != kind:
        raise ValueError(f"config.json: {name} asks for rope type {kind!r}; only 'default' (no scaling) is implemented")
    unknown = sorted(set(rope) - {"rope_type", "type", "rope_theta"})
    if unknown:
        raise ValueError(f"config.json: {name} has the fields {unknown}, which are not implemented")
    return read_float(rope, "rope_theta") if "rope_theta" in rope else None


def agreed_rope_base(stated: Mapping[str, float | None], *, default: float) -> float:
    """The one base that several places state; ``default`` where none does.

    Args:
        stated: name of the place in config.json -> base, or None.
    """
    bases = {name: base for name, base in stated.items() if base is not None}
    if len(set(bases.values())) > 1:
        text = ", ".join(f"{name} says {base}" for name, base in bases.items())
        raise ValueError(f"config.json: the places that state a RoPE base disagree: {text}; remove the wrong one")
    return next(iter(bases.values()), default)


def refuse_what_no_family_implements(config: Mapping[str, Any]) -> None:
    """ValueError for quantised weights and for dropout."""
    if config.get("quantization_config") is not None:
        raise ValueError("config.json: quantization_config is set; quantised checkpoints are not supported")
    if config.get("attention_dropout"):
        raise ValueError(
            f"config.json: attention_dropout is {config['attention_dropout']!r}; dropout is not implemented"
        )


def added_by_conversion(spec: ModelSpec) -> list[str]:
    """What conversions give to layers and no model class of transformers has, one entry each for an error message."""
    added = {
        "prime MLPs": [i for i, layer in enumerate(spec.layers) if layer.prime is not None],
        "fast weights": list(spec.ttt_layers),
        "attention sinks": [i for i, layer in enumerate(spec.layers) if layer.sink_tokens],
    }
    return [f"{what} (layers {layers})" for what, layers in added.items() if layers]


def differing(spec: ModelSpec, fixed: Mapping[str, Any]) -> list[str]:
    """Fields of the spec that are not what a family's models always have, one entry each for an error message."""
    return [
        f"{name}={getattr(spec, name)} (always {value})"
        for name, value in fixed.items()
        if getattr(spec, name) != value
    ]
