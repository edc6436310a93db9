import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.families import FAMILIES
from ttt_lit.families.keys import RenameRules, Rule
from ttt_lit.families.qwen2 import RULES, spec_from_config

TINY = {
    "model_type": "qwen2",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        ("model.layers.0.self_attn.k_proj.bias", "layers.0.self_attn.k_proj.bias"),
        ("model.layers.27.post_attention_layernorm.weight", "layers.27.pre_feedforward_layernorm.weight"),
        ("model.layers.11.mlp.down_proj.weight", "layers.11.mlp.down_proj.weight"),
        ("model.norm.weight", "norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_qwen2_names_both_ways(theirs, ours):
    assert RULES.to_ours(theirs) == ours
    assert RULES.to_theirs(ours) == theirs


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.01.mlp.up_proj.weight",
        "model.layers.-1.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight.extra2",
        "model.layers.1.mlp.up_proj.weight\n",
        "model.layers.١.mlp.up_proj.weight",
        "xmodel.norm.weight",
        "model.layers.0.post_feedforward_layernorm.weight",
    ],
)
def test_unknown_keys_are_reported_not_guessed(key):
    assert RULES.to_ours(key) is None


def test_parameters_without_a_qwen2_name_are_all_listed():
    with pytest.raises(ValueError, match=r"prime_mlp.*post_attention_layernorm"):
        RULES.map_to_theirs(
            ["layers.0.prime_mlp.up_proj.weight", "layers.0.post_attention_layernorm.weight", "norm.weight"]
        )


def test_two_parameters_may_not_meet_in_one_key():
    rules = RenameRules((Rule(theirs="x", ours="a"), Rule(theirs="x", ours="b")))
    with pytest.raises(ValueError, match="several parameters to 'x'"):
        rules.map_to_theirs(["a", "b"])


def test_a_rule_that_cannot_be_reversed_is_refused():
    with pytest.raises(ValueError, match="same"):
        Rule(theirs="model.layers.{layer}.w", ours="layers.w")


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 99999), st.sampled_from(sorted(spec_from_config(TINY).parameter_shapes())))
def test_renaming_is_reversible_for_every_layer_index(layer, name):
    name = name.replace(".11.", f".{layer}.")
    assert RULES.to_ours(RULES.to_theirs(name)) == name


def test_every_parameter_has_exactly_one_source():
    spec = spec_from_config(TINY)
    sources = FAMILIES["qwen2"].sources(spec)
    assert set(sources) == set(spec.parameter_shapes())
    assert len({source.key for source in sources.values()}) == len(sources)
