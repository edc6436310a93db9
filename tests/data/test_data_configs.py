import dataclasses
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from ttt_lit.data.prepare import PrepareConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
SETS = [("stdlib", "stdlib_long"), ("dclm_8k", "books_32k")]
PAIRS = [(f"{family}{short}", f"{family}{long}") for family in ("", "gemma_") for short, long in SETS]
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def parse(*arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(PrepareConfig)
    parsed = parser.parse_args(list(arguments))
    return PrepareConfig(**{key: value for key, value in parsed.items() if key != "config"})


def test_the_study_has_its_data_sets():
    qwen = ["books_32k", "dclm_8k", "stdlib", "stdlib_long"]
    assert [*(f"gemma_{name}" for name in qwen), *qwen] == sorted(NAMES, key=lambda name: ("gemma" not in name, name))


@pytest.mark.parametrize("name", NAMES)
def test_every_config_parses_to_what_it_says_and_its_header_says_how_to_launch_it(name):
    path = CONFIGS / f"{name}.yaml"
    config = parse("--config", str(path))
    written = yaml.safe_load(path.read_text())
    assert {key: getattr(config, key) for key in written} == written
    header = path.read_text().split("source:")[0]
    assert f"python cli.py prepare --config configs/data/{name}.yaml" in header


@pytest.mark.parametrize("short, long", PAIRS)
def test_short_and_long_sets_of_a_run_share_tokenizer_and_split(short, long):
    first, second = (parse("--config", str(CONFIGS / f"{name}.yaml")) for name in (short, long))
    assert first.tokenizer == second.tokenizer
    assert first.train_tokenizer == second.train_tokenizer
    assert first.tokenizer_kind == second.tokenizer_kind
    assert first.validation_fraction == second.validation_fraction
    assert first.output != second.output
    assert second.context == 4 * first.context
    assert (first.layout, second.layout) == ("packed", "per_document")


@pytest.mark.parametrize("name", [name for names in SETS for name in names])
def test_gemmas_set_differs_from_the_other_familys_in_tokenizer_and_output_alone(name):
    theirs, ours = (dataclasses.asdict(parse("--config", str(CONFIGS / f"{n}.yaml"))) for n in (name, f"gemma_{name}"))
    kinds = {"tokenizer_kind"} if ours["train_tokenizer"] else set()
    assert {key for key in ours if ours[key] != theirs[key]} == {"tokenizer", "output"} | kinds
