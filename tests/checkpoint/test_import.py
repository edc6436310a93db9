import gc
import json
import os
import re
from pathlib import Path

import pytest
import torch
from hf_imports import refused, run
from safetensors.torch import load_file, save_file

from ttt_lit.checkpoint import tensors
from ttt_lit.checkpoint.importing import audit_headers, import_checkpoint
from ttt_lit.checkpoint.store import load_checkpoint


def qwen2_name(name):
    return f"model.{name}".replace("pre_feedforward_layernorm", "post_attention_layernorm")


def gemma3_name(name):
    return f"model.{name}"


@pytest.mark.parametrize("family, their_name", [("qwen2", qwen2_name), ("gemma3", gemma3_name)])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_arrives_bit_for_bit_under_our_names(hf_folder, tmp_path, quiet, family, their_name, shards, tied):
    folder = hf_folder(family, shards=shards, tie_word_embeddings=tied)
    checkpoint = run(folder, tmp_path, quiet)
    state = checkpoint.state()
    assert len(state) == len(folder.tensors)
    for name, tensor in state.items():
        theirs = name if name.startswith("lm_head") else their_name(name)
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, folder.tensors[theirs]), name
    assert checkpoint.family == family
    assert [step.operation for step in checkpoint.lineage] == ["import"]
    checkpoint.verify()


def test_same_input_same_bytes_out(hf_folder, tmp_path, quiet):
    folder = hf_folder()
    outputs = []
    for name in ("one", "two"):
        import_checkpoint(str(folder), str(tmp_path / name), parity=False, console=quiet)
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        outputs.append([(p.relative_to(tmp_path / name), p.read_bytes()) for p in files])
    assert outputs[0] == outputs[1]


def test_the_audit_accounts_for_every_key_and_file(hf_folder, tmp_path, quiet):
    folder = hf_folder(shards=2)
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 49}}, "added_tokens": [{"id": 60, "content": "<x>"}]})
    )
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    (folder / "other.safetensors").write_bytes(b"")
    (folder / "modeling_x.py").write_text("raise SystemExit('remote code ran')")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_x.Model"}}))
    checkpoint = run(folder, tmp_path, quiet)
    audit = json.loads((tmp_path / "out/audit.json").read_text())
    assert {record["source"] for record in audit["tensors"]} == set(folder.tensors)
    assert {record["status"] for record in audit["tensors"]} == {"inherited"}
    assert {record["dtype"] for record in audit["tensors"]} == {"BF16"}
    by_source = {record["source"]: record["shape"] for record in audit["tensors"]}
    assert all(by_source[name] == list(tensor.shape) for name, tensor in folder.tensors.items())
    assert audit["counts"]["inherited"]["parameters"] == sum(t.numel() for t in folder.tensors.values())
    assert {file["name"] for file in audit["files"]} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert all(len(file["sha256"]) == 64 for file in audit["files"])
    assert audit["tokenizer"]["sha256"] == checkpoint.tokenizer_hash
    assert audit["parity"] == "not checked: switched off"
    notes = " ".join(audit["notes"])
    for expected in ("auto_map", "pytorch_model.bin", "other.safetensors", "id 60"):
        assert expected in notes
    assert not list((tmp_path / "out").rglob("*.py"))
    printed = quiet.file.getvalue()
    assert "model.layers.*.self_attn.q_proj.bias" in printed
    assert audit["files"][0]["sha256"] in printed


def test_missing_extra_and_misshapen_keys_are_all_named(hf_folder, tmp_path, quiet):
    def edit(tensors):
        del tensors["model.layers.1.self_attn.v_proj.bias"]
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(24, 16)
        tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(16, 20)

    with pytest.raises(ValueError, match="missing") as error:
        audit_headers(str(hf_folder(edit=edit)))
    for key in ("layers.1.self_attn.v_proj.bias", "model.norm", "rotary_emb", "layers.3.mlp", "layers.2.mlp.down_proj"):
        assert key in str(error.value)
    assert "--allow" in str(error.value)
    assert "(16, 20) instead of (16, 24)" in str(error.value)


def test_weights_of_one_family_under_the_config_of_another_are_refused(hf_folder, tmp_path, quiet):
    """Two norms carry the same name in both families and mean different places; the others tell them apart."""
    folder = hf_folder("gemma3")
    config = json.loads((hf_folder(name="qwen", num_hidden_layers=7) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, tmp_path, quiet, "missing: .*q_proj.bias.*q_norm")


EXTRA = "model.rotary_emb.inv_freq"


def add_extra(tensors):
    tensors[EXTRA] = torch.zeros(2)


def test_an_extra_key_is_dropped_only_with_a_reason_that_goes_into_the_audit(hf_folder, tmp_path, quiet):
    folder = hf_folder(edit=add_extra)
    refused(folder, tmp_path, quiet, EXTRA)
    checkpoint = run(folder, tmp_path, quiet, allow=[f"{EXTRA}=computed, not learned = fine"])
    dropped = [record for record in checkpoint.receipt.records if record.status == "dropped"]
    assert [(record.name, record.note) for record in dropped] == [(EXTRA, "computed, not learned = fine")]
    assert checkpoint.lineage[0].parameters == {"allow": {EXTRA: "computed, not learned = fine"}}


@pytest.mark.parametrize(
    "allow, message",
    [
        (["model.norm.weight=do not need it"], "cannot do without"),
        (["no.such.key=why not"], "no.such.key is not in the checkpoint"),
        ([EXTRA], "expected KEY=REASON"),
        ([f"{EXTRA}="], "expected KEY=REASON"),
        ([f"{EXTRA}=a", f"{EXTRA}=b"], "each key once"),
    ],
)
def test_exceptions_that_cannot_be_made_are_refused(hf_folder, tmp_path, quiet, allow, message):
    refused(hf_folder(edit=add_extra), tmp_path, quiet, message, allow=allow)


def test_a_missing_key_cannot_be_allowed(hf_folder, tmp_path, quiet):
    folder = hf_folder(edit=lambda tensors: tensors.pop("model.norm.weight"))
    refused(folder, tmp_path, quiet, "missing.*model.norm.weight.*cannot do without", allow=["model.norm.weight=new"])


def test_a_second_copy_of_a_tied_head_is_dropped_only_if_equal(hf_folder, tmp_path, quiet):
    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def other(tensors):
        copy(tensors)
        tensors["lm_head.weight"][7, 3] += 1

    refused(hf_folder(name="differs", edit=other), tmp_path, quiet, "lm_head.weight is not model.embed_tokens.weight")
    checkpoint = run(hf_folder(edit=copy), tmp_path, quiet)
    dropped = [record for record in checkpoint.receipt.records if record.status == "dropped"]
    assert [record.name for record in dropped] == ["lm_head.weight"]
    assert "equal byte for byte" in dropped[0].note


def test_an_untied_model_without_its_head_is_incomplete(hf_folder, tmp_path, quiet):
    folder = hf_folder(tie_word_embeddings=False, edit=lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, tmp_path, quiet, "missing: lm_head.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_by_name(hf_folder, tmp_path, quiet, value):
    folder = hf_folder(edit=lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].fill_(value))
    refused(folder, tmp_path, quiet, r"layers\.1\.mlp\.up_proj.*NaN or infinite")


def test_quantised_weights_are_refused(hf_folder, tmp_path, quiet):
    def edit(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    refused(hf_folder(edit=edit), tmp_path, quiet, "quantised: model.layers.1.mlp.up_proj.weight I8")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_and_never_opened(tmp_path, quiet, name):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    os.mkfifo(folder / name)  # opening it would block for ever
    refused(folder, tmp_path, quiet, f"{name}.*can run code")


SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    "target",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x\0.safetensors",
        "..",
        "",
        "model.bin",
        "absent.safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_cannot_lead_outside_its_folder(hf_folder, tmp_path, quiet, target):
    folder = hf_folder(shards=2)
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = target
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, tmp_path, quiet, "index.json|hf: names the file|missing")


def test_a_link_out_of_the_folder_is_refused(hf_folder, tmp_path, quiet):
    folder = hf_folder()
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, tmp_path, quiet, "link out of its folder")


def test_the_hub_cache_layout_of_links_is_accepted(hf_folder, tmp_path, quiet):
    cache = tmp_path / "models--x--y"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for path in hf_folder().iterdir():
        path.rename(cache / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert run(snapshot, tmp_path, quiet).receipt.counts()["inherited"]["tensors"] == 38


@pytest.mark.parametrize("change", ["unlisted", "elsewhere", "nowhere"])
def test_an_index_that_contradicts_its_files_is_refused(hf_folder, tmp_path, quiet, change):
    folder = hf_folder(shards=2)
    path = folder / "model.safetensors.index.json"
    weights = json.loads(path.read_text())["weight_map"]
    if change == "unlisted":
        del weights["model.norm.weight"]
    elif change == "elsewhere":
        weights["model.norm.weight"] = next(f for f in weights.values() if f != weights["model.norm.weight"])
    else:
        weights["model.ghost"] = SHARD
    path.write_text(json.dumps({"weight_map": weights}))
    refused(folder, tmp_path, quiet, "contradicts.*model.(norm.weight|ghost)")


def test_a_single_file_beside_an_index_is_ambiguous(hf_folder, tmp_path, quiet):
    folder = hf_folder(shards=2)
    save_file(folder.tensors, folder / "model.safetensors")
    refused(folder, tmp_path, quiet, "holds both")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not valid JSON"),
        ("[]", "JSON object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("{}", "model_type is None"),
        ('{"model_type": "llama"}', "'llama'.*'qwen2'"),
        ('{"model_type": ["qwen2"]}', "model_type"),
        ('{"model_type": "qwen2"}', "is missing"),
    ],
)
def test_bad_configs_end_in_one_line(hf_folder, tmp_path, quiet, text, message):
    folder = hf_folder()
    (folder / "config.json").write_text(text)
    refused(folder, tmp_path, quiet, message)


def test_a_tokenizer_of_another_model_is_refused(hf_folder, tmp_path, quiet):
    folder = hf_folder()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 50}}}))
    refused(folder, tmp_path, quiet, "ids up to 50, the embedding 50 rows")
    (folder / "tokenizer.json").write_text(json.dumps({"model": 3}))
    refused(folder, tmp_path, quiet, "tokenizer.json: not a usable")


def test_our_own_checkpoint_is_no_source(hf_folder, tmp_path, quiet):
    run(hf_folder(), tmp_path, quiet)
    with pytest.raises(ValueError, match="ttt_lit checkpoint already"):
        import_checkpoint(str(tmp_path / "out"), str(tmp_path / "again"), console=quiet)


def test_an_existing_output_is_kept(hf_folder, tmp_path, quiet):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        run(hf_folder(), tmp_path, quiet)
    assert (tmp_path / "out").is_dir()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of this process")
def test_an_import_maps_the_weights_and_holds_none_of_them(hf_folder, tmp_path, quiet, monkeypatch):
    """However large the checkpoint: what the process itself has to keep grows by less than the weights' size."""
    folder = hf_folder(vocab_size=2_000_000)  # 64 MB

    def own_bytes():
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    seen = []
    monkeypatch.setattr(tensors, "save_file", lambda *a, **k: [save_file(*a, **k), seen.append(own_bytes())])
    folder.tensors.clear()
    gc.collect()
    before = own_bytes()
    run(folder, tmp_path, quiet)
    assert max(seen) - before < 32_000_000


def test_shards_of_the_output_follow_its_size(hf_folder, tmp_path, quiet):
    folder = hf_folder()
    checkpoint = run(folder, tmp_path, quiet, shard_bytes=4000)
    merged = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        merged |= load_file(path)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert merged.keys() == checkpoint.spec.parameter_shapes().keys()
    assert load_checkpoint(tmp_path / "out").weights_hash == checkpoint.weights_hash
