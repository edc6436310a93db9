"""From a command line to a run: parse, assemble, continue or start, fit."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentError, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from ttt_lit.data.stream import TokenDataModule
from ttt_lit.strict_yaml import check_config_files
from ttt_lit.train.module import TTTModule
from ttt_lit.train.parser_errors import explained
from ttt_lit.train.resume import resume_file
from ttt_lit.train.run_config import RunConfig
from ttt_lit.train.run_folder import claimed, is_finished

BASE = Path(__file__).resolve().parents[2] / "configs" / "base.yaml"

# What stages need of the Trainer. They are facts of the method, so a configuration that says otherwise is refused.
PRECISIONS = ("32-true", "bf16-mixed")
"""Master and fast weights stay float32 in both: true half precision would cast them, and a scaled loss does not reach the inner step."""

_FIXED: dict[str, Any] = {
    "max_epochs": None,  # one epoch a stage, set once the stages are known
    "reload_dataloaders_every_n_epochs": 1,
    "num_sanity_val_steps": 0,  # it would run before the first stage is entered
    "inference_mode": False,  # the inner loop takes gradients in validation too
    "use_distributed_sampler": False,
    "enable_checkpointing": False,  # StageCheckpoint knows the moments at which a save is whole
    "accumulate_grad_batches": 1,  # set per stage
    "gradient_clip_val": None,  # optim.clip_norm, which sees every shard and logs the norm
}


# A run's length belongs to its budget, its files to run.*: these would be overridden, or break the count.
_REFUSED = (
    *("logger", "default_root_dir", "fast_dev_run", "overfit_batches", "limit_train_batches", "limit_val_batches"),
    *("min_epochs", "min_steps", "max_steps", "max_time", "val_check_interval", "check_val_every_n_epoch"),
    "gradient_clip_algorithm",
)

FSDP2 = "fsdp2"
"""Value of trainer.strategy for several devices."""


def _fsdp2(devices: Any, num_nodes: int) -> ModelParallelStrategy:
    """FSDP2 over all devices of all nodes. The strategy's own default would split tensors within a node instead."""
    if devices in ("auto", -1, "-1"):
        devices = max(1, torch.cuda.device_count())
    count = len(devices) if isinstance(devices, list) else int(devices)
    return ModelParallelStrategy(data_parallel_size=count * num_nodes, tensor_parallel_size=1)


def device_count(trainer: Any) -> int | None:
    """Devices of a run as Lightning reads them, a number or ids, on all nodes; None for ``auto`` and −1: the machine decides."""
    if isinstance(trainer.devices, list):
        return len(trainer.devices) * int(trainer.num_nodes)
    given = str(trainer.devices)
    ids = [one for one in given.split(",") if one]
    if "," in given and ids:
        return len(ids) * int(trainer.num_nodes)
    return int(given) * int(trainer.num_nodes) if given.isdigit() and given != "0" else None


def refuse_trainer(given: Any, default: Any) -> None:
    """ValueError for settings of the Trainer that belong to the stages, the budget or ``run.*``, and for true half precision."""
    wrong = [key for key in _FIXED if given[key] not in (default[key], _FIXED[key])]
    wrong += [key for key in _REFUSED if given[key] != default[key]]
    if wrong:
        raise ValueError(
            f"trainer: {', '.join(wrong)} follow from the run's stages and budget; remove them from the configuration"
        )
    if str(given.precision) not in (*PRECISIONS, "32", "None"):
        raise ValueError(f"trainer.precision: got {given.precision}, expected {' or '.join(PRECISIONS)}")


def resolved_config(parser: LightningArgumentParser, config: Any) -> dict[str, Any]:
    """What a parser has read, as the plain data that a run's folder keeps and a later start is compared with."""
    plain: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_none=False))
    plain.pop("config", None)
    return plain


# What LightningCLI is made with wherever a run's settings are read: they are part of the configuration that a folder keeps.
CLI_SETTINGS: dict[str, Any] = {
    "run": False,
    "save_config_callback": None,
    "seed_everything_default": 0,
    "auto_configure_optimizers": False,
}


def parser_settings(command: str) -> dict[str, Any]:
    """What every parser of a run's settings is made with. A setting is written out: its beginning could be another one tomorrow."""
    return {
        "default_config_files": [str(BASE)],
        "prog": f"cli.py {command}",
        "allow_abbrev": False,
        "exit_on_error": False,  # its own way out prints every setting that there is before the one that is wrong
    }


class _CommandLine(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunConfig, "run")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        given = self.config.trainer
        refuse_trainer(given, self.parser.get_defaults().trainer)
        if given.strategy == FSDP2:
            kwargs["strategy"] = _fsdp2(given.devices, given.num_nodes)
        if given.enable_progress_bar is False:  # Lightning takes it for a contradiction that base.yaml names a bar
            named = self.config_init.trainer.callbacks or []
            kwargs["callbacks"] = [callback for callback in named if not isinstance(callback, ProgressBar)]
        return super().instantiate_trainer(**(_FIXED | kwargs | self.run_settings()))

    def run_settings(self) -> dict[str, Any]:
        """Where the run's files go."""
        folder = Path(self.config.run.root) / self.config.run.experiment / self.config.run.id
        logger = TensorBoardLogger(save_dir=folder, name="", version="", default_hp_metric=False)
        return {"logger": logger, "default_root_dir": str(folder)}


class _WithoutCallbacks(_CommandLine):
    """For measuring a checkpoint: nothing is trained and nothing is written."""

    def run_settings(self) -> dict[str, Any]:
        return {"logger": False, "callbacks": []}


@dataclass
class Assembled:
    """Everything of a run, instantiated; nothing has been read yet."""

    run: RunConfig
    trainer: L.Trainer
    module: TTTModule
    data: TokenDataModule
    config: dict[str, Any]
    """The resolved configuration as plain data."""


def assemble(arguments: list[str], *, command: str) -> Assembled:
    """Parse a command line over ``configs/base.yaml`` and build the run's parts."""
    # LightningCLI warns about arguments passed in while sys.argv has some; these are the ones that were given.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    # Noise of the framework about its own next versions.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.* is deprecated")
    # Streams have no state to save: the ledger knows the position, and a test holds resume to the bit.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    check_config_files(arguments, BASE)
    try:
        cli = (_CommandLine if command == "fit" else _WithoutCallbacks)(
            TTTModule,
            TokenDataModule,
            args=arguments,
            parser_kwargs=parser_settings(command),
            **CLI_SETTINGS,
        )
    except ArgumentError as error:
        raise ValueError(explained(error)) from error
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}") from error
    config = resolved_config(cli.parser, cli.config)
    run = RunConfig(**{field.name: getattr(cli.config.run, field.name) for field in dataclasses.fields(RunConfig)})
    cli.trainer.fit_loop.max_epochs = len(cli.model.stages.enabled())
    cli.model.run, cli.model.run_config = run, config
    return Assembled(run, cli.trainer, cli.model, cli.datamodule, config)


@rank_zero_only
def _print(text: str) -> None:
    print(text, flush=True)


def fit(arguments: list[str]) -> int:
    """Start a run or continue it. Returns the exit status. RuntimeError: another process trains this run.

    Rank 0 holds the run's lock from before the first look into its folder until it leaves, however that is. Where it is refused, the
    other ranks wait for it in vain until their launcher (torchrun, srun) ends them, as after any failure of one rank.
    """
    parts = assemble(arguments, command="fit")
    with claimed(parts.run.folder, parts.config) if parts.trainer.is_global_zero else contextlib.nullcontext():
        return _train(parts)


def _train(parts: Assembled) -> int:
    folder = parts.run.folder
    if is_finished(folder):
        _print(f"{folder}: this run is finished; give another --run.id to run it again")
        return 0
    resume = resume_file(folder)
    if resume is not None:
        _print(f"{folder}: continuing from {resume.name}")
    try:
        parts.trainer.fit(parts.module, datamodule=parts.data, ckpt_path=str(resume) if resume else None)
    except SystemExit:  # what Lightning makes of Ctrl-C, and of a run that was told to stop
        last = resume_file(folder)
        _print(f"{folder}: the same command continues from {last.name if last else 'the beginning'}")
        raise KeyboardInterrupt from None
    _leave_process_group()
    _print(f"{folder}: finished; python cli.py report {folder} shows what came out")
    return 0


def _leave_process_group() -> None:
    """Ranks part together: one that exits while another still waits for it tears the other's threads down with it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def validate(arguments: list[str]) -> int:
    """Measure a start checkpoint on the held-out blocks, inner loop on and off, and print the result."""
    parts = assemble(arguments, command="validate")
    names = list(parts.module.stages.enabled())
    stage = parts.run.stage or names[-1]
    if stage not in names:
        raise ValueError(f"run.stage: got {stage!r}, expected one of {', '.join(names)}")
    parts.module.validate_stage = names.index(stage)
    parts.trainer.validate(parts.module, datamodule=parts.data, verbose=False)
    for inner, result in parts.module.evaluation.compute().items():
        print(
            f"stage {stage}, inner loop {inner}: {result.nats_per_token:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte "
            f"({result.tokens} tokens in {result.blocks} blocks)"
        )
    return 0
