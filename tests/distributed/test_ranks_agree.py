"""Two gloo processes train as one does: every loss and every parameter's gradient, in every mode, through stage transitions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "fit"))

import tiny

WORKER = Path(__file__).with_name("gradients_worker.py")
MODES = {"A": "first_order", "B0": "none", "B1": "static", "B2": "meta", "C": "meta"}

TAUGHT = {"B1": ', "teacher_kl": 3.0, "window_share": 0.25'}
"""A narrow window, held to the imported model by a divergence."""

pytestmark = pytest.mark.ranks


def launch(
    output: Path, arguments: list[str], ranks: int, unplug_after: int = 0, skew: bool = False
) -> subprocess.CompletedProcess:
    python = [sys.executable, "-W", "ignore"]
    command = python + (["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else [])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TEST_UNPLUG_AFTER": str(unplug_after)}
    environment |= {"TEST_SKEW_CLOCKS": "1"} if skew else {}
    return subprocess.run(
        [*command, str(WORKER), str(output), *arguments], capture_output=True, text=True, env=environment
    )


def arguments(world: Path, folder: Path, ranks: int, name: str) -> list[str]:
    stages = [
        f'--model.stages.{stage}={{"enabled": true, "mode": "{mode}", "share": 0.2, "lr": 1e-5{TAUGHT.get(stage, "")}}}'
        for stage, mode in MODES.items()
    ]
    extra = [*stages, f"--trainer.devices={ranks}", f"--run.id={name}"]
    return tiny.arguments(
        world, folder / "runs", *extra, *(["--trainer.strategy=fsdp2"] if ranks > 1 else []), steps=10
    )


def run(world: Path, folder: Path, ranks: int, *, unplug_after: int = 0) -> dict:
    output = folder / f"{ranks}_{unplug_after}.pt"
    given = arguments(world, folder, ranks, f"ranks{ranks}_{unplug_after}")
    if unplug_after:
        launch(output, given, ranks, unplug_after)
        assert not output.exists()
    done = launch(output, given, ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def world(folder):
    return tiny.make_world(folder / "world")


@pytest.fixture(scope="module")
def runs(world, folder):
    return run(world, folder, 1), run(world, folder, 2)


def test_parameters_really_are_sharded(runs):
    one, two = runs
    assert one["sharded"] == 0
    assert two["sharded"] == len(one["steps"][-1]["gradients"])


def test_every_gradient_of_every_mode_agrees(runs):
    one, two = runs
    assert [step["mode"] for step in one["steps"]] == [mode for mode in MODES.values() for _ in range(2)]
    assert len(one["steps"]) == len(two["steps"])
    for alone, sharded in zip(one["steps"], two["steps"], strict=True):
        assert alone["mode"] == sharded["mode"]
        assert alone["gradients"].keys() == sharded["gradients"].keys(), alone["mode"]
        assert abs(alone["loss"] - sharded["loss"]) < 1e-6
        assert abs(alone["norm"] - sharded["norm"]) < 1e-4 * alone["norm"]
        for name, gradient in alone["gradients"].items():
            error = (gradient - sharded["gradients"][name]).norm() / gradient.norm().clamp(min=1e-12)
            # float32 with sums in another order; a lost or halved contribution is off by more than 1e-1.
            assert error < 1e-3, (alone["stage"], alone["mode"], name, float(error))


def test_a_mode_without_prime_mlps_gives_them_no_gradient(runs):
    for step in runs[1]["steps"]:
        has_prime = any("prime_mlp" in name for name in step["gradients"])
        assert has_prime == (step["mode"] != "none")


def test_transitions_and_validation_agree(runs):
    one, two = (result["history"]["stages"] for result in runs)
    for name in MODES:
        assert one[name]["transition"]["after"] == pytest.approx(two[name]["transition"]["after"], abs=1e-6)
        for alone, sharded in zip(one[name]["validations"], two[name]["validations"], strict=True):
            assert alone["tokens"] == sharded["tokens"]
            assert alone["nats_per_token"] == pytest.approx(sharded["nats_per_token"], abs=1e-5)


def test_damage_agrees(runs):
    one, two = (result["history"] for result in runs)
    assert list(one["imported"]) == list(two["imported"]) == ["short", "long"]
    for context, curve in one["imported"].items():
        assert two["imported"][context] == pytest.approx(curve, abs=1e-5)
    for name in MODES:
        alone, sharded = (history["stages"][name]["damage"] for history in (one, two))
        assert len(alone) == len(sharded) == 8
        for mine, theirs in zip(alone, sharded, strict=True):
            assert theirs == pytest.approx(mine, abs=1e-5)


def test_two_ranks_that_were_unplugged_end_like_two_that_were_not(runs, world, folder):
    """Sharded resume in the middle of a stage: weights, optimiser and data position to the bit."""
    again = run(world, folder, 2, unplug_after=7)
    assert len(again["steps"]) < len(runs[1]["steps"])
    for name, value in runs[1]["final"].items():
        assert torch.equal(again["final"][name], value), name
    assert _losses(again) == _losses(runs[1])


def _losses(result: dict) -> list:
    return [(name, stage["losses"]) for name, stage in result["history"]["stages"].items()]


def test_a_mesh_that_would_train_several_models_is_refused(world, folder):
    """Lightning's own defaults split tensors within a node, and a model that is not written for that is trained twice."""
    strategy = '--trainer.strategy={"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'
    done = launch(folder / "none.pt", [*arguments(world, folder, 1, "mesh"), "--trainer.devices=2", strategy], 2)
    assert done.returncode != 0
    assert "expected 2 × 1; set --trainer.strategy fsdp2" in done.stderr


def test_ranks_whose_clocks_disagree_take_the_same_steps_at_the_same_rates(world, folder):
    """In a run by time rank 0's clock decides for all: when a stage ends, and every learning rate on the way."""
    output = folder / "skewed.pt"
    budget = ["--model.budget.tokens=null", "--model.budget.gpu_hours=0.003"]
    done = launch(output, [*arguments(world, folder, 2, "skewed"), *budget], 2, skew=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rates = [torch.load(f"{output}.rates{rank}") for rank in (0, 1)]
    assert rates[0] == rates[1]
    assert {stage for stage, *_ in rates[0]} == set(MODES)
