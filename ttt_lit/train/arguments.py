"""Whether ``fit`` would take command lines, many in one process. Dataclasses are built from them; weights and data are not touched.

``python -m ttt_lit.train.arguments`` takes a JSON list of command lines and gives a JSON list: null, or what is wrong with each.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from ttt_lit.data.stream import TokenDataModule
from ttt_lit.strict_yaml import check_config_files
from ttt_lit.train.checks import check_callbacks, check_steps
from ttt_lit.train.module import TTTModule
from ttt_lit.train.parser_errors import explained
from ttt_lit.train.run import (
    BASE,
    CLI_SETTINGS,
    _CommandLine,
    device_count,
    parser_settings,
    refuse_trainer,
    resolved_config,
)
from ttt_lit.train.run_config import RunConfig
from ttt_lit.train.run_folder import CONFIG_NAME, begun_config, differences, has_ended
from ttt_lit.train.stages import plan_stages

# How a launcher spreads a run over devices.
_PLACEMENT = ("trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.plugins")

_NAMED = 5
"""So many differing settings are named; more would hide the advice."""


@dataclass(frozen=True)
class _Begun:
    """A run that has begun to train."""

    config: dict[str, Any]
    has_ended: bool


class _ParserOnly(_CommandLine):
    """``fit``'s parser, which has read nothing but the defaults."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.get_defaults()

    def _set_seed(self) -> None:
        return None

    def instantiate_classes(self) -> None:
        return None


def errors_of(command_lines: Sequence[Sequence[str]]) -> list[str | None]:
    """For each list of ``fit``'s arguments the first thing for which ``fit`` would refuse it, in one line; None for one that it takes.

    Where a run's folder shows that it has begun, the settings are those that it was started with, or that is what is wrong.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    cli = _ParserOnly(
        TTTModule,
        TokenDataModule,
        load_from_checkpoint_support=False,
        parser_kwargs=parser_settings("fit"),
        **CLI_SETTINGS,
    )
    return [_error(cli.parser, list(arguments)) for arguments in command_lines]


def _error(parser: LightningArgumentParser, arguments: list[str]) -> str | None:
    try:
        check_config_files(arguments, BASE)
        config = parser.parse_args(arguments)
        built = parser.instantiate(config)
        refuse_trainer(config.trainer, parser.get_defaults().trainer)
        begun = _begun(built.run.folder)
        if begun is None:
            _refuse_start(built)
        else:
            _refuse_change(built.run, begun, resolved_config(parser, config))
    except Exception as error:  # whatever it is, the run's own process would end with it
        return explained(error)
    return None


def _refuse_start(built: Any) -> None:
    """What ``fit`` finds out before its first step, as far as neither weights nor data are needed."""
    check_callbacks(built.trainer.callbacks or [])
    module = built.model
    # Where the machine decides how many devices: what does not divide for one does not for more.
    check_steps(plan_stages(module.stages, module.size, module.budget, devices=device_count(built.trainer) or 1))


def _begun(folder: Path) -> _Begun | None:
    """None before a run has begun, and where its files cannot be read: its own start says so, and fails alone."""
    try:
        config = begun_config(folder)
        return None if config is None else _Begun(config, has_ended(folder))
    except (ValueError, OSError):
        return None


def _refuse_change(run: RunConfig, begun: _Begun, asked: dict[str, Any]) -> None:
    kept = begun.config
    changed = differences(kept, asked)
    if begun.has_ended:
        # Nobody will start it again: where it ran does not matter, nor what only one of two versions knows.
        changed = [name for name in changed if name not in _PLACEMENT and {name} <= _names(kept) & _names(asked)]
    if not changed:
        return
    named = [_change(name, _value(kept, name), _value(asked, name)) for name in changed[:_NAMED]]
    named += [f"{len(changed) - _NAMED} more"] if len(changed) > _NAMED else []
    raise ValueError(
        f"the run was started with another configuration: {', '.join(named)}; go back to {run.folder / CONFIG_NAME}, give the run another "
        f"name in the matrix file (its name, or a label of an axis), or remove the folder {run.folder}"
    )


def _names(config: Any, where: str = "") -> set[str]:
    """Dotted names of all settings and sections."""
    if not isinstance(config, dict):
        return set()
    below = {f"{where}{key}" for key in config}
    return below.union(*(_names(value, f"{where}{key}.") for key, value in config.items()))


def _change(name: str, old: Any, new: Any) -> str:
    short = not isinstance(old, dict | list) and not isinstance(new, dict | list)
    return f"{name} was {json.dumps(old)}, now {json.dumps(new)}" if short else f"{name} differs"


def _value(config: Any, name: str) -> Any:
    for key in name.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


if __name__ == "__main__":
    json.dump(errors_of(json.load(sys.stdin)), sys.stdout)
