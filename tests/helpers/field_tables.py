"""The tables of ``docs/configuration.md`` and ``docs/run-record.md``, made from the dataclasses: ``make docs`` writes them.

A page keeps its own words; below a heading that is a dataclass's name in backticks, the first table is the class's.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from pathlib import Path

import yaml

from ttt_lit.convert.fast_mlp import TTTConfig
from ttt_lit.record import measured, schema
from ttt_lit.train.budget import Budget
from ttt_lit.train.evaluation import ValidationConfig
from ttt_lit.train.optim import OptimConfig
from ttt_lit.train.run_config import RunConfig
from ttt_lit.train.schedule import InnerLRSchedule, LRSchedule
from ttt_lit.train.stages import SizeConfig, StageConfig
from ttt_lit.train.start import StartConfig
from ttt_lit.ttt.inner import InnerLoop
from ttt_lit.ttt.settings import EngineConfig

DOCS = Path(__file__).resolve().parents[2] / "docs"
SETTINGS = (
    *(RunConfig, StartConfig, TTTConfig, EngineConfig, StageConfig, LRSchedule, InnerLRSchedule, SizeConfig, Budget),
    *(InnerLoop, OptimConfig, ValidationConfig),
)
RECORD = tuple(each for each in (vars(measured) | vars(schema)).values() if dataclasses.is_dataclass(each))
_WORDS = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "list"}


def filled(page: Path) -> str:
    """The page with its tables as the code has them."""
    text = page.read_text(encoding="utf-8")
    kinds, column = (RECORD, "type") if page.name == "run-record.md" else (SETTINGS, "default")
    for kind in kinds:
        before, heading, rest = re.split(rf"^(#+ `{kind.__name__}`\n)", text, maxsplit=1, flags=re.MULTILINE)
        intro, table, after = re.split(r"((?:^\|.*\n)+)", rest, maxsplit=1, flags=re.MULTILINE)
        assert "\n#" not in intro, f"{page.name}: no table below {kind.__name__}"
        cell = _type if column == "type" else _default
        rows = [f"| `{name}` | {cell(kind, name)} | {said} |" for name, said in meanings(kind).items()]
        text = (
            before
            + heading
            + intro
            + "\n".join([f"| field | {column} | meaning |", "| --- | --- | --- |", *rows])
            + "\n"
            + after
        )
    return text


def meanings(kind: type) -> dict[str, str]:
    """Field → the docstring below it, as Markdown."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    found = {}
    for node, after in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            said = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            text = " ".join(said.split()).replace("``", "`").replace("|", "\\|")
            found[node.target.id] = re.sub(r"docs/([\w-]+)\.md", r"[\1](\1.md)", text)
    return found


def _default(kind: type, name: str) -> str:
    (field,) = (each for each in dataclasses.fields(kind) if each.name == name)
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=1000)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def _type(kind: type, name: str) -> str:
    return _words(typing.get_type_hints(kind)[name])


def _words(hint: object) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return f"{_words(arguments[0])} or null"
    if origin is typing.Literal:
        return "string"
    if origin is list and arguments[0] is not typing.Any:
        inner = _words(arguments[0])
        return (
            f"list of {inner}"
            if inner.startswith("`")
            else f"list of {inner.replace(' or', 's or') if ' or' in inner else inner + 's'}"
        )
    if dataclasses.is_dataclass(hint):
        return f"`{hint.__name__}`"
    return _WORDS[origin or hint]


if __name__ == "__main__":
    for page in (DOCS / "configuration.md", DOCS / "run-record.md"):
        page.write_text(filled(page), encoding="utf-8")
