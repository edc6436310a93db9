"""Qwen2 and Qwen2.5: grouped queries, q/k/v biases, no q/k norm, head tied or not.

Fields and defaults are those of ``transformers`` 5.23's ``Qwen2Config``. Both spellings of the rotary base are read:
``rope_theta`` with ``rope_scaling`` (published configs) and ``rope_parameters`` (transformers 5). What the spec cannot
express is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttt_lit.families.common_fields import (
    ACTIVATIONS,
    FULL,
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

RULES = RenameRules(
    (
        Rule(theirs="model.embed_tokens.weight", ours="embed_tokens.weight"),
        Rule(theirs="model.layers.{layer}.input_layernorm.weight", ours="layers.{layer}.input_layernorm.weight"),
        Rule(theirs="model.layers.{layer}.self_attn.{part}", ours="layers.{layer}.self_attn.{part}"),
        # Qwen names the norm before the MLP after what it follows; ours is named after what it precedes.
        Rule(
            theirs="model.layers.{layer}.post_attention_layernorm.weight",
            ours="layers.{layer}.pre_feedforward_layernorm.weight",
        ),
        Rule(theirs="model.layers.{layer}.mlp.{part}", ours="layers.{layer}.mlp.{part}"),
        Rule(theirs="model.norm.weight", ours="norm.weight"),
        Rule(theirs="lm_head.weight", ours="lm_head.weight"),
    )
)


def spec_from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The model that a Qwen2 config.json describes.

    Raises:
        ValueError: a field that is missing, of the wrong kind, or asks for what is not implemented, by name.
    """
    _refuse_unsupported(config)
    heads = read_int(config, "num_attention_heads")
    hidden = read_int(config, "hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise ValueError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    kv_heads = heads if config.get("num_key_value_heads", 0) is None else read_int(config, "num_key_value_heads")
    base = _rope_base(config)
    return ModelSpec(
        vocab_size=read_int(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=read_int(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads if config.get("head_dim") is None else read_int(config, "head_dim"),
        layers=tuple(LayerSpec(window=window, rope_base=base) for window in _windows(config)),
        norm_eps=read_float(config, "rms_norm_eps", default=1e-6),
        qkv_bias=True,
        activation=read_choice(config, "hidden_act", ACTIVATIONS, default="silu"),
        tied_head=read_bool(config, "tie_word_embeddings", default=False),
    )


def config_from_spec(spec: ModelSpec, source: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json for ``spec``; fields of ``source`` that still hold are kept as they are.

    Raises:
        ValueError: something that a Qwen2 model cannot be; the message lists it all.
    """
    return config_for(
        spec,
        source,
        model_type="qwen2",
        problems=_not_expressible(spec),
        write=_write,
        spec_from_config=spec_from_config,
    )


def _write(spec: ModelSpec, config: dict[str, Any]) -> None:
    for old in ("rope_theta", "rope_scaling", "rope_parameters", "layer_types", "head_dim"):
        config.pop(old, None)
    config |= shape_fields(spec) | {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": activation_name(spec.activation),
        # Read by every version of transformers; version 5 moves it into rope_parameters by itself.
        "rope_theta": spec.layers[0].rope_base,
    }
    if spec.head_dim * spec.num_heads != spec.hidden_size:
        config["head_dim"] = spec.head_dim
    config |= _window_fields([layer.window for layer in spec.layers])


def _window_fields(windows: list[int | None]) -> dict[str, Any]:
    sliding = [i for i, window in enumerate(windows) if window is not None]
    if not sliding:
        return {"use_sliding_window": False, "max_window_layers": len(windows)}
    fields: dict[str, Any] = {
        "use_sliding_window": True,
        "sliding_window": windows[sliding[0]],
        "max_window_layers": sliding[0],
    }
    if len(sliding) != len(windows) - sliding[0]:
        fields["layer_types"] = [FULL if window is None else SLIDING for window in windows]
    return fields


def _windows(config: Mapping[str, Any]) -> list[int | None]:
    """Per layer, as ``Qwen2Config`` resolves its four window fields."""
    count = read_int(config, "num_hidden_layers", most=MAX_LAYERS)
    window = None
    if read_bool(config, "use_sliding_window", default=False) and config.get("sliding_window", 0) is not None:
        window = read_int(config, "sliding_window", default=4096)
    kinds = read_layer_types(config, count)
    if kinds is None:
        first = config.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ValueError(f"config.json: max_window_layers is {first!r}, expected a whole number from 0")
        return [window if i >= first else None for i in range(count)]
    if window is None and SLIDING in kinds:
        raise ValueError(
            "config.json: layer_types has sliding_attention but no window: set use_sliding_window and sliding_window"
        )
    return [window if kind == SLIDING else None for kind in kinds]


def _rope_base(config: Mapping[str, Any]) -> float:
    """The rotary base, from wherever the config says it; two places that disagree are an error."""
    places = ("rope_parameters", "rope_scaling")
    stated = {name: read_rope_object(config.get(name), name) for name in places}
    if "rope_theta" in config:
        stated["rope_theta"] = read_float(config, "rope_theta")
    return agreed_rope_base(stated, default=10_000.0)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    refuse_what_no_family_implements(config)
    if config.get("use_mrope"):
        raise ValueError("config.json: use_mrope is set; multimodal rotary embedding is not implemented")


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
    problems = differing(spec, fixed) + added_by_conversion(spec)
    if len(bases := sorted({layer.rope_base for layer in spec.layers})) > 1:
        problems.append(f"several RoPE bases {bases}")
    if len(windows := sorted({layer.window for layer in spec.layers if layer.window is not None})) > 1:
        problems.append(f"different windows in different layers {windows}")
    return problems


def _refused_by_vllm(spec: ModelSpec) -> list[str]:
    """vLLM's Qwen2 (2026) knows one window for all layers. It refuses a config whose layers differ unless max_window_layers
    is their number, and would then run every layer with full attention."""
    problems = []
    windowed = [i for i, layer in enumerate(spec.layers) if layer.window is not None]
    if 0 < len(windowed) < spec.num_layers:
        full = [i for i in range(spec.num_layers) if i not in windowed]
        problems.append(f"windows in some layers only (full attention in layers {full})")
    if spec.activation != "silu":
        problems.append(f"activation {spec.activation} (always silu)")
    if spec.head_dim * spec.num_heads != spec.hidden_size:
        problems.append(f"head_dim {spec.head_dim} (always hidden_size / num_attention_heads)")
    return problems


FAMILY = renamed_family(
    name="qwen2",
    model_types=("qwen2",),
    rules=RULES,
    spec_from_config=spec_from_config,
    config_from_spec=config_from_spec,
    default_positions=32_768,
    refused_by_vllm=_refused_by_vllm,
)
