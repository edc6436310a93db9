"""A matrix becomes runs: every combination once, ids that stay, parents that exist."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_lit.launch.matrix import argument, expand
from ttt_lit.launch.matrix_file import parse_matrix

ROOT = Path(__file__).resolve().parents[2]
ARMS = ("q_a", "q_b", "q_base")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A folder of base.yaml, three arms and an overlay."""
    folder = tmp_path_factory.mktemp("configs")
    base = {"run": {"root": "runs", "id": "default"}, "model": {"inner": {"lr": 1.0}, "ttt": None}}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    for arm in ARMS:
        plain = {"run": {"experiment": arm}, "model": {"start": {"init_from": "artifacts/checkpoint"}}}
        (folder / f"{arm}.yaml").write_text(yaml.safe_dump(plain))
    (folder / "small.yaml").write_text("model: {inner: {lr: 0.5}, size: {short: 64}}\n")
    return folder


def matrix(*entries, name="m", **others):
    return parse_matrix({"name": name, "runs": list(entries), **others}, "m.yaml")


def ids(configs, *entries, **others):
    return [run.name for run in expand(matrix(*entries, **others), configs=configs)]


def settings_of(run):
    """Dotted name → text, later ones over earlier ones, --config aside."""
    pairs = zip(run.arguments[::2], run.arguments[1::2], strict=True)
    return {name.removeprefix("--"): value for name, value in pairs if name != "--config"}


LR = {"1": {}, "half": {"model.inner.lr": 0.5}, "2": {"model.inner.lr": 2.0}}
TTT = {"none": {}, "last": {"model.ttt.layers": [3]}}


def test_an_id_names_what_is_not_default(configs):
    entry = {"arms": ["q_a"], "axes": {"lr": LR, "ttt": TTT}, "seeds": [0, 1]}
    assert ids(configs, entry) == [
        *("q_a/m", "q_a/m-s1", "q_a/m-lr_half", "q_a/m-lr_half-s1", "q_a/m-lr_2", "q_a/m-lr_2-s1"),
        *("q_a/m-ttt_last", "q_a/m-ttt_last-s1"),
    ]
    product = ids(configs, entry | {"vary": "product", "seeds": [0]})
    assert product == [
        *("q_a/m", "q_a/m-ttt_last", "q_a/m-lr_half", "q_a/m-lr_half-ttt_last", "q_a/m-lr_2", "q_a/m-lr_2-ttt_last"),
    ]


def test_arguments_are_those_of_fit(configs):
    overlay = str(configs / "small.yaml")
    entry = {"arms": ["q_a"], "overlays": [overlay], "set": {"model.ttt": None}, "axes": {"lr": LR}, "seeds": [2]}
    run = expand(matrix(entry), configs=configs)[-1]
    assert run.arguments == (
        *("--config", f"{configs}/q_a.yaml", "--config", overlay, "--model.ttt", "null", "--model.inner.lr", "2.0"),
        *("--model.start.seed", "2", "--data.seed", "2", "--run.id", "m-lr_2-s2", "--run.variant", "lr=2"),
    )
    assert run.variant == "lr=2"
    assert str(run.folder) == "runs/q_a/m-lr_2-s2"
    assert expand(matrix(entry), configs=configs, root="elsewhere")[0].folder.parts[0] == "elsewhere"


def test_values_are_written_as_the_command_line_reads_them():
    written = {None: "null", True: "true", 3: "3", 0.05: "0.05", "all": "all", float("inf"): ".inf"}
    assert {value: argument(value) for value in written} == written
    assert argument([3, 7]) == "[3, 7]"


@pytest.mark.parametrize(
    "group, label",
    [
        ({"model.inner.lr": 1.0}, {"model.inner": {"lr": 2.0}}),
        ({"model.inner": {"lr": 1.0, "clip": 3.0}}, {"model.inner.lr": 2.0}),
        ({"model.inner": {"lr": 1.0}, "model.ttt": None}, {"model.inner": {"lr": 2.0}}),
    ],
)
def test_a_labels_setting_wins_over_the_entrys(configs, group, label):
    """``fit`` reads arguments in their order, so the label's come last, whether they name a setting or its group."""
    entry = {"arms": ["q_a"], "set": group, "axes": {"lr": {"1": {}, "2": label}}}
    default, moved = expand(matrix(entry), configs=configs)
    names = [name.removeprefix("--") for name in moved.arguments[::2]]
    assert max(map(names.index, label)) > max([names.index(name) for name in group if name not in label], default=0)
    assert len(names) == len(set(names) | {"config"})
    assert (default.variant, moved.variant) == ("", "lr=2")


def test_a_wall_clock_matched_run_waits_for_the_baseline_of_its_seed(configs):
    matched = {"arms": ["q_a"], "seeds": [0, 1], "gpu_hours": {"of": "q_base", "shares": [0.35, 1]}}
    runs = {run.name: run for run in expand(matrix({"arms": ["q_base"], "seeds": [0, 1]}, matched), configs=configs)}
    run = runs["q_a/m-t0.35-s1"]
    assert run.after == (run.gpu_hours.of,) == ("q_base/m-s1",)
    assert settings_of(run)["run.share"] == "0.35"
    assert "run.share" not in settings_of(runs["q_base/m"])
    assert run.with_budget(0.012345)[-4:] == ("--model.budget.tokens", "null", "--model.budget.gpu_hours", "0.012345")
    assert {name for name in runs if name.startswith("q_a")} == {
        *("q_a/m-t0.35", "q_a/m-t0.35-s1", "q_a/m-t1", "q_a/m-t1-s1"),
    }


def start_from(run):
    return {"model.start.init_from": f"runs/{run}/checkpoints/B1"}


def test_a_start_from_another_run_is_a_dependency(configs):
    second = {"arms": ["q_b"], "set": start_from("q_a/m")}
    runs = expand(matrix(second, {"arms": ["q_a"]}), configs=configs)
    assert [(run.name, run.after) for run in runs] == [("q_b/m", ("q_a/m",)), ("q_a/m", ())]
    outside = {"arms": ["q_b"], "set": start_from("q_a/other")}
    assert expand(matrix(outside, {"arms": ["q_a"]}), configs=configs)[0].after == ()


@pytest.mark.parametrize(
    "entries, message",
    [
        (
            [{"arms": ["q_base"]}, {"arms": ["q_a"], "seeds": [1], "gpu_hours": {"of": "q_base", "shares": [0.5]}}],
            "q_a/m-t0.5-s1: gpu_hours.of needs the run q_base/m-s1",
        ),
        (
            [{"arms": ["q_a"], "set": start_from("q_b/m")}, {"arms": ["q_b"], "set": start_from("q_a/m")}],
            "q_a/m, q_b/m wait for each other",
        ),
        ([{"arms": ["q_a"], "set": start_from("q_a/m")}], "q_a/m wait for each other"),
        ([{"arms": ["q_odd"]}], "q_odd.yaml: run.experiment is q_a, expected the arm's name q_odd"),
        ([{"arms": ["q_none"]}], "q_none.yaml: no such file"),
    ],
)
def test_runs_that_nobody_could_train_are_an_error(configs, entries, message):
    (configs / "q_odd.yaml").write_text("run: {experiment: q_a}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        expand(matrix(*entries), configs=configs)


VALUES = st.integers(1, 9)
AXES = st.lists(st.lists(VALUES, min_size=1, max_size=3, unique=True), max_size=3)


def entry_of(axes, seeds, vary, arms=("q_a",)):
    """Axis i sets a setting of its own, to each of its values; the first label, "0", sets nothing."""
    made = {
        f"axis{i}": {"0": {}} | {str(value): {f"model.axis{i}": value} for value in values}
        for i, values in enumerate(axes)
    }
    return {"arms": list(arms), "axes": made, "seeds": seeds, "vary": vary}


@given(AXES, st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True), st.sampled_from(["one", "product"]))
def test_every_combination_appears_exactly_once(configs, axes, seeds, vary):
    runs = expand(matrix(entry_of(axes, seeds, vary, ARMS)), configs=configs)
    labels = [len(values) + 1 for values in axes]
    points = len(list(itertools.product(*map(range, labels)))) if vary == "product" else 1 + sum(n - 1 for n in labels)
    assert len(runs) == len({run.name for run in runs}) == len(ARMS) * len(seeds) * points
    ours = ("run.id", "run.variant")
    meanings = {(run.experiment, *((k, v) for k, v in settings_of(run).items() if k not in ours)) for run in runs}
    assert len(meanings) == len(runs)


@settings(max_examples=40)
@given(
    AXES, AXES, st.lists(st.integers(0, 3), min_size=2, max_size=3, unique=True), st.sampled_from(["one", "product"])
)
def test_an_axis_a_label_or_a_seed_more_changes_no_other_id(configs, axes, more, seeds, vary):
    """And the runs that were there keep their order."""
    longer = [[*values, 10 + i] for i, values in enumerate(axes)] + more
    before = expand(matrix(entry_of(axes, seeds[:-1], vary)), configs=configs)
    after = expand(matrix(entry_of(longer, seeds, vary)), configs=configs)
    kept = [run for run in after if run.name in {run.name for run in before}]
    assert [dataclasses.asdict(run) for run in kept] == [dataclasses.asdict(run) for run in before]
