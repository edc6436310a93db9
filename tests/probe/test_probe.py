"""The command as a whole: what it writes is what was measured, what was cut off goes on, and fit accepts its overlay."""

import contextlib
import io
import json
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CONTEXT, write_checkpoint
from helpers.tiny import tiny_spec, ttt_layer

import cli
from ttt_lit.checkpoint.store import load_checkpoint
from ttt_lit.data.stream import TokenDataModule
from ttt_lit.identity import hash_file
from ttt_lit.model.spec import LayerSpec
from ttt_lit.probe.blocks import held_out_blocks
from ttt_lit.probe.config import ProbeConfig, layer_policy, make_plan
from ttt_lit.train.arguments import errors_of
from ttt_lit.ttt.naive import sequence_nll_naive

ROOT = Path(__file__).resolve().parents[2]
# The command computes in float32, the specification here in float64.
CLOSE = 2e-5
EXACT = ("--precision", "32-true", "--device", "cpu")
SMALL = (*EXACT, "--sinks", "0", "2", "--max-documents", "4", "--sweep-documents", "3", "--inner-rates", "0.5", "0.1")


def arguments(world, output, *more):
    return ["--checkpoint", str(world / "checkpoint"), "--data", str(world / "long"), "--output", str(output), *more]


def run(world, output, *more):
    assert cli.main(["probe", *arguments(world, output, *SMALL, *more)]) == 0
    return json.loads((output / "probe.json").read_text())


@pytest.fixture(scope="module")
def probed(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("probes") / "tiny"
    return output, run(world, output)


@pytest.fixture(scope="module")
def naive(world):
    """Token losses (T,) of a block by the specification, under windows and sinks of each layer."""
    checkpoint = load_checkpoint(world / "checkpoint")
    weights = {name: tensor.double() for name, tensor in checkpoint.state().items()}

    def losses(tokens, *layers):
        spec = checkpoint.spec.with_layers(tuple(LayerSpec(**layer) for layer in layers))
        return sequence_nll_naive(weights, spec, tokens, mode="none", chunk=len(tokens), inner_lr=0.0, clip=0.0)

    return losses


@pytest.fixture(scope="module")
def blocks(world):
    return held_out_blocks(TokenDataModule(long=str(world / "long")), CONTEXT, 4)


def only(rows, **wanted):
    (row,) = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return row


def test_blocks_are_the_middles_of_documents_evenly_spread(world):
    data = TokenDataModule(long=str(world / "long"))
    every = held_out_blocks(data, CONTEXT, 1000)
    assert len({block.document for block in every}) == len(every) == data.manifest("long").validation.documents
    some = held_out_blocks(data, CONTEXT // 2, 3)
    assert [block.document for block in some] == [every[i * len(every) // 3].document for i in range(3)]
    for block in some:
        whole = next(each for each in every if each.document == block.document).tokens
        torch.testing.assert_close(block.tokens, whole[:, : CONTEXT // 2 + 1])


@pytest.mark.parametrize("window, sinks", [(4, None), (8, 0), (8, 2), (16, None)])
def test_damage_is_the_specification_s(probed, naive, blocks, window, sinks):
    _, found = probed
    sinks = found["recommendation"]["sink_tokens"] if sinks is None else sinks
    row = only(found["damage"], window=window, sink_tokens=sinks)
    differences = [
        naive(block.tokens[0], *[{"window": window, "sink_tokens": sinks}] * 4) - naive(block.tokens[0], *[{}] * 4)
        for block in (blocks[i * 4 // 3] for i in range(3))
    ]
    beyond = torch.stack(differences)[:, window:].mean()
    assert row["beyond"] == pytest.approx(float(beyond), abs=CLOSE)
    assert row["nats"] == pytest.approx(float(torch.stack(differences).mean()), abs=CLOSE)
    assert row["inside"] == 0
    assert row["documents"] == 3
    assert row["beyond_low"] <= row["beyond"] <= row["beyond_high"]


@pytest.mark.parametrize("window, stride", [(4, 4), (8, 8), (16, 8)])
def test_the_ceiling_is_the_specification_s(probed, naive, blocks, window, stride):
    row = only(probed[1]["ceiling"], window=window, stride=stride)
    beyond = []
    for block in blocks:
        row_tokens, losses = block.tokens[0], []
        for start in range(window + stride, CONTEXT, stride):
            losses.append(naive(row_tokens[start - window : start + stride + 1], *[{}] * 4)[window:])
        beyond.append(torch.cat(losses) - naive(row_tokens, *[{}] * 4)[window + stride :])
    total = torch.stack(beyond)
    assert row["beyond"] == pytest.approx(float(total.mean()), abs=CLOSE)
    # Per token of the block: positions that were not compared count as 0.
    assert row["nats"] == pytest.approx(float(total.sum(1).mean()) / CONTEXT, abs=CLOSE)
    assert row["documents"] == row["blocks"] == 4


def test_layers_and_the_greedy_list_are_the_specification_s(probed, naive, blocks):
    layers, sinks = probed[1]["layers"], probed[1]["recommendation"]["sink_tokens"]
    cut = {"window": 8, "sink_tokens": sinks}

    def repaired(kept):
        parts = []
        for block in (blocks[0], blocks[1]):  # the first and the second of the three sweep documents
            tokens = block.tokens[0]
            narrow = [{} if i in kept else cut for i in range(4)]
            parts.append((naive(tokens, *[cut] * 4) - naive(tokens, *narrow))[8:].mean())
        return float(sum(parts) / 2)

    assert layers["window"] == 8
    assert {row["layer"]: row["repaired"] for row in layers["alone"]} == pytest.approx(
        {i: repaired({i}) for i in range(4)}, abs=CLOSE
    )
    kept = []
    for step in layers["greedy"]:
        kept.append(max(set(range(4)) - set(kept), key=lambda i: repaired({*kept, i})))
        assert step["kept"] == kept
        assert step["repaired"] == pytest.approx(repaired(set(kept)), abs=CLOSE)
    assert len(kept) == 2


def test_a_window_that_spans_the_context_costs_exactly_nothing(world, tmp_path):
    found = run(world, tmp_path / "wide", "--windows", "8", str(CONTEXT), "--layer-documents", "0")
    row = only(found["damage"], window=CONTEXT)
    assert (row["nats"], row["inside"], row["beyond"]) == (0, 0, None)
    assert row["curve"] == row["imported_curve"]
    assert found["window"] == 8


def test_a_hybrid_s_local_layers_keep_their_window_or_are_narrowed_without_sinks(world, tmp_path, blocks):
    local, full, tokens = LayerSpec(window=8), LayerSpec(), blocks[0].tokens
    decoder = write_checkpoint(tmp_path / "hybrid", local, full, local, full, tokenizer=world / "tokenizer")
    given = ["--checkpoint", str(tmp_path / "hybrid"), "--data", str(world / "long"), "--output", str(tmp_path / "o")]
    few = ["--sinks", "2", "--max-documents", "4", "--sweep-documents", "1", "--layer-documents", "1", "--inner-rates"]
    assert cli.main(["probe", *given, *few, *EXACT]) == 0
    found = json.loads((tmp_path / "o" / "probe.json").read_text())
    weights = {name: tensor.double() for name, tensor in decoder.state_dict().items()}

    def loss(*layers):
        spec = decoder.spec.with_layers(layers)
        return sequence_nll_naive(weights, spec, tokens[0], mode="none", chunk=CONTEXT, inner_lr=0.0, clip=0.0).mean()

    for window, near in ((4, LayerSpec(window=4)), (8, local), (16, local)):
        cut = LayerSpec(window=window, sink_tokens=2)
        damage = loss(near, cut, near, cut) - loss(local, full, local, full)
        assert only(found["damage"], window=window)["nats"] == pytest.approx(float(damage), abs=CLOSE)
    assert [row["layer"] for row in found["layers"]["alone"]] == [1, 3]
    assert found["inner"] == []
    assert "Layers 1, 3 had full attention and get the sinks" in (tmp_path / "o" / "probe.md").read_text()


def test_the_file_says_what_was_probed_and_with_what(world, probed):
    _, found = probed
    assert found["schema_version"] == 1
    checkpoint = load_checkpoint(world / "checkpoint")
    assert found["checkpoint"] == {
        "name": str(world / "checkpoint"),
        "digest": checkpoint.weights_hash,
        "family": "qwen2",
        "num_parameters": checkpoint.spec.num_parameters(),
    }
    assert found["data"]["manifest"] == hash_file(world / "long" / "manifest.json")
    assert (found["data"]["context"], found["data"]["blocks"], found["data"]["documents"]) == (CONTEXT, 4, 4)
    assert {(row["window"], row["rate"]) for row in found["inner"]} == {(w, r) for w in (None, 8) for r in (0.5, 0.1)}
    assert all(0 < row["update_norm"] <= row["rate"] * 1.001 for row in found["inner"])


def test_fit_accepts_the_overlay_and_means_the_same(probed):
    output, found = probed
    arm = ["--config", str(ROOT / "configs/q_p1_bridge.yaml"), "--config", str(ROOT / "configs/size/demo.yaml")]
    assert errors_of([[*arm, "--config", str(output / "probe.yaml")]]) == [None]
    model, advice = yaml.safe_load((output / "probe.yaml").read_text())["model"], found["recommendation"]
    names = ("window", "sink_tokens", "full_attention_layers")
    assert model["size"] == {name: advice[name] for name in names}
    assert model["inner"] == {"lr": advice["inner_lr"]}
    assert model["validation"] == {"probe": (output / "probe.json").as_posix()}


def test_the_page_says_three_things_and_shows_the_picture(probed):
    output, _ = probed
    page = (output / "probe.md").read_text()
    assert re.search(r"A window of 8 tokens without sinks costs [+−]\d\.\d{4} \[.*\] nats per token", page)
    assert "A memory beyond" in page
    assert "fewer than 20 documents" in page
    assert (output / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_cut_off_goes_on_and_ends_with_the_same_numbers(world, probed, tmp_path, capsys):
    output = tmp_path / "cut"
    for minutes in ("0", "0"):
        run(world, output, "--max-minutes", minutes)
        assert "the same command continues" in capsys.readouterr().out
    kept = json.loads((output / "probe.json").read_text())
    assert len(kept["rows"]) == 2
    again = run(world, output)
    whole = probed[1]
    assert all(row in again["rows"] for row in kept["rows"])
    assert [again[item] for item in ("damage", "ceiling", "inner", "layers")] == [
        whole[item] for item in ("damage", "ceiling", "inner", "layers")
    ]
    lines = capsys.readouterr().out.splitlines()
    assert sum("min left" in line for line in lines) > 10
    run(world, output)
    assert "min left" not in capsys.readouterr().out


class Stopping(io.StringIO):
    """An output that presses Ctrl-C once, after the fourth line."""

    def write(self, text):
        before, after = self.getvalue().count("\n"), super().write(text)
        if before < 4 <= self.getvalue().count("\n"):
            signal.raise_signal(signal.SIGINT)
        return after


def test_ctrl_c_ends_in_one_line_and_keeps_what_was_measured(world, tmp_path, capsys):
    output, shown = tmp_path / "stopped", Stopping()
    with contextlib.redirect_stdout(shown):
        assert cli.main(["probe", *arguments(world, output, *SMALL)]) == 130
    *_, measured, last = shown.getvalue().splitlines()
    assert "min left; document 1 of 4, window 8, sinks 2" in measured
    assert last == f"{output}: stopped, what was measured is kept; the same command continues"
    assert capsys.readouterr().err == ""
    assert len(json.loads((output / "probe.json").read_text())["rows"]) == 3
    assert not list(output.glob("*.tmp"))


def test_another_probe_s_folder_is_not_continued(world, probed, tmp_path, capsys):
    write_checkpoint(tmp_path / "other", *(LayerSpec(),) * 4, tokenizer=world / "tokenizer", seed=1)
    given = ["--checkpoint", str(tmp_path / "other"), "--data", str(world / "long"), "--output", str(probed[0])]
    assert cli.main(["probe", *given, *EXACT]) == 1
    error = capsys.readouterr().err
    assert "is of another probe (checkpoint.digest differ); give another --output" in error
    assert error.count("\n") == 1


def test_a_converted_checkpoint_and_foreign_contexts_are_refused(world, tmp_path, capsys):

    write_checkpoint(tmp_path / "ttt", LayerSpec(), ttt_layer(), tokenizer=world / "tokenizer")
    given = ["--checkpoint", str(tmp_path / "ttt"), "--data", str(world / "long"), "--output", str(tmp_path / "o")]
    assert cli.main(["probe", *given]) == 1
    assert "has TTT layers already" in capsys.readouterr().err
    assert cli.main(["probe", *arguments(world, tmp_path / "o", "--context", "64")]) == 1
    assert "expected per_document with context 64 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"windows": [0, 4]}, "--windows: got [0, 4]"),
        ({"windows": [64]}, "--windows: got [64], expected one below the context of 64"),
        ({"sinks": [-1]}, "--sinks"),
        ({"chunk": 5}, "--chunk: got 5, expected a proper divisor of the context of 64"),
        ({"chunk": 64}, "--chunk"),
        ({"windows": [40], "stride": 24}, "--stride: got 24"),
        ({"max_documents": 0, "keep_layers": -1}, "--max-documents: got 0, expected at least 1; --keep-layers: got -1"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_measured(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_plan(ProbeConfig(checkpoint="c", data="d", **changes), 64)


def test_defaults_follow_from_the_context_and_the_model():
    plan = make_plan(ProbeConfig(checkpoint="c", data="d"), 4096)
    assert (plan.windows, plan.window, plan.chunk) == ((512, 1024, 2048), 1024, 512)
    assert plan.strides == {512: 512, 1024: 1024, 2048: 1024}

    assert layer_policy(None, tiny_spec(LayerSpec(), LayerSpec())) == "last_quarter"
    assert layer_policy(None, tiny_spec(LayerSpec(window=4), LayerSpec())) == "global"
    assert layer_policy(["1", "0"], tiny_spec(LayerSpec(), LayerSpec())) == [1, 0]
