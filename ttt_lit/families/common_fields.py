"""What the configs of several families share: fields spelled alike, and the order in which a config is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ttt_lit.families.config_fields import read_float
from ttt_lit.model.spec import ModelSpec

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' name -> ours."""
FULL, SLIDING = LAYER_KINDS = ("full_attention", "sliding_attention")


def activation_name(ours: str) -> str:
    """transformers' name of one of our activations."""
    return next(theirs for theirs, activation in ACTIVATIONS.items() if activation == ours)


def config_for(
    spec: ModelSpec,
    source: Mapping[str, Any] | None,
    *,
    model_type: str,
    problems: Sequence[str],
    write: Callable[[ModelSpec, dict[str, Any]], None],
    spec_from_config: Callable[[Mapping[str, Any]], ModelSpec],
) -> dict[str, Any]:
    """config.json for ``spec``; a ``source`` that still means the same model is kept as it is.

    Args:
        problems: what the family cannot express in ``spec``.
        write: puts the fields of ``spec`` into a config and removes those that would contradict them.

    Raises:
        ValueError: there are problems; the message lists them all.
    """
    if problems:
        raise ValueError(f"a {model_type} config.json cannot express: " + "; ".join(problems))
    config = dict(source) if source is not None else {}
    # The code it points to is not part of a checkpoint folder.
    config.pop("auto_map", None)
    if source is not None and spec_from_config(config) == spec:
        return config
    config["model_type"] = model_type
    write(spec, config)
    if spec_from_config(config) != spec:
        raise ValueError("the exported config.json would not mean the same model: this is a defect, please report it")
    return config


def shape_fields(spec: ModelSpec) -> dict[str, Any]:
    """Sizes and switches that every family names alike."""
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_head,
    }


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
        raise ValueError(
            "config.json: quantization_config is set; quantised checkpoints are not supported, import the unquantised one"
        )
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
        "learned sink logits": [i for i, layer in enumerate(spec.layers) if layer.sink_logit],
    }
    return [f"{what} (layers {layers})" for what, layers in added.items() if layers]


def differing(spec: ModelSpec, fixed: Mapping[str, Any]) -> list[str]:
    """Fields of the spec that are not what a family's models always have, one entry each for an error message."""
    return [
        f"{name}={getattr(spec, name)} (always {value})"
        for name, value in fixed.items()
        if getattr(spec, name) != value
    ]
