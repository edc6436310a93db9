"""The report's CSV, and the table of GPU-hours to a target that it shares its numbers with."""

from helpers.page_records import arm, rows_of
from helpers.records import CONTEXT, validation

from ttt_lit.record.schema import Parent
from ttt_lit.report.sheets import gates_csv, runs_csv
from ttt_lit.report.tables import to_target
from ttt_lit.verdict.gates import judge_candidates
from ttt_lit.verdict.study import read_study


def test_csv_has_a_row_per_run_and_stage_and_one_per_gate():
    records = [arm("q_ttt_scratch", "ttt_scratch", 2.6, hours=9, seed=seed) for seed in (0, 1)]
    records.append(arm("q_p1_bridge", "bridge", 2.5, hours=5))
    rows = rows_of(runs_csv(records))
    assert [row["run"] for row in rows] == ["q_p1_bridge/s0", "q_ttt_scratch/s0", "q_ttt_scratch/s1"]
    assert float(rows[2]["loss_inner_on"]) == records[1].final().nats_per_token
    assert [rows[2][name] for name in ("seed", "stage", "transition_held", "share")] == ["1", "C", "true", ""]
    judged = {"qwen2": judge_candidates(read_study(records).families["qwen2"])}
    wanted = [(g.subject, g.name, g.account or "", g.outcome) for each in judged["qwen2"] for g in each.gates]
    columns = ("judged", "gate", "account", "outcome")
    assert [tuple(row[name] for name in columns) for row in rows_of(gates_csv(judged))] == wanted


def test_csv_and_final_take_the_same_of_two_contexts():
    record = arm("q", "bridge", 2.6, hours=1)
    record.stages[0].validations.append(validation({"0": 9.0}, context=2 * CONTEXT))
    (row,) = rows_of(runs_csv([record]))
    assert float(row["loss_inner_on"]) == record.final().nats_per_token
    assert float(row["bits_per_byte_inner_on"]) == record.final().bits_per_byte


def test_hours_to_the_target_and_which_are_an_upper_bound_are_the_same_in_csv_and_table():
    quick = arm("quick", "bridge", 1.7, hours=100, parents=[Parent(name="x", gpu_seconds=36_000.0)])
    slow, never = arm("slow", "direct", 2.4, hours=100), arm("never", "control", 9.0, hours=100)
    compared = [arm("a", "ttt_scratch", 2.5, hours=100), quick, slow, never]
    rows = {
        row["experiment"]: row for row in rows_of(runs_csv([*compared, arm("external", "external", 2.0, hours=100)]))
    }
    columns = [f"gpu_hours_to_target{end}" for end in ("", "_with_parents", "_is_upper_bound")]
    found = {name: [row[column] for column in columns] for name, row in rows.items()}
    assert found["quick"] == ["25.0", "35.0", "true"]
    assert found["slow"][2] == "false"
    assert 50 < float(found["slow"][0]) < 95
    assert found["never"] == ["", "", ""]
    assert rows["never"]["target_loss"] == rows["a"]["target_loss"] != ""
    assert rows["external"]["target_loss"] == ""
    table = to_target(read_study(compared).families["qwen2"])
    shown = {row[0]: row[1:] for row in table.rows}
    assert shown["quick"] == ("≤ 25", "≤ 35")
    assert shown["never"] == ("not reached", "not reached")
    assert shown["slow"][0] == f"{float(found['slow'][0]):.3g}"
    assert "≤: at the target at the first evaluation" in table.title
    assert "≤" not in to_target(read_study([compared[0], never]).families["qwen2"]).title


def test_no_text_of_a_csv_is_a_formula_and_negative_numbers_stay_numbers():
    record = arm("=1+1", "control", -0.5, hours=1, run_id="r", status="failed", reason="@x")
    (row,) = rows_of(runs_csv([record]))
    assert (row["run"], row["experiment"], row["reason"]) == ("'=1+1/r", "'=1+1", "'@x")
    assert float(row["loss_inner_on"]) < 0
