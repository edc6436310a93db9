import dataclasses
import json
import re

import gemma3_variants
import pytest
import qwen2_variants
import torch
import torch.nn.functional as F
from qwen2_variants import VARIANTS
from redescribed import decoder, exported, save_as

from ttt_lit.checkpoint import parity
from ttt_lit.checkpoint.importing import import_checkpoint
from ttt_lit.checkpoint.parity import ParityConfig, check_parity, parity_lengths
from ttt_lit.families import FAMILIES

# Float32 summation order over 32 channels, relative to the largest logit and to each gradient's norm.
LOGIT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4
# A window of one token makes some gradients exactly zero, where rounding has no scale of its own.
ZERO_GRADIENT = 1e-5


SHORT = ParityConfig(lengths=(12,))


def cases(qwen2, gemma3):
    """(family, config changes) of these variants."""
    chosen = [("qwen2", name, qwen2_variants.VARIANTS[name]) for name in qwen2]
    chosen += [("gemma3", name, gemma3_variants.VARIANTS[name]) for name in gemma3]
    return [pytest.param(family, changes, id=f"{family}-{name}") for family, name, changes in chosen]


def imported(folder, tmp_path, quiet):
    """Without the parity that is on by default: for tests that run it themselves."""
    return import_checkpoint(str(folder), str(tmp_path / "ours"), parity=False, console=quiet)


def loss_of(logits, tokens):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("family, changes", cases(qwen2_variants.VARIANTS, gemma3_variants.VARIANTS))
def test_logits_and_every_gradient_equal_transformers(hf_model, tmp_path, quiet, family, changes):
    theirs, folder = hf_model(family, **changes)
    checkpoint = import_checkpoint(str(folder), str(tmp_path / "ours"), console=quiet)
    assert checkpoint.family == family
    ours, stored = decoder(checkpoint), FAMILIES[family].stored_names(checkpoint.spec)
    tokens = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(1))
    their_logits, our_logits = theirs(input_ids=tokens).logits, ours(tokens)
    assert (their_logits - our_logits).abs().max() <= LOGIT_TOLERANCE * their_logits.abs().max()
    loss_of(their_logits, tokens).backward()
    loss_of(our_logits, tokens).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = gradients.pop(stored[name])
        assert (parameter.grad - expected).norm() <= GRADIENT_TOLERANCE * expected.norm() + ZERO_GRADIENT, name
    assert not gradients


def test_the_report_reads_lengths_beyond_every_window_and_goes_into_the_audit(hf_model, tmp_path, quiet):
    _, folder = hf_model(**VARIANTS["mixed_layer_types"], dtype=torch.bfloat16)
    import_checkpoint(str(folder), str(tmp_path / "ours"), console=quiet)
    report = json.loads((tmp_path / "ours/audit.json").read_text())["parity"]
    assert report["lengths"] == [1, 2, 9, 17, 26, 96]
    assert report["max_abs_logit_diff"] <= report["limit"] == 1e-4 * max(1, report["largest_logit"])
    assert report["top1_agreement"] == 1.0
    assert 0 <= report["kl_nats"] < 1e-8
    assert report["windows_not_crossed"] == []
    assert list(report["layer_errors"]) == ["the embeddings", "layer 0", "layer 1", "layer 2", "layer 3"]
    assert "max |logit difference|" in quiet.file.getvalue()


def swap_biases(state, layer):
    k, v = (f"layers.{layer}.self_attn.{name}_proj.bias" for name in "kv")
    state[k], state[v] = state[v], state[k]


def rotate_pairs(state, layer):
    """The layout of models that rotate adjacent pairs, left as it is."""
    name = f"layers.{layer}.self_attn.q_proj.weight"
    rows = state[name].shape[0]
    order = torch.arange(rows).view(-1, 2, 4).transpose(1, 2).reshape(-1)
    state[name] = state[name][order]


def swap_norms(state, layer):
    a, b = (f"layers.{layer}.{name}_layernorm.weight" for name in ("input", "pre_feedforward"))
    state[a], state[b] = state[b], state[a]


def swap_gate_and_up(state, layer):
    a, b = (f"layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up"))
    state[a], state[b] = state[b], state[a]


def swap_query_and_key_norms(state, layer):
    a, b = (f"layers.{layer}.self_attn.{name}_norm.weight" for name in "qk")
    state[a], state[b] = state[b], state[a]


def swap_norms_around_the_residual(state, layer):
    """What Qwen calls post-attention norm is Gemma's pre-feedforward norm."""
    a, b = (f"layers.{layer}.{name}_layernorm.weight" for name in ("post_attention", "pre_feedforward"))
    state[a], state[b] = state[b], state[a]


def add_the_unit_offset_twice(state, layer):
    state[f"layers.{layer}.post_feedforward_layernorm.weight"] += 1


@pytest.mark.parametrize(
    "family, damage",
    [
        ("qwen2", swap_biases),
        ("qwen2", rotate_pairs),
        ("qwen2", swap_norms),
        ("qwen2", swap_gate_and_up),
        ("gemma3", swap_query_and_key_norms),
        ("gemma3", swap_norms_around_the_residual),
        ("gemma3", add_the_unit_offset_twice),
    ],
)
@pytest.mark.parametrize("layer", ["first", "middle", "last"])
def test_a_broken_layer_is_found_and_named(hf_model, tmp_path, quiet, family, damage, layer):
    _, folder = hf_model(family)
    checkpoint = imported(folder, tmp_path, quiet)
    state, count = checkpoint.state(), checkpoint.spec.num_layers
    layer = {"first": 0, "middle": count // 2, "last": count - 1}[layer]
    damage(state, layer)
    report = check_parity(folder, checkpoint.spec, state, config=SHORT)
    assert not report.passed
    assert report.first_departure == f"layer {layer}"
    with pytest.raises(ValueError, match=f"that of layer {layer}$"):
        report.require("x")


def test_broken_embedding_and_head_are_told_apart_from_layers(hf_model, tmp_path, quiet):
    _, folder = hf_model(tie_word_embeddings=False)
    checkpoint = imported(folder, tmp_path, quiet)
    for name, expected in (
        ("embed_tokens.weight", "the embeddings"),
        ("norm.weight", "the final norm or the output head"),
        ("lm_head.weight", "the final norm or the output head"),
    ):
        state = checkpoint.state()
        state[name] = state[name].roll(1, 0)
        report = check_parity(folder, checkpoint.spec, state, config=SHORT)
        assert not report.passed
        assert report.first_departure == expected


@pytest.mark.parametrize(
    "family, changes, layer",
    [
        ("qwen2", VARIANTS["windowed_from_layer_2"], 2),
        ("gemma3", {}, 4),  # a local layer
        ("gemma3", {}, 5),  # a global layer
    ],
)
@pytest.mark.parametrize("what", ["window", "rope_base"])
def test_a_wrong_description_of_right_weights_is_found(hf_model, tmp_path, quiet, family, changes, layer, what):
    _, folder = hf_model(family, **changes)
    checkpoint = imported(folder, tmp_path, quiet)
    layers = list(checkpoint.spec.layers)
    right = layers[layer]
    # One token more than the window, or a window where there is none: only texts beyond it can show that.
    wrong_window = {"window": 20 if right.window is None else right.window + 1}
    wrong = wrong_window if what == "window" else {"rope_base": right.rope_base * 1.002}
    layers[layer] = dataclasses.replace(right, **wrong)
    spec = checkpoint.spec.with_layers(tuple(layers))
    report = check_parity(folder, spec, checkpoint.state())
    assert report.first_departure == f"layer {layer}"
    assert not report.passed
    if what == "window":
        within = ParityConfig(lengths=(1, 2, 5), max_tokens=5)
        assert check_parity(folder, spec, checkpoint.state(), config=within).passed


def test_an_import_that_fails_parity_leaves_nothing_behind(hf_model, tmp_path, quiet, monkeypatch):
    family = FAMILIES["qwen2"]

    k, v = (f"layers.1.self_attn.{name}_proj.bias" for name in "kv")

    def swapped(name):
        return family.stored_name({k: v, v: k}.get(name, name))

    monkeypatch.setitem(FAMILIES, "qwen2", dataclasses.replace(family, stored_name=swapped))
    _, folder = hf_model()
    with pytest.raises(ValueError, match=r"not the one that transformers runs.*layer 1$") as error:
        import_checkpoint(str(folder), str(tmp_path / "ours"), console=quiet)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_nan_never_passes(hf_model, tmp_path, quiet):
    _, folder = hf_model()
    checkpoint = imported(folder, tmp_path, quiet)
    state = checkpoint.state()
    state["layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    report = check_parity(folder, checkpoint.spec, state, config=SHORT)
    assert not report.passed
    assert report.first_departure == "layer 1"


def test_an_import_says_in_plain_lines_what_it_is_doing(hf_model, tmp_path, quiet, monkeypatch):
    """Each step as it begins; where a line is due, layer by layer. The console here is a file."""
    _, folder = hf_model()
    monkeypatch.setattr("ttt_lit.checkpoint.announcer.EVERY_SECONDS", 0.0)
    import_checkpoint(str(folder), str(tmp_path / "ours"), parity_config=SHORT, console=quiet)
    lines = [line for line in quiet.file.getvalue().splitlines() if line.startswith("[")]
    stages = ["reading the headers", "audit: ", "writing ", "parity: transformers", "parity: ours", "parity: comparing"]
    first = [next(i for i, line in enumerate(lines) if stage in line) for stage in stages]
    assert first == sorted(first)
    assert all(re.match(r"\[ *\d+ s\] ", line) for line in lines)
    for whose in ("transformers", "ours"):
        assert [line for line in lines if f"parity: {whose}, 12 tokens, layer 3 of 4 done" in line]


def test_windows_beyond_reach_are_stated(hf_model, tmp_path, quiet):
    _, folder = hf_model(use_sliding_window=True, sliding_window=200, max_window_layers=1)
    checkpoint = import_checkpoint(
        str(folder), str(tmp_path / "ours"), parity_config=ParityConfig(max_tokens=96), console=quiet
    )
    assert parity_lengths(checkpoint.spec, ParityConfig(max_tokens=96)) == ((1, 2, 17, 96), (200,))
    assert "windows not crossed: [200]" in quiet.file.getvalue()


def test_code_of_the_checkpoint_is_not_run(hf_model, tmp_path, quiet):
    _, folder = hf_model()
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    import_checkpoint(str(folder), str(tmp_path / "ours"), console=quiet)
    assert not (tmp_path / "ran").exists()
    assert "auto_map" in quiet.file.getvalue()


@pytest.mark.parametrize(
    "family, changes",
    cases(
        ["tied_dense", "untied", "wide_heads", "mixed_layer_types"],
        ["pattern_6", "untied", "score_scalar", "layer_types", "rope_parameters"],
    ),
)
def test_transformers_loads_what_we_export(hf_model, tmp_path, quiet, family, changes):
    theirs, folder = hf_model(family, **changes)
    again = exported(imported(folder, tmp_path, quiet), tmp_path / "back")
    assert again.dtype == torch.float32
    tokens = torch.randint(61, (1, 24), generator=torch.Generator().manual_seed(2))
    assert torch.equal(theirs(input_ids=tokens).logits, again(input_ids=tokens).logits)


@pytest.mark.parametrize("slides", [(0, 1, 2, 3), (2, 3), (0, 2)])
@pytest.mark.parametrize("window", [1, 6])
def test_a_windowed_model_of_ours_is_the_same_in_transformers(hf_model, tmp_path, quiet, slides, window):
    """Dense import -> windows -> export: transformers computes our windowed logits, and no longer the dense ones."""
    theirs, folder = hf_model()
    dense = imported(folder, tmp_path, quiet)
    layers = [
        dataclasses.replace(layer, window=window if i in slides else None) for i, layer in enumerate(dense.spec.layers)
    ]
    described = save_as(dense, dense.spec.with_layers(tuple(layers)), tmp_path / "windowed")
    again = exported(described, tmp_path / "back")
    tokens = torch.randint(61, (1, 24), generator=torch.Generator().manual_seed(2))
    logits = again(input_ids=tokens).logits
    assert (decoder(described)(tokens) - logits).abs().max() <= LOGIT_TOLERANCE * logits.abs().max()
    assert (theirs(input_ids=tokens).logits - logits).abs().max() > 0.01


def test_parity_runs_in_float32_whatever_is_stored(hf_model, tmp_path, quiet, monkeypatch):
    seen = []
    real = parity._compare

    def spy(theirs, ours, *rest):
        seen.extend(tensor.dtype for run in (theirs, ours) for hidden, logits in run for tensor in [*hidden, logits])
        return real(theirs, ours, *rest)

    monkeypatch.setattr(parity, "_compare", spy)
    _, folder = hf_model(dtype=torch.bfloat16)
    import_checkpoint(str(folder), str(tmp_path / "ours"), console=quiet)
    assert set(seen) == {torch.float32}
