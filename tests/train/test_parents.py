"""What a checkpoint has cost: every run in its history, with the cost that is known, and nothing invented."""

import pytest

from ttt_lit.checkpoint.receipt import LineageStep
from ttt_lit.train.evaluation import ValidationConfig, headline_inner
from ttt_lit.train.origin import parents


def fit_step(run, **known):
    return LineageStep(
        operation="fit", parameters={"experiment": "bridge", "run": run, "imported_windows": [None]} | known
    )


def test_a_model_from_nothing_has_no_parents():
    assert parents(()) == []


def test_an_import_is_a_parent_of_unknown_cost():
    (external,) = parents((LineageStep(operation="import", source="Qwen/Qwen2.5-1.5B"),))
    assert external == {"name": "Qwen/Qwen2.5-1.5B", "stage": None, "gpu_seconds": None, "tokens": None}


def test_who_trained_an_import_and_who_went_on_are_parents_in_that_order():
    known = [{"name": f"external/{n}", "stage": "A", "gpu_seconds": 10.0 * n, "tokens": n} for n in (1, 2)]
    history = (
        LineageStep(operation="import", source="folder", parameters={"trained_by": known}),
        fit_step("first", stage="B1", gpu_seconds=7.0, tokens=70),
        fit_step("second", stage="C", gpu_seconds=8.0, tokens=80),
    )
    assert parents(history) == [
        *known,
        {"name": "bridge/first", "stage": "B1", "gpu_seconds": 7.0, "tokens": 70},
        {"name": "bridge/second", "stage": "C", "gpu_seconds": 8.0, "tokens": 80},
    ]


def test_a_step_that_did_not_say_what_it_cost_has_an_unknown_cost():
    """Checkpoints written before costs were kept; a conversion costs nothing and is no run."""
    history = (fit_step("old", stage="B1"), LineageStep(operation="convert"))
    assert parents(history) == [{"name": "bridge/old", "stage": "B1", "gpu_seconds": None, "tokens": None}]


@pytest.mark.parametrize(
    "headline, mode, inner",
    [
        ("as_trained", "meta", "on"),
        ("as_trained", "first_order", "on"),
        ("as_trained", "static", "off"),
        ("as_trained", "none", "off"),
        ("with_updates", "none", "on"),
        ("without_updates", "meta", "off"),
    ],
)
def test_which_loss_speaks_for_a_run(headline, mode, inner):
    assert headline_inner(ValidationConfig(headline=headline), mode, can_update=True) == inner


def test_updates_cannot_speak_for_a_model_that_has_none():
    config = ValidationConfig(headline="with_updates")
    with pytest.raises(ValueError, match="validation.headline: with_updates needs TTT layers"):
        headline_inner(config, "none", can_update=False)
