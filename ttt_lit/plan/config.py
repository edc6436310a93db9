"""The configuration of a run, read as ``fit`` reads it, and the network that it starts from: no weights, no data, no trainer."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, set_parsing_settings

from ttt_lit.checkpoint.receipt import Receipt
from ttt_lit.convert.windowed import with_windows
from ttt_lit.data.stream import TokenDataModule
from ttt_lit.families import family_of_config
from ttt_lit.model.spec import ModelSpec
from ttt_lit.strict_yaml import check_config_files
from ttt_lit.train.checks import check_stages
from ttt_lit.train.module import TTTModule
from ttt_lit.train.origin import Origin, origin_of_checkpoint
from ttt_lit.train.parser_errors import explained
from ttt_lit.train.run import BASE, CLI_SETTINGS, PRECISIONS, _CommandLine, device_count, parser_settings
from ttt_lit.train.stages import StagePlan, plan_stages
from ttt_lit.train.start import Start, extended

SHAPES = "configs/shapes/"


class NotKnown(ValueError):
    """``fit`` takes these settings, but what they come to is decided where the run starts."""


class _WithoutTrainer(_CommandLine):
    """The configured devices need not be here."""

    def instantiate_trainer(self, **_: Any) -> None:  # type: ignore[override]
        return None


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """What a command line describes."""

    name: str
    shape: str
    """Where the network's shape comes from."""
    spec: ModelSpec
    """The network with its prime MLPs and learned sinks; windows as imported."""
    origin: Origin
    """What the run starts from."""
    module: TTTModule
    precision: str
    devices: int
    """As configured; 1 where that is decided when the run starts."""
    on_cpu: bool
    """Whether the configuration asks for a CPU."""

    def plans(self, devices: int) -> tuple[StagePlan, ...]:
        """The run's stages in numbers. ValueError for what does not fit together."""
        module = self.module
        plans = plan_stages(module.stages, module.size, module.budget, devices=devices)
        check_stages(plans, _start(self.spec, self.origin), module.start_config, module.inner, module.size)
        return plans


def read_run(arguments: list[str], shape: str | None) -> PlannedRun:
    """Parse ``fit``'s arguments over ``configs/base.yaml``. ``shape``: a Hugging Face config.json, in place of the start's own."""
    # LightningCLI warns about arguments passed in while sys.argv has some; these are the ones that were given.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    check_config_files(arguments, BASE)
    try:
        cli = _WithoutTrainer(
            TTTModule,
            TokenDataModule,
            args=arguments,
            parser_kwargs=parser_settings("plan"),
            **CLI_SETTINGS | {"seed_everything_default": False},  # nothing is computed
        )
    except ArgumentError as error:
        raise ValueError(explained(error)) from error
    module, trainer = cli.model, cli.config.trainer
    precision = "32-true" if str(trainer.precision) in ("32", "None") else str(trainer.precision)
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision: got {precision}, expected {' or '.join(PRECISIONS)}")
    origin, source = _origin(module.start_config.init_from, shape)
    if module.start_config.init == "scratch":
        origin = origin.shape_only()
    return PlannedRun(
        name=f"{cli.config.run.experiment}/{cli.config.run.id}",
        shape=source,
        spec=_spec(origin, module),
        origin=origin,
        module=module,
        precision=precision,
        devices=_devices(trainer),
        on_cpu=trainer.accelerator == "cpu",
    )


def _spec(origin: Origin, module: TTTModule) -> ModelSpec:
    return with_windows(extended(origin, module.start_config, module.ttt), origin.imported_windows)


def _origin(init_from: str, shape: str | None) -> tuple[Origin, str]:
    """The network to start from, and the path of its description."""
    path = Path(init_from)
    if shape is None and path.is_dir():
        return origin_of_checkpoint(init_from), init_from
    source = init_from if shape is None else shape
    if not Path(source).is_file():
        option = "model.start.init_from" if shape is None else "--shape"
        raise FileNotFoundError(
            f"{option}: {source} does not exist, so the network's shape is not known; name a Hugging Face config.json with --shape "
            f"({SHAPES} has some)"
        )
    text = Path(source).read_text(encoding="utf-8")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not JSON: {error}") from error
    family = family_of_config(config)
    origin = Origin(
        spec=family.spec_from_config(config),
        family=family.name,
        lineage=(),
        source_config=text,
        tokenizer=None,
        tokenizer_hash=None,
        checkpoint=None,
    )
    return origin, source


def _devices(trainer: Any) -> int:
    count = device_count(trainer)
    if count is None:
        raise NotKnown(
            f"trainer.devices: got {trainer.devices}, which depends on the machine; say how many with --trainer.devices N"
        )
    return count


def _start(spec: ModelSpec, origin: Origin) -> Start:
    """A start with this description and without a tensor."""
    receipt = Receipt.all_new(spec.parameter_shapes(), dtype="F32", note="planned")
    return Start(origin=origin, stored=spec, spec=spec, state={}, added={}, receipt=receipt, optimizer=None)
