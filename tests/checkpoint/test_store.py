import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from ttt_lit.checkpoint.receipt import LineageStep, Receipt, TensorRecord
from ttt_lit.checkpoint.store import load_checkpoint, new_folder, save_checkpoint
from ttt_lit.model.spec import LayerSpec, ModelSpec, PrimeSpec

SPEC = ModelSpec(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    layers=(LayerSpec(window=3), LayerSpec(prime=PrimeSpec(intermediate_size=4), fast="prime")),
    qkv_bias=True,
)


def random_state(spec=SPEC, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in spec.parameter_shapes().items()}


def save(path, **changes):
    spec = changes.get("spec", SPEC)
    arguments = {
        "spec": spec,
        "state": random_state(spec),
        "family": "qwen2",
        "receipt": Receipt.all_new(spec.parameter_shapes(), dtype="F32", note="normal(0, 0.02)"),
        "lineage": (LineageStep(operation="scratch", parameters={"seed": 0}),),
    }
    return save_checkpoint(path, **arguments | changes)


def test_everything_comes_back(tmp_path):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text("{}")
    (tmp_path / "tok/secrets.txt").write_text("not a tokenizer file")
    save(tmp_path / "c", source_config='{"a":  1}', tokenizer=tmp_path / "tok")
    opened = load_checkpoint(tmp_path / "c")
    assert opened.spec == SPEC
    assert opened.lineage == (LineageStep(operation="scratch", parameters={"seed": 0}),)
    assert opened.receipt.counts()["new"]["parameters"] == SPEC.num_parameters()
    assert opened.source_config == '{"a":  1}'
    assert (tmp_path / "c/source/config.json").read_text() == '{"a":  1}'
    assert [p.name for p in opened.tokenizer.iterdir()] == ["tokenizer.json"]
    assert opened.tokenizer_hash == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    state = opened.state()
    assert list(state) == list(SPEC.parameter_shapes())
    assert all(torch.equal(state[name], tensor) for name, tensor in random_state().items())
    opened.verify()


def test_state_is_cast_on_request_and_safetensors_reads_the_file(tmp_path):
    opened = save(tmp_path / "c", state=random_state(dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in opened.state(dtype=torch.float32).values()} == {torch.float32}
    plain = load_file(tmp_path / "c/model.safetensors")
    assert all(torch.equal(plain[name], tensor) for name, tensor in opened.state().items())
    assert len({file.stat().st_mode for file in (tmp_path / "c").iterdir()}) == 1  # weights are as readable as the rest


def test_the_receipt_states_the_dtype_that_is_stored(tmp_path):
    opened = save(tmp_path / "c", state=random_state(dtype=torch.bfloat16))
    assert {record.dtype for record in opened.receipt.records} == {"BF16"}


def test_shards_hold_the_same_tensors(tmp_path):
    opened = save(tmp_path / "c", shard_bytes=1500)
    assert sum(name.endswith(".safetensors") for name in opened.files) > 2
    assert all(torch.equal(opened.state()[name], tensor) for name, tensor in random_state().items())
    opened.verify()
    other = random_state()
    other["norm.weight"][0] += 1
    assert save(tmp_path / "d", shard_bytes=1500, state=other).weights_hash != opened.weights_hash
    assert save(tmp_path / "e", shard_bytes=1500).weights_hash == opened.weights_hash


def test_the_same_input_gives_the_same_bytes(tmp_path):
    one, two = save(tmp_path / "a"), save(tmp_path / "b")
    assert one.files == two.files
    assert (tmp_path / "a/checkpoint.json").read_bytes() == (tmp_path / "b/checkpoint.json").read_bytes()


def test_the_bytes_do_not_depend_on_the_process(tmp_path):
    """Pinned: another order, padding or hash seed, or another writer in safetensors, would show here."""
    state = {n: torch.arange(math.prod(s)).reshape(s).bfloat16() for n, s in SPEC.parameter_shapes().items()}
    state["norm.weight"] = state["norm.weight"].float()
    opened = save(tmp_path / "c", state=state)
    assert opened.weights_hash == "dee07d6cffafe9eef3d664e2a1496911f1d2cf706cd8ddc651d138c276c73aa1"


def test_a_state_that_does_not_fit_is_refused_with_every_key(tmp_path):
    state = random_state()
    state["surprise"] = state.pop("norm.weight")
    state["layers.0.mlp.up_proj.weight"] = torch.zeros(12, 7)
    with pytest.raises(ValueError, match=r"missing: norm.weight; extra: surprise; misshapen: layers.0.mlp.up_proj"):
        save(tmp_path / "c", state=state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["without", "doubled", "unknown", "reshaped"])
def test_a_receipt_that_does_not_account_for_every_tensor_is_refused(tmp_path, change):
    records = list(Receipt.all_new(SPEC.parameter_shapes(), dtype="F32", note="normal").records)
    last = records.pop()
    extra = {
        "without": [],
        "doubled": [last, last],
        "unknown": [last, dataclasses.replace(last, name="surprise")],
        "reshaped": [dataclasses.replace(last, shape=(9,))],
    }
    with pytest.raises(ValueError, match="surprise" if change == "unknown" else "norm.weight"):
        save(tmp_path / "c", receipt=Receipt(tuple(records + extra[change])))
    assert not list(tmp_path.iterdir())


def test_dropped_tensors_are_no_parameters_and_need_a_reason(tmp_path):
    receipt = Receipt.all_new(SPEC.parameter_shapes(), dtype="F32", note="normal")
    gone = TensorRecord(name="rotary.inv_freq", status="dropped", shape=(2,), dtype="F32", note="computed")
    opened = save(tmp_path / "c", receipt=Receipt((*receipt.records, gone)))
    assert opened.receipt.counts()["dropped"] == {"tensors": 1, "parameters": 2}
    with pytest.raises(ValueError, match="without a note"):
        TensorRecord(name="x", status="dropped", shape=(2,), dtype="F32")


def test_conversions_append_to_the_receipt():
    before = dataclasses.replace(SPEC, layers=(LayerSpec(), LayerSpec()))
    receipt = Receipt.all_new(before.parameter_shapes(), dtype="BF16", note="imported")
    new = {n: s for n, s in SPEC.parameter_shapes().items() if n not in before.parameter_shapes()}
    with pytest.raises(ValueError, match="prime_mlp.*has no record"):
        receipt.check(SPEC.parameter_shapes())
    receipt.with_new(new, dtype="BF16", note="copied").check(SPEC.parameter_shapes())


@pytest.mark.parametrize("name", ["model.safetensors", "spec.json", "lineage.json", "receipt.json", "checkpoint.json"])
def test_damage_of_any_file_is_found_and_named(tmp_path, name):
    opened = save(tmp_path / "c")
    path = tmp_path / "c" / name
    content = path.read_bytes()
    for damaged in (content[:-3], b"", content.replace(b"1", b"\xb1", 1), None):
        if damaged == content:
            continue
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises((ValueError, FileNotFoundError), match="c") as error:
            load_checkpoint(opened.path).verify()
        assert "\n" not in str(error.value)
    path.write_bytes(content)
    load_checkpoint(opened.path).verify()


def test_one_flipped_bit_in_the_weights_is_found(tmp_path):
    save(tmp_path / "c")
    path = tmp_path / "c/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    opened = load_checkpoint(tmp_path / "c")
    assert opened.state()
    with pytest.raises(ValueError, match="model.safetensors has changed"):
        opened.verify()


def test_weights_that_contradict_the_spec_are_refused(tmp_path):
    save(tmp_path / "c")
    wider = dataclasses.replace(SPEC, intermediate_size=13)
    (tmp_path / "c/spec.json").write_text(wider.to_json())
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj\.weight"):
        load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(tmp_path, version):
    save(tmp_path / "c")
    manifest = json.loads((tmp_path / "c/checkpoint.json").read_text())
    (tmp_path / "c/checkpoint.json").write_text(json.dumps(manifest | {"format_version": version}))
    with pytest.raises(ValueError, match="format_version is .*expected 1"):
        load_checkpoint(tmp_path / "c")


def test_a_manifest_cannot_lead_outside_its_folder(tmp_path):
    save(tmp_path / "c")
    manifest = json.loads((tmp_path / "c/checkpoint.json").read_text())
    manifest["files"]["../other/model.safetensors"] = "0"
    (tmp_path / "c/checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="outside the folder"):
        load_checkpoint(tmp_path / "c")


def test_what_is_no_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is there.*import command"):
        load_checkpoint(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="Hugging Face folder"):
        load_checkpoint(tmp_path)


def test_an_existing_output_is_never_touched(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c/mine").write_text("precious")
    with pytest.raises(ValueError, match="exists already"):
        save(tmp_path / "c")
    assert (tmp_path / "c/mine").read_text() == "precious"


def test_a_folder_is_complete_or_absent(tmp_path):
    def interrupted():
        with new_folder(tmp_path / "c") as partial:
            (partial / "half").write_text("written")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_behind_does_not_reach_the_next(tmp_path):
    (tmp_path / ".c.partial").mkdir()
    (tmp_path / ".c.partial/stale.safetensors").write_text("old")
    opened = save(tmp_path / "c")
    opened.verify()
    assert not (tmp_path / "c/stale.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
