import dataclasses
import io
import json

import pytest
import torch
from hf_folders import CONFIGS, random_tensors, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from ttt_lit.checkpoint.export import export_checkpoint
from ttt_lit.checkpoint.importing import import_checkpoint
from ttt_lit.checkpoint.receipt import LineageStep, Receipt
from ttt_lit.checkpoint.store import load_checkpoint, save_checkpoint
from ttt_lit.families import family_of_config
from ttt_lit.families.qwen2 import spec_from_config
from ttt_lit.model.spec import LayerSpec, PrimeSpec

CONFIG = CONFIGS["qwen2"]


def read_folder(path):
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    return json.loads((path / "config.json").read_text()), tensors


def same_tensors(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].view(-1).view(torch.uint8), b[name].view(-1).view(torch.uint8)), name


@st.composite
def qwen2_random_folders(draw):
    """config, tensors and number of shards of a random Qwen2 checkpoint."""
    kv, groups, layers = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head = 2 * draw(st.integers(1, 3))
    config = {
        key: CONFIG[key] for key in sorted(CONFIG) if key in ("model_type", "hidden_act") or draw(st.booleans())
    } | {
        "vocab_size": draw(st.integers(1, 20)),
        "hidden_size": kv * groups * head,
        "intermediate_size": draw(st.integers(1, 10)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv * groups,
        "num_key_value_heads": kv,
        "tie_word_embeddings": draw(st.booleans()),
        "use_sliding_window": draw(st.booleans()),
        "max_window_layers": draw(st.integers(0, layers)),
        "sliding_window": draw(st.integers(1, 100)),
    }
    if draw(st.booleans()):
        config |= {"head_dim": head + 2}
    if draw(st.booleans()):
        config.pop("rope_theta", None)
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": draw(st.floats(2.0, 1e7))}
    if config["use_sliding_window"] and draw(st.booleans()):
        kinds = st.sampled_from(["full_attention", "sliding_attention"])
        config["layer_types"] = draw(st.lists(kinds, min_size=layers, max_size=layers))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    tensors = random_tensors(config, dtype, seed=draw(st.integers(0, 9)))
    if config["tie_word_embeddings"] and draw(st.booleans()):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if draw(st.booleans()):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    return config, tensors, draw(st.sampled_from([1, 2]))


@st.composite
def gemma3_random_folders(draw):
    """config, tensors and number of shards of a random Gemma 3 checkpoint."""
    kv, groups, layers = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    published = CONFIGS["gemma3"]
    config = {key: published[key] for key in published if key == "model_type" or draw(st.booleans())} | {
        "vocab_size": draw(st.integers(1, 20)),
        "hidden_size": kv * groups * draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 10)),
        "num_hidden_layers": layers,
        "num_attention_heads": kv * groups,
        "num_key_value_heads": kv,
        "head_dim": 2 * draw(st.integers(1, 3)),
        "query_pre_attn_scalar": draw(st.integers(1, 9)),
        "tie_word_embeddings": draw(st.booleans()),
        "sliding_window_pattern": draw(st.integers(1, 6)),
    }
    if draw(st.booleans()):
        kinds = ["full_attention", "sliding_attention"]
        config["layer_types"] = draw(st.lists(st.sampled_from(kinds), min_size=layers, max_size=layers))
        for old in ("rope_theta", "rope_local_base_freq", "sliding_window_pattern"):
            config.pop(old, None)
        base = st.floats(2.0, 1e7)
        config["rope_parameters"] = {kind: {"rope_type": "default", "rope_theta": draw(base)} for kind in kinds}
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    tensors = random_tensors(config, dtype, seed=draw(st.integers(0, 9)))
    if config["tie_word_embeddings"] and draw(st.booleans()):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return config, tensors, draw(st.sampled_from([1, 2]))


@settings(deadline=None, max_examples=50)
@given(st.one_of(qwen2_random_folders(), gemma3_random_folders()), st.sampled_from([10**9, 600]))
def test_hf_to_ours_to_hf_keeps_every_key_bit_and_meaning(tmp_path_factory, folder, shard_bytes):
    config, tensors, shards = folder
    home = tmp_path_factory.mktemp("trip")
    write_folder(home / "hf", config, tensors, shards)
    quiet = Console(file=io.StringIO())
    import_checkpoint(str(home / "hf"), str(home / "ours"), parity=False, console=quiet, shard_bytes=shard_bytes)
    export_checkpoint(str(home / "ours"), str(home / "back"), engine="transformers", shard_bytes=shard_bytes)
    back_config, back_tensors = read_folder(home / "back")
    same_tensors(tensors, back_tensors)
    family = family_of_config(config)
    assert family.spec_from_config(back_config) == family.spec_from_config(config)
    changed = {key for key in config if back_config.get(key) != config[key]}
    assert changed <= {"torch_dtype"}


def test_generation_settings_and_tokenizer_return_unchanged(hf_folder, tmp_path, quiet):
    folder = hf_folder()
    files = {
        "generation_config.json": '{"eos_token_id":   1}',
        "tokenizer.json": '{"model": {"vocab": {"a": 0}}}',
        "tokenizer_config.json": "{}",
        "chat_template.jinja": "x",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "README.md").write_text("not ours to carry")
    import_checkpoint(str(folder), str(tmp_path / "ours"), parity=False, console=quiet)
    export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert {p.name for p in (tmp_path / "back").iterdir()} == {*files, "config.json", "model.safetensors"}
    for name, text in files.items():
        assert (tmp_path / "back" / name).read_text() == text


def converted(hf_folder, tmp_path, quiet, layer):
    """An imported checkpoint with every layer replaced, saved as a conversion would."""
    import_checkpoint(str(hf_folder()), str(tmp_path / "ours"), parity=False, console=quiet)
    before = load_checkpoint(tmp_path / "ours")
    spec = before.spec.with_layers(tuple(dataclasses.replace(old, **layer) for old in before.spec.layers))
    new = {n: s for n, s in spec.parameter_shapes().items() if n not in before.spec.parameter_shapes()}
    return save_checkpoint(
        tmp_path / "converted",
        spec=spec,
        state=before.state() | {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in new.items()},
        family=before.family,
        receipt=before.receipt.with_new(new, dtype="BF16", note="zeros") if new else before.receipt,
        lineage=(*before.lineage, LineageStep(operation="convert")),
        source_config=before.source_config,
    )


def test_a_windowed_model_exports_as_one(hf_folder, tmp_path, quiet):
    converted(hf_folder, tmp_path, quiet, {"window": 5})
    export_checkpoint(str(tmp_path / "converted"), str(tmp_path / "back"))
    config, tensors = read_folder(tmp_path / "back")
    assert [layer.window for layer in spec_from_config(config).layers] == [5, 5, 5]
    assert config["max_position_embeddings"] == CONFIG["max_position_embeddings"]
    assert config["torch_dtype"] == "bfloat16"
    assert len(tensors) == 38


def test_windows_in_some_layers_are_written_only_for_transformers(hf_folder, tmp_path, quiet):
    """vLLM's Qwen2 asserts max_window_layers == num_hidden_layers, and then gives no layer a window."""
    checkpoint = converted(hf_folder, tmp_path, quiet, {})
    layers = tuple(
        dataclasses.replace(layer, window=None if i == 1 else 5) for i, layer in enumerate(checkpoint.spec.layers)
    )
    save_checkpoint(
        tmp_path / "mixed",
        spec=checkpoint.spec.with_layers(layers),
        state=checkpoint.state(),
        family="qwen2",
        receipt=checkpoint.receipt,
        lineage=checkpoint.lineage,
    )
    with pytest.raises(ValueError, match=r"full attention in layers \[1\].*--engine transformers") as caught:
        export_checkpoint(str(tmp_path / "mixed"), str(tmp_path / "back"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "back").exists()
    export_checkpoint(str(tmp_path / "mixed"), str(tmp_path / "back"), engine="transformers")
    assert [layer.window for layer in spec_from_config(read_folder(tmp_path / "back")[0]).layers] == [5, None, 5]
    with pytest.raises(ValueError, match="engine: got 'vllm'"):
        export_checkpoint(str(tmp_path / "mixed"), str(tmp_path / "no"), engine="vllm")


@pytest.mark.parametrize(
    "claimed, contexts, expected",
    [(100, [64], 100), (100, [64, 128, 96], 128), (None, [40_000], 40_000), (None, [64], None), (100, [None], 100)],
)
def test_an_export_claims_the_longest_context_trained_on(hf_folder, tmp_path, quiet, claimed, contexts, expected):
    """A config without the field stands for its class's default, 32,768; a step of an older version says no context."""
    import_checkpoint(str(hf_folder()), str(tmp_path / "ours"), parity=False, console=quiet)
    before = load_checkpoint(tmp_path / "ours")
    config = {key: value for key, value in CONFIG.items() if key != "max_position_embeddings"}
    steps = tuple(
        LineageStep(operation="fit", parameters={} if context is None else {"context": context}) for context in contexts
    )
    save_checkpoint(
        tmp_path / "trained",
        spec=before.spec,
        state=before.state(),
        family="qwen2",
        receipt=before.receipt,
        lineage=(*before.lineage, *steps),
        source_config=json.dumps(config if claimed is None else config | {"max_position_embeddings": claimed}),
    )
    export_checkpoint(str(tmp_path / "trained"), str(tmp_path / "back"))
    assert read_folder(tmp_path / "back")[0].get("max_position_embeddings") == expected


def test_prime_mlps_cannot_be_exported(hf_folder, tmp_path, quiet):
    converted(hf_folder, tmp_path, quiet, {"prime": PrimeSpec(intermediate_size=4), "fast": "prime"})
    with pytest.raises(ValueError, match="prime MLPs.*fast weights"):
        export_checkpoint(str(tmp_path / "converted"), str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    "layer, what",
    [({"window": 5, "sink_tokens": 2}, "attention sinks"), ({"sink_logit": True}, "learned sink logits")],
)
def test_sinks_of_either_kind_cannot_be_exported(hf_folder, tmp_path, quiet, layer, what):
    converted(hf_folder, tmp_path, quiet, layer)
    with pytest.raises(ValueError, match=rf"{what} \(layers \[0, 1, 2\]\)"):
        export_checkpoint(str(tmp_path / "converted"), str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def test_a_damaged_checkpoint_is_not_exported(hf_folder, tmp_path, quiet):
    import_checkpoint(str(hf_folder()), str(tmp_path / "ours"), parity=False, console=quiet)
    weights = tmp_path / "ours/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ValueError, match="model.safetensors has changed"):
        export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()


def test_a_model_of_ours_becomes_somebody_elses_checkpoint(tmp_path, quiet):
    """The demo's road: a checkpoint trained here -> Hugging Face folder -> import."""
    spec = dataclasses.replace(spec_from_config(CONFIG), layers=(LayerSpec(rope_base=500.0),) * 2)
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(s, generator=generator) for n, s in spec.parameter_shapes().items()}
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    receipt = Receipt.all_new(spec.parameter_shapes(), dtype="F32", note="a test")
    made = {"spec": spec, "state": state, "receipt": receipt, "lineage": (), "tokenizer": tmp_path / "tok"}
    save_checkpoint(tmp_path / "trained", family="qwen2", **made)
    export_checkpoint(str(tmp_path / "trained"), str(tmp_path / "hf"))
    checkpoint = import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "ours"), parity=False, console=quiet)
    assert checkpoint.spec == spec
    same_tensors(checkpoint.state(), state)
    assert checkpoint.tokenizer_hash is not None


def test_scratch_models_have_a_receipt_too():
    spec = spec_from_config(CONFIG)
    receipt = Receipt.all_new(spec.parameter_shapes(), dtype="F32", note="normal(0, 0.02)")
    receipt.check(spec.parameter_shapes())
    assert Receipt.from_json(receipt.to_json()) == receipt
