"""Gemma 3, the text model: norms before and after each part with a unit offset, q/k norm, scaled embeddings, mixed layers.

A layer's type decides its window and its RoPE base together, so a spec in which they vary apart has no config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import Gemma3TextConfig

from ttt_lit.families import fields
from ttt_lit.families.family import Family
from ttt_lit.families.fields import FULL, SLIDING
from ttt_lit.model.spec import ModelSpec

PATTERN = 6
# Where published configs state the RoPE base of each type.
BASE_KEYS = {FULL: "rope_theta", SLIDING: "rope_local_base_freq"}
NOT_IMPLEMENTED = {
    "attn_logit_softcapping": "logit softcapping",
    "final_logit_softcapping": "logit softcapping",
    "attention_bias": "a bias in attention",
    "use_bidirectional_attention": "attention to later tokens",
}


def stored_name(name: str) -> str:
    """Gemma's norms are named by place, as ours are, and so is everything else."""
    return name if name == "lm_head.weight" else "model." + name


def spec_from_config(raw: Mapping[str, Any]) -> ModelSpec:
    """The model that a Gemma 3 text config.json describes.

    Raises:
        ValueError: a field that is missing, of the wrong kind, or asks for what is not implemented, by name.
    """
    pattern = raw.get("sliding_window_pattern", PATTERN)
    if type(pattern) is not int or pattern < 1:
        raise ValueError(f"config.json: sliding_window_pattern is {pattern!r}, expected a whole number from 1")
    config = fields.read_config(raw, Gemma3TextConfig, NOT_IMPLEMENTED)
    if raw.get("hidden_act", config.hidden_activation) != config.hidden_activation:
        raise ValueError(f"config.json: hidden_act is {raw['hidden_act']!r}, but hidden_activation is read: remove it")
    if other := sorted(set(config.rope_parameters) - {FULL, SLIDING}):
        raise ValueError(f"config.json: rope_parameters has {other}, expected an object each for {FULL} and {SLIDING}")
    bases = {
        kind: fields.read_rope_base(config.rope_parameters[kind], name=f"rope_parameters.{kind}", key=key, raw=raw)
        for kind, key in BASE_KEYS.items()
    }
    scalar = config.query_pre_attn_scalar
    if scalar < 1:
        raise ValueError(f"config.json: query_pre_attn_scalar is {scalar}, expected a whole number from 1")
    return ModelSpec(
        **fields.common_spec_fields(config),
        head_dim=config.head_dim,
        layers=fields.read_layers(config, bases),
        norm_unit_offset=True,
        post_norms=True,
        qk_norm=True,
        activation=fields.read_activation(config, "hidden_activation"),
        # transformers rounds it to the dtype of the embeddings, and so does the decoder.
        embedding_scale=math.sqrt(config.hidden_size),
        score_scale=None if scalar == config.head_dim else scalar**-0.5,
    )


def _write(spec: ModelSpec, config: dict[str, Any]) -> None:
    """In the published spelling, which every version of transformers reads; layers that follow no pattern need ``layer_types``."""
    for old in ("rope_scaling", "rope_parameters", "layer_types", "sliding_window_pattern", "_sliding_window_pattern"):
        config.pop(old, None)
    kinds = fields.layer_types(spec)
    config |= fields.common_config_fields(spec) | {
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": spec.head_dim,
        "query_pre_attn_scalar": _score_scalar(spec),
        "hidden_activation": fields.activation_name(spec.activation),
        **{BASE_KEYS[kind]: layer.rope_base for kind, layer in zip(kinds, spec.layers, strict=True)},
    }
    if SLIDING in kinds:
        config["sliding_window"] = spec.layers[kinds.index(SLIDING)].window
    pattern = next((n for n in (PATTERN, *range(1, len(kinds) + 2)) if _pattern(n, len(kinds)) == kinds), None)
    config |= {"layer_types": kinds} if pattern is None else {"sliding_window_pattern": pattern}


def _pattern(every: int, count: int) -> list[str]:
    """The ``every``-th layer is full, the others slide."""
    return [SLIDING if (i + 1) % every else FULL for i in range(count)]


def _not_expressible(spec: ModelSpec) -> list[str]:
    fixed = {
        "norm_unit_offset": True,
        "pre_norms": True,
        "post_norms": True,
        "qk_norm": True,
        "qkv_bias": False,
        "embedding_scale": math.sqrt(spec.hidden_size),
    }
    problems = fields.differing(spec, fixed)
    if spec.hidden_size % spec.num_heads:
        problems.append(f"hidden_size {spec.hidden_size}, not a multiple of num_heads {spec.num_heads}")
    if spec.score_scale is not None and _score_scalar(spec) ** -0.5 != spec.score_scale:
        problems.append(f"score_scale={spec.score_scale} (always 1 / sqrt of a whole number)")
    for kind in (FULL, SLIDING):
        groups: dict[tuple[int | None, float], list[int]] = {}
        for i, layer in enumerate(spec.layers):
            if fields.layer_types(spec)[i] == kind:
                groups.setdefault((layer.window, layer.rope_base), []).append(i)
        if len(groups) > 1:
            text = ", ".join(f"layers {at} have window {w} and RoPE base {b:g}" for (w, b), at in groups.items())
            problems.append(f"{text} (all {kind} layers share one window and one RoPE base)")
    return problems


def _score_scalar(spec: ModelSpec) -> int:
    """``query_pre_attn_scalar``, at least 1."""
    return spec.head_dim if spec.score_scale is None else max(1, round(spec.score_scale**-2))


FAMILY = Family(
    name="gemma3",
    config_class=Gemma3TextConfig,
    spec_from_config=spec_from_config,
    not_expressible=_not_expressible,
    write=_write,
    stored_name=stored_name,
)
