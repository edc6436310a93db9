"""The ceiling of a study, the control of a candidate, the 2 × 2 with its interaction, and how the page shows them."""

import csv
import io

import pytest
from helpers.records import ceiling, run, validation

from ttt_lit.record.measured import Damage
from ttt_lit.record.schema import Start
from ttt_lit.report.console import decision
from ttt_lit.report.page import build_page
from ttt_lit.report.sheets import differences_csv
from ttt_lit.verdict.comparison import flags
from ttt_lit.verdict.formats import interval
from ttt_lit.verdict.own_part import ceiling_sentence, controls, own_part_gate
from ttt_lit.verdict.study import read_study
from ttt_lit.verdict.two_by_two import cells, effects

IDS = [f"{number:012x}" for number in range(24)]
HALVES = {each: number % 2 for number, each in enumerate(IDS)}


def arm(experiment, role, off, on=None, *, seed=0, mode="meta", windows=(8192,), spread=0.0, start=None, **fields):
    """A run with these losses; every second block has ``spread`` more of the gain on − off, every other one less."""
    validations = [validation(dict.fromkeys(IDS, off), inner="off")]
    if on is not None:
        losses = {each: on + spread * (1 if HALVES[each] else -1) for each in IDS}
        validations.append(validation(losses, inner="on"))
    headline = "on" if mode in ("meta", "first_order") else "off"
    record = run(experiment, role, {}, seed=seed, final=validations[-1], headline=headline, **fields)
    record.stages[0].validations, record.stages[0].mode, record.stages[0].windows = validations, mode, list(windows)
    if role in ("control", "fa_import"):
        record.start_validation = validation(dict.fromkeys(IDS, off + 0.1 if start is None else start), inner="off")
    if on is None:
        record.model.ttt_layers = []
    return record


def qwen(**fields):
    """Two seeds of baseline, bridge and the control that is read with updates; one of the other two controls."""
    return [
        *(arm("q_ttt_scratch", "ttt_scratch", 2.70, 2.62, seed=seed, **fields) for seed in (0, 1)),
        *(arm("q_p1_bridge", "bridge", 2.63, 2.60, seed=seed, spread=0.01, **fields) for seed in (0, 1)),
        *(arm("q_ttt_at_evaluation", "control", 2.64, 2.80, seed=seed, mode="none", **fields) for seed in (0, 1)),
        arm("q_static", "control", 2.635, 2.70, mode="static", **fields),
        arm("q_swa_only", "control", 2.64, mode="none", **fields),
        arm("q_fa_import", "fa_import", 2.58, mode="none", windows=(None,), **fields),
    ]


def family(records):
    (found,) = read_study(records).families.values()
    return found


@pytest.fixture(scope="module")
def study():
    return family(qwen(ceiling=[ceiling(0.015, nats=0.02), ceiling(0.05, window=2048)]))


def test_the_four_cells_their_differences_and_the_interaction_are_those_of_the_losses(study):
    found = {each.arm.name: (each.trained, each.off, each.on) for each in cells(study)}
    assert found == {
        "q_p1_bridge": ("with", pytest.approx(2.63), pytest.approx(2.60)),
        "q_ttt_scratch": ("with", pytest.approx(2.70), pytest.approx(2.62)),
        "q_static": ("without, prime MLPs trained", pytest.approx(2.635), pytest.approx(2.70)),
        "q_swa_only": ("without", pytest.approx(2.64), None),
        "q_ttt_at_evaluation": ("without", pytest.approx(2.64), pytest.approx(2.80)),
    }
    pairs = {(each.arm.name, each.control.name): each.comparisons for each in effects(study)}
    assert list(pairs) == [("q_p1_bridge", each) for each in ("q_ttt_at_evaluation", "q_swa_only", "q_static")]
    values = [each.interval.estimate for each in pairs["q_p1_bridge", "q_ttt_at_evaluation"]]
    assert values == pytest.approx([2.60 - 2.64, 2.60 - 2.80, 2.63 - 2.64, (2.60 - 2.63) - (2.80 - 2.64)])
    whole, read_on, _, both = pairs["q_p1_bridge", "q_ttt_at_evaluation"]
    assert (whole.reasons, whole.of_ceiling, both.of_ceiling) == ((), "−200% of the ceiling", "−950% of the ceiling")
    assert both.interval.low < both.interval.estimate < both.interval.high  # blocks differ in their gains
    assert (read_on.interval.documents, read_on.interval.seeds) == (24, 2)
    assert [each.interval is None for each in pairs["q_p1_bridge", "q_swa_only"]] == [False, True, False, True]
    assert any("same seed in q_static: seed 1" in reason for reason in pairs["q_p1_bridge", "q_static"][3].reasons)


def test_the_gate_reads_the_best_matched_control_without_updates(study):
    gate = own_part_gate(study, "q_p1_bridge", "", study.matched("q_p1_bridge", ""), resamples=200)
    assert gate.outcome == "pass"
    assert [name for name, _ in gate.numbers] == [
        "q_p1_bridge with − without inner updates",
        "q_p1_bridge − q_ttt_at_evaluation read without updates",
    ]
    assert all("of the ceiling, 2 seeds" in value for _, value in gate.numbers)


def test_losing_to_the_control_is_not_called_harm_of_the_updates():
    """On − off is −0.03, and yet the other training is ahead by 0.05: that says nothing about updates alone."""
    records = qwen()
    for record in records[4:6]:
        record.stages[0].validations[0] = validation(dict.fromkeys(IDS, 2.55), inner="off")
    found = family(records)
    gate = own_part_gate(found, "q_p1_bridge", "", found.matched("q_p1_bridge", ""), resamples=200)
    assert gate.outcome == "fail"
    assert gate.reasons[0].startswith("q_p1_bridge − q_ttt_at_evaluation read without updates: +0.0500")
    assert "or by the other training" in gate.reasons[0]
    assert not any("updates do harm" in reason for reason in gate.reasons)


def test_where_attention_stays_as_imported_the_imported_model_trained_further_is_the_control():
    """No branch on a family: whatever starts alike, sees alike and never updates."""
    hybrid = (512, None)
    records = [
        *(arm("g_ttt_scratch", "ttt_scratch", 2.7, 2.6, seed=seed, windows=hybrid) for seed in (0, 1)),
        *(arm("g_p1_hybrid_preserve", "bridge", 2.6, 2.5, seed=seed, windows=hybrid) for seed in (0, 1)),
        *(arm("g_fa_import", "fa_import", 2.55, mode="none", seed=seed, windows=hybrid) for seed in (0, 1)),
    ]
    for record in records:
        record.ceiling = [ceiling(0.05, window=512)]
    found = family(records)
    candidate = found.matched("g_p1_hybrid_preserve", "")
    assert [each.name for each in controls(found, candidate)] == ["g_fa_import"]
    assert own_part_gate(found, "g_p1_hybrid_preserve", "", candidate, resamples=200).outcome == "pass"
    assert controls(found, found.baseline) == []
    assert "see the whole context" in ceiling_sentence(found)
    assert "could pass" in ceiling_sentence(found)


def test_a_study_without_a_ceiling_says_how_to_measure_one_and_one_with_two_says_so():
    assert "no ceiling was measured for window 8,192" in family(qwen()).ceiling.problem
    assert "python cli.py probe" in ceiling_sentence(family(qwen()))
    records = qwen(ceiling=[ceiling(0.05)])
    records[3].ceiling = [ceiling(0.05, checkpoint="coder")]
    study = read_study(records)
    assert any("different ceilings for window 8,192 (0.0550 by dense and 0.0550 by coder)" in p for p in study.problems)
    assert family(records).ceiling.ceiling is None
    records[3].ceiling = []  # a run that carries none contradicts none
    assert family(records).ceiling.ceiling == ceiling(0.05)


def test_the_ceiling_of_a_model_that_the_candidates_do_not_come_from_is_none():
    """Arms from random weights may carry it: any model of their shape was accepted there."""
    records = qwen()
    for record in records[:2]:
        record.ceiling = [ceiling(0.05, checkpoint="coder (abab)", digest="ab" * 32)]
    study = read_study(records)
    (problem,) = [problem for problem in study.problems if "ceiling" in problem]
    assert "measured on coder (abab), from which q_p1_bridge did not start" in problem
    (found,) = study.families.values()
    assert (found.ceiling.ceiling, found.ceiling.window) == (None, 8192)
    assert "could pass" in ceiling_sentence(found)
    for record in records[2:4]:  # trained further before: the model behind it counts
        record.start = Start(
            source="b1", weights_hash="c" * 64, lineage=[{"operation": "fit", "source_hash": "ab" * 32}]
        )
    assert family(records).ceiling.ceiling.digest == "ab" * 32


def test_what_updates_do_to_an_unprepared_control_is_no_harm_of_its_training():
    read_with = arm("q_ttt_at_evaluation", "control", 2.64, 2.80, mode="none")
    read_with.headline = "on"
    assert flags(family([read_with]).arms[0]) == []
    harmed = arm("q_ttt_at_evaluation", "control", 2.64, 2.50, mode="none", start=2.5)
    harmed.headline = "on"
    assert any("worse than the checkpoint" in each for each in flags(family([harmed]).arms[0]))


def page_of(records):
    return build_page(read_study(records), {"qwen2": []}, records, command="x")


def test_the_page_names_the_cells_that_nothing_fills_and_shows_the_share_beside_every_difference():
    page = page_of(qwen(ceiling=[ceiling(0.015, nats=0.02)]))
    four = next(table for table in page.tables if table.title.startswith("Inner updates of"))
    assert {row[0]: row[4] for row in four.rows}["q_ttt_at_evaluation"] == (
        "+0.1600", "[+0.1600, +0.1600]", "(+800% of the ceiling)",
    )  # fmt: skip
    arms = next(table for table in page.tables if table.title.startswith("Arms of"))
    shown = [cell for row in arms.rows for cell in row[7:] if cell != ("–",)]
    assert len(shown) == 10  # five arms to the baseline, five to the imported model
    assert all(cell[2].endswith("% of the ceiling)") for cell in shown)
    items = [item for section in page.sections for item in section.items]
    assert "q_swa_only read with updates: it has no TTT layers" in items
    assert any(item.startswith("q_ttt_scratch trained without updates: no token-matched run") for item in items)


def test_the_sheet_of_differences_and_the_terminal_have_the_same_numbers(study):
    rows = list(csv.DictReader(io.StringIO(differences_csv([study]))))
    wanted = {(each.arm.name, each.control.name): each.interaction for each in effects(study)}
    found = {(row["of"], row["minus"]): row for row in rows if row["difference"] == "interaction"}
    assert found.keys() == wanted.keys()
    row, interaction = found["q_p1_bridge", "q_ttt_at_evaluation"], wanted["q_p1_bridge", "q_ttt_at_evaluation"]
    assert float(row["nats"]) == interaction.interval.estimate
    assert float(row["share_of_ceiling"]) == interaction.interval.estimate / 0.02
    assert (row["usable"], found["q_p1_bridge", "q_static"]["usable"]) == ("true", "false")
    (text,) = decision([record for arm in study.arms for record in arm.records])
    assert f"{' '.join(interval(interaction.interval))} (−950% of the ceiling)" in text
    assert (
        "What the gate can tell: All context beyond the window of 8,192 tokens is worth 0.0200 [0.0150, 0.0250]" in text
    )


@pytest.mark.parametrize(
    "low, nats, share", [(0.0, 0.0004, ""), (-0.001, 0.02, ""), (None, 0.02, ""), (0.001, 0.02, "−200% of")]
)
def test_a_difference_is_no_share_of_a_ceiling_that_may_be_0(low, nats, share):
    """−0.04 nats would be "−10,000% of the ceiling" of 0.0004."""
    found = family(qwen(ceiling=[ceiling(low, nats=nats)]))
    (pair,) = [each for each in effects(found) if each.control.name == "q_ttt_at_evaluation"]
    assert pair.whole.interval.estimate == pytest.approx(-0.04)
    assert pair.whole.of_ceiling == (f"{share} the ceiling" if share else "")
    rows = csv.DictReader(io.StringIO(differences_csv([found])))
    assert any(row["share_of_ceiling"] for row in rows) == bool(share)


def test_healing_stands_apart_from_gain():
    """Damage 0.9 → 0.1 beyond the window heals 0.8 and wins nothing; what updates add is 0.04."""
    records = qwen()
    assert not any(text.startswith("Damage is") for section in page_of(records).sections for text in section.text)

    def damage(when, inner, inside, beyond):
        return Damage(when=when, context="long", inner=inner, inside=inside, beyond=beyond, nats=0.0)

    records[2].stages[0].damage = [
        damage("start", "off", 0.01, 0.9), damage("end", "off", -0.02, 0.1), damage("end", "on", -0.025, 0.06),
        Damage(when="end", context="short", inner="off", inside=0.03, beyond=None, nats=0.03),
    ]  # fmt: skip
    (damaged,) = [table for table in page_of(records).tables if table.title.startswith("Nats per token: inside")]
    assert damaged.rows == (
        ("q_p1_bridge/s0", "C", "long", ("inside +0.0100", "beyond +0.9000"), ("inside −0.0200", "beyond +0.1000"),
         ("inside −0.0300", "beyond −0.8000"), ("inside −0.0050", "beyond −0.0400")),
        ("q_p1_bridge/s0", "C", "short", ("inside –", "beyond –"), ("inside +0.0300", "beyond –"),
         ("inside –", "beyond –"), ("inside –", "beyond –")),
    )  # fmt: skip
