"""The benchmark of training steps runs, compares before it times, and refuses to time what is wrong."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from helpers.compare import assert_same_tensors, gradients_of, scan
from helpers.tiny import random_decoder, random_tokens, tiny_spec, ttt_layer

from ttt_lit.model.spec import LayerSpec

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = [
    "--set",
    "hidden=16",
    "mlp=24",
    "layers=4",
    "heads=4",
    "kv_heads=2",
    "vocab=40",
    "window=12",
    "sinks=2",
    "chunk=8",
]
ONCE = [*TINY, "--context", "16", "--rounds", "1"]
ARMS = ["dense", "swa", "naive", "naive_recompute", "engine:recompute", "engine:equal_memory", "engine:keep"]


@pytest.fixture
def meta_step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("meta_step")


@pytest.fixture
def naive_step(meta_step):
    return importlib.import_module("step.naive")


@pytest.fixture
def policies(meta_step):
    return importlib.import_module("step.policies")


def test_every_arm_is_measured_and_every_exact_arm_compared(meta_step, tmp_path, capsys):
    files = {"--json": tmp_path / "out.json", "--markdown": tmp_path / "out.md"}
    assert meta_step.main([*ONCE, *(str(x) for pair in files.items() for x in pair)]) == 0
    record = json.loads(files["--json"].read_text())
    (check,) = record["checks"]
    assert check["largest_gradient_error"] < 1e-4 < 0.01 < check["first_order_error"]
    (found,) = record["contexts"]
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert list(arms) == [*ARMS, "first_order:keep"]
    assert found["reference"] == "naive"
    for name, arm in arms.items():
        assert arm["failure"] is None, name
        assert len(arm["seconds"]) == 1, name
        assert arm["peak_bytes"] > 0, name
        assert arm["flops_ratio"] > 0, name
        if name in ARMS[3:]:
            assert arm["gradient_error"] < 1e-4, name
    assert arms["engine:equal_memory"]["peak_bytes"] <= arms["naive_recompute"]["peak_bytes"]
    text = files["--markdown"].read_text()
    assert text.strip() in capsys.readouterr().out
    assert all(f"| {name} " in text for name in arms)


def test_transformers_is_timed_beside_the_dense_step_only_where_it_agrees(meta_step, monkeypatch, tmp_path, capsys):
    file = tmp_path / "out.json"
    run = [*ONCE, "--arms", "dense", "transformers", "--json", str(file)]
    assert meta_step.main(run) == 0
    dense, theirs = json.loads(file.read_text())["contexts"][0]["arms"]
    assert theirs["compared_with"] == "dense"
    assert theirs["gradient_error"] < 1e-4
    assert dense["flops_per_token"] - theirs["flops_per_token"] == 2 * 16 * 40  # the logits that ours makes again
    assert "Compared with dense, every gradient agrees to" in capsys.readouterr().out
    bench = importlib.import_module("step.bench")
    right = bench.transformers_loss
    monkeypatch.setattr(bench, "transformers_loss", lambda *arguments: 1.1 * right(*arguments))
    assert meta_step.main(run) == 1
    assert "transformers and dense disagree" in capsys.readouterr().err


def test_sinks_stand_beside_the_same_arm_without_and_are_compared_with_their_own_kind(meta_step, tmp_path, capsys):
    file = tmp_path / "out.json"
    arms = ["dense", "swa", "swa_sinks", "engine:keep", "engine_sinks:keep", "engine_sinks:factors"]
    assert meta_step.main([*ONCE, "--arms", *arms, "--json", str(file)]) == 0
    (found,) = json.loads(file.read_text())["contexts"]
    assert list(found["sinks"]) == ["swa_sinks", "engine_sinks:keep"]
    assert all(1 < price["flops_ratio"] < 1.1 and price["time_ratio"] > 0 for price in found["sinks"].values())
    errors = {arm["name"]: arm["gradient_error"] for arm in found["arms"]}
    assert errors["engine_sinks:factors"] < 1e-4
    assert errors["engine:keep"] is errors["engine_sinks:keep"] is None
    assert "engine_sinks:keep: " in capsys.readouterr().out


@pytest.mark.parametrize("arms", [["first_order:keep"], ["naive", "engine"]])
def test_a_wrong_attention_is_not_timed(meta_step, naive_step, monkeypatch, tmp_path, capsys, arms):
    right = naive_step.attention
    monkeypatch.setattr(naive_step, "attention", lambda *qkv, scale, **reach: right(*qkv, scale=1.1 * scale, **reach))
    assert meta_step.main([*ONCE, "--arms", *arms, "--json", str(tmp_path / "out.json")]) == 1
    assert "disagree" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_arm_that_does_not_fit_is_left_out(meta_step, monkeypatch, tmp_path):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(meta_step, "check_short", lambda _: [])
    monkeypatch.setattr(importlib.import_module("step.bench"), "naive_loss", full)
    assert meta_step.main([*ONCE, "--arms", "dense", "naive", "swa", "--json", str(tmp_path / "out.json")]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert [arm["failure"] for arm in record["contexts"][0]["arms"]] == [None, "out of memory", None]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.3, 1e6])
def test_the_naive_step_has_the_gradients_of_the_engine(naive_step, recompute, clip):
    layers = [
        LayerSpec(window=3, sink_tokens=2),
        LayerSpec(),
        ttt_layer(window=5),
        LayerSpec(window=6),
        ttt_layer(window=1),
    ]
    layers += [LayerSpec(window=4, sink_tokens=2), LayerSpec(window=1, sink_tokens=5)]
    decoder = random_decoder(tiny_spec(*layers, qk_norm=True, qkv_bias=True, tied_head=False, post_norms=True))
    tokens = random_tokens(2, 21)
    scan(decoder, tokens, clip=clip).loss.backward()
    expected = {name: g.clone() for name, g in gradients_of(decoder).items()}
    decoder.zero_grad()
    naive_step.naive_loss(decoder, tokens, chunk=4, inner_lr=0.5, clip=clip, recompute=recompute).backward()
    assert_same_tensors(gradients_of(decoder), expected)


@pytest.mark.parametrize("target, most", [(-1, None), (0, 0), (34, 3), (35, 3), (99, 9), (1000, 10)])
def test_the_search_finds_the_most_that_fits(policies, target, most):
    """Ten chunks; the first are free, because the peak lies elsewhere."""
    assert policies.most_kept(lambda kept: max(0, 11 * kept), target, 10, 9.0) == most


@pytest.mark.parametrize(
    "arm, says",
    [
        ("dense:keep", "dense accepts no policy except recompute"),
        ("swa:fill", "swa accepts no policy except recompute"),
        ("naive:keep", "naive takes no policy"),
        ("engine:all", "except recompute, keep, factors, two_level, offload, equal_memory, fill"),
        ("sparse", "expected KIND or KIND:POLICY with KIND one of dense, transformers, "),
    ],
)
def test_an_unknown_arm_is_told_what_its_kind_accepts(meta_step, arm, says):
    with pytest.raises(SystemExit, match=f"--arms: got '{arm}', .*{says}"):
        meta_step.main([*ONCE, "--arms", arm, "--memory-gib", "1"])


def test_the_dense_network_has_the_weights_of_the_other_but_no_prime_mlp(meta_step):
    arguments = meta_step.parse(ONCE)
    bench = meta_step.Bench(arguments, meta_step.sizes_of(arguments), meta_step.Cpu())
    every = dict(bench.decoder.named_parameters())
    dense = dict(bench.dense.decoder.named_parameters())
    assert dense.keys() == {name for name in every if "prime" not in name} < every.keys()
    assert all(p is every[name] for name, p in dense.items())
