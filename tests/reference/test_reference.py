"""The method is the official implementation's, and the check that says so would notice if it were not."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import bugs
from helpers.compare import ENGINES, assert_equals_naive
from helpers.golden import write_golden
from helpers.tiny import random_decoder, random_tokens, tiny_spec, ttt_layer
from safetensors import safe_open
from safetensors.torch import save_file

import ttt_lit.reference.check as reference
from ttt_lit.model.spec import LayerSpec
from ttt_lit.reference.check import (
    FINAL_LIMIT,
    LIMITS,
    check_case,
    check_reference,
    error,
    inner_lr,
    outer_lr,
    read_case,
)

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))
META = [path for path in GOLDEN if path.stem.startswith("meta")]


def test_the_golden_files_are_all_here():
    """A missing file would make the next tests weaker without failing them."""
    assert [path.stem for path in GOLDEN] == [
        "meta_inner_ffn", "meta_no_clip", "meta_paper", "meta_qwen_like", "pretrain_dense", "pretrain_swa",
        "train_meta_5_steps",
    ]  # fmt: skip


def test_the_limits_are_those_of_the_reference():
    assert {torch.float64: 1e-4, torch.float32: 1e-3} == LIMITS
    assert FINAL_LIMIT == 1e-3


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_golden_file_passes_and_says_so_in_one_line(path, capsys):
    assert check_reference([str(path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    number = r"\d\.\de-\d+"
    assert re.match(
        rf"{path.stem} loss_err={number} nll_err={number} grad_err={number} worst=language_model\.\S+ ", line
    )
    trains = "steps" in path.stem
    assert (re.search(rf" losses_err={number} final_err={number} ", line) is not None) is trains
    assert line.endswith(" ok")


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("path", META, ids=lambda path: path.stem)
def test_every_engine_passes(path, name):
    assert check_case(read_case(path), torch.float64, engine=ENGINES[name]).passed


@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: bug.__name__)
def test_broken_code_fails_both_checks(bug, monkeypatch):
    """The golden files and the naive twin are two witnesses; a mistake must not get past either of them."""
    bug(monkeypatch)
    assert not check_case(read_case(META[2]), torch.float64).passed
    decoder = random_decoder(tiny_spec(LayerSpec(window=3), ttt_layer(window=3), ttt_layer(window=3)))
    with pytest.raises(AssertionError):
        assert_equals_naive(decoder, random_tokens(2, 13), chunk=4, clip=0.05)


def test_the_comparison_of_the_broken_code_passes_when_it_is_whole():
    assert META[2].stem == "meta_paper"
    decoder = random_decoder(tiny_spec(LayerSpec(window=3), ttt_layer(window=3), ttt_layer(window=3)))
    assert_equals_naive(decoder, random_tokens(2, 13), chunk=4, clip=0.05)


def test_a_failure_is_the_exit_status_and_the_line_names_the_worst_tensor(monkeypatch, capsys):
    bugs.first_order(monkeypatch)
    assert check_reference([str(META[2]), str(GOLDEN[5])]) == 1
    failed, passed = capsys.readouterr().out.splitlines()
    assert failed.endswith(" FAILED")
    assert float(re.search(r"grad_err=(\S+)", failed)[1]) > 0.1
    assert float(re.search(r"loss_err=(\S+)", failed)[1]) < 1e-4
    assert "worst=language_model." in failed
    assert passed.startswith("pretrain_swa ")
    assert passed.endswith(" ok")


# Files made here, for what the official ones do not reach -------------------------------------------------------------------


# A golden file stores float32: after fewer than four steps (the first has rate 0) its rounding is a share of 1e-3 of what the weights
# have moved.
CASES = {
    "norms switched off, trained": {},
    "only post-norms, trained": {"pre_norm": False, "post_norm": True, "qk_norm": True},
    "no norm at all, tied": {"pre_norm": False, "tie": True},
    "ordinary MLPs fast, trained": {"prime": False, "inner": "ffn"},
    "pretraining with prime MLPs": {"mode": "pretrain", "block": "SWAFull", "chunk": 8},
    "dense pretraining, trained": {
        "mode": "pretrain", "block": "self_attention", "prime": False, "suffix": 0, "chunk": 8, "ilr_warmup": 0,
    },
    "no clip, no inner warm-up": {"clip": 0.0, "ilr_warmup": 0},
    "every layer in the suffix": {"suffix": 3, "steps": 1, "window": 99},
    "one layer, one head, four chunks": {"layers": 1, "suffix": 1, "heads": 1, "chunk": 2, "steps": 1},
    "one chunk": {"chunk": 8, "steps": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [pytest.param(c, id=name) for name, c in CASES.items()],
)
def test_any_file_in_the_format_is_checked(changes, tmp_path, capsys):
    path = write_golden(tmp_path / "case.safetensors", **changes)
    assert check_reference([str(path)]) == 0, capsys.readouterr().out


def test_every_stored_tensor_is_compared_idle_norms_included(tmp_path):
    case = read_case(write_golden(tmp_path / "case.safetensors", steps=1))
    for name in case.group("grad."):
        case.tensors[f"grad.{name}"] = case.tensors[f"grad.{name}"] + 1.0
        assert check_case(case, torch.float64).worst == name
        case.tensors[f"grad.{name}"] -= 1.0


def test_a_forgotten_weight_decay_shows(tmp_path):
    """In the losses it is invisible; relative to the distance that the weights moved it is not."""
    norms = {"post_norm": True, "qk_norm": True}
    right = check_case(read_case(write_golden(tmp_path / "right.safetensors", **norms)), torch.float64)
    assert right.passed
    path = write_golden(tmp_path / "case.safetensors", weight_decay=0.0, **norms)
    errors = check_case(read_case(path), torch.float64)
    assert not errors.passed
    assert errors.final > FINAL_LIMIT
    assert max(errors.loss, errors.nll, errors.grad, errors.losses) < LIMITS[torch.float64]


def test_decay_of_norms_that_are_switched_off_shows(tmp_path):
    path = write_golden(tmp_path / "case.safetensors", idle_decay=False)
    assert check_case(read_case(path), torch.float64).final > FINAL_LIMIT


@pytest.mark.parametrize("dtype", [torch.float32])
def test_checking_a_case_leaves_it_as_it_was(dtype, tmp_path):
    """Otherwise the result would depend on how often, and in which order, a case is checked."""
    case = read_case(write_golden(tmp_path / "case.safetensors"))
    before = {name: tensor.clone() for name, tensor in case.tensors.items()}
    check_case(case, dtype)
    assert [name for name, tensor in case.tensors.items() if not torch.equal(tensor, before[name])] == []


def test_forgetting_the_decay_in_the_optimiser_fails_the_official_case(monkeypatch):
    build = reference.build_optimizer

    def without_decay(named, config):
        optimizer = build(named, config)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        return optimizer

    monkeypatch.setattr(reference, "build_optimizer", without_decay)
    errors = check_case(read_case(GOLDEN[6]), torch.float64)
    assert errors.final > FINAL_LIMIT
    assert errors.losses < LIMITS[torch.float64]


# Schedules and measures -------------------------------------------------------------------------------------------------------


def test_outer_rate_by_hand():
    assert [outer_lr(step) for step in (0, 1, 2)] == [0.0, 0.5e-3, 1e-3]
    assert outer_lr(6) == pytest.approx((1e-3 + 1e-5) / 2)
    assert outer_lr(10) == outer_lr(50) == pytest.approx(1e-5)


@pytest.mark.parametrize("warmup, steps", [(3, 5), (5, 5), (8, 5), (1, 1), (10, 3)])
def test_inner_rate_is_that_of_the_golden_readme(warmup, steps):
    config = {"ilr": 0.8, "ilr_init": 0.2, "ilr_warmup": warmup, "steps": steps}
    for step in range(steps):
        assert inner_lr(config, step) == pytest.approx(0.2 + 0.6 * min(1, (step + 1) / warmup))


def test_without_warm_up_the_inner_rate_is_constant():
    assert inner_lr({"ilr": 0.8, "ilr_init": 0.2, "ilr_warmup": 0, "steps": 4}, 0) == 0.8


def test_error_is_relative_and_zero_must_be_zero():
    a, zero = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert error(a, a) == 0.0
    assert error(2 * a, a) == pytest.approx(1.0)
    assert error(zero, zero) == 0.0
    assert error(torch.tensor([0.0, 1e-30]), zero) == float("inf")


def test_nan_does_not_pass(tmp_path):
    case = read_case(write_golden(tmp_path / "case.safetensors", steps=1))
    case.tensors["weight.language_model.model.ln_f.weight"][0] = float("nan")
    errors = check_case(case, torch.float64)
    assert not errors.passed


# Files that are not golden files ----------------------------------------------------------------------------------------------


def edit(source, target, *, config=None, tensors=None):
    """A copy with another config object and with tensors replaced, or dropped where the replacement is None."""
    with safe_open(str(source), "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    stored = {n: t for n, t in (stored | (tensors or {})).items() if t is not None}
    save_file(stored, target, metadata=metadata if config is None else config)
    return target


def assert_one_line(excinfo, path):
    message = str(excinfo.value)
    assert "\n" not in message
    assert str(path) in message


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such golden file") as excinfo:
        check_reference([str(tmp_path / "nothing.safetensors")])
    assert_one_line(excinfo, tmp_path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", META[0].read_bytes()[:5000]])
def test_a_damaged_file(tmp_path, content):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file") as excinfo:
        check_reference([str(path)])
    assert_one_line(excinfo, path)


def config_with(**changes):
    with safe_open(str(META[0]), "pt") as file:
        config = json.loads(file.metadata()["config"])
    return {"config": json.dumps({k: v for k, v in (config | changes).items() if v is not None})}


FOREIGN = {
    "no metadata": ({}, {}),
    "metadata that is not JSON": ({"config": "{"}, {}),
    "metadata that is no object": ({"config": "[1]"}, {}),
    "no mode": (config_with(mode=None), {}),
    "an unknown mode": (config_with(mode="sometimes"), {}),
    "no chunk": (config_with(chunk=None), {}),
    "no steps": (config_with(steps=None), {}),
    "no clip": (config_with(clip=None), {}),
    "no inner rate": (config_with(ilr=None), {}),
    "another width": (config_with(hidden=16), {}),
    "a chunk that does not divide": (config_with(chunk=7), {}),
    "no tokens": (None, {"tokens": None}),
    "no token losses": (None, {"token_nll": None}),
    "a missing weight": (None, {"weight.language_model.model.wte.weight": None}),
    "a missing gradient": (None, {"grad.language_model.model.wte.weight": None}),
    "no gradient at all": (None, "drop gradients"),
    "a misshapen weight": (None, {"weight.language_model.model.ln_f.weight": torch.zeros(3)}),
    "a misshapen gradient": (None, {"grad.language_model.model.ln_f.weight": torch.zeros(3)}),
    "an unknown weight": (None, {"weight.language_model.model.extra": torch.zeros(3)}),
    "tokens of another length": (None, {"tokens": torch.zeros(1, 2, 30, dtype=torch.int32)}),
    "token ids above the vocabulary": (None, {"tokens": torch.full((1, 2, 49), 97, dtype=torch.int32)}),
}


@pytest.mark.parametrize("config, tensors", [pytest.param(*c, id=n) for n, c in FOREIGN.items()])
def test_a_file_that_is_not_a_golden_file(config, tensors, tmp_path):
    if tensors == "drop gradients":
        with safe_open(str(META[0]), "pt") as file:
            tensors = {name: None for name in file.keys() if name.startswith("grad.")}  # noqa: SIM118
    path = edit(META[0], tmp_path / "foreign.safetensors", config=config, tensors=tensors)
    with pytest.raises(ValueError, match=r"\S") as excinfo:
        check_reference([str(path)])
    assert_one_line(excinfo, path)


def test_training_numbers_that_are_missing(tmp_path):
    path = edit(GOLDEN[6], tmp_path / "case.safetensors", tensors={"losses": None})
    with pytest.raises(ValueError, match="losses.* missing") as excinfo:
        check_reference([str(path)])
    assert_one_line(excinfo, path)
