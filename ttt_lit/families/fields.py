"""The fields that families share: read through transformers' config class, which knows every spelling and every default.

A config is somebody else's file: what the class or we refuse ends in one line that names the key.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ttt_lit.model.spec import Activation, LayerSpec, ModelSpec

MAX_LAYERS = 4096
MAX_SIZE = 2**31 - 1
FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' name -> ours."""
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "num_layers": "num_hidden_layers",
}
"""Our name -> transformers', required in every config.json."""
NOT_IMPLEMENTED = {
    "quantization_config": "quantised weights (import the unquantised checkpoint)",
    "attention_dropout": "dropout",
}
"""Key of config.json -> what it asks for, in every family."""
ANY_VALUE = ("quantization_config", "attn_logit_softcapping", "final_logit_softcapping")
"""Of these keys null alone asks for nothing; of others false and 0 do too."""


def read_config(
    raw: Mapping[str, Any], config_class: type[PreTrainedConfig], not_implemented: Mapping[str, str]
) -> Any:
    """A parsed config.json as the object that transformers resolves it to.

    Raises:
        ValueError: a size is missing or out of range, the class refuses the config, or a key of ``not_implemented`` is set.
    """
    if missing := [name for name in SIZES.values() if name not in raw]:
        raise ValueError(f"config.json: {', '.join(missing)} is missing")
    # Before the class makes a list of them.
    layers = raw["num_hidden_layers"]
    if type(layers) is int and layers > MAX_LAYERS:
        raise ValueError(f"config.json: num_hidden_layers is {layers}, expected at most {MAX_LAYERS}")
    try:
        config: Any = config_class.from_dict(copy.deepcopy(dict(raw)))
    except Exception as error:  # of whatever kind the class raises
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"config.json: transformers' {config_class.__name__} refuses it: {text}") from None
    for name in SIZES.values():
        if not 1 <= getattr(config, name) <= MAX_SIZE:
            raise ValueError(f"config.json: {name} is {getattr(config, name)}, expected 1 to {MAX_SIZE}")
    if not 0 < config.rms_norm_eps < math.inf:
        raise ValueError(f"config.json: rms_norm_eps is {config.rms_norm_eps}, expected a positive number")
    for name, what in (NOT_IMPLEMENTED | dict(not_implemented)).items():
        value = getattr(config, name, None)
        if value or (value is not None and name in ANY_VALUE):
            raise ValueError(f"config.json: {name} is {str(value)[:100]}; {what} is not implemented")
    if unknown := sorted(set(config.layer_types) - {FULL, SLIDING}):
        raise ValueError(f"config.json: layer_types has {unknown}; only {FULL} and {SLIDING} are implemented")
    return config


def common_spec_fields(config: Any) -> dict[str, Any]:
    """Arguments of ``ModelSpec`` that every family names alike."""
    sizes = {ours: getattr(config, theirs) for ours, theirs in SIZES.items() if ours != "num_layers"}
    return sizes | {"norm_eps": config.rms_norm_eps, "tied_head": config.tie_word_embeddings}


def common_config_fields(spec: ModelSpec) -> dict[str, Any]:
    """The way back."""
    sizes = {theirs: getattr(spec, ours) for ours, theirs in SIZES.items()}
    return sizes | {"rms_norm_eps": spec.norm_eps, "tie_word_embeddings": spec.tied_head}


def read_activation(config: Any, name: str) -> Activation:
    """The activation that the field ``name`` asks for."""
    if (value := getattr(config, name)) not in ACTIVATIONS:
        raise ValueError(f"config.json: {name} is {value!r}, expected one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[value]


def activation_name(ours: str) -> str:
    """transformers' name of one of our activations."""
    return next(theirs for theirs, activation in ACTIVATIONS.items() if activation == ours)


def read_rope_base(rope: Mapping[str, Any], *, name: str, key: str, raw: Mapping[str, Any]) -> float:
    """The base in a resolved rope object. Refuses every kind of scaling.

    Args:
        rope: the resolved object.
        name: what it is called in config.json.
        key: where published configs state the base; it must not say another one.
        raw: the config.json.
    """
    kinds = [rope.get("rope_type"), rope.get("type", "default")]
    base: Any = rope.get("rope_theta")
    if kinds != ["default", "default"]:
        raise ValueError(
            f"config.json: {name} (rope_scaling) asks for rope type {kinds}; only 'default' is implemented"
        )
    if unknown := sorted(set(rope) - {"rope_type", "type", "rope_theta"}):
        raise ValueError(f"config.json: {name} has the fields {unknown}, which are not implemented")
    if type(base) not in (int, float) or not 0 < base < math.inf:
        raise ValueError(f"config.json: {name} or {key} says {base!r}, expected a positive number")
    if raw.get(key, base) != base:
        raise ValueError(f"config.json: {name} or rope_scaling says {base}, {key} {raw[key]}: remove the wrong one")
    return float(base)


def read_layers(config: Any, bases: Mapping[str, float]) -> tuple[LayerSpec, ...]:
    """Per layer what its type stands for; ``bases``: layer type -> RoPE base."""
    window = config.sliding_window
    if SLIDING in config.layer_types and (window is None or window < 1):
        raise ValueError(
            f"config.json: some layers slide, but sliding_window is {window}, or use_sliding_window is off; set both"
        )
    return tuple(
        LayerSpec(window=window if kind == SLIDING else None, rope_base=bases[kind]) for kind in config.layer_types
    )


def layer_types(spec: ModelSpec) -> list[str]:
    """transformers' type of each layer."""
    return [FULL if layer.window is None else SLIDING for layer in spec.layers]


def differing(spec: ModelSpec, fixed: Mapping[str, Any]) -> list[str]:
    """What no model of a family is, one entry each: fields that are ``fixed`` to another value, and what conversions add."""
    added = {
        "prime MLPs": [i for i, layer in enumerate(spec.layers) if layer.prime is not None],
        "fast weights": list(spec.ttt_layers),
        "attention sinks": [i for i, layer in enumerate(spec.layers) if layer.sink_tokens],
        "learned sink logits": [i for i, layer in enumerate(spec.layers) if layer.sink_logit],
    }
    found = [f"{name}={getattr(spec, name)} (always {v})" for name, v in fixed.items() if getattr(spec, name) != v]
    return found + [f"{what} (layers {layers})" for what, layers in added.items() if layers]
