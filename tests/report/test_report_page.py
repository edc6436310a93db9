"""The page shows every arm and gate, needs nothing but itself, lets no name break out, and copes with what runs leave behind."""

import csv
import html.parser
import io
import math
import re
import subprocess
import sys

import pytest
from helpers.page_records import arm

import cli
from ttt_lit.record.schema import Model, Parent, Start
from ttt_lit.report.blocks import Listing, Paragraph
from ttt_lit.report.build import build_page
from ttt_lit.report.closing import across, problems, reading
from ttt_lit.report.differences import family_differences
from ttt_lit.report.html import html_page
from ttt_lit.report.runs import run_table
from ttt_lit.report.write import write_report
from ttt_lit.verdict.comparison import compare_all
from ttt_lit.verdict.formats import interval_text
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
        made += [
            arm(
                "q_p1_bridge",
                "bridge",
                2.66 - share / 8,
                hours=1000 * share,
                seed=seed,
                share=share,
                run_id=f"w{share}",
            )
            for share in (0.35, 0.5, 0.7, 1.0)
        ]
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


@pytest.fixture(scope="module")
def records():
    return [*qwen(), *gemma()]


@pytest.fixture(scope="module")
def folder(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(records, folder, command=COMMAND)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


class Reader(html.parser.HTMLParser):
    """Tags, ids, attributes that point somewhere, and text; closing tags must match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.references, self.text = [], [], [], [], []
        self.rows, self.headings, self.items = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append((tag, values))
        self.ids += [values["id"]] if "id" in values else []
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        if tag == "li":
            self.items.append("")
        if tag == "tr":
            self.rows.append("")
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "li" in self.open:
            self.items[-1] += data
        if "tr" in self.open:
            self.rows[-1] += f"{data} "
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append((self.open[-1], data))


@pytest.fixture(scope="module")
def read(page):
    return Reader(page)


def test_the_page_needs_nothing_but_itself(page, read):
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in read.tags}
    assert all(reference.startswith("#") for reference in read.references)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_every_id_occurs_once_and_every_reference_has_its_target(page, read):
    assert len(read.ids) == len(set(read.ids))
    targets = {reference[1:] for reference in read.references} | set(re.findall(r"url\(#([^)]*)\)", page))
    assert targets
    assert targets <= set(read.ids)


def test_names_from_records_stay_text(page, read, folder):
    assert "<script" not in page
    assert "<b>" not in page
    assert HOSTILE in "".join(read.text)
    assert "-1 | <b>loss is nan" in "".join(read.text)
    assert COMMAND in "".join(read.text)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    outside_code = markdown[: markdown.index("```")]
    assert "<script" not in outside_code
    assert not re.search(r"(?<!\\)\]\(y\)", outside_code)
    assert "evil&lt;script&gt;alert(1)&lt;/script&gt;\\|\"'\\[x\\](y)\\`\\$\\\\frac\\$&amp;" in outside_code


def test_every_arm_and_every_gate_has_a_row(records, read):
    study = read_study(records)
    for family in study.families.values():
        for each in family.arms:
            name = each.variant or each.name
            assert any(row.startswith(name) or f" {name} " in row for row in read.rows), name
            for record in each.records:
                assert any(row.startswith(record.name) for row in read.rows), record.name
        for gate in gates_of(family):
            decided = [
                row for row in read.rows if row.startswith(gate.subject) and gate.name in row and gate.outcome in row
            ]
            said = [" ".join([row, *read.items]) for row in decided]
            assert any(all(reason in text for reason in gate.brief or gate.reasons) for text in said), gate
            assert any(all(value in text for _, value in gate.numbers) for text in said), gate


def gates_of(family):
    return [gate for each in judge_candidates(family) for gate in each.gates]


def test_what_two_candidates_share_is_said_once_and_the_csv_has_it_all(records, read, folder):
    family = read_study(records).families["qwen2"]
    bridge, direct, _ = (each.marginal for each in sorted(judge_candidates(family), key=lambda e: (e.variant, e.name)))
    shared = [reason for reason in bridge.reasons if reason in direct.reasons]
    rows = rows_of(folder / "gates.csv")
    assert shared
    for reason in shared:
        assert [reason in item for item in read.items].count(True) >= 1
        assert not any(reason in row for row in read.rows)
        assert sum(reason in row["reasons"] for row in rows if row["gate"] == "wall-clock saving") == 6


def test_the_card_says_what_was_measured_before_what_follows(records, read, page):
    family = read_study(records).families["qwen2"]
    bridge = family.matched("q_p1_bridge", "")
    found = compare_all(family, bridge)
    card = page[page.index("<h2>qwen2: ") : page.index(">What would change it<", page.index("<h2>qwen2: "))]
    for role in ("ttt_scratch", "fa_import", "fa_scratch"):
        assert interval_text(found[role].interval) in card, role
    assert f"{bridge.loss:.4f} nats per token" in card
    assert f"against {family.baseline.loss:.4f} of the baseline (q_ttt_scratch)" in card
    assert "multiple of the baseline&#x27;s: 0.600 run alone, 0.600 with parents" in card
    assert "q_p1_bridge: measured, not proved" in card
    for share in (0.35, 0.5, 0.7, 1.0):
        assert f"q_p1_bridge at {share:g}" in card
    assert card.index("measured, not proved") < card.index(">Why<")


def test_the_answer_comes_first_and_the_page_can_be_navigated(read):
    headings = [text for level, text in read.headings if level in ("h1", "h2")]
    order = [
        "Does a pretrained start save TTT-E2E training time?",
        "qwen2: ",  # has a finished baseline and a finished candidate
        "gemma3: ",
        "Gates",
        "Family qwen2",
        "Family gemma3",
    ]
    assert headings[: len(order)] == order
    assert headings[len(order) :][:3] == ["Flags and problems", "Across families", "Other runs"]
    scopes = [values.get("scope") for tag, values in read.tags if tag == "th"]
    assert set(scopes) == {"col", "row"}
    drawings = [values for tag, values in read.tags if tag == "svg"]
    assert drawings
    assert all(values["role"] == "img" and values["aria-label"] for values in drawings)
    assert len([tag for tag, _ in read.tags if tag == "figcaption"]) == len(drawings)


def test_what_went_wrong_is_listed(read):
    text = "".join(read.text)
    assert "no bridge and no direct conversion" in text
    assert "gemma3: no run of role fa_scratch" in text
    assert "without a partner of the same seed in q_static" in text
    assert any("diverged" in row and "<b>loss is nan" in row for row in read.rows)


def test_markdown_links_the_figures_that_exist(folder):
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"!\[[^\]]*\]\((figures/\w+\.png)\)", markdown))
    assert linked == {f"figures/{path.name}" for path in (folder / "figures").glob("*.png")}
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {
        path.stem for path in (folder / "figures").glob("*.svg")
    }
    widths: dict[int, set[int]] = {}
    for number, block in enumerate(markdown.split("\n\n")):
        if block.startswith("| "):
            widths[number] = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
    assert widths
    assert all(len(counts) == 1 for counts in widths.values())


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8"), newline="")))


def test_csv_has_a_row_per_run_and_stage_and_one_per_gate(records, folder):
    rows = rows_of(folder / "runs.csv")
    assert len(rows) == sum(len(record.stages) for record in records)
    mine = next(row for row in rows if row["run"] == "q_ttt_scratch/s1")
    assert float(mine["loss_inner_on"]) == next(r for r in records if r.name == mine["run"]).final().nats_per_token
    assert (mine["seed"], mine["stage"], mine["transition_held"], mine["share"]) == ("1", "C", "true", "")
    gates = [gate for family in read_study(records).families.values() for gate in gates_of(family)]
    assert [(row["judged"], row["gate"], row["account"], row["outcome"]) for row in rows_of(folder / "gates.csv")] == [
        (gate.subject, gate.name, gate.account or "", gate.outcome) for gate in gates
    ]


def test_families_are_compared_with_the_bytes_that_they_were_measured_on():
    qwen_run, gemma_run = arm("q_ttt_scratch", "ttt_scratch", 2.6, hours=1), gemma()[0]
    gemma_run.stages[0].validations[0].bytes = 70_964
    _, words, grid = across(read_study([qwen_run, gemma_run]))
    assert grid.header[-1] == "held-out bytes"
    expected = {"q_ttt_scratch": f"{qwen_run.final().bytes:,}", "g_ttt_scratch": "70,964"}
    assert {row[0]: row[-1] for row in grid.rows} == expected
    assert "of the same text" not in words.text
    assert "cut by its own tokenizer" in words.text


def test_seeds_of_a_difference_are_counted_in_words():
    baseline = [arm("q_ttt_scratch", "ttt_scratch", 2.6, hours=1, seed=seed) for seed in (0, 1)]
    for seeds, words in (((0,), "(1 seed)"), ((0, 1), "(2 seeds)"), ((0, 1, 2), "(2 of 3 seeds)")):
        bridge = [arm("q_p1_bridge", "bridge", 2.5, hours=1, seed=seed) for seed in seeds]
        family = read_study([*baseline, *bridge]).families["qwen2"]
        _, grid = run_table(family, family_differences(family))
        (line,) = {row[6][0] for row in grid.rows if row[0][0].startswith("q_p1_bridge")}
        assert line.startswith("Δ baseline: ")
        assert line.endswith(f" {words}")


def test_the_page_says_what_stable_convergence_does_with_an_interval_around_zero():
    """It passes, which is not what the other gates do, and the page must not say otherwise."""
    wave = [3.0 + 0.001 * math.sin(step) for step in range(240)]
    records = [arm("q_ttt_scratch", "ttt_scratch", 2.6, hours=1), arm("q_p1_bridge", "bridge", 2.5, hours=1)]
    records[1].stages[0].train_losses = wave
    (candidate,) = judge_candidates(read_study(records).families["qwen2"], resamples=500)
    convergence = next(gate for gate in candidate.secondary if gate.name == "stable convergence")
    assert convergence.outcome == "pass"
    assert re.search(r"\[−0\.\d+, \+0\.\d+\]", dict(convergence.numbers)["change over the last third of C, seed 0"])
    (rule,) = (b.text for b in reading(records, "x") if isinstance(b, Paragraph) and b.text.startswith("Insufficient"))
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
    assert {"report.html", "report.md", "runs.csv", "gates.csv", "figures/gemma3_frontier_marginal.png"} <= set(
        files_of(tmp_path / "a")
    )


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


@pytest.mark.parametrize(
    "left, says",
    [
        ([], "No run has a role in a comparison"),
        ([gemma()[2]], "No run has a role in a comparison"),
        ([unfinished()], "no arm has both a final loss and known GPU-hours"),
        ([without_stages()], "no run has spent compute time on a stage"),
        ([qwen()[-1]], "no arm has both a final loss and known GPU-hours"),
        ([arm("q_p1_bridge", "bridge", 2.6, hours=1)], "there is no baseline to compare with"),
        ([arm("q_p1_bridge", "bridge", 2.6, hours=1, share=0.5)], "no run at the baseline's number of tokens"),
        ([arm("q_ttt_scratch", "ttt_scratch", 2.6, hours=1)], "no gate applies"),
        (
            [arm("q_ttt_scratch", "ttt_scratch", 2.6, hours=1), unfinished()],
            "No loss was measured, the run did not finish",
        ),
    ],
    ids=[
        "nothing",
        "only external",
        "unfinished",
        "no stage",
        "diverged",
        "no baseline",
        "only a budget",
        "no candidate",
        "failed",
    ],
)
def test_missing_data_is_said_in_place_of_a_figure(left, says):
    study = read_study(left)
    built = build_page(
        study, {name: judge_candidates(family) for name, family in study.families.items()}, left, command="x"
    )
    absent = {picture.stem: "" for picture in built.pictures}
    assert all(isinstance(picture.figure, str) or picture.figure.axes for picture in built.pictures)
    text = "".join(Reader(html_page(built, absent | drawn(built))).text)
    assert says in text
    assert all(record.name in text for record in left)


def drawn(built):
    return {picture.stem: "<svg ></svg>" for picture in built.pictures if not isinstance(picture.figure, str)}


def test_the_command_writes_the_page_and_says_where_without_torch(tmp_path):
    without_stages().write(tmp_path / "runs" / "x" / "record.json")
    code = "import sys, cli; assert cli.main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    arguments = ["report", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert f"written to {tmp_path / 'out' / 'report.html'}" in result.stdout
    assert f"python cli.py report {tmp_path / 'runs'}" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert cli.COMMANDS["report"].__doc__


def test_cells_of_every_table_name_their_column_for_phones(read):
    cells = [values for tag, values in read.tags if tag == "td"]
    assert cells
    assert all(values.get("data-column") for values in cells)


def test_on_a_cpu_figures_of_time_say_what_else_is_in_them():
    for device, said in (("x86_64 cpu", True), ("H200", False)):
        records = [arm("q_ttt_scratch", "ttt_scratch", 2.6, hours=1), arm("q_p1_bridge", "bridge", 2.5, hours=1)]
        for record in records:
            record.environment.device = device
        built = build_page(read_study(records), {"qwen2": []}, records, command="x")
        captions = {picture.stem: picture.caption for picture in built.pictures}
        for stem in ("qwen2_speed", "qwen2_target", "qwen2_loss_gpu_hours"):
            assert ("Processes on CPU cores" in captions[stem]) == said, stem


def test_two_baselines_are_one_too_many_and_not_called_missing():
    study = read_study([arm("one", "ttt_scratch", 2.6, hours=1), arm("two", "ttt_scratch", 2.6, hours=1)])
    (listing,) = (block for block in problems(study, {}) if isinstance(block, Listing))
    assert any("2 arms have the role ttt_scratch" in item for item in listing.items)
    assert not any("no run of role ttt_scratch" in item for item in listing.items)
    assert any("no run of role fa_import" in item for item in listing.items)
