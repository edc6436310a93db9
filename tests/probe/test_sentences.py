"""From hand-made rows to figures, sentences and overlay: every branch by values that a reader can work out."""

from pathlib import Path

import pytest
import yaml

from ttt_lit.probe.config import ProbeConfig, make_plan
from ttt_lit.probe.figure import picture
from ttt_lit.probe.report import markdown, overlay, sentences
from ttt_lit.probe.rows import IMPORTED, Rows
from ttt_lit.probe.summary import best_kept, best_sinks, summarise

CONTEXT, DENSE = 64, 3.0
# Half of the positions lie beyond the window: a mean over the block is half of the mean beyond it.
WINDOW, BEYOND = 32, 0.5


def plan_of(**given):
    given = {"windows": [WINDOW], "stride": 16, "sinks": [0, 4], "inner_rates": [1.0, 0.1]} | given
    return make_plan(ProbeConfig(checkpoint="c", data="d", **given), CONTEXT)


def rows_of(*, damage, worth=0.0, documents=20, window=WINDOW, sweep=4, into=None):
    """``damage``: key → loss − imported loss, per token of the whole block; ``worth``: per token beyond window + stride."""
    rows = into or Rows()
    for number in range(documents):
        name, dense = f"{number:012x}", DENSE + 0.1 * number
        rows.add(IMPORTED, name, number, {"loss": dense, "curve": [dense] * 32})
        rows.add(("ceiling", window, 16), name, number, {"dense": dense, "fresh": dense + worth})
        for key, more in damage.items() if number < sweep else ():
            values = {"loss": dense + more, "curve": [dense + more] * 32}
            rows.add(key, name, number, values | ({"update_norms": [0.5]} if key[0] == "inner" else {}))
    return rows


def page(rows, plan, *, planned=20, held_out=40, missing=(), folder_context=CONTEXT):
    """As ``probe.json`` would be."""
    found = summarise(rows, plan)
    documents = found["imported"]["documents"]
    data = {"name": "d", "context": CONTEXT, "folder_context": folder_context, "documents": documents}
    data |= {"blocks": documents, "planned_documents": planned, "held_out_documents": held_out}
    settings = {"chunk": 8, "clip": 1.0, "precision": "32-true", "ttt_layers": [3], "imported_windows": [None] * 4}
    checkpoint = {"name": "c", "family": "qwen2", "num_parameters": 1}
    top = {"checkpoint": checkpoint, "data": data, "settings": settings, "seconds": 60.0, "threads": 1}
    return top | {"finished": not missing, "missing": list(missing)} | found


def overlay_of(probe):
    text = overlay(probe, Path("p/probe.json"))
    return text, yaml.safe_load(text)["model"]


NONE, FOUR = ("damage", WINDOW, 0), ("damage", WINDOW, 4)


def test_damage_share_and_worth_are_per_token_beyond_the_window():
    # 0.4 and 0.1 beyond the window. A worth of 0.08 beyond 48 of 64 is 0.02 of the block, and 0.04 beyond 32.
    probe = page(rows_of(damage={NONE: 0.2, FOUR: 0.05}, worth=0.08), plan_of())
    cost, repair, worth = sentences(probe)
    assert (
        cost
        == "A window of 32 tokens without sinks costs +0.4000 [+0.4000, +0.4000] nats per token beyond the window (4 documents)."
    )
    assert repair == (
        "4 sink tokens repair 75% of it: +0.1000 nats per token beyond the window remain; the lost context itself is worth at least "
        "+0.0400."
    )
    assert worth.startswith(
        "A memory beyond 32 tokens could win at least +0.0200 [+0.0200, +0.0200] nats per token of a block of 64; the true ceiling is "
        "higher."
    )
    assert probe["recommendation"]["sink_tokens"] == 4


@pytest.mark.parametrize(
    "worth, documents, planned, held_out, said, tells",
    [
        (0.09, 20, 20, 40, "which can tell a memory from nothing here", True),
        (0.07, 20, 20, 40, "does not exclude less than 0.02, twice the gate, so a model without memory could pass", False),
        (0.09, 12, 12, 12, "the folder holds out 12, so prepare more data", False),
        (0.09, 12, 12, 40, "give --max-documents 20 or more", False),
        (0.09, 12, 20, 40, "the same command continues", False),
    ],
)  # fmt: skip
def test_the_verdict_and_its_advice_follow_from_their_cause(worth, documents, planned, held_out, said, tells):
    rows = rows_of(damage={NONE: 0.2, FOUR: 0.05}, worth=worth, documents=documents)
    probe = page(rows, plan_of(), planned=planned, held_out=held_out)
    assert said in sentences(probe)[2]
    assert probe["recommendation"]["gate_can_tell"] is tells
    text, model = overlay_of(probe)
    assert model["size"].get("window") == (WINDOW if tells else None)
    assert ("# No window is set here: the ceiling does not decide on one." in text) is not tells


def test_the_overlay_s_window_comes_with_what_it_costs_there():
    plan = plan_of(windows=[16, 32, 40])
    damage = {NONE: 0.2, FOUR: 0.05, ("damage", 40, 4): 0.03, ("damage", 16, 4): 0.06}
    rows = rows_of(damage=damage, worth=0.01)
    rows_of(damage={}, worth=0.4, window=40, into=rows)  # 0.4 beyond 56 of 64: 0.05 of the block, 0.1333 beyond 40
    text, model = overlay_of(page(rows, plan))
    assert model["size"]["window"] == 40
    # 0.03 of the block is 0.08 beyond 40 of 64.
    assert (
        "# With 4 sink tokens it costs +0.0800 [+0.0800, +0.0800] nats per token beyond it (4 documents; the lost context itself is worth "
        "at least +0.1333)." in text
    )
    assert "# Sinks, layers and the inner rate were tried at a window of 32 tokens." in text
    del damage[("damage", 40, 4)]
    rows = rows_of(damage=damage, worth=0.01)
    text, model = overlay_of(page(rows_of(damage={}, worth=0.4, window=40, into=rows), plan))
    assert "window" not in model["size"]
    assert "# No window is set here: the damage there was not measured." in text


@pytest.mark.parametrize(
    "sinks, damage, cost, repair",
    [
        ([4], {4: 0.05}, "with 4 sink tokens costs +0.1000", "Other numbers of sink tokens were not tried; "),
        ([0], {0: 0.05}, "without sinks costs +0.1000", "Other numbers of sink tokens were not tried; "),
        ([1, 4], {1: 0.2, 4: 0.05}, "with 1 sink token costs +0.4000", "4 sink tokens instead of 1 repair 75% of it: "),
        ([0, 1], {0: 0.2, 1: 0.05}, "without sinks costs +0.4000", "1 sink token repairs 75% of it: "),
        ([0, 4], {0: 0.05, 4: 0.049}, "without sinks costs +0.1000", "More sink tokens repair nothing that would be worth"),
        ([0, 4], {0: -0.01, 4: -0.03}, "without sinks costs −0.0200", "With 4 sink tokens it is −0.0600 nats per token"),
    ],
)  # fmt: skip
def test_sentences_of_sinks_say_what_was_tried(sinks, damage, cost, repair):
    rows = rows_of(damage={("damage", WINDOW, each): more for each, more in damage.items()})
    got = sentences(page(rows, plan_of(sinks=sinks)))
    assert f"A window of 32 tokens {cost}" in got[0]
    assert got[1].startswith(repair)


def test_layers_are_kept_until_the_damage_is_within_a_tenth_of_the_worth():
    layer = ("layer", WINDOW, 4)
    damage = {NONE: 0.5, FOUR: 0.25, (*layer, 1): 0.24, (*layer, 2): 0.15, (*layer, 2, 1): 0.06}
    # Beyond the window 0.5 remain; 0.3 with layer 2 kept, which is enough where the lost context is worth 0.22 there.
    for worth, kept in ((0.44, [2]), (0.0, [1, 2]), (0.9, [])):
        probe = page(rows_of(damage=damage, worth=worth), plan_of())
        assert probe["layers"]["excess"] == pytest.approx(0.5 - worth / 2)
        assert [step["kept"] for step in probe["layers"]["greedy"]] == [[2], [2, 1]]
        text, model = overlay_of(probe)
        assert model["size"]["full_attention_layers"] == kept
        words = {
            (2,): "keeping layer 2 at full attention repairs +0.2000",
            (1, 2): "layers 2, 1 at full attention repairs +0.3800",
        }
        assert words.get(tuple(kept), "Not needed, though keeping layers 2, 1") in text  # fmt: skip
    text, model = overlay_of(page(rows_of(damage={NONE: 0.5, FOUR: 0.25}), plan_of()))
    assert "full_attention_layers" not in model["size"]
    assert "was not measured" in text


@pytest.mark.parametrize("changes, rate", [({1.0: 0.3, 0.1: -0.02}, 0.1), ({1.0: 0.3, 0.1: 0.0}, None)])
def test_a_rate_is_written_where_one_helps_with_how_it_was_measured(changes, rate):
    damage = {NONE: 0.2, FOUR: 0.05} | {("inner", WINDOW, 4, each): 0.05 + more for each, more in changes.items()}
    # Measured in another window and with other sinks, where a high rate looks good.
    damage |= {("damage", 16, 4): 0.1, ("inner", 16, 4, 1.0): -1.0, ("inner", WINDOW, 0, 1.0): -1.0}
    probe = page(rows_of(damage=damage), plan_of())
    text, model = overlay_of(probe)
    assert model.get("inner") == (None if rate is None else {"lr": rate})
    assert "# Untrained, at chunk 8 and clip 1 within a window of 32 tokens, " in text
    assert ("no inner rate of 0.1, 1 helps, so no inner.lr is set here" in text) is (rate is None)
    assert {(row["window"], row["sink_tokens"]) for row in probe["inner"]} == {(WINDOW, 4)}


def test_settings_are_compared_on_the_blocks_that_all_have_read():
    """Easy documents must not speak for the setting that was measured on them alone."""
    rows = rows_of(damage={NONE: 0.2, FOUR: 0.05}, sweep=4)
    rows.add(("damage", WINDOW, 16), "000000000003", 3, {"loss": DENSE + 0.3 + 0.1, "curve": [0.0] * 32})
    rows.add(NONE, "000000000009", 9, {"loss": DENSE - 5, "curve": [0.0] * 32})
    plan = plan_of(sinks=[0, 4, 16])
    assert best_sinks(rows, plan) == 4
    assert summarise(rows, plan)["sinks"]["before"] == pytest.approx(0.4)
    for layer, number, loss in ((1, 0, 3.0), (1, 1, 3.0), (2, 1, 2.9), (2, 2, 9.0)):
        rows.add(("layer", WINDOW, 4, layer), f"{number:012x}", number, {"loss": loss})
    assert best_kept(rows, WINDOW, 4, 1) == (2,)


def test_an_unfinished_probe_says_so_in_one_line():
    rows = rows_of(damage={NONE: 0.2, FOUR: 0.05})
    line = "Unfinished: inner loop (3 of 8) not measured; the same command continues."
    probe = page(rows, plan_of(), missing=["inner loop (3 of 8)"])
    assert line in markdown(probe, "x").splitlines()
    assert f"# {line}" in overlay_of(probe)[0].splitlines()
    assert "Unfinished" not in markdown(page(rows, plan_of()), "x")


def test_the_picture_s_gate_lines_are_not_the_colour_of_a_damage():
    left, right = picture(page(rows_of(damage={NONE: 0.2, FOUR: 0.05}, worth=0.08), plan_of())).axes
    damage = {line.get_color() for line in left.lines if "sink" in str(line.get_label())}
    gates = {line.get_color() for line in right.lines if "gate" in str(line.get_label())}
    assert len(damage) == 2
    assert not damage & gates
    labels = [str(line.get_label()) for line in left.lines]
    assert "end of the window: 32" in labels
    assert "the lost context is worth at least 0.040" in labels
    fewest = next(line for line in left.lines if line.get_label() == "window 32, 0 sinks")
    assert fewest.get_ydata() == pytest.approx([0.2] * 32)
