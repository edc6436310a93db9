"""What trains the same appears once, one id has one meaning, and nothing waits for a run that nobody trains."""

import pytest

from ttt_lit.launch.matrix import resolve


def names(runs):
    return [run.name for run in runs]


def of_axis(first, second, **others):
    return {"arms": ["q_a"], "axes": {"x": {"first": first, "second": second}}} | others


def test_what_entries_and_files_say_alike_is_one_run(runs_of, tmp_path):
    small = tmp_path / "small.yaml"
    small.write_text("model: {lr: 0.5}\n")
    plain = {"arms": ["q_a", "q_b"], "overlays": [str(small)]}
    again = {"arms": ["q_a"], "overlays": [str(small), str(small)], "seeds": [0, 1]}
    same = of_axis({}, {"model.lr": 0.5}, overlays=[str(small)])
    assert names(runs_of(plain, again, same)) == ["q_a/m", "q_b/m", "q_a/m-s1"]


@pytest.mark.parametrize(
    "first, second",
    [
        ({"model.lr": 1}, {"model.lr": 1.0}),
        ({"model.betas": [1, 0.5]}, {"model.betas": [1.0, 0.5]}),
        ({"model.inner": {"lr": 1}}, {"model.inner.lr": 1}),
        ({"model.stages.B1": None}, {"model.stages.B1": {"enabled": False}}),
        ({"model.stages.B1.enabled": False}, {"model.stages.B1": {"enabled": False, "window_share": 0.5}}),
    ],
)
def test_the_same_in_other_words_is_the_same(runs_of, first, second):
    assert names(runs_of(of_axis(first, second))) == ["q_a/m"]


@pytest.mark.parametrize(
    "first, second",
    [
        ({"model.x": 1}, {"model.x": True}),
        ({"model.x": 1}, {"model.x": 1.5}),
        ({"model.ttt": None}, {"model.ttt": {}}),
        ({"model.stages.B1": {}}, {"model.stages.B1": None}),
        ({"model.stages.B1.window_share": 1.0}, {"model.stages.B1.window_share": 0.5}),
        # The code's default, spelt out: only the code knows.
        ({}, {"model.stages.C.carry": "params"}),
    ],
)
def test_what_may_train_something_else_stays(runs_of, first, second):
    assert names(runs_of(of_axis(first, second))) == ["q_a/m", "q_a/m-x_second"]


def test_a_setting_of_a_stage_that_is_off_makes_no_run_of_its_own(runs_of):
    axes = {
        "b1": {"with": {}, "without": {"model.stages.B1.enabled": False}},
        "b1_window": {"1": {}, "half": {"model.stages.B1.window_share": 0.5}},
    }
    on = {"model.stages.B1": {"enabled": True}}
    runs = runs_of({"arms": ["q_a"], "set": on, "axes": axes, "vary": "product"})
    assert names(runs) == ["q_a/m", "q_a/m-b1_window_half", "q_a/m-b1_without"]


MORE, EMPTY = "trainer.callbacks+", {"model.ttt": {}}


@pytest.mark.parametrize(
    "layers, resolved",
    [
        ([{"trainer.callbacks": ["a"]}, {MORE: ["b"]}, {MORE: ["b"]}], {"trainer.callbacks": ["a", "b", "b"]}),
        ([{MORE: ["b"]}, {MORE: ["b"]}], {MORE: ["b", "b"]}),
        ([{MORE: ["b"]}, {"trainer.callbacks": ["a"]}], {"trainer.callbacks": ["a"]}),
        # An empty mapping changes nothing of a group, but is not null.
        ([{"model.ttt.layers": [3]}, EMPTY], {"model.ttt.layers": [3]}),
        ([EMPTY, {"model.ttt.layers": [3]}], {"model.ttt.layers": [3]}),
        ([{"model.ttt": None}, EMPTY], EMPTY),
    ],
)
def test_later_files_are_laid_over_earlier_ones(layers, resolved):
    assert resolve(range(len(layers)), {}, layers.__getitem__) == resolved


@pytest.mark.parametrize(
    "one, other, message",
    [
        (
            {"arms": ["q_a"], "set": {"model.lr": 1.0}},
            {"arms": ["q_a"], "set": {"model.lr": 0.5}},
            r"the id q_a/m: model.lr is 1 in runs\[1\] and 0.5 in runs\[2\]; make them labels of an axis, or ",
        ),
        (
            {"arms": ["q_a"], "gpu_hours": {"of": "q_base", "shares": [0.333333333]}},
            {"arms": ["q_a"], "gpu_hours": {"of": "q_base", "shares": [0.33333334]}},
            r"the id q_a/m-t0.333333: gpu_hours is .* write shares that differ in their first six digits$",
        ),
        (
            {"arms": ["q_b"]},
            {
                "arms": ["q_a"],
                "axes": {"a": {"1": {}, "b_c": {"model.a": 1}}, "a_b": {"1": {}, "c": {"model.b": 1}}},
            },
            r"the id q_a/m-a_b_c: model.a is 1 in runs\[2\] and not set in runs\[2\]; rename an axis or a label$",
        ),
    ],
)
def test_one_id_with_two_meanings_is_an_error_that_names_the_difference(runs_of, one, other, message):
    with pytest.raises(ValueError, match=message):
        runs_of({"arms": ["q_base"]}, one, other)


def test_a_start_from_a_run_that_another_stands_for_is_refused(runs_of, tmp_path):
    """Its checkpoint would never be written: the run would wait for nobody, and fail."""
    child = {
        "arms": ["q_b"],
        "set": {"model.start.init_from": f"{tmp_path}/runs/q_a/m-x_second/checkpoints/C"},
    }
    with pytest.raises(
        ValueError, match=r"q_b/m: .* names q_a/m-x_second, which trains the same as q_a/m .*name q_a/m$"
    ):
        runs_of(of_axis({"model.lr": 1}, {"model.lr": 1.0}), child)
