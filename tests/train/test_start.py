"""What a run begins with: the checkpoint's own tensors or reproducible random ones, every one of them accounted for."""

import json

import pytest
import torch
from helpers.tiny import random_state, tiny_spec, ttt_layer
from safetensors.torch import save_file

from ttt_lit.checkpoint.receipt import LineageStep, Receipt
from ttt_lit.checkpoint.store import load_checkpoint, save_checkpoint
from ttt_lit.convert.fast_mlp import TTTConfig
from ttt_lit.model.spec import LayerSpec
from ttt_lit.train.start import StartConfig, optimizer_file, resolve_start

DENSE = tiny_spec(LayerSpec(), LayerSpec())
TTT = TTTConfig()
QWEN = {
    "model_type": "qwen2", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "rope_theta": 100.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "max_position_embeddings": 64,
}  # fmt: skip


def make_checkpoint(folder, spec=DENSE, *, dtype=torch.float32):
    state = random_state(spec, dtype=dtype)
    receipt = Receipt.all_new(spec.parameter_shapes(), dtype="F32", note="random")
    lineage = (LineageStep(operation="import", source="somewhere"),)
    save_checkpoint(folder, spec=spec, state=state, family="qwen2", receipt=receipt, lineage=lineage)
    return state


@pytest.fixture
def checkpoint(tmp_path):
    make_checkpoint(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


@pytest.fixture
def hf_config(tmp_path):
    """A Hugging Face config.json and a folder with a tokenizer: a shape without weights."""
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    return {"init_from": str(tmp_path / "config.json"), "tokenizer": str(tmp_path / "tok")}


def moments(spec):
    shapes = spec.parameter_shapes()
    state = {f"{n}.{part}": torch.rand(s) for n, s in shapes.items() for part in ("exp_avg", "exp_avg_sq")}
    return state | {f"{n}.step": torch.tensor(3.0) for n in shapes}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_checkpoints_weights_come_through_bit_for_bit_in_float32(tmp_path):
    state = make_checkpoint(tmp_path / "c", dtype=torch.bfloat16)
    start = resolve_start(StartConfig(init_from=str(tmp_path / "c")), None)
    assert start.spec == DENSE
    assert start.added == {}
    assert same(dict(start.state), {name: tensor.float() for name, tensor in state.items()})


def test_prime_mlps_are_added_and_nothing_inherited_moves(checkpoint):
    plain, ttt = (resolve_start(StartConfig(init_from=checkpoint), config) for config in (None, TTT))
    assert ttt.spec.ttt_layers == (1,)
    assert set(ttt.state) == set(ttt.spec.parameter_shapes())
    assert set(ttt.added) == set(ttt.state) - set(plain.state)
    assert set(ttt.added) == {name for name in ttt.state if "prime" in name}
    assert same({name: ttt.state[name] for name in plain.state}, dict(plain.state))


@pytest.mark.parametrize("ttt", [None, TTT, TTTConfig(prime_init="random"), TTTConfig(prime_init="paper")])
@pytest.mark.parametrize("init", ["checkpoint", "scratch"])
def test_the_receipt_accounts_for_every_tensor(checkpoint, init, ttt):
    start = resolve_start(StartConfig(init_from=checkpoint, init=init, seed=5), ttt)
    start.receipt.check(start.spec.parameter_shapes())
    by_name = {record.name: record for record in start.receipt.records}
    assert {r.dtype for r in start.receipt.records} == {"F32"}
    origin = {r.name: r for r in load_checkpoint(checkpoint).receipt.records}
    for name in start.state:
        if name in start.added:
            assert (by_name[name].status, by_name[name].note) == ("new", f"prime_init {ttt.prime_init}, seed 5")
        elif init == "scratch":
            assert (by_name[name].status, by_name[name].note) == ("new", "normal std 0.02, norms identity, seed 5")
        else:
            assert by_name[name] == origin[name]


@pytest.mark.parametrize("ttt", [None, TTT])
@pytest.mark.parametrize("init", ["checkpoint", "scratch"])
def test_learned_sinks_are_new_zeros_of_full_attention_layers_and_move_no_other_tensor(tmp_path, init, ttt):
    spec = tiny_spec(LayerSpec(window=3), LayerSpec())
    make_checkpoint(tmp_path / "c", spec)
    given = {"init_from": str(tmp_path / "c"), "init": init, "seed": 5}
    plain, start = (resolve_start(StartConfig(**given, sink_logits=sinks), ttt) for sinks in (False, True))
    assert [layer.sink_logit for layer in start.spec.layers] == [False, True]
    name = "layers.1.self_attn.sink_logit"
    assert set(start.state) - set(plain.state) == {name} == {n for n in start.added if "sink" in n}
    assert torch.equal(start.state[name], torch.zeros(spec.num_heads))
    assert same({n: start.state[n] for n in plain.state}, dict(plain.state))
    start.receipt.check(start.spec.parameter_shapes())
    record = next(r for r in start.receipt.records if r.name == name)
    assert (record.status, record.note) == ("new", "a learned sink of zero mass")


@pytest.mark.parametrize("sinks", [False, True])
def test_a_checkpoint_with_learned_sinks_keeps_them_and_its_shape_alone_has_none(tmp_path, sinks):
    spec = tiny_spec(LayerSpec(window=3), LayerSpec(sink_logit=True))
    state = make_checkpoint(tmp_path / "c", spec)
    start = resolve_start(StartConfig(init_from=str(tmp_path / "c"), sink_logits=sinks), None)
    assert (start.spec, start.added) == (spec, {})
    assert same(dict(start.state), state)
    scratch = resolve_start(StartConfig(init_from=str(tmp_path / "c"), init="scratch", sink_logits=sinks), None)
    assert [layer.sink_logit for layer in scratch.spec.layers] == [False, sinks]


@pytest.mark.parametrize("ttt", [None, TTTConfig(prime_init="random")])
def test_scratch_is_a_function_of_the_seed(checkpoint, ttt):
    def state(seed):
        torch.rand(7)  # whatever else drew random numbers before
        return dict(resolve_start(StartConfig(init_from=checkpoint, init="scratch", seed=seed), ttt).state)

    first, second, other = state(1), state(1), state(2)
    assert same(first, second)
    matrices = [n for n in first if "norm" not in n and "prime_mlp.down_proj" not in n]
    assert all(not torch.equal(first[n], other[n]) for n in matrices)


def test_scratch_takes_the_shape_and_not_the_weights(checkpoint):
    start = resolve_start(StartConfig(init_from=checkpoint, init="scratch", std=0.1), None)
    inherited = load_checkpoint(checkpoint).state()
    assert {n: t.shape for n, t in start.state.items()} == {n: t.shape for n, t in inherited.items()}
    assert 0.05 < start.state["embed_tokens.weight"].std() < 0.15
    assert not torch.equal(start.state["embed_tokens.weight"], inherited["embed_tokens.weight"])
    assert {r.status for r in start.receipt.records} == {"new"}


def test_the_scratch_arm_has_the_modules_of_the_inherited_one(checkpoint):
    arms = [resolve_start(StartConfig(init_from=checkpoint, init=init), TTT) for init in ("checkpoint", "scratch")]
    assert arms[0].spec == arms[1].spec
    assert not arms[1].state["layers.1.prime_mlp.down_proj.weight"].any()


def test_a_config_json_is_enough_for_scratch(hf_config):
    start = resolve_start(StartConfig(init="scratch", **hf_config), TTT)
    assert (start.spec.hidden_size, start.spec.num_layers, start.spec.ttt_layers) == (8, 2, (1,))
    assert set(start.state) == set(start.spec.parameter_shapes())
    assert start.origin.tokenizer_hash is not None
    start.receipt.check(start.spec.parameter_shapes())


def test_a_ttt_checkpoint_keeps_its_prime_mlps(tmp_path):
    spec = tiny_spec(LayerSpec(), ttt_layer(window=4, width=6))
    state = make_checkpoint(tmp_path / "c", spec)
    start = resolve_start(StartConfig(init_from=str(tmp_path / "c")), TTT)
    assert start.spec == spec
    assert start.added == {}
    assert same(dict(start.state), state)


# Loading everything -----------------------------------------------------------------------------------------------------------


def load_all(checkpoint, ttt=None):
    return resolve_start(StartConfig(init_from=checkpoint, load="all"), ttt)


def test_all_brings_the_moments_beside_the_checkpoint(checkpoint):
    saved = moments(DENSE)
    save_file(saved, optimizer_file(checkpoint))
    assert same(dict(load_all(checkpoint).optimizer), saved)
    assert resolve_start(StartConfig(init_from=checkpoint), None).optimizer is None


def test_the_optimisers_file_lies_beside_the_folder_and_not_in_it(checkpoint):
    assert str(optimizer_file(checkpoint)) == checkpoint + ".optimizer.safetensors"
    assert optimizer_file(checkpoint + "/") == optimizer_file(checkpoint)


def test_all_is_refused_where_the_file_is_missing(checkpoint):
    with pytest.raises(
        FileNotFoundError, match=r"load all needs .*optimizer\.safetensors, which is missing.*load: params"
    ):
        load_all(checkpoint)


def test_all_is_refused_where_tensors_are_new(checkpoint):
    save_file(moments(DENSE), optimizer_file(checkpoint))
    with pytest.raises(ValueError, match=r"load all needs .* 4 are new \(layers\.1\..*prime.*set load: params"):
        load_all(checkpoint, TTT)


@pytest.mark.parametrize("kind", ["missing", "extra", "misshapen", "no step"])
def test_all_is_refused_unless_every_shape_matches(checkpoint, kind):
    saved = moments(DENSE)
    name = "layers.0.mlp.up_proj.weight"
    if kind == "missing":
        del saved[f"{name}.exp_avg"]
    elif kind == "extra":
        name = "layers.7.mlp.up_proj.weight"
        saved[f"{name}.exp_avg"] = torch.zeros(6, 8)
    elif kind == "misshapen":
        saved[f"{name}.exp_avg"] = torch.zeros(8, 6)
    else:
        del saved[f"{name}.step"]
    save_file(saved, optimizer_file(checkpoint))
    with pytest.raises(ValueError, match=f"load all refused, .* in 1 tensors: {name}"):
        load_all(checkpoint)


def test_all_is_refused_where_the_file_is_damaged(checkpoint):
    optimizer_file(checkpoint).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"optimizer\.safetensors"):
        load_all(checkpoint)


def test_scratch_has_no_moments_to_load(checkpoint):
    with pytest.raises(ValueError, match="init scratch has no optimiser state to load"):
        resolve_start(StartConfig(init_from=checkpoint, init="scratch", load="all"), None)


# What is missing or does not belong -------------------------------------------------------------------------------------------


def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"does not exist; make it with: python cli\.py import .*--output"
    ) as excinfo:
        resolve_start(StartConfig(init_from=missing), None)
    assert str(excinfo.value).count(missing) == 2


def test_a_hugging_face_folder_needs_import_first(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="needs `import` first"):
        resolve_start(StartConfig(init_from=str(tmp_path)), None)


def test_a_config_json_has_no_weights(hf_config):
    with pytest.raises(ValueError, match="has no weights; set init: scratch"):
        resolve_start(StartConfig(**hf_config), None)


def test_a_missing_config_json(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; give a checkpoint folder"):
        resolve_start(StartConfig(init_from=str(tmp_path / "config.json"), init="scratch"), None)


@pytest.mark.parametrize(
    "tokenizer, message", [(None, "not set, but a config.json has no tokenizer"), ("x", "holds no tokenizer")]
)
def test_a_config_json_needs_a_tokenizer(hf_config, tmp_path, tokenizer, message):
    folder = tokenizer and str(tmp_path / tokenizer)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        resolve_start(StartConfig(init="scratch", **hf_config | {"tokenizer": folder}), None)


def test_a_tokenizer_beside_a_checkpoint_would_have_no_effect(checkpoint, hf_config):
    with pytest.raises(ValueError, match="tokenizer has no effect"):
        resolve_start(StartConfig(init_from=checkpoint, tokenizer=hf_config["tokenizer"]), None)


def test_a_config_json_that_is_not_json_names_the_file(hf_config, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        resolve_start(StartConfig(init="scratch", **hf_config), None)
