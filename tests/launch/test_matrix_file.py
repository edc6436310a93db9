"""A matrix file's syntax: what it may say, and mistakes that are refused in one line that names file and place."""

import pytest

from ttt_lit.launch.matrix_file import parse_matrix, read_matrix

LR = {"1": {}, "half": {"model.inner.lr": 0.5}, "2": {"model.inner.lr": 2.0}}
STAGE = "model.stages.B2"


def entry(**others):
    return {"arms": ["q_a"]} | others


def matched(*shares):
    return {"of": "q_b", "shares": list(shares)}


@pytest.mark.parametrize(
    "given, message",
    [
        (entry(sedes=[1]), r"m.yaml: matrix.runs\[0\]: got unknown fields \['sedes'\]"),
        (entry() | {"sedes": [1], 5: 6}, r"unknown fields \[5, 'sedes'\]"),
        ({}, r"runs\[0\]: .* misses fields \['arms'\]"),
        (entry(arms=[]), r"runs\[0\].arms: got \[\]"),
        (entry(arms=["q_a", "q_a"]), "no item twice"),
        (entry(arms=["q/a"]), r"runs\[0\].arms: got 'q/a'"),
        (entry(seeds=[-1]), "whole numbers"),
        (entry(overlays="configs/a.yaml"), r"runs\[0\].overlays: got 'configs/a.yaml', expected a list"),
        (entry(set={"lr": 1}), "dotted names"),
        (entry(set={"data.seed": 1}), "data.seed comes from seeds"),
        (entry(set={"model.start": {"seed": 7}}), "model.start: model.start.seed comes from seeds"),
        (entry(set={"model.start": None}), "model.start: model.start.seed comes from seeds"),
        (entry(set={"run.id": "x"}), "run.id is the launcher's"),
        (entry(set={f"{STAGE}.share": 0.1, STAGE: {"lr": 1.0}}), f"set: {STAGE}.share and {STAGE} set the same thing"),
        (entry(set={"model.x": [{1: 2, "a": 3}]}), r"set: model.x\[0\]: got the key 1, expected text; quote it"),
        (entry(axes={"lr": {"1": {}}}), "at least two labels"),
        (entry(axes={"lr": {False: {}, "on": {}}}), "quote it"),
        (entry(axes={"lr": {"a b": {}, "c": {}}}), "part of a folder's name"),
        (entry(axes={"lr": {5: {"model.x": 1}, "5": {"model.x": 2}}}), r"axes.lr: got '5', expected no label twice"),
        (entry(axes={"lr": {"1": {}, "2": {STAGE: {}, f"{STAGE}.lr": 1}}}), r"axes.lr.2: .* set the same thing twice"),
        (entry(axes={"lr": {"1": None, "2": 5}}), r"axes.lr.2: got 5"),
        (entry(axes={"a": LR, "b": {"x": {}, "y": {"model.inner": None}}}), "a sets model.inner.lr and b sets model.i"),
        (entry(gpu_hours={"of": "q_b"}), r"gpu_hours: .* misses fields \['shares'\]"),
        (entry(gpu_hours=matched(0)), "numbers up to 10"),
        (entry(gpu_hours=matched(35)), r"0\.35 is 35 %"),
        (entry(gpu_hours=matched(0.333333333, 0.33333334)), r"shares, six digits .*: got \['0.333333', '0.333333'\]"),
        (
            entry(gpu_hours=matched(1), set={"model.budget.tokens": 1}),
            "gpu_hours decides the budget; remove model.budget.tokens",
        ),
    ],
)
def test_a_mistake_names_file_and_key(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_matrix({"name": "m", "runs": [given]}, "m.yaml")
    assert str(caught.value).startswith("m.yaml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "slurm, message",
    [
        ({"gpus": 8}, r"m.yaml: matrix.slurm: got unknown fields \['gpus'\]"),
        ({"nodes": 0}, "slurm.nodes: got 0"),
        ({"timeout_min": 14}, "slurm.timeout_min: got 14, expected a whole number ≥ 15: a run is warned 300 sec"),
    ],
)
def test_the_cluster_section_is_checked(slurm, message):
    with pytest.raises(ValueError, match=message):
        parse_matrix({"name": "m", "runs": [entry()], "slurm": slurm}, "m.yaml")


RUNS = "name: m\nruns:\n  - arms: [q_a]\n"


@pytest.mark.parametrize(
    "text, message",
    [
        (f"{RUNS}    arms: [q_b]\n", r"line 4: the key arms appears twice \(first in line 3\); remove one$"),
        (f"{RUNS}    <<: {{}}\n    <<: {{}}\n", r"line 5: the key << appears twice .* write <<: \[\*one, \*other\]$"),
        ("name: m\nruns: [\n", "not YAML: line 3: while parsing a flow node"),
        ("name: a\n---\nname: b\n", "not YAML: line 2: expected a single document"),
        (f"{RUNS}    set: {{model.x: !!binary aGVsbG8=}}\n", r"line 4: got a value of the kind binary, expected text"),
        (f"{RUNS}    set: {{model.x: !!python/name:os.system }}\n", "line 4: got a value of the kind python/name:os"),
        (f"{RUNS}    set: {{model.x: !!int five}}\n", "a value that is not what its tag or form says"),
        (f"{RUNS}    set: {{[a, b]: 3}}\n", "line 4: got a key that is neither text nor a number"),
        ("name: m\nruns: &all\n  - arms: [q_a]\n    set: {model.x: *all}\n", "line 2: this anchor contains an alias"),
        (f"{RUNS}    set: {{model.x: {'[' * 500}\n", "too many brackets inside each other"),
    ],
)
def test_a_file_that_is_not_plain_yaml_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_matrix(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_or_not_there_is_named(tmp_path):
    (tmp_path / "m.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"m.yaml: byte 0 is not UTF-8"):
        read_matrix(tmp_path / "m.yaml")
    with pytest.raises(FileNotFoundError, match="no such matrix file"):
        read_matrix(tmp_path / "none.yaml")


def test_entries_can_share_what_an_anchor_names(tmp_path):
    """A merged key gives way to the entry's own, wherever the merge is written and however deep it goes."""
    (tmp_path / "m.yaml").write_text(
        "name: m\nruns:\n"
        "  - &first\n    arms: [q_a]\n    seeds: [0, 1]\n    set: &set {model.x: 1, model.y: 2}\n"
        "  - &second\n    <<: *first\n    arms: [q_b]\n    set: {<<: *set, model.y: 3}\n"
        "  - seeds: [5]\n    <<: [*second, *first]\n"
    )
    runs = read_matrix(tmp_path / "m.yaml").runs
    assert [(run.arms, run.seeds) for run in runs] == [(["q_a"], [0, 1]), (["q_b"], [0, 1]), (["q_b"], [5])]
    assert [run.set["model.y"] for run in runs] == [2, 3, 3]
    assert runs[2].set == {"model.x": 1, "model.y": 3}


def test_scalars_are_read_as_fit_reads_them(tmp_path):
    (tmp_path / "m.yaml").write_text(
        f"{RUNS}    set: {{data.short: 2024-01-01, model.lr: 1e-3, model.start: {{x: 2}}}}\n"
    )
    found = read_matrix(tmp_path / "m.yaml").runs[0].set
    assert found == {"data.short": "2024-01-01", "model.lr": 0.001, "model.start": {"x": 2}}


@pytest.mark.parametrize("where", ["q_a", "small"])
@pytest.mark.parametrize(
    "text, message",
    [
        ("model: {budget: {tokens: 1}}\nmodel: {}\n", r"line 2: the key model appears twice \(first in line 1\)"),
        ("- model\n", r"got \['model'\], expected a mapping of settings"),
        ("model: {x: {1: 2}}\n", "model.x: got the key 1, expected text"),
    ],
)
def test_an_arms_and_an_overlays_file_are_read_as_strictly(runs_of, tmp_path, text, message, where):
    """What of such a file is lost would be lost in every run that names it."""
    small = tmp_path / "configs" / "small.yaml"
    small.write_text("")
    (tmp_path / "configs" / f"{where}.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        runs_of(entry(overlays=[str(small)]))
    assert f"{where}.yaml: " in str(caught.value)
    assert "\n" not in str(caught.value)
