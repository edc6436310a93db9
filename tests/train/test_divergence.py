"""The guard fires on what ends runs, and on nothing else."""

import json
import math
import random

import pytest

from ttt_lit.train.divergence import DivergenceDetector


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
