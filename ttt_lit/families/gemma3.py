"""Gemma 3, the text model: norms before and after each part with a unit offset, q/k norm, scaled embeddings, mixed layers.

Fields and defaults are those of ``transformers`` 5.23's ``Gemma3TextConfig``. Both spellings of the layers are read:
``sliding_window_pattern``, ``rope_theta`` and ``rope_local_base_freq`` (published configs), and ``layer_types`` with one
``rope_parameters`` object per type (transformers 5). A layer's type decides its window and its RoPE base together, so a
spec in which they vary apart has no config. What the spec cannot express is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ttt_lit.families.common_fields import (
    ACTIVATIONS,
    FULL,
    LAYER_KINDS,
    SLIDING,
    activation_name,
    added_by_conversion,
    agreed_rope_base,
    config_for,
    differing,
    read_layer_types,
    read_rope_object,
    refuse_what_no_family_implements,
    shape_fields,
)
from ttt_lit.families.config_fields import MAX_LAYERS, read_bool, read_choice, read_float, read_int
from ttt_lit.families.family import renamed_family
from ttt_lit.families.keys import RenameRules, Rule
from ttt_lit.model.spec import LayerSpec, ModelSpec

ACTIVATION, HEAD_DIM, PATTERN, WINDOW = "gelu_pytorch_tanh", 256, 6, 4096
BASES = {FULL: 1_000_000.0, SLIDING: 10_000.0}
# Where published configs state the base of each type.
BASE_FIELDS = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}

RULES = RenameRules(
    (
        Rule(theirs="model.embed_tokens.weight", ours="embed_tokens.weight"),
        # Gemma's four norms are named by place, as ours are, and so is everything else inside a layer.
        *(
            Rule(theirs=f"model.layers.{{layer}}.{name}", ours=f"layers.{{layer}}.{name}")
            for name in (
                "input_layernorm.weight",
                "self_attn.{part}",
                "post_attention_layernorm.weight",
                "pre_feedforward_layernorm.weight",
                "mlp.{part}",
                "post_feedforward_layernorm.weight",
            )
        ),
        Rule(theirs="model.norm.weight", ours="norm.weight"),
        Rule(theirs="lm_head.weight", ours="lm_head.weight"),
    )
)


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The model that a Gemma 3 text config.json describes.

    Raises:
        ValueError: a field that is missing, of the wrong kind, or asks for what is not implemented, by name.
    """
    _refuse_unsupported(config)
    heads, hidden = read_int(config, "num_attention_heads"), read_int(config, "hidden_size")
    if hidden % heads:
        raise ValueError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = read_int(config, "head_dim", default=HEAD_DIM)
    scalar = read_int(config, "query_pre_attn_scalar", default=256)
    return ModelSpec(
        vocab_size=read_int(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=read_int(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=read_int(config, "num_key_value_heads"),
        head_dim=head_dim,
        layers=_layers(config),
        norm_eps=read_float(config, "rms_norm_eps", default=1e-6),
        norm_unit_offset=True,
        post_norms=True,
        qk_norm=True,
        activation=read_choice(config, "hidden_activation", ACTIVATIONS, default=ACTIVATION),
        tied_head=read_bool(config, "tie_word_embeddings", default=True),
        # transformers rounds it to the dtype of the embeddings, and so does the decoder.
        embedding_scale=math.sqrt(hidden),
        score_scale=None if scalar == head_dim else scalar**-0.5,
    )


def config_from_spec(spec: ModelSpec, source: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json for ``spec``; fields of ``source`` that still hold are kept as they are.

    Raises:
        ValueError: something that a Gemma 3 model cannot be; the message lists it all.
    """
    if spec.score_scale == spec.head_dim**-0.5:
        spec = dataclasses.replace(spec, score_scale=None)
    return config_for(
        spec,
        source,
        model_type="gemma3_text",
        problems=_not_expressible(spec),
        write=_write,
        spec_from_config=spec_from_config,
    )


def _write(spec: ModelSpec, config: dict[str, Any]) -> None:
    """In the published spelling, which every version of transformers reads; layers that follow no pattern need ``layer_types``."""
    for old in ("rope_scaling", "rope_parameters", "layer_types", "sliding_window_pattern", "_sliding_window_pattern"):
        config.pop(old, None)
    kinds = [FULL if layer.window is None else SLIDING for layer in spec.layers]
    config |= shape_fields(spec) | {
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": spec.head_dim,
        "query_pre_attn_scalar": _score_scalar(spec),
        "hidden_activation": activation_name(spec.activation),
        **{BASE_FIELDS[kind]: layer.rope_base for kind, layer in zip(kinds, spec.layers, strict=True)},
    }
    if SLIDING in kinds:
        config["sliding_window"] = spec.layers[kinds.index(SLIDING)].window
    pattern = next((n for n in (PATTERN, *range(1, len(kinds) + 2)) if _pattern(n, len(kinds)) == kinds), None)
    config |= {"layer_types": kinds} if pattern is None else {"sliding_window_pattern": pattern}


def _layers(config: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Per layer what its type stands for, as ``Gemma3TextConfig`` resolves it."""
    count = read_int(config, "num_hidden_layers", most=MAX_LAYERS)
    kinds = read_layer_types(config, count)
    if kinds is None:
        kinds = _pattern(read_int(config, "sliding_window_pattern", default=PATTERN), count)
    bases = _rope_bases(config)
    layers = {FULL: LayerSpec(rope_base=bases[FULL])}
    if SLIDING in kinds:
        window = read_int(config, "sliding_window", default=WINDOW)
        layers[SLIDING] = LayerSpec(window=window, rope_base=bases[SLIDING])
    return tuple(layers[kind] for kind in kinds)


def _pattern(every: int, count: int) -> list[str]:
    """The ``every``-th layer is full, the others slide."""
    return [SLIDING if (i + 1) % every else FULL for i in range(count)]


def _rope_bases(config: Mapping[str, Any]) -> dict[str, float]:
    """The rotary base of each layer type; ``rope_scaling`` is about full attention alone."""
    nested = config.get("rope_parameters")
    if nested is None:
        nested = {}
    if not isinstance(nested, dict) or not set(nested) <= set(LAYER_KINDS):
        raise ValueError(
            f"config.json: rope_parameters is {str(nested)[:200]}, expected an object with one object for each of {LAYER_KINDS}"
        )
    bases = {}
    for kind, field in BASE_FIELDS.items():
        name = f"rope_parameters.{kind}"
        stated = {name: read_rope_object(nested.get(kind), name)}
        if kind == FULL:
            stated["rope_scaling"] = read_rope_object(config.get("rope_scaling"), "rope_scaling")
        if field in config:
            stated[field] = read_float(config, field)
        bases[kind] = agreed_rope_base(stated, default=BASES[kind])
    return bases


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    refuse_what_no_family_implements(config)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name) is not None:
            raise ValueError(f"config.json: {name} is {config[name]!r}; logit softcapping is not implemented")
    for name in ("attention_bias", "use_bidirectional_attention"):
        if config.get(name):
            raise ValueError(f"config.json: {name} is {config[name]!r}; it is not implemented")
    if "hidden_act" in config and config["hidden_act"] != config.get("hidden_activation", ACTIVATION):
        raise ValueError(
            f"config.json: hidden_act is {config['hidden_act']!r}, but Gemma 3 reads hidden_activation: remove hidden_act"
        )


def _not_expressible(spec: ModelSpec) -> list[str]:
    fixed = {
        "norm_unit_offset": True,
        "pre_norms": True,
        "post_norms": True,
        "qk_norm": True,
        "qkv_bias": False,
        "embedding_scale": math.sqrt(spec.hidden_size),
    }
    problems = differing(spec, fixed) + added_by_conversion(spec)
    if spec.hidden_size % spec.num_heads:
        problems.append(f"hidden_size {spec.hidden_size}, not a multiple of num_heads {spec.num_heads}")
    if spec.score_scale is not None and _score_scalar(spec) ** -0.5 != spec.score_scale:
        problems.append(f"score_scale={spec.score_scale} (always 1 / sqrt of a whole number)")
    return problems + _mixed_kinds(spec)


def _score_scalar(spec: ModelSpec) -> int:
    """``query_pre_attn_scalar``, at least 1."""
    return spec.head_dim if spec.score_scale is None else max(1, round(spec.score_scale**-2))


def _mixed_kinds(spec: ModelSpec) -> list[str]:
    """What keeps the layers from being of two types, each with one window and one RoPE base."""
    problems = []
    for kind, windowed in ((FULL, False), (SLIDING, True)):
        groups: dict[tuple[int | None, float], list[int]] = {}
        for i, layer in enumerate(spec.layers):
            if (layer.window is not None) == windowed:
                groups.setdefault((layer.window, layer.rope_base), []).append(i)
        if len(groups) > 1:
            text = ", ".join(f"layers {at} have window {w} and RoPE base {b:g}" for (w, b), at in groups.items())
            changed = "RoPE base" if len({base for _, base in groups}) > 1 else "window"
            problems.append(
                f"{text} (all {kind} layers share one window and one RoPE base, so transformers would silently run some with "
                f"another {changed})"
            )
    return problems


FAMILY = renamed_family(
    name="gemma3",
    model_types=("gemma3_text",),
    rules=RULES,
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    default_positions=131_072,
)
