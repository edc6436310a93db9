"""What a run starts from, before it adds anything: a checkpoint of ours, or only a description of a network."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttt_lit.checkpoint.receipt import LineageStep, Receipt
from ttt_lit.checkpoint.store import Checkpoint, load_checkpoint
from ttt_lit.convert.windowed import with_windows
from ttt_lit.families import family_of_config
from ttt_lit.identity import tokenizer_hash
from ttt_lit.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A network's description and history; ``checkpoint`` holds the weights, if there are any."""

    spec: ModelSpec
    family: str
    lineage: tuple[LineageStep, ...]
    source_config: str | None
    """Text of the Hugging Face config.json, kept verbatim."""
    generation_config: str | None = None
    """Text of its generation_config.json, kept verbatim."""
    tokenizer: Path | None
    tokenizer_hash: str | None
    checkpoint: Checkpoint | None

    @property
    def imported_windows(self) -> tuple[int | None, ...]:
        """Every layer's window before a training run narrowed it: what this run's stages are derived from."""
        last = self.lineage[-1] if self.lineage else None
        if last is not None and last.operation == "fit":
            return tuple(last.parameters["imported_windows"])
        return tuple(layer.window for layer in self.spec.layers)

    @property
    def as_imported(self) -> bool:
        """Whether no training run has done anything to these weights and their attention since the import: what damage is measured
        against, and what may teach, where there are weights."""
        return not self.lineage or self.lineage[-1].operation != "fit"

    def shape_only(self) -> Origin:
        """The same network without weights, history and what runs have added: what a run from random weights starts from."""
        spec = with_windows(self.spec, self.imported_windows)
        bare = tuple(dataclasses.replace(layer, prime=None, fast=None, sink_logit=False) for layer in spec.layers)
        return dataclasses.replace(self, spec=spec.with_layers(bare), lineage=(), checkpoint=None)

    @property
    def weights_hash(self) -> str | None:
        return None if self.checkpoint is None else self.checkpoint.weights_hash

    @property
    def receipt(self) -> Receipt | None:
        return None if self.checkpoint is None else self.checkpoint.receipt


_COSTS = ("stage", "gpu_seconds", "tokens")


def parents(lineage: Sequence[LineageStep]) -> list[dict[str, Any]]:
    """Every run that went into a checkpoint, oldest first: ``name``, ``stage``, ``gpu_seconds``, ``tokens``; None for what is not known.

    An imported checkpoint counts as a run of somebody else's, of unknown cost unless the import was told who trained it.
    """
    found: list[dict[str, Any]] = []
    for step in lineage:
        if step.operation == "fit":
            own = step.parameters
            found.append({"name": f"{own['experiment']}/{own['run']}"} | {key: own.get(key) for key in _COSTS})
        elif step.operation == "import":
            found += step.parameters.get("trained_by") or [{"name": step.source} | dict.fromkeys(_COSTS)]
    return found


def origin_of_checkpoint(path: str) -> Origin:
    """A checkpoint folder of ours. FileNotFoundError naming the command that makes one."""
    if not Path(path).exists():
        raise FileNotFoundError(
            f"model.start.init_from: {path} does not exist; make it with: python cli.py import --source DIR_OR_HUB_ID --output {path}"
        )
    checkpoint = load_checkpoint(path)
    return Origin(
        spec=checkpoint.spec,
        family=checkpoint.family,
        lineage=checkpoint.lineage,
        source_config=checkpoint.source_config,
        generation_config=checkpoint.generation_config,
        tokenizer=checkpoint.tokenizer,
        tokenizer_hash=checkpoint.tokenizer_hash,
        checkpoint=checkpoint,
    )


def origin_of_config(path: str, tokenizer: str | None) -> Origin:
    """A Hugging Face config.json: the shape of a network without weights."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"model.start.init_from: {path} does not exist; give a checkpoint folder or a Hugging Face config.json"
        )
    if tokenizer is None:
        raise ValueError(
            "model.start.tokenizer: not set, but a config.json has no tokenizer; set it to the tokenizer's folder"
        )
    folder = Path(tokenizer)
    digest = tokenizer_hash(folder)
    if digest is None:
        raise FileNotFoundError(
            f"model.start.tokenizer: {folder} holds no tokenizer; the prepare command makes or names one"
        )
    text = Path(path).read_text(encoding="utf-8")
    try:
        config: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    family = family_of_config(config)
    return Origin(
        spec=family.spec_from_config(config),
        family=family.name,
        lineage=(),
        source_config=text,
        tokenizer=folder,
        tokenizer_hash=digest,
        checkpoint=None,
    )
