"""The guard fires on what ends runs, and on nothing else."""

import json
import math
import random
from types import SimpleNamespace

import pytest

from ttt_lit.record.divergence import DivergenceDetector
from ttt_lit.train.divergence import Diverged, non_finite_loss, stop_unless_finite


def feed(detector, losses):
    """Index of the first loss that is answered with a reason, or None."""
    return next((index for index, loss in enumerate(losses) if detector.update(loss, 1.0)), None)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_stop_at_once_even_without_history(bad):
    assert "loss is" in DivergenceDetector().update(bad, 1.0)
    assert "gradient norm is" in DivergenceDetector().update(3.0, bad)


def test_a_slow_rise_without_any_nan_is_caught():
    """3.3 → 7 nats over 100 steps: slower than the running median, which would follow it up."""
    noise = random.Random(0)
    losses = [3.3 + noise.gauss(0, 0.1) for _ in range(60)] + [3.3 + 3.7 * i / 100 for i in range(100)]
    stopped = feed(DivergenceDetector(window=16), losses)
    assert stopped is not None
    assert 60 < stopped < 120


def test_the_slow_rise_is_caught_from_the_first_step_of_a_stage():
    assert feed(DivergenceDetector(), [3.3 + 3.7 * i / 100 for i in range(100)]) < 60


def test_ordinary_training_never_fires():
    noise = random.Random(1)
    losses = [3.0 + 8.0 * math.exp(-i / 100) + noise.gauss(0, 0.25) for i in range(5000)]
    assert feed(DivergenceDetector(), losses) is None


def test_one_odd_batch_does_not_end_a_run_but_three_do():
    calm = [3.0] * 20
    assert feed(DivergenceDetector(patience=3), calm + [9.0] + calm + [9.0, 9.0] + calm) is None
    assert feed(DivergenceDetector(patience=3), calm + [9.0] * 3) == 22


def test_a_transition_jump_is_no_divergence_after_reset():
    detector = DivergenceDetector()
    assert feed(detector, [2.0] * 40) is None
    detector.reset()
    assert feed(detector, [6.0] * 40) is None
    assert detector.limit == 7.5


def test_too_high_losses_do_not_raise_the_limit():
    detector = DivergenceDetector(window=8, min_history=8, patience=1000)
    feed(detector, [2.0] * 8 + [9.0] * 100)
    assert detector.limit == 3.5


def test_state_survives_json_and_decides_alike():
    rising = [3.0] * 15 + [3.0 + 0.05 * i for i in range(60)]
    whole = feed(DivergenceDetector(), rising)
    for cut in (3, 20, whole - 1):
        first = DivergenceDetector()
        feed(first, rising[:cut])
        second = DivergenceDetector()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert cut + feed(second, rising[cut:]) == whole


@pytest.mark.parametrize(
    "arguments", [{"window": 0}, {"window": 4, "min_history": 5}, {"patience": 0}, {"margin_nats": 0.0}]
)
def test_senseless_limits_are_refused(arguments):
    with pytest.raises(ValueError, match="DivergenceDetector: got"):
        DivergenceDetector(**arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_held_out_loss_that_is_no_number_is_named_with_what_it_was_measured_on(bad):
    what = "validation loss of stage B2"
    said = non_finite_loss(what, context=1024, losses={"off": 3.0, "on": bad})
    assert said == f"validation loss of stage B2 at context 1024 with inner updates on is {bad}"
    both = non_finite_loss(what, context=1024, losses={"off": bad, "on": bad})
    assert both.endswith(f"with inner updates off is {bad} and with inner updates on is {bad}")


def test_held_out_losses_that_are_numbers_stop_nothing_however_high():
    assert non_finite_loss("loss", context=8, losses={"off": 1e30, "on": 0.0}) is None
    assert non_finite_loss("loss", context=8, losses={}) is None


@pytest.mark.parametrize(
    "entered, init, said",
    [
        (-1, "checkpoint", "nothing has been trained, because the weights to start from are broken (imported)"),
        (-1, "scratch", "nothing has been trained, because the network cannot compute as it was drawn (seed 7)"),
        (0, "checkpoint", "the last good checkpoint is imported."),
        (0, "scratch", "there is no good checkpoint, since no stage has been finished."),
        (1, "checkpoint", "checkpoints/B1."),
        (2, "scratch", "checkpoints/B2."),
    ],
)
def test_who_stops_says_from_where_to_go_on(tmp_path, entered, init, said):
    """The stage that diverged has no good checkpoint, the one before it has; before the first one there is only the start."""
    trainer = SimpleNamespace(default_root_dir=str(tmp_path))
    plans = [SimpleNamespace(name=name) for name in ("B1", "B2", "C")]
    start = SimpleNamespace(init=init, init_from="imported", seed=7)
    module = SimpleNamespace(entered=entered, plans=plans, start_config=start)
    stop_unless_finite(trainer, module, "loss", context=8, losses={"off": 3.0})
    with pytest.raises(Diverged, match=r"^loss at context 8 with inner updates off is nan; ") as error:
        stop_unless_finite(trainer, module, "loss", context=8, losses={"off": math.nan})
    assert said in str(error.value)
    assert "\n" not in str(error.value)
