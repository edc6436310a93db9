"""Qwen2 and Qwen2.5: grouped queries, q/k/v biases, no q/k norm, head tied or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen2Config

from ttt_lit.families import fields
from ttt_lit.families.family import Family
from ttt_lit.families.fields import FULL, SLIDING
from ttt_lit.model.spec import ModelSpec


def stored_name(name: str) -> str:
    """Qwen names the norm before the MLP after what it follows; ours is named after what it precedes."""
    if name == "lm_head.weight":
        return name
    return "model." + name.replace("pre_feedforward_layernorm", "post_attention_layernorm")


def spec_from_config(raw: Mapping[str, Any]) -> ModelSpec:
    """The model that a Qwen2 config.json describes.

    Raises:
        ValueError: a field that is missing, of the wrong kind, or asks for what is not implemented, by name.
    """
    head_dim = raw.get("head_dim")
    if type(head_dim) not in (int, type(None)):
        raise ValueError(f"config.json: head_dim is {head_dim!r}, expected a whole number or null")
    config = fields.read_config(raw, Qwen2Config, {"use_mrope": "multimodal rotary embedding"})
    hidden, heads = config.hidden_size, config.num_attention_heads
    if head_dim is None and hidden % heads:
        raise ValueError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    base = fields.read_rope_base(config.rope_parameters, name="rope_parameters", key="rope_theta", raw=raw)
    return ModelSpec(
        **fields.common_spec_fields(config),
        head_dim=hidden // heads if head_dim is None else head_dim,
        layers=fields.read_layers(config, {FULL: base, SLIDING: base}),
        qkv_bias=True,
        activation=fields.read_activation(config, "hidden_act"),
    )


def _write(spec: ModelSpec, config: dict[str, Any]) -> None:
    for old in ("rope_theta", "rope_scaling", "rope_parameters", "layer_types", "head_dim"):
        config.pop(old, None)
    config |= fields.common_config_fields(spec) | {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": fields.activation_name(spec.activation),
        # Read by every version of transformers; version 5 moves it into rope_parameters by itself.
        "rope_theta": spec.layers[0].rope_base,
    }
    if spec.head_dim * spec.num_heads != spec.hidden_size:
        config["head_dim"] = spec.head_dim
    kinds = fields.layer_types(spec)
    first = kinds.index(SLIDING) if SLIDING in kinds else len(kinds)
    config |= {"use_sliding_window": SLIDING in kinds, "max_window_layers": first}
    if SLIDING in kinds:
        config["sliding_window"] = spec.layers[first].window
    if FULL in kinds[first:]:
        config["layer_types"] = kinds


def _not_expressible(spec: ModelSpec) -> list[str]:
    fixed = {
        "norm_unit_offset": False,
        "pre_norms": True,
        "post_norms": False,
        "qk_norm": False,
        "qkv_bias": True,
        "embedding_scale": 1.0,
        "score_scale": None,
    }
    problems = fields.differing(spec, fixed)
    if len(bases := sorted({layer.rope_base for layer in spec.layers})) > 1:
        problems.append(f"several RoPE bases {bases}")
    if len(windows := sorted({layer.window for layer in spec.layers if layer.window is not None})) > 1:
        problems.append(f"different windows in different layers {windows}")
    return problems


def _refused_by_vllm(spec: ModelSpec) -> list[str]:
    """vLLM's Qwen2 (2026) knows one window for all layers. It refuses a config whose layers differ unless max_window_layers
    is their number, and would then run every layer with full attention."""
    problems, kinds = [], fields.layer_types(spec)
    if len(set(kinds)) > 1:
        full = [i for i, kind in enumerate(kinds) if kind == FULL]
        problems.append(f"windows in some layers only (full attention in layers {full})")
    if spec.activation != "silu":
        problems.append(f"activation {spec.activation} (always silu)")
    if spec.head_dim * spec.num_heads != spec.hidden_size:
        problems.append(f"head_dim {spec.head_dim} (always hidden_size / num_attention_heads)")
    return problems


FAMILY = Family(
    name="qwen2",
    config_class=Qwen2Config,
    spec_from_config=spec_from_config,
    not_expressible=_not_expressible,
    write=_write,
    stored_name=stored_name,
    refused_by_vllm=_refused_by_vllm,
)
