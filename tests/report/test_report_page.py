"""The page shows every arm and gate, needs nothing but itself, lets no name break out, and copes with what runs leave behind."""

import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from helpers.page_records import arm, rows_of

import cli
from ttt_lit.record.schema import Model, Parent, Start
from ttt_lit.report.page import across, build_page, problems, reading
from ttt_lit.report.runs import template
from ttt_lit.report.table import Mark
from ttt_lit.report.words import family_differences
from ttt_lit.report.write import html, write_report
from ttt_lit.verdict.gates import MAX_LAST_RISE, judge_candidates
from ttt_lit.verdict.study import read_study

HOSTILE = "evil<script>alert(1)</script>|\"'[x](y)`$\\frac$&"
COMMAND = "python cli.py report runs --output <out>"
CONTROLS = ("q_static", "q_swa_only", "q_first_order", "q_ttt_at_evaluation")


def qwen():
    """Ten token-matched arms, shares of wall-clock, an ablation and a diverged run with a hostile name."""
    made = []
    for seed in (0, 1):
        made += [
            arm("q_ttt_scratch", "ttt_scratch", 2.60, hours=1000, seed=seed),
            arm("q_fa_scratch", "fa_scratch", 2.65, hours=700, seed=seed, noise=0.01),
            arm("q_fa_import", "fa_import", 2.58, hours=500, seed=seed, noise=0.01),
            arm("q_p1_bridge", "bridge", 2.57, hours=600, seed=seed, noise=0.01),
            arm("q_p2_direct", "direct", 2.585, hours=620, seed=seed, noise=0.02),
        ]
        for share in (0.35, 0.5, 0.7, 1.0):
            fields = {"seed": seed, "share": share, "run_id": f"w{share}"}
            made.append(arm("q_p1_bridge", "bridge", 2.66 - share / 8, hours=1000 * share, **fields))
    made += [arm(name, "control", 2.7 + 0.004 * n, hours=480 + 5 * n) for n, name in enumerate(CONTROLS)]
    made.append(arm("q_p1_bridge", "bridge", 2.59, hours=590, variant="carry=params", run_id="v"))
    broken = arm(HOSTILE, "control", 2.6, hours=400, run_id="=cmd()", status="diverged", reason="-1 | <b>loss is nan")
    for document in broken.stages[0].validations[0].documents:
        document.nats_per_token = math.nan
    broken.stages[0].validations[0].nats_per_token = math.nan
    return [*made, broken]


def gemma():
    family = {"model": Model(family="gemma3", num_parameters=1, num_layers=1, ttt_layers=[])}
    start = {"start": Start(source="a|b", weights_hash="0123456789abcdef"), "parents": [Parent(name="ext/1")]}
    return [
        arm("g_ttt_scratch", "ttt_scratch", 2.8, hours=900, **family),
        arm("g_fa_import", "fa_import", 2.75, hours=500, **family, **start),
        arm("external", "external", 3.0, hours=50, **family),
    ]


def built(records, judged=None):
    study = read_study(records)
    judged = {name: judge_candidates(family) for name, family in study.families.items()} if judged is None else judged
    return build_page(study, judged, records, command="x")


@pytest.fixture(scope="module")
def records():
    return [*qwen(), *gemma()]


@pytest.fixture(scope="module")
def data(records):
    return built(records)


@pytest.fixture(scope="module")
def folder(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(records, folder, command=COMMAND)
    return folder


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    """Well-formed: every tag is closed."""
    return ElementTree.fromstring(text)


@pytest.fixture(scope="module")
def rows(page):
    return [" ".join(row.itertext()) for row in page.iter("tr")]


def test_the_page_needs_nothing_but_itself_and_every_reference_has_its_one_target(text, page):
    assert not any(word in text for word in ("http:", "https:", "@import"))
    assert not {"script", "link", "img", "iframe", "object"} & {each.tag for each in page.iter()}
    ids = [each.get("id") for each in page.iter() if each.get("id")]
    pointing = [each.get(name) for each in page.iter() for name in ("src", "href", "data") if each.get(name)]
    targets = {*pointing, *re.findall(r"url\(([^)]*)\)", text)}
    assert len(ids) == len(set(ids))
    assert targets
    assert targets <= {f"#{each}" for each in ids}


def test_names_from_records_stay_text(text, page, folder):
    assert "<script" not in text
    assert "<b>" not in text
    for said in (HOSTILE, "-1 | <b>loss is nan", COMMAND):
        assert said in "".join(page.itertext())
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    outside_code = markdown[: markdown.index("```")]
    assert "<script" not in outside_code
    assert not re.search(r"(?<!\\)\]\(y\)", outside_code)
    assert "evil&lt;script&gt;alert(1)&lt;/script&gt;\\|\"'\\[x\\](y)\\`\\$\\\\frac\\$&amp;" in outside_code


def test_every_arm_run_and_gate_has_a_row(records, rows):
    for family in read_study(records).families.values():
        for each in family.arms:
            names = [each.variant or each.name, *(record.name for record in each.records)]
            assert all(any(name in row for row in rows) for name in names)
        for gate in (gate for each in judge_candidates(family) for gate in each.gates):
            mine = [row for row in rows if row.startswith(gate.name) and gate.subject in row]
            assert all(
                any(reason in row and gate.outcome in row for row in mine) for reason in gate.brief or gate.reasons
            )
            assert all(any(name in row and value in row for row in mine) for name, value in gate.numbers)


def test_what_two_candidates_share_is_said_once_and_the_csv_has_it_all(records, rows, folder):
    bridge, direct = (
        next(each.marginal for each in judge_candidates(read_study(records).families["qwen2"]) if each.name == name)
        for name in ("q_p1_bridge", "q_p2_direct")
    )
    shared = [reason for reason in bridge.reasons if reason in direct.reasons]
    sheet = rows_of((folder / "gates.csv").read_bytes())
    assert shared
    for reason in shared:
        assert sum(reason in row for row in rows) == 1
        assert sum(reason in row["reasons"] for row in sheet if row["gate"] == "wall-clock saving") == 6


def test_the_first_screen_is_the_verdict_the_numbers_and_the_frontier(data, page):
    card = next(each for each in page.iter("section") if "qwen2" in "".join(each.itertext()))
    assert [each.tag for each in card.iter() if each.tag in ("table", "dl", "figure")] == ["table", "dl", "figure"]
    assert [each.tag for each in card[0]][:2] == ["h2", "div"]
    assert "Final loss against GPU-hours, the run alone" in "".join(card[1].itertext())
    table = data.sections[0].tables[0]
    found = {row[0][0]: row[1:] for row in table.rows}
    assert list(found)[:3] == ["q_ttt_scratch", "q_p1_bridge", "q_p1_bridge at 0.35"]
    assert found["q_p1_bridge"][:3] == ("2.5834", "0.600", "0.600")
    assert [cell[0] for cell in found["q_p1_bridge"][3:]] == ["−0.0200", "−0.0800", "−0.0100 †"]
    assert table.rows[1][0][1] == "measured, not proved"
    assert "12 blocks of 12 documents, 2 seeds" in table.title


def test_the_answer_comes_first_and_the_page_can_be_navigated(page):
    headings = ["".join(each.itertext()).strip() for each in page.iter() if each.tag in ("h1", "h2")]
    order = ["Does a pretrained start save TTT-E2E training time?", "qwen2: ? not yet", "gemma3: ? not yet", "Gates"]
    order += ["Family qwen2", "Family gemma3", "Flags and problems", "Across families", "Other runs"]
    assert [" ".join(heading.split()) for heading in headings][:9] == order
    assert {each.get("scope") for each in page.iter("th")} == {"col", "row"}
    assert all(each.get("data-column") for each in page.iter("td"))
    drawings = list(page.iter("svg"))
    assert drawings
    assert all(each.get("role") == "img" and each.get("aria-label") for each in drawings)
    assert len(list(page.iter("figcaption"))) == len(drawings)


def test_what_went_wrong_is_listed(page, rows):
    items = ["".join(each.itertext()) for each in page.iter("li")]
    for said in ("gemma3: no bridge and no direct conversion", "gemma3: no run of role fa_scratch", "seed in q_static"):
        assert any(said in item for item in items), said
    assert any("diverged" in row and "<b>loss is nan" in row for row in rows)


def test_markdown_has_the_rows_of_every_table_and_links_the_figures_that_exist(data, folder):
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    names = {path.stem for path in (folder / "figures").iterdir()}
    assert set(re.findall(r"!\[[^\]]*\]\(figures/(\w+)\.png\)", markdown)) == names
    tables = [block for block in markdown.split("\n\n") if block.startswith("| ")]
    widths = [{len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()} for block in tables]
    assert [(len(block.splitlines()) - 2, width) for block, width in zip(tables, widths, strict=True)] == [
        (len(table.rows), {len(table.header) + 1}) for table in data.tables
    ]


def test_families_are_compared_with_the_bytes_that_they_were_measured_on():
    qwen_run, gemma_run = arm("q_ttt_scratch", "ttt_scratch", 2.6, hours=1), gemma()[0]
    gemma_run.stages[0].validations[0].bytes = 70_964
    section = across(read_study([qwen_run, gemma_run]))
    (table,) = section.tables
    assert table.header[-1] == "held-out bytes"
    expected = {"q_ttt_scratch": f"{qwen_run.final().bytes:,}", "g_ttt_scratch": "70,964"}
    assert {row[0]: row[-1] for row in table.rows} == expected
    assert "cut by its own tokenizer" in section.text[0]


def test_seeds_of_a_difference_are_counted_in_words():
    baseline = [arm("q_ttt_scratch", "ttt_scratch", 2.6, hours=1, seed=seed) for seed in (0, 1)]
    for seeds, words in (((0,), "(1 seed)"), ((0, 1), "(2 seeds)"), ((0, 1, 2), "(2 of 3 seeds)")):
        bridge = [arm("q_p1_bridge", "bridge", 2.5, hours=1, seed=seed) for seed in seeds]
        family = read_study([*baseline, *bridge]).families["qwen2"]
        rows = template(family, family_differences(family)).rows
        (line,) = {row[6][0] for row in rows if row[0][0].startswith("q_p1_bridge")}
        assert line.startswith("Δ baseline: ")
        assert line.endswith(f" {words}")


def test_the_page_says_what_stable_convergence_does_with_an_interval_around_zero():
    """It passes, which is not what the other gates do, and the page must not say otherwise."""
    records = [arm("q_ttt_scratch", "ttt_scratch", 2.6, hours=1), arm("q_p1_bridge", "bridge", 2.5, hours=1)]
    records[1].stages[0].train_losses = [3.0 + 0.001 * math.sin(step) for step in range(240)]
    (candidate,) = judge_candidates(read_study(records).families["qwen2"], resamples=500)
    convergence = next(gate for gate in candidate.secondary if gate.name == "stable convergence")
    assert convergence.outcome == "pass"
    assert re.search(r"\[−0\.\d+, \+0\.\d+\]", dict(convergence.numbers)["change over the last third of C, seed 0"])
    (rule,) = (paragraph for paragraph in reading() if paragraph.startswith("Insufficient"))
    assert "The one exception is stable convergence" in rule
    assert f"nowhere above {MAX_LAST_RISE:g}" in rule


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_records_in_any_order_give_the_same_bytes(tmp_path):
    records = gemma()
    for record in records:
        record.evaluations, record.stages[0].throughput = [], None  # fewer figures: drawing takes time
    write_report(records, tmp_path / "a", command=COMMAND)
    write_report(records[::-1], tmp_path / "b", command=COMMAND)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    names = {
        "report.html",
        "report.md",
        "runs.csv",
        "gates.csv",
        "differences.csv",
        "figures/gemma3_frontier_marginal.png",
    }
    assert names <= files_of(tmp_path / "a").keys()


def unfinished():
    record = arm("q_p1_bridge", "bridge", 2.6, hours=1, status="running")
    stage = record.stages[0]
    stage.validations, stage.train_losses, stage.throughput, stage.transition = [], [], None, None
    stage.spent.gpu_seconds, record.totals.gpu_seconds, record.evaluations = {}, {}, []
    return record


def without_stages():
    record = unfinished()
    record.stages = []
    return record


def baseline():
    return arm("q_ttt_scratch", "ttt_scratch", 2.6, hours=1)


@pytest.mark.parametrize(
    "left, says",
    [
        ([], "No run has a role in a comparison"),
        ([gemma()[2]], "No run has a role in a comparison"),
        ([unfinished()], "no arm has both a final loss and known GPU-hours"),
        ([without_stages()], "no run has spent compute time on a stage"),
        ([qwen()[-1]], "no arm has both a final loss and known GPU-hours"),
        ([arm("q_p1_bridge", "bridge", 2.6, hours=1)], "There is no baseline to compare with"),
        ([arm("q_p1_bridge", "bridge", 2.6, hours=1, share=0.5)], "no run at the baseline's number of tokens"),
        ([baseline()], "no gate applies"),
        ([baseline(), unfinished()], "no loss was measured, the run did not finish"),
    ],
)
def test_missing_data_is_said_in_place_of_a_figure(left, says):
    page = built(left)
    drawn = {each.stem: "<svg ></svg>" for each in page.pictures if not isinstance(each.figure, str)}
    assert all(isinstance(each.figure, str) or each.figure.axes for each in page.pictures)
    text = "".join(ElementTree.fromstring(html(page, drawn)).itertext())
    assert says in text
    assert all(record.name in text for record in left)


def test_the_command_writes_the_page_and_says_where_without_torch(tmp_path):
    without_stages().write(tmp_path / "runs" / "x" / "record.json")
    code = "import sys, cli; assert cli.main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    arguments = ["report", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"written to {tmp_path / 'out' / 'report.html'}" in result.stdout
    assert f"python cli.py report {tmp_path / 'runs'}" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert cli.COMMANDS["report"].__doc__


def test_two_baselines_are_one_too_many_and_not_called_missing():
    study = read_study([arm("one", "ttt_scratch", 2.6, hours=1), arm("two", "ttt_scratch", 2.6, hours=1)])
    items = problems(study, {}).items
    assert any("2 arms have the role ttt_scratch" in item for item in items)
    assert not any("no run of role ttt_scratch" in item for item in items)
    assert any("no run of role fa_import" in item for item in items)


def test_outcomes_are_shown_with_a_symbol_too(rows):
    assert Mark("pass").symbol != Mark("fail").symbol != Mark("insufficient").symbol
    assert any("? insufficient" in " ".join(row.split()) for row in rows)
