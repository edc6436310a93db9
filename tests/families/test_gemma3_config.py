import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.convert.windowed import windowed
from ttt_lit.families import family_of_config
from ttt_lit.families.gemma3 import FAMILY, spec_from_config
from ttt_lit.model.spec import LayerSpec, ModelSpec, PrimeSpec

PUBLISHED = json.loads((Path(__file__).parents[2] / "configs/shapes/gemma-3-1b-pt.json").read_text())
GLOBAL_LAYERS = [5, 11, 17, 23]


def changed(**fields):
    return {k: v for k, v in (PUBLISHED | fields).items() if v != "absent"}


def as_transformers_5_spells_it(**fields):
    kinds = ["full_attention" if i in GLOBAL_LAYERS else "sliding_attention" for i in range(26)]
    bases = {"full_attention": 1e6, "sliding_attention": 1e4}
    rope = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()}
    old = dict.fromkeys(["rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"], "absent")
    return changed(**old | {"layer_types": kinds, "rope_parameters": rope} | fields)


def test_the_published_config_gives_the_published_model():
    spec = spec_from_config(PUBLISHED)
    assert family_of_config(PUBLISHED).name == "gemma3"
    assert spec.num_parameters() == 999_885_952
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (26, 4, 1, 256)
    for i, layer in enumerate(spec.layers):
        expected = (None, 1e6) if i in GLOBAL_LAYERS else (512, 1e4)
        assert (layer.window, layer.rope_base) == expected
    assert spec.embedding_scale == 1152**0.5
    assert spec.attention_scale == 1 / 16
    assert spec.norm_unit_offset
    assert spec.pre_norms
    assert spec.post_norms
    assert spec.qk_norm
    assert spec.tied_head
    assert not spec.qkv_bias
    assert spec.activation == "gelu_tanh"


def test_both_spellings_mean_the_same():
    assert spec_from_config(as_transformers_5_spells_it()) == spec_from_config(PUBLISHED)


def test_what_a_config_of_sizes_alone_stands_for():
    """A newer default of transformers would be another model: it shows here."""
    required = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    spec = spec_from_config({name: PUBLISHED[name] for name in [*required, "num_key_value_heads"]})
    published = spec_from_config(PUBLISHED)
    wider = tuple(dataclasses.replace(layer, window=layer.window and 4096) for layer in published.layers)
    assert spec == published.with_layers(wider)
    assert FAMILY.default_positions == 131_072


@pytest.mark.parametrize(
    "pattern, full", [(1, range(26)), (2, range(1, 26, 2)), (6, GLOBAL_LAYERS), (27, []), ("absent", GLOBAL_LAYERS)]
)
def test_every_so_many_layers_one_is_global(pattern, full):
    layers = spec_from_config(changed(sliding_window_pattern=pattern)).layers
    assert [i for i, layer in enumerate(layers) if layer.window is None] == list(full)


def test_a_layer_list_beats_the_pattern_as_in_transformers():
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 24
    layers = spec_from_config(changed(layer_types=kinds)).layers
    assert [layer.rope_base for layer in layers] == [1e6] * 2 + [1e4] * 24


def test_the_score_scale_is_its_own_field():
    assert spec_from_config(PUBLISHED).score_scale is None
    assert spec_from_config(changed(query_pre_attn_scalar=168)).attention_scale == 168**-0.5
    assert spec_from_config(changed(head_dim=64)).attention_scale == 1 / 16


LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_scaling": LINEAR}, "full_attention.*'linear'"),
        ({"rope_scaling": {"rope_theta": 5.0}}, "rope_scaling says 5.0, rope_theta 1000000"),
        ({"rope_parameters": {"full_attention": LINEAR}}, "rope_parameters.full_attention.*'linear'"),
        ({"rope_parameters": {"sliding_attention": {"factor": 2.0}}}, "rope_parameters.sliding_attention.*'factor'"),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}}, "says 5.0, rope_local_base_freq 10000"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters.*full_attention"),
        ({"rope_parameters": [1e6]}, "rope_parameters"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_parameters": {"full_attention": 5.0}}, "config.json"),
        ({"rope_local_base_freq": "10000"}, "rope_local_base_freq"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"attention_bias": True}, "attention_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_activation": "gelu"}, "hidden_activation.*'gelu'"),
        ({"hidden_act": "silu"}, "hidden_act .*hidden_activation"),
        ({"hidden_size": 1151}, "hidden size .1151"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"num_key_value_heads": 3}, "num_kv_heads 3"),
        ({"head_dim": None}, "head_dim"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"query_pre_attn_scalar": 256.0}, "query_pre_attn_scalar"),
        ({"sliding_window": None}, "sliding_window"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({"layer_types": ["full_attention"] * 25}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 26}, "layer_types"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings"),
    ],
)
def test_what_is_not_implemented_or_not_possible_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        spec_from_config(changed(**fields))
    assert "\n" not in str(error.value)


def test_the_multimodal_model_is_another_model_type():
    with pytest.raises(ValueError, match="'gemma3', expected one of.*'gemma3_text'"):
        family_of_config({"model_type": "gemma3", "text_config": PUBLISHED})


@pytest.mark.parametrize("config", [PUBLISHED, as_transformers_5_spells_it(), changed(query_pre_attn_scalar=168)])
def test_an_unchanged_model_keeps_every_field_as_it_was(config):
    assert FAMILY.config_from_spec(spec_from_config(config), config) == config
    assert "auto_map" not in FAMILY.config_from_spec(
        spec_from_config(config), config | {"auto_map": {"AutoModel": "evil.py"}}
    )


@pytest.mark.parametrize("source", [PUBLISHED, as_transformers_5_spells_it()])
def test_smaller_local_windows_change_one_setting(source):
    spec = spec_from_config(source)
    smaller = spec.with_layers(tuple(dataclasses.replace(layer, window=layer.window and 128) for layer in spec.layers))
    config = FAMILY.config_from_spec(smaller, source)
    assert {k for k in PUBLISHED if config.get(k) != PUBLISHED[k]} - {"rope_scaling"} == {"sliding_window"}
    assert spec_from_config(config) == smaller


@pytest.mark.parametrize("window", [1, 512, 8192])
def test_a_windowed_global_layer_keeps_its_base_and_cannot_be_exported(window):
    """In a config it would be a sliding layer, and those are rotated with the local base."""
    spec = windowed(spec_from_config(PUBLISHED), window)
    at_global = {(spec.layers[i].window, spec.layers[i].rope_base) for i in GLOBAL_LAYERS}
    assert at_global == {(window, 1e6)}
    with pytest.raises(
        ValueError, match=rf"layers \[5, 11, 17, 23\] have window {window} and RoPE base 1e\+06"
    ) as error:
        FAMILY.config_from_spec(spec, PUBLISHED)
    assert "\n" not in str(error.value)


def test_windows_everywhere_can_be_exported_where_all_layers_share_a_base():
    one_base = changed(rope_local_base_freq=1e6)
    spec = windowed(spec_from_config(one_base), 512)
    config = FAMILY.config_from_spec(spec, one_base)
    assert spec_from_config(config) == spec
    assert {layer.window for layer in spec.layers} == {512}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qk_norm": False}, "qk_norm"),
        ({"post_norms": False}, "post_norms"),
        ({"pre_norms": False}, "pre_norms"),
        ({"qkv_bias": True}, "qkv_bias"),
        ({"norm_unit_offset": False}, "norm_unit_offset"),
        ({"embedding_scale": 1.0}, r"embedding_scale=1.0 \(always 3.0"),
        ({"score_scale": 0.4}, "score_scale=0.4"),
        ({"score_scale": 3.0}, "score_scale=3.0"),
        ({"num_heads": 2, "num_kv_heads": 1}, "hidden_size 9, not a multiple of num_heads 2"),
        ({"layers": (LayerSpec(prime=PrimeSpec(intermediate_size=4)),)}, "prime MLPs .layers .0"),
        ({"layers": (LayerSpec(), LayerSpec(fast="mlp"))}, "fast weights .layers .1"),
        ({"layers": (LayerSpec(window=5, sink_tokens=2),)}, "attention sinks .layers .0"),
        ({"layers": (LayerSpec(window=3), LayerSpec(window=5))}, "sliding_attention layers share one window"),
        (
            {"layers": (LayerSpec(rope_base=3.0), LayerSpec(rope_base=5.0))},
            "full_attention layers share one window and one RoPE base",
        ),
    ],
)
def test_what_gemma3_cannot_be_is_refused_by_name(change, message):
    spec = dataclasses.replace(spec_from_config(changed(hidden_size=9, num_attention_heads=3)), num_kv_heads=3)
    with pytest.raises(ValueError, match=message):
        FAMILY.config_from_spec(dataclasses.replace(spec, **change), None)


def test_a_scale_spelt_out_is_the_same_model():
    spec = spec_from_config(PUBLISHED)
    assert FAMILY.config_from_spec(dataclasses.replace(spec, score_scale=256**-0.5), PUBLISHED) == PUBLISHED


@st.composite
def specs(draw):
    kv, groups, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 14))
    hidden, head_dim = kv * groups * draw(st.integers(1, 300)), 2 * draw(st.integers(1, 128))
    scalar = draw(st.integers(1, 1000))
    sliding = LayerSpec(window=draw(st.integers(1, 1000)), rope_base=draw(st.floats(1.0, 1e8)))
    full = LayerSpec(rope_base=draw(st.floats(1.0, 1e8)))
    every = draw(st.integers(0, 7))
    slides = st.lists(st.booleans(), min_size=layers, max_size=layers)
    chosen = [bool((i + 1) % every) for i in range(layers)] if every else draw(slides)
    return ModelSpec(
        vocab_size=draw(st.integers(1, 300_000)),
        hidden_size=hidden,
        intermediate_size=draw(st.integers(1, 9000)),
        num_heads=kv * groups,
        num_kv_heads=kv,
        head_dim=head_dim,
        layers=tuple(sliding if slide else full for slide in chosen),
        norm_eps=draw(st.floats(1e-12, 1e-2)),
        norm_unit_offset=True,
        post_norms=True,
        qk_norm=True,
        activation=draw(st.sampled_from(["silu", "gelu_tanh"])),
        tied_head=draw(st.booleans()),
        embedding_scale=hidden**0.5,
        score_scale=None if scalar == head_dim else scalar**-0.5,
    )


@settings(deadline=None, max_examples=100)
@given(specs(), st.sampled_from([None, PUBLISHED, as_transformers_5_spells_it()]))
def test_spec_to_config_to_spec_is_the_identity(spec, source):
    config = FAMILY.config_from_spec(spec, source)
    assert spec_from_config(json.loads(json.dumps(config))) == spec


def test_every_parameter_has_a_name_of_its_own():
    spec = spec_from_config(changed(tie_word_embeddings=False))
    stored = FAMILY.stored_names(spec)
    assert list(stored) == list(spec.parameter_shapes())
    assert stored.pop("lm_head.weight") == "lm_head.weight"
    assert stored == {name: f"model.{name}" for name in stored}
