"""What a probe of the imported model says that context beyond a window is worth, checked against the run that will carry it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ttt_lit.data.stream import TokenDataModule
from ttt_lit.model.spec import ModelSpec
from ttt_lit.train.evaluation import ValidationConfig
from ttt_lit.train.origin import Origin

_SCHEMA = 1
_MAKE = "make it with python cli.py probe from the imported model and this run's data.long"


def read_ceiling(
    config: ValidationConfig, data: TokenDataModule, origin: Origin, last: ModelSpec
) -> list[dict[str, Any]]:
    """The ceilings in ``probe.json``, one per window, as the record has them; none where no probe is set.

    Parameters:
        data: of the run; the probe must have read the same long data at the same context.
        origin: of the run; the probe must have read these weights, or those that they were trained from. Random weights have no model of
            their own: there the imported model of the same shape counts.
        last: the network in the run's last stage. Its window must have been probed, unless a layer sees the whole context.

    Raises:
        FileNotFoundError, ValueError: one line that names ``python cli.py probe``.
    """
    if config.probe is None:
        return []
    where = f"model.validation.probe: {config.probe}"
    made, ceilings = _parse(Path(config.probe), where)
    context = data.manifest("long").context
    run = {"schema_version": _SCHEMA, "manifest of the long data": data.identity("long"), "context": context}
    if origin.checkpoint is None:
        run |= {"family": origin.family, "num_parameters": origin.spec.num_parameters()}
    for what, expected in run.items():
        if made[what] != expected:
            raise ValueError(f"{where}: {what}: got {made[what]}, expected {expected} as in this run; {_MAKE}")
    if origin.checkpoint is not None and made["digest"] not in _models(origin):
        expected = " or ".join(_models(origin))
        raise ValueError(
            f"{where}: digest of the checkpoint: got {made['digest']}, expected {expected}, which this run comes from; {_MAKE}"
        )
    widths = [context if layer.window is None else layer.window for layer in last.layers]
    probed = [ceiling["window"] for ceiling in ceilings]
    if max(widths) < context and max(widths) not in probed:
        raise ValueError(
            f"{where}: got a ceiling for windows {probed}, expected one for {max(widths)}, the run's last; {_MAKE}, for that window too"
        )
    return ceilings


def _models(origin: Origin) -> list[str]:
    """Hashes of the weights that a run starts from, and of those from which these were trained."""
    hashes = [origin.weights_hash, *(step.source_hash for step in origin.lineage if step.operation == "fit")]
    return [each for each in hashes if each is not None]


def _parse(path: Path, where: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a probe was made with, and its ceilings."""
    if not path.is_file():
        raise FileNotFoundError(f"{where} does not exist; {_MAKE}")
    try:
        probe = json.loads(path.read_text(encoding="utf-8"))
        made = {
            "schema_version": probe["schema_version"],
            "manifest of the long data": probe["data"]["manifest"],
            "context": probe["data"]["context"],
            **{name: probe["checkpoint"][name] for name in ("digest", "family", "num_parameters")},
        }
        name, digest = probe["checkpoint"]["name"], probe["checkpoint"]["digest"]
        ceilings = [
            {key: int(row[key]) for key in ("window", "stride", "blocks", "documents")}
            | {"nats": float(row["nats"]), "checkpoint": f"{name} ({digest[:12]})", "digest": digest}
            | {end: None if row[end] is None else float(row[end]) for end in ("low", "high")}
            for row in probe["ceiling"]
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: not a probe.json ({type(error).__name__}: {error}); {_MAKE}") from error
    return made, ceilings
