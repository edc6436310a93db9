import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.families import family_named, family_of_config
from ttt_lit.families.qwen2 import FAMILY, spec_from_config
from ttt_lit.model.spec import LayerSpec, ModelSpec, PrimeSpec

PUBLISHED = json.loads((Path(__file__).parents[2] / "configs/shapes/qwen2.5-1.5b.json").read_text())


def changed(**fields):
    return {k: v for k, v in (PUBLISHED | fields).items() if v != "absent"}


def test_the_published_config_gives_the_published_model():
    spec = spec_from_config(PUBLISHED)
    assert spec.num_parameters() == 1_543_714_304
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (28, 12, 2, 128)
    assert spec.qkv_bias
    assert spec.tied_head
    assert not spec.qk_norm
    assert {(layer.window, layer.rope_base) for layer in spec.layers} == {(None, 1e6)}


def test_both_spellings_of_the_rope_base_mean_the_same():
    new = changed(rope_theta="absent", rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    old = changed(rope_scaling={"type": "default"})
    assert spec_from_config(new) == spec_from_config(old) == spec_from_config(PUBLISHED)


@pytest.mark.parametrize(
    "fields, windows",
    [
        ({"use_sliding_window": False, "max_window_layers": 0}, [None] * 28),
        ({"use_sliding_window": True, "max_window_layers": 28}, [None] * 28),
        ({"use_sliding_window": True, "max_window_layers": 20}, [None] * 20 + [131072] * 8),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 512}, [512] * 28),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, [None] * 28),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["sliding_attention", "full_attention"] * 14,
                "max_window_layers": 28,
            },
            [7, None] * 14,
        ),
    ],
)
def test_windows_per_layer(fields, windows):
    assert [layer.window for layer in spec_from_config(changed(**fields)).layers] == windows


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}, "dynamic"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_theta": 2.0}}, "rope_scaling says 2.0"),
        ({"rope_scaling": "linear"}, "linear"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"hidden_act": "relu"}, "hidden_act.*'relu'"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"hidden_size": 1537}, "hidden_size 1537"),
        ({"hidden_size": 1536.0}, "hidden_size"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"num_key_value_heads": "absent"}, "num_key_value_heads is missing"),
        ({"num_key_value_heads": 5}, "num_kv_heads 5"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"use_sliding_window": "yes"}, "use_sliding_window"),
        ({"use_sliding_window": True, "max_window_layers": "0"}, "max_window_layers"),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 0}, "sliding_window"),
        ({"layer_types": ["full_attention"] * 27}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 28}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 28}, "use_sliding_window"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"use_mrope": True}, "use_mrope"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 3}, "head_dim"),
        ({"head_dim": "64"}, "head_dim"),
    ],
)
def test_what_is_not_implemented_or_not_possible_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        spec_from_config(changed(**fields))
    assert "\n" not in str(error.value)


def test_an_unknown_model_type_lists_the_known_ones():
    assert family_of_config(PUBLISHED).name == "qwen2"
    with pytest.raises(ValueError, match=r"'llama'.*gemma3_text.*qwen2"):
        family_of_config({"model_type": "llama"})
    with pytest.raises(ValueError, match="None"):
        family_of_config({})
    with pytest.raises(ValueError, match=r"'lama'.*qwen2"):
        family_named("lama")


def test_an_unchanged_model_keeps_every_published_field():
    assert FAMILY.config_from_spec(spec_from_config(PUBLISHED), PUBLISHED) == PUBLISHED


def test_a_windowed_model_says_so_and_keeps_the_rest():
    dense = spec_from_config(PUBLISHED)
    windowed = dense.with_layers(tuple(dataclasses.replace(layer, window=512) for layer in dense.layers))
    config = FAMILY.config_from_spec(windowed, PUBLISHED)
    assert config["use_sliding_window"] is True
    assert (config["sliding_window"], config["max_window_layers"]) == (512, 0)
    window_fields = {"use_sliding_window", "sliding_window", "max_window_layers"}
    assert {k for k in PUBLISHED if config[k] != PUBLISHED[k]} == window_fields
    assert spec_from_config(config) == windowed


def test_code_references_do_not_survive_export():
    config = FAMILY.config_from_spec(spec_from_config(PUBLISHED), PUBLISHED | {"auto_map": {"AutoModel": "evil.py"}})
    assert "auto_map" not in config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"post_norms": True}, "post_norms"),
        ({"pre_norms": False}, "pre_norms"),
        ({"qkv_bias": False}, "qkv_bias"),
        ({"norm_unit_offset": True}, "norm_unit_offset"),
        ({"embedding_scale": 2.0}, "embedding_scale"),
        ({"score_scale": 0.4}, "score_scale"),
        ({"layers": (LayerSpec(prime=PrimeSpec(intermediate_size=4)),)}, "prime MLPs .layers .0"),
        ({"layers": (LayerSpec(), LayerSpec(fast="mlp"))}, "fast weights .layers .1"),
        ({"layers": (LayerSpec(window=5, sink_tokens=2),)}, "attention sinks .layers .0"),
        ({"layers": (LayerSpec(window=3), LayerSpec(window=5))}, r"different windows.*\[3, 5\]"),
        ({"layers": (LayerSpec(rope_base=3.0), LayerSpec(rope_base=5.0))}, "RoPE bases"),
    ],
)
def test_what_qwen2_cannot_be_is_refused_by_name(change, message):
    spec = ModelSpec(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=12,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        layers=(LayerSpec(),),
        qkv_bias=True,
    )
    with pytest.raises(ValueError, match=message):
        FAMILY.config_from_spec(dataclasses.replace(spec, **change), None)


def test_what_vllm_does_not_run_is_named():
    """Its Qwen2 has one window for all layers, silu, and heads as wide as the hidden size allows."""
    dense = spec_from_config(PUBLISHED)
    windows = {"all": [512] * 28, "none": [None] * 28, "upper": [None] * 14 + [512] * 14}
    refused = {}
    for name, of in windows.items():
        layers = tuple(dataclasses.replace(layer, window=w) for layer, w in zip(dense.layers, of, strict=True))
        refused[name] = FAMILY.refused_by_vllm(dense.with_layers(layers))
    assert refused["all"] == refused["none"] == []
    assert "windows in some layers only" in refused["upper"][0]
    assert str(list(range(14))) in refused["upper"][0]
    odd = dataclasses.replace(dense, activation="gelu_tanh", head_dim=64)
    assert len(FAMILY.refused_by_vllm(odd)) == 2


REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
REQUIRED += ["num_key_value_heads"]


def test_what_a_config_of_sizes_alone_stands_for():
    """A newer default of transformers would be another model: it shows here."""
    spec = spec_from_config({name: PUBLISHED[name] for name in REQUIRED})
    published = spec_from_config(PUBLISHED)
    layers = (LayerSpec(rope_base=10_000.0),) * 28
    assert spec == dataclasses.replace(published, layers=layers, tied_head=False)
    assert FAMILY.default_positions == 32_768


def test_key_heads_that_are_null_are_as_many_as_query_heads():
    assert spec_from_config(changed(num_key_value_heads=None)).num_kv_heads == 12


def test_every_parameter_has_a_name_of_its_own():
    spec = spec_from_config(changed(tie_word_embeddings=False))
    stored = FAMILY.stored_names(spec)
    assert list(stored) == list(spec.parameter_shapes())
    assert len(set(stored.values())) == len(stored)
    assert stored["layers.27.pre_feedforward_layernorm.weight"] == "model.layers.27.post_attention_layernorm.weight"
    assert stored["layers.11.self_attn.k_proj.bias"] == "model.layers.11.self_attn.k_proj.bias"
    assert stored["lm_head.weight"] == "lm_head.weight"


@st.composite
def specs(draw):
    kv, groups, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    head_dim = 2 * draw(st.integers(1, 8))
    wide = draw(st.booleans())
    window = draw(st.integers(1, 1000))
    base = draw(st.floats(1.0, 1e8))
    slides = draw(st.lists(st.booleans(), min_size=layers, max_size=layers))
    return ModelSpec(
        vocab_size=draw(st.integers(1, 300_000)),
        hidden_size=kv * groups * head_dim if wide else draw(st.integers(1, 512)),
        intermediate_size=draw(st.integers(1, 9000)),
        num_heads=kv * groups,
        num_kv_heads=kv,
        head_dim=head_dim,
        layers=tuple(LayerSpec(window=window if slide else None, rope_base=base) for slide in slides),
        norm_eps=draw(st.floats(1e-12, 1e-2)),
        qkv_bias=True,
        activation=draw(st.sampled_from(["silu", "gelu_tanh"])),
        tied_head=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=100)
@given(specs(), st.booleans())
def test_spec_to_config_to_spec_is_the_identity(spec, with_source):
    config = FAMILY.config_from_spec(spec, PUBLISHED if with_source else None)
    assert spec_from_config(json.loads(json.dumps(config))) == spec
