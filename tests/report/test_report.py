"""The report says what the records say, the bad news included."""

import dataclasses
import subprocess
import sys

import pytest
from helpers.demo_record import SWA
from helpers.records import run

import cli
from ttt_lit.record.schema import Parent
from ttt_lit.report.collect import read_records
from ttt_lit.report.console import console, run_tables
from ttt_lit.report.runs import transitions

IDS = [f"{index:03}" for index in range(32)]


def says(record, *parts):
    text = console([record])
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in\n{text}"
    return text


def test_a_run_that_works(make_record):
    text = says(
        make_record(),
        "The run finished: 491,520 tokens in 2 stages.",
        "The inner loop helps at the end of C, context 1,024",
        "Its advantage grows along the context",
        "the loss is flat beyond the window",
        "Prime MLPs inserted, into C: loss 3.50000 before, 3.50000 after: equal to 1e-05, as promised.",
        "4.600 → 3.610",
        "4.500 → 2.900",
        "245,760",
    )
    assert not any(alarm in text for alarm in ("HURTS", "NO DIFFERENCE", "NOT", "BROKEN", "VALIDATION TOOK"))


def below(by):
    return tuple(loss - by for loss in SWA)


FLAT = "C with the inner loop off, window 256, context 1,024: the loss is flat"


@pytest.mark.parametrize(
    "bend, said, never",
    [
        ({"on": (4.7, 4.0, 3.8, 3.7, 3.7, 3.75)}, ("THE INNER LOOP HURTS at the end of C", "DOES NOT GROW"), "helps"),
        ({"on": below(0.004)}, ("THE INNER LOOP MAKES NO DIFFERENCE at the end of C",), "helps"),
        ({"on": below(0.3)}, ("The inner loop helps", "Its advantage DOES NOT GROW"), "HURTS"),
        ({"swa": (*SWA[:4], 3.50, 3.45)}, ("THE LOSS IS NOT FLAT", "it falls by 0.133", FLAT), "rises"),
        ({"swa": (*SWA[:4], 3.70, 3.75)}, ("THE LOSS IS NOT FLAT", "it rises by 0.133", FLAT), "falls"),
        ({"windows": (1024, 1024)}, ("does not reach beyond the window",), "NOT FLAT"),
        ({"windows": (256, None)}, (), "beyond the window"),
        ({"validation_seconds": 50.0}, ("VALIDATION TOOK 25% of the run's device time (limit 10%)",), "BROKEN"),
    ],
)
def test_what_is_not_as_expected_is_said(make_record, bend, said, never):
    assert never not in says(make_record(**bend), *said)


def test_a_broken_promise_is_said(make_record):
    record = make_record(after=3.6)
    says(record, "PROMISE BROKEN: prime MLPs inserted, into C: loss 3.50000 before, 3.60000 after")
    assert [row[-1] for row in transitions([record]).rows] == ["BROKEN"]


def test_an_allowed_jump_is_reported_as_one(make_record):
    record = make_record(after=3.6)
    record.stages[1].transition.preserves = False
    assert "BROKEN" not in says(record, "a jump of +0.100 nats per token")
    assert [row[-1] for row in transitions([record]).rows] == ["jump allowed"]


def test_an_unfinished_run_says_why_and_still_reports(make_record):
    record = make_record()
    record.status, record.reason = "diverged", "stage C, step 12: the loss is nan"
    record.stages[1].transition.after = float("nan")
    record.stages[1].validations = []
    record.stages[1].throughput = None
    record.stages[1].spent.optimizer_steps = 12
    says(record, "status is diverged (stage C, step 12: the loss is nan)", "PROMISE BROKEN", "12 of 60")


def test_a_loss_that_is_no_number_is_no_effect(make_record):
    record = make_record()
    record.status, record.reason = "diverged", "stage C, step 12: the loss is nan"
    nan = float("nan")
    for validation in record.stages[1].validations:
        validation.nats_per_token = nan
        for bucket in validation.buckets:
            bucket.nats_per_token = nan
    text = says(record, "The effect of the inner loop at the end of C, context 1,024 is UNKNOWN", "UNKNOWN beyond")
    assert not any(word in text for word in ("helps", "HURTS", "NO DIFFERENCE"))


def test_a_run_without_stages_is_reported(make_record):
    record = make_record()
    record.status, record.stages = "running", []
    says(record, "status is running: what follows")


def study():
    free = [Parent(name="pretraining", gpu_seconds=0.0)]
    return [
        run("q_p1_bridge", "bridge", dict.fromkeys(IDS, 2.9), hours=250.0, parents=free),
        run("q_ttt_scratch", "ttt_scratch", dict.fromkeys(IDS, 3.0)),
        run("q_fa_import", "fa_import", dict.fromkeys(IDS, 2.8)),
        run("q_p1_bridge", "bridge", dict.fromkeys(IDS, 3.02), share=0.5, hours=52.0, run_id="half", parents=free),
    ]


def test_more_than_three_runs_are_decided_together_in_short():
    text = console(study())
    assert "What q_p1_bridge" not in text
    assert "The run finished" not in text
    for part in (
        "qwen2: not yet",
        "Δ with 95% interval over 32 blocks of 32 documents, 1 seed",
        "What would change it: First of all this has to change: no run at 0.35",
        "† may not be used as evidence",
    ):
        assert part in text, part
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for row in (
        "q_ttt_scratch baseline 3.0000 1.00 1.00 – – +0.2000 † [+0.2000, +0.2000]",
        "q_p1_bridge measured, not proved 2.9000 2.50 2.50 −0.1000 [−0.1000, −0.1000] – +0.1000 † [+0.1000, +0.1000]",
        "q_p1_bridge at 0.5 measured, not proved 3.0200 0.520 0.520 +0.0200 [+0.0200, +0.0200] – +0.2200 † [+0.2200, +0.2200]",
    ):
        assert row in lines
    assert "What q_p1_bridge/s0 shows" in console(study()[:3])


def test_the_summary_of_the_demo_fits_one_screen(make_record):
    external, bridge = make_record(run_id="external"), make_record()
    external.stages = external.stages[:1]
    bridge.stages.insert(1, dataclasses.replace(bridge.stages[1], name="B2"))
    assert len(console([external, bridge]).splitlines()) <= 40


def test_a_table_is_as_wide_as_the_terminal_and_else_as_its_cells(make_record, monkeypatch):
    table = run_tables([make_record()])[0]
    assert len(table.text().splitlines()) == 3 + len(table.rows)
    monkeypatch.setenv("COLUMNS", "80")
    assert len(table.text().splitlines()) == 3 + len(table.rows)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert max(map(len, table.text().splitlines())) <= 80


def test_many_runs_without_a_role_decide_nothing(make_record):
    records = [make_record(run_id=str(number)) for number in range(4)]
    for record in records:
        record.role = None
    assert "nothing is decided" in console(records)


def test_a_table_has_the_same_cells_as_markdown(make_record):
    record = make_record()
    record.stages[1].transition.kind = "a | b"
    for table in (*run_tables([record]), transitions([record])):
        lines = table.markdown().splitlines()[2:]
        cells = [[cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")] for line in lines]
        assert [[cell.replace("\0", "|") for cell in row] for row in cells[2:]] == [list(row) for row in table.rows]


def test_runs_are_folders_files_and_folders_of_many_runs_and_each_counts_once(tmp_path, make_record):
    for name in ("b", "a"):
        make_record(run_id=name).write(tmp_path / "runs" / "experiment" / name / "record.json")
    make_record(run_id="c").write(tmp_path / "c.json")
    every, one, file = str(tmp_path / "runs"), str(tmp_path / "runs" / "experiment" / "b"), str(tmp_path / "c.json")
    assert [record.run_id for record in read_records([every, file]).records] == ["a", "b", "c"]
    assert [record.run_id for record in read_records([one, every]).records] == ["b", "a"]


def test_the_command_prints_the_summary_and_writes_nothing_unasked(tmp_path, make_record, capsys):
    make_record().write(tmp_path / "a" / "record.json")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "What q_p1_bridge/demo-1 shows" in capsys.readouterr().out
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "record.json"]


@pytest.mark.parametrize("content", [None, "{"])
def test_a_missing_or_broken_record_is_named_in_one_line_and_nothing_is_written(tmp_path, make_record, content, capsys):
    make_record().write(tmp_path / "good" / "record.json")
    (tmp_path / "bad").mkdir()
    if content is not None:
        (tmp_path / "bad" / "record.json").write_text(content)
    runs = [str(tmp_path / "good"), str(tmp_path / "bad")]
    assert cli.main(["report", *runs, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "bad") in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_broken_record_in_a_folder_of_many_is_left_out_with_its_path(tmp_path, make_record, capsys):
    make_record().write(tmp_path / "runs" / "good" / "record.json")
    broken = tmp_path / "runs" / "bad" / "record.json"
    broken.parent.mkdir()
    broken.write_text("{")
    found = read_records([str(tmp_path / "runs")])
    assert [record.run_id for record in found.records] == ["demo-1"]
    assert len(found.unreadable) == 1
    assert cli.main(["report", str(tmp_path / "runs")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Problems\n")
    assert str(broken) in text
    assert "What q_p1_bridge/demo-1 shows" in text


def test_a_broken_record_that_was_named_too_or_is_all_there_is_ends_the_report(tmp_path, make_record):
    make_record().write(tmp_path / "runs" / "good" / "record.json")
    broken = tmp_path / "runs" / "bad" / "record.json"
    broken.parent.mkdir()
    broken.write_text("{")
    with pytest.raises(ValueError, match="bad/record.json"):
        read_records([str(tmp_path / "runs"), str(broken.parent)])
    (tmp_path / "runs" / "good" / "record.json").unlink()
    with pytest.raises(ValueError, match="bad/record.json"):
        read_records([str(tmp_path / "runs")])


def test_a_run_that_is_not_finished_is_marked_in_every_table(make_record):
    record = make_record()
    assert "[" not in "".join(row[0] for table in run_tables([record]) for row in table.rows)
    record.status, record.reason = "failed", "out of memory"
    names = [row[0] for table in run_tables([record]) for row in table.rows]
    assert names
    assert set(names) == {"q_p1_bridge/demo-1 [failed]"}


def test_reasons_are_printed_once_or_the_file_that_has_them_is_named(monkeypatch):
    records = [run("q_ttt_scratch", "ttt_scratch", dict.fromkeys(IDS, 3.0))]
    records += [run(name, "bridge", dict.fromkeys(IDS, 2.9)) for name in ("one", "two")]
    records.append(run("q_fa_import", "fa_import", dict.fromkeys(IDS, 2.9)))
    lines = [line for line in console(records).splitlines() if line.startswith("wall-clock saving")]
    assert ["there are no wall-clock-matched runs" in line for line in lines].count(True) == 1
    monkeypatch.setattr("ttt_lit.report.console.MAX_REASONS", 1)
    assert "6 different ones, all of them in report.md" in console(records)


def test_no_run_is_an_error():
    with pytest.raises(ValueError, match="got no run"):
        read_records([])


def test_the_summary_needs_neither_torch_nor_numpy(tmp_path, make_record):
    make_record().write(tmp_path / "record.json")
    code = (
        "import sys, cli; assert cli.main(['report', sys.argv[1]]) == 0; "
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "What q_p1_bridge/demo-1 shows" in result.stdout


@pytest.mark.parametrize("entropy, words", [(6.3, "nats below the unigram entropy"), (4.0, "LEARNT TOO LITTLE")])
def test_whether_the_model_has_learnt_more_than_frequencies_is_said(make_record, entropy, words):
    record = make_record()
    record.unigram_entropy = entropy
    says(record, words)
    record.unigram_entropy = None
    assert "unigram" not in console([record])
