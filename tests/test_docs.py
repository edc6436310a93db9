"""What the documentation says about the code is true: fields and defaults, files, links, commands, metric names."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml
from helpers.field_tables import filled

import cli
from ttt_lit import metrics
from ttt_lit.data.prepare import PrepareConfig
from ttt_lit.data.stream import TokenDataModule
from ttt_lit.train import run
from ttt_lit.train.module import TTTModule
from ttt_lit.train.stages import Stages

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
DOCUMENTED = (PrepareConfig, TokenDataModule)

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"\bcli\.py\s+([a-z][a-z-]*)")
_PATH = re.compile(r"(?<![\w./-])((?:configs|ttt_lit|callbacks|tests|docs)/[\w./-]*\w|cli\.py)")
_PLACEHOLDER = re.compile(r"(^|/)[A-Z]+(\.|/|$)")


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative link targets that do not exist."""
    targets = [target.partition("#")[0] for target in _LINK.findall(text) if "://" not in target]
    return [target for target in targets if target and not (folder / target).exists()]


def unknown_commands(text: str) -> list[str]:
    return [name for name in _COMMAND.findall(text) if name not in cli.COMMANDS]


def missing_paths(text: str) -> list[str]:
    """Files and folders of the project that are named and do not exist; NAME in capitals stands for any name."""
    named = {path for path in _PATH.findall(text) if not _PLACEHOLDER.search(path)}
    return sorted(path for path in named if not (ROOT / path).exists())


def table_under(heading: str) -> dict[str, tuple[str, str]]:
    """Field → (default, meaning) of the first table below ``### `HEADING` `` or ``## HEADING``."""
    _, found, rest = CONFIGURATION.partition(f"# {heading}\n")
    assert found, f"docs/configuration.md has no section {heading}"
    section = re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| `")
    ]
    return {cells[0].strip("`"): (cells[1], cells[2]) for cells in rows}


def defaults_of(kind: type) -> dict[str, object]:
    """Field or argument → default, ``inspect.Parameter.empty`` where it is required."""
    parameters = dict(inspect.signature(kind).parameters)
    found = {name: parameter.default for name, parameter in parameters.items()}
    if dataclasses.is_dataclass(kind):
        made = {f.name: f.default_factory() for f in dataclasses.fields(kind) if callable(f.default_factory)}
        found |= made
    return found


def plain(value: object) -> object:
    """As YAML would hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value


def stated(cell: str) -> object:
    return inspect.Parameter.empty if cell == "required" else yaml.safe_load(cell.strip("`"))


@pytest.mark.parametrize("kind", DOCUMENTED, ids=lambda kind: kind.__name__)
def test_every_field_is_documented_with_its_default(kind):
    table = table_under(f"`{kind.__name__}`")
    assert {name: stated(default) for name, (default, _) in table.items()} == {
        name: plain(value) for name, value in defaults_of(kind).items()
    }
    assert all(meaning for _, meaning in table.values())


@pytest.mark.parametrize("page", ["configuration.md", "run-record.md"])
def test_the_tables_of_a_page_are_the_codes(page):
    """Where this fails, ``make docs`` writes them anew."""
    path = ROOT / "docs" / page
    assert filled(path) == path.read_text(encoding="utf-8")


def test_every_argument_of_the_model_is_documented():
    table, defaults = table_under("The model"), defaults_of(TTTModule)
    assert table.keys() == defaults.keys()
    for name, (cell, _) in table.items():
        if cell == "see below":
            assert dataclasses.is_dataclass(defaults[name])
        else:
            assert stated(cell) == plain(defaults[name])


def test_every_stage_is_named():
    assert all(f"`{field.name}`" in CONFIGURATION for field in dataclasses.fields(Stages))


def test_every_fixed_trainer_setting_is_named():
    assert [key for key in run._FIXED if f"`{key}`" not in CONFIGURATION] == []


def test_callbacks_are_those_of_the_base_configuration_with_their_arguments():
    named = yaml.safe_load((ROOT / "configs" / "base.yaml").read_text(encoding="utf-8"))["trainer"]["callbacks"]
    table = table_under("Callbacks")
    assert list(table) == [entry["class_path"] for entry in named]
    for path, (cell, _) in table.items():
        arguments = dict(item.strip("` ").split(": ") for item in cell.split(",") if item)
        assert {name: yaml.safe_load(value) for name, value in arguments.items()} == _constructor_defaults(path)


def _constructor_defaults(class_path: str) -> dict[str, object]:
    """Keyword defaults of a callback's own ``__init__``, read from its source."""
    module, _, name = class_path.rpartition(".")
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))
    owner = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    own = [node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    if not own:
        return {}
    arguments = own[0].args
    names = [argument.arg for argument in arguments.args[1:]]
    return dict(zip(names, [ast.literal_eval(value) for value in arguments.defaults], strict=True))


def test_every_metric_is_named():
    made = [metrics.gpu_seconds(account) for account in metrics.ACCOUNTS]
    made += [make(inner) for inner in ("on", "off") for make in (metrics.val_loss, metrics.val_bits_per_byte)]
    made += [metrics.learning_rate(group) for group in ("base", "prime")]
    made += [
        metrics.position_loss((0, 1), inner).replace("000000", "START").replace("000001", "STOP")
        for inner in ("on", "off")
    ]
    made += [metrics.on_tokens_axis("NAME"), metrics.on_gpu_hours_axis("NAME")]
    fixed = [name for name in metrics.UNITS if name != metrics.LEARNING_RATE]
    assert [name for name in [*fixed, *made] if f"`{name}`" not in CONFIGURATION] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_points_at_what_exists(page):
    text = page.read_text(encoding="utf-8")
    assert broken_links(text, page.parent) == []
    assert unknown_commands(text) == []
    assert missing_paths(text) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_config_points_at_what_exists(path):
    text = path.read_text(encoding="utf-8")
    assert unknown_commands(text) == []
    assert missing_paths(text) == []


def test_planted_mistakes_are_found():
    assert broken_links("[a](method.md) [b](gone.md) [c](https://example.org) [d](method.md#x)", ROOT / "docs") == [
        "gone.md"
    ]
    assert unknown_commands("python cli.py fit, python cli.py fly, `cli.py check-reference`, cli.py COMMAND") == ["fly"]
    text = "configs/base.yaml configs/bsae.yaml configs/data/NAME.yaml configs/size/ ttt_lit/gone.py, runs/tests/x"
    assert missing_paths(text) == ["configs/bsae.yaml", "ttt_lit/gone.py"]
