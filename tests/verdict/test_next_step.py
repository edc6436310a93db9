"""A command is given only where it does something for the candidate; else words say what to write."""

from pathlib import Path

import pytest
from helpers.records import run

from ttt_lit.launch.matrix_file import read_matrix
from ttt_lit.record.schema import Model, Parent
from ttt_lit.verdict.evidence import SHARES
from ttt_lit.verdict.gates import judge_candidates
from ttt_lit.verdict.next_step import EXAMPLE, EXAMPLE_BASELINE, EXAMPLE_CANDIDATE, EXAMPLE_OF, demo_step
from ttt_lit.verdict.study import read_study

ROOT = Path(__file__).parents[2]
DOCUMENTS = [f"{number:03}" for number in range(32)]


def small(experiment, role, **fields):
    parents = [] if role == "ttt_scratch" else [Parent(name="pretraining", gpu_seconds=0.0)]
    record = run(experiment, role, dict.fromkeys(DOCUMENTS, 3.0), **({"parents": parents} | fields))
    record.totals.tokens = 1_000
    return record


def step(*records):
    (family,) = read_study(records).families.values()
    (candidate,) = judge_candidates(family, resamples=50)
    return demo_step(family, candidate)


def at_shares(experiment, seeds=(0,), **fields):
    return [
        small(experiment, "bridge", share=share, hours=100 * share, seed=seed, run_id=f"t{share}-{seed}", **fields)
        for share in SHARES
        for seed in seeds
    ]


def test_the_file_of_the_command_holds_what_the_step_says():
    scratch, candidate = read_matrix(ROOT / EXAMPLE).runs
    assert (scratch.arms, candidate.arms) == ([EXAMPLE_BASELINE], [EXAMPLE_CANDIDATE])
    assert candidate.gpu_hours.of == EXAMPLE_BASELINE
    assert tuple(candidate.gpu_hours.shares) == SHARES
    assert (scratch.axes, candidate.axes) == ({}, {})
    assert scratch.seeds == candidate.seeds == [0]
    assert read_matrix(ROOT / EXAMPLE_OF).name == read_matrix(ROOT / EXAMPLE).name


def test_what_the_file_holds_is_a_command():
    found = step(small(EXAMPLE_BASELINE, "ttt_scratch"), small(EXAMPLE_CANDIDATE, "bridge"))
    assert (found.kind, found.command) == ("wall-clock runs", f"python cli.py matrix --config {EXAMPLE}")
    assert "run q_p1_bridge at 0.35, 0.5, 0.7, 1 of the GPU-hours of q_ttt_scratch" in found.sentence


@pytest.mark.parametrize(
    "scratch, candidate, fields",
    [
        (
            "g_ttt_scratch",
            "g_p1_hybrid_preserve",
            {"model": Model(family="gemma3", num_parameters=1, num_layers=1, ttt_layers=[0])},
        ),
        (EXAMPLE_BASELINE, "q_p2_direct", {}),
        (EXAMPLE_BASELINE, EXAMPLE_CANDIDATE, {"variant": "carry=params"}),
        ("other", EXAMPLE_CANDIDATE, {}),
    ],
)
def test_what_no_file_holds_is_an_entry_to_write(scratch, candidate, fields):
    baseline = small(scratch, "ttt_scratch", **{key: value for key, value in fields.items() if key == "model"})
    found = step(baseline, small(candidate, "bridge", **fields))
    assert (found.kind, found.command) == ("wall-clock runs", None)
    assert f"--config {EXAMPLE}" not in found.sentence
    assert f"add an entry for {candidate} alone" in found.sentence
    assert f"gpu_hours: {{of: {scratch}, shares: [0.35, 0.5, 0.7, 1]}}" in found.sentence


def test_only_the_budgets_that_are_missing_are_asked_for():
    half = small("q_p2_direct", "bridge", share=0.5, hours=50.0, run_id="t")
    assert "shares: [0.35, 0.7, 1]" in step(small(EXAMPLE_BASELINE, "ttt_scratch"), half).sentence


@pytest.mark.parametrize("seed, wanted", [(0, "[0, 1]"), (3, "[0, 3]")])
def test_a_second_seed_is_written_before_anything_is_run(seed, wanted):
    found = step(small(EXAMPLE_BASELINE, "ttt_scratch", seed=seed), *at_shares("q_p2_direct", (seed,)))
    assert (found.kind, found.command) == ("seeds", None)
    assert (
        f"add seeds: {wanted} to the entries of both in the matrix file that they came from, and then run"
        in found.sentence
    )


def test_for_the_runs_of_the_known_file_a_second_seed_names_it_and_still_has_no_command():
    found = step(small(EXAMPLE_BASELINE, "ttt_scratch"), *at_shares(EXAMPLE_CANDIDATE))
    assert (found.kind, found.command) == ("seeds", None)
    assert f"(for the runs of {EXAMPLE_OF}: {EXAMPLE}), and then run" in found.sentence
