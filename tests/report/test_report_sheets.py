"""The report's CSV, and the table of GPU-hours to a target that it shares its numbers with."""

import csv
import io

from helpers.page_records import arm
from helpers.records import CONTEXT, validation

from ttt_lit.record.schema import Parent
from ttt_lit.report.blocks import Grid
from ttt_lit.report.build import build_page
from ttt_lit.report.sheets import runs_csv
from ttt_lit.verdict.study import read_study


def test_csv_and_final_take_the_same_of_two_contexts():
    record = arm("q", "bridge", 2.6, hours=1)
    record.stages[0].validations.append(validation({"0": 9.0}, context=2 * CONTEXT))
    (row,) = csv.DictReader(io.StringIO(runs_csv([record]), newline=""))
    assert float(row["loss_inner_on"]) == record.final().nats_per_token
    assert float(row["bits_per_byte_inner_on"]) == record.final().bits_per_byte


def test_csv_says_which_hours_to_the_target_are_an_upper_bound():
    quick = arm("quick", "bridge", 1.7, hours=100, parents=[Parent(name="x", gpu_seconds=36_000.0)])
    slow, never = arm("slow", "direct", 2.4, hours=100), arm("never", "control", 9.0, hours=100)
    made_it = arm("external", "external", 2.0, hours=100)
    text = runs_csv([arm("a", "ttt_scratch", 2.5, hours=100), quick, slow, never, made_it])
    rows = {row["experiment"]: row for row in csv.DictReader(io.StringIO(text, newline=""))}
    columns = [f"gpu_hours_to_target{end}" for end in ("", "_with_parents", "_is_upper_bound")]
    found = {name: [row[column] for column in columns] for name, row in rows.items()}
    assert found["quick"] == ["25.0", "35.0", "true"]
    assert found["slow"][2] == "false"
    assert 50 < float(found["slow"][0]) < 95
    assert found["never"] == ["", "", ""]
    assert rows["never"]["target_loss"] == rows["a"]["target_loss"] != ""
    assert rows["external"]["target_loss"] == ""
    assert [row["stage"] for row in rows.values()] == ["C"] * 5


def test_the_table_of_hours_to_the_target_has_the_figures_numbers():
    quick = arm("quick", "bridge", 1.7, hours=100, parents=[Parent(name="x", gpu_seconds=36_000.0)])
    runs = [arm("a", "ttt_scratch", 2.5, hours=100), arm("never", "control", 9.0, hours=100)]
    (without,) = (grid for grid in target_grids(runs))
    (found,) = (grid for grid in target_grids([*runs, quick]))
    assert "≤" not in without.caption
    assert "≤: at the target at the first evaluation" in found.caption
    rows = {row[0]: row[1:] for row in found.rows}
    assert rows == {"a": ("95", "95"), "never": ("not reached", "not reached"), "quick": ("≤ 25", "≤ 35")}


def target_grids(records):
    blocks = build_page(read_study(records), {"qwen2": []}, records, command="x").blocks
    return [block for block in blocks if isinstance(block, Grid) and block.caption.startswith("GPU-hours to")]


def test_no_text_of_a_csv_is_a_formula_and_negative_numbers_stay_numbers():
    record = arm("=1+1", "control", -0.5, hours=1, run_id="r", status="failed", reason="@x")
    (row,) = csv.DictReader(io.StringIO(runs_csv([record]), newline=""))
    assert (row["run"], row["experiment"], row["reason"]) == ("'=1+1/r", "'=1+1", "'@x")
    assert float(row["loss_inner_on"]) < 0
