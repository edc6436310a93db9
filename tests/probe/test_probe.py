"""The command as a whole: what it writes is what was measured, what was cut off goes on, and fit accepts its overlay."""

import contextlib
import io
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.tiny import tiny_spec, ttt_layer
from probe_world import CONTEXT, write_checkpoint

import cli
from ttt_lit.checkpoint.store import load_checkpoint
from ttt_lit.convert.windowed import windowed
from ttt_lit.data.stream import TokenDataModule
from ttt_lit.identity import hash_file
from ttt_lit.model.spec import LayerSpec
from ttt_lit.probe import measure
from ttt_lit.probe.blocks import held_out_blocks
from ttt_lit.probe.config import ProbeConfig, layer_policy, make_plan
from ttt_lit.train.arguments import errors_of
from ttt_lit.train.ceiling import read_ceiling
from ttt_lit.train.evaluation import ValidationConfig
from ttt_lit.train.origin import origin_of_checkpoint
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


def middles(folder):
    """By document, the tokens of its middle block, from the files alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    side = manifest["validation"]
    shards = [np.fromfile(folder / each["file"], dtype=np.int32)[-each["tokens"] :] for each in side["shards"]]
    tokens, starts = np.concatenate(shards), np.load(folder / side["document_starts"]["file"])
    bos = [] if manifest["bos_id"] is None else [manifest["bos_id"]]
    length, found = CONTEXT + 1 - len(bos), {}
    for document, (start, stop) in enumerate(zip(starts, [*starts[1:], len(tokens)], strict=True)):
        whole = (stop - start) // length
        middle = start + whole // 2 * length
        found[document] = [*bos, *tokens[middle : middle + length].tolist()]
    return found


def test_blocks_are_the_middles_of_documents_evenly_spread(world):
    data = TokenDataModule(long=str(world / "long"))
    every = held_out_blocks(data, CONTEXT, 1000)
    assert {block.document: block.tokens[0].tolist() for block in every} == middles(world / "long")
    assert len(every) == data.manifest("long").validation.documents > 3
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
    assert model["size"] == {name: advice[name] for name in names if advice[name] is not None}
    assert model.get("inner") == (None if advice["inner_lr"] is None else {"lr": advice["inner_lr"]})
    assert model["validation"] == {"probe": (output / "probe.json").as_posix()}


def test_the_page_says_three_things_and_shows_the_picture(probed):
    output, _ = probed
    page = (output / "probe.md").read_text()
    assert re.search(r"A window of 8 tokens without sinks costs [+−]\d\.\d{4} \[.*\] nats per token", page)
    assert "A memory beyond" in page
    assert "Fewer than 20 documents" in page
    assert "Unfinished" not in page
    assert (output / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_cut_off_goes_on_and_ends_with_the_same_numbers(world, probed, tmp_path, capsys):
    output = tmp_path / "cut"
    for minutes in ("0", "0"):
        run(world, output, "--max-minutes", minutes)
        assert "the same command continues" in capsys.readouterr().out
    kept = json.loads((output / "probe.json").read_text())
    assert len(kept["rows"]) == 2
    assert not kept["finished"]
    assert kept["missing"][:2] == ["sinks (7 of 9)", "ceilings (15 of 16)"]
    again = run(world, output)
    whole = probed[1]
    assert all(row in again["rows"] for row in kept["rows"])
    assert again["finished"]
    assert [again[item] for item in ("damage", "ceiling", "inner", "layers")] == [
        whole[item] for item in ("damage", "ceiling", "inner", "layers")
    ]
    lines = capsys.readouterr().out.splitlines()
    assert sum("min left" in line for line in lines) > 10
    run(world, output)
    assert "min left" not in capsys.readouterr().out


def decided(found):
    """All that advice rests on. Rates as imported are left out: earlier documents still belong to their mean."""
    return {
        "inner": [row for row in found["inner"] if row["window"] is not None],
        **{name: found[name] for name in ("window", "sinks", "layers", "recommendation")},
    }


@pytest.mark.parametrize(
    "more",
    [
        ("--windows", "4", "6", "12"),
        ("--sinks", "0", "2", "3"),
        ("--windows", "5", "--max-documents", "6", "--sinks", "3"),
    ],
)  # fmt: skip
def test_a_probe_continued_with_other_settings_decides_as_one_begun_with_them(world, probed, tmp_path, more):
    kept = tmp_path / "kept"
    shutil.copytree(probed[0], kept)
    again, fresh = run(world, kept, *more), run(world, tmp_path / "fresh", *more)
    assert decided(again) == decided(fresh)
    assert len(again["rows"]) > len(fresh["rows"])
    assert again["finished"]


def test_more_documents_that_change_the_best_sinks_leave_no_mixture(world, probed, tmp_path):
    """As when the best number flips: layers and rates that were measured with another number are not read."""
    kept = tmp_path / "kept"
    shutil.copytree(probed[0], kept)
    whole = json.loads((kept / "probe.json").read_text())
    was = whole["recommendation"]["sink_tokens"]
    for row in whole["rows"]:  # the other number is now a nat better
        if row["key"] == ["damage", 8, 2 - was]:
            row["loss"] -= 1
    (kept / "probe.json").write_text(json.dumps(whole))
    again = run(world, kept)
    assert again["recommendation"]["sink_tokens"] == again["layers"]["sink_tokens"] == 2 - was
    assert {row["sink_tokens"] for row in again["inner"] if row["window"] is not None} == {2 - was}
    assert run(world, kept)["recommendation"] == again["recommendation"]


@pytest.mark.parametrize("more", [(), ("--windows", "4", "6", "12")])
def test_ctrl_c_at_the_first_task_ends_in_one_line(world, probed, tmp_path, monkeypatch, more):
    """Of a new probe, and of one that is continued with a window at which nothing is measured."""
    kept = tmp_path / "kept"
    if more:
        shutil.copytree(probed[0], kept)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "token_losses", stop)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert cli.main(["probe", *arguments(world, kept, *SMALL, *more)]) == 130
    assert "stopped, what was measured is kept" in shown.getvalue().splitlines()[-1]
    found = json.loads((kept / "probe.json").read_text())
    assert not found["finished"]
    assert found["recommendation"] is None


def test_a_run_takes_the_overlay_s_ceiling_and_a_shorter_probe_has_none(world, probed, tmp_path):
    """By the check that a run makes, not by parsing alone."""
    data = TokenDataModule(long=str(world / "long"))
    data.setup()
    spec = windowed(tiny_spec(*(LayerSpec(),) * 4), 8)
    origin = origin_of_checkpoint(world / "checkpoint")
    given = yaml.safe_load((probed[0] / "probe.yaml").read_text())["model"]["validation"]["probe"]
    ceilings = read_ceiling(ValidationConfig(probe=given), data, origin, spec)
    assert [(each["window"], each["nats"]) for each in ceilings] == [
        (each["window"], each["nats"]) for each in probed[1]["ceiling"]
    ]
    run(world, tmp_path / "short", "--context", "16", "--windows", "8", "--layer-documents", "0")
    text = (tmp_path / "short" / "probe.yaml").read_text()
    assert "validation" not in yaml.safe_load(text)["model"]
    assert (
        "# validation.probe is left out: 16 tokens of each document were read, and a run on this folder reads 32;"
        in text
    )
    with pytest.raises(ValueError, match="context: got 16, expected 32"):
        read_ceiling(ValidationConfig(probe=str(tmp_path / "short" / "probe.json")), data, origin, spec)


def test_a_chunk_that_nothing_was_measured_with_blocks_no_continuation(world, tmp_path):
    few = ("--max-documents", "1", "--sweep-documents", "1", "--layer-documents", "0", "--windows", "8")
    none = (*few, "--inner-rates")
    assert run(world, tmp_path / "o", *none)["settings"]["chunk"] is None
    settings = run(world, tmp_path / "o", *few, "--chunk", "8", "--ttt-layers", "1", "3")["settings"]
    assert (settings["chunk"], settings["ttt_layers"]) == (8, [1, 3])
    again = run(world, tmp_path / "o", *none)
    assert again["settings"] == settings
    assert len(again["inner"]) == 4


def commands(text):
    """The probe commands in it, without comment marks and line ends."""
    plain = re.sub(r"\\\s*\n#?", " ", text)
    return [" ".join(each.split()) for each in re.findall(r"python cli\.py probe --checkpoint .*", plain)]


def test_every_page_names_one_probe_for_the_study_and_it_measures_the_study_s_windows():
    matrix = ROOT / "configs/matrix"
    (command,) = {one for page in (ROOT / "README.md", matrix / "qwen.yaml") for one in commands(page.read_text())}
    assert commands((ROOT / "docs/probe.md").read_text()) == [command]
    words = command.split()
    windows = {int(word) for word in words[words.index("--windows") + 1 : words.index("--windows") + 3]}
    two = yaml.safe_load((matrix / "qwen_window_2k.yaml").read_text())["runs"][0]["set"]
    base = yaml.safe_load((ROOT / "configs/base.yaml").read_text())["model"]["size"]
    assert windows == {two["model.size.window"], base["window"]}
    assert two["model.validation.probe"] == words[words.index("--output") + 1] + "/probe.json"
    assert "--context" not in words


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
    *_, measured, unfinished, last = shown.getvalue().splitlines()
    assert unfinished.startswith(f"{output}: Unfinished: sinks (6 of 9), ceilings (15 of 16), ")
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
        ({"sweep_documents": 3, "layer_documents": 4}, "--layer-documents: got 4, expected 0 to 3"),
        ({"max_documents": 3, "sweep_documents": 4}, "--sweep-documents: got 4, expected 1 to 3"),
        ({"inner_rates": [], "chunk": 8}, "--chunk: got 8 without an inner rate"),
        ({"inner_rates": [], "ttt_layers": ["global"]}, "--ttt-layers: got global without an inner rate"),
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
