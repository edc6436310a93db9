"""Whether command lines of ``fit`` can be read, many in one process: names and types of settings. Nothing is built from them.

``python -m ttt_lit.train.arguments`` takes a JSON list of command lines and gives a JSON list: null, or what is wrong with each.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from ttt_lit.data.stream import TokenDataModule
from ttt_lit.train.module import TTTModule
from ttt_lit.train.run import _CommandLine, parser_settings

# How the parser says that a setting does not exist, with the parts of its name.
_NOT_A_SETTING = (
    re.compile(r"unrecognized arguments: --(?P<name>[^\s=]+)"),
    re.compile(r"Group '(?P<group>[\w.]+)' does not accept option '(?P<name>[\w.]+)'"),
    re.compile(r'Parser key "(?P<group>[\w.]+)": .*Option \'(?P<name>[\w.]+)\' is not accepted'),
)


class _ParserOnly(_CommandLine):
    """``fit``'s parser, which has read nothing but the defaults."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.get_defaults()

    def instantiate_classes(self) -> None:
        return None


def errors_of(command_lines: Sequence[Sequence[str]]) -> list[str | None]:
    """For each list of ``fit``'s arguments the first thing that is wrong with it, in one line; None for one that can be read."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    cli = _ParserOnly(
        TTTModule,
        TokenDataModule,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        auto_configure_optimizers=False,
        parser_kwargs=parser_settings("fit") | {"exit_on_error": False},
    )
    return [_error(cli.parser, list(arguments)) for arguments in command_lines]


def _error(parser: LightningArgumentParser, arguments: list[str]) -> str | None:
    try:
        parser.parse_args(arguments)
    except Exception as error:  # whatever it is, the run's own process would end with it
        return _explained(" ".join(str(error).split()))
    return None


def _explained(message: str) -> str:
    """The parser's message, made short where it is about a name."""
    for pattern in _NOT_A_SETTING:
        found = pattern.search(message)
        if found is not None:
            return f"{'.'.join(found.groupdict().values())}: fit has no such setting"
    return message


if __name__ == "__main__":
    json.dump(errors_of(json.load(sys.stdin)), sys.stdout)
