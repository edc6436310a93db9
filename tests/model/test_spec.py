"""The description of a network: survives JSON, names what it does not know, and refuses what cannot be built."""

import dataclasses
import json
import subprocess
import sys

import pytest
from helpers.tiny import specs, tiny_spec
from hypothesis import given, settings

from ttt_lit.model.spec import LayerSpec, ModelSpec, PrimeSpec, last_quarter


@settings(max_examples=60)
@given(specs())
def test_json_round_trip(spec):
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_a_description_from_before_attention_sinks_has_none():
    data = json.loads(tiny_spec().to_json())
    assert [layer.pop("sink_tokens") for layer in data["layers"]] == [0, 0]
    assert ModelSpec.from_dict(data) == tiny_spec()


def edited(path, value):
    data = json.loads(tiny_spec().to_json())
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize("path", [["hiden_size"], ["layers", 0, "windw"], ["layers", 1, "prime", "width"]])
def test_an_unknown_field_is_refused_by_name(path):
    with pytest.raises(ValueError, match=f"unknown fields .*{path[-1]}"):
        ModelSpec.from_json(edited(path, 3))


@pytest.mark.parametrize("field", ["vocab_size", "layers"])
def test_a_missing_field_is_an_error_that_names_it(field):
    data = json.loads(tiny_spec().to_json())
    del data[field]
    with pytest.raises((ValueError, TypeError), match=field):
        ModelSpec.from_dict(data)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 0}, "vocab_size: got 0"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads 3 is not a multiple of num_kv_heads 2"),
        ({"head_dim": 3}, "head_dim: got 3, expected an even number"),
        ({"activation": "relu"}, "activation: got 'relu'"),
        ({"layers": ()}, "layers: got none"),
    ],
)
def test_an_impossible_network_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_spec(), **changes)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError, match="vocab_size.*head_dim"):
        dataclasses.replace(tiny_spec(), vocab_size=0, head_dim=5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"window": 0}, "window: got 0"),
        ({"window": 4, "sink_tokens": -1}, "sink_tokens: got -1"),
        ({"sink_tokens": 2}, "sink_tokens: got 2 with window None"),
        ({"rope_base": 0.0}, "rope_base: got 0.0"),
        ({"rope_base": float("nan")}, "rope_base: got nan"),
        ({"fast": "lora"}, "fast: got 'lora'"),
        ({"fast": "prime"}, "no prime MLP"),
    ],
)
def test_an_impossible_layer_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LayerSpec(**changes)


def test_a_prime_mlp_without_width_is_refused():
    with pytest.raises(ValueError, match="intermediate_size: got 0"):
        PrimeSpec(intermediate_size=0)


@pytest.mark.parametrize("layers, chosen", [(28, 7), (26, 7), (6, 2), (1, 1), (2, 1), (4, 1)])
def test_last_quarter_counts_from_the_top(layers, chosen):
    assert last_quarter(layers) == tuple(range(layers - chosen, layers))


def test_the_suffix_starts_at_the_lowest_ttt_layer():
    fast = LayerSpec(fast="mlp")
    assert tiny_spec(LayerSpec(), fast, LayerSpec(), fast).ttt_layers == (1, 3)
    assert tiny_spec(LayerSpec(), fast, LayerSpec(), fast).suffix_start == 1
    assert tiny_spec(LayerSpec(), LayerSpec()).suffix_start == 2


def test_parameters_of_qwen_1_5b_are_counted_as_published():
    """1.54B, 1.31B of them outside the embeddings (the Qwen2.5 model card)."""
    spec = ModelSpec(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_heads=12, num_kv_heads=2, head_dim=128,
        layers=(LayerSpec(),) * 28, qkv_bias=True,
    )  # fmt: skip
    assert round(spec.num_parameters() / 1e9, 2) == 1.54
    assert round((spec.num_parameters() - 151_936 * 1536) / 1e9, 2) == 1.31


def test_the_number_of_layers_is_not_to_change():
    with pytest.raises(ValueError, match="got 1 layers, expected 2"):
        tiny_spec().with_layers((LayerSpec(),))


def test_reading_a_spec_does_not_load_torch():
    code = "import sys, ttt_lit.model.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
