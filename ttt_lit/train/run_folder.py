"""A run's folder belongs to one process at a time, to one configuration for good, and shows nothing of a start that was refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import yaml

from ttt_lit.record.codec import refuse_constant, write_atomic
from ttt_lit.record.schema import ENDED, RECORD_NAME, Status
from ttt_lit.train.lock import RunLock
from ttt_lit.train.resume import resume_file

CONFIG_NAME = "config.yaml"

# Settings that change what is shown, or how fast and how safely the same numbers are made: no part of what a run is, so a start may
# change them. Section, or class of a callback → its keys; None: the callback itself may come and go.
NOT_IDENTITY: dict[str, tuple[str, ...] | None] = {
    "run": ("root",),  # the folder that is compared with says it already; as a path it can be written in many ways
    "trainer": ("enable_progress_bar",),
    "data": ("num_workers", "verify"),
    "callbacks.stage_checkpoint.StageCheckpoint": ("every_seconds",),
    "callbacks.heartbeat.Heartbeat": ("every_seconds",),
    "callbacks.step_log.StepLog": ("every_steps",),
    "callbacks.progress.StageProgressBar": None,
}


@contextmanager
def claimed(folder: Path, config: dict[str, Any]) -> Iterator[None]:
    """The right to train the run of ``folder`` with this configuration. For global rank 0: nothing is touched before the lock is held.

    A body that ends with an error before the run's record is written has refused to start: what it left behind is removed.

    Raises:
        RuntimeError: another process trains the run.
        ValueError: the run was started with another configuration.
    """
    lock = RunLock(folder)
    lock.acquire()
    try:
        before = _Before(folder)
        try:
            _keep_config(folder, config)
            yield
        except BaseException:
            before.restore()
            raise
    finally:
        lock.release()


def is_finished(folder: Path) -> bool:
    """Whether the record says so. A diverged run is a ValueError: continuing would diverge again. So is a damaged record."""
    path = folder / RECORD_NAME
    if not path.is_file():
        return False
    status, reason = _ending(path)
    if status == "diverged":
        raise ValueError(f"{folder}: this run diverged ({reason}); change the configuration and give another --run.id")
    return status == "finished"


def has_ended(folder: Path) -> bool:
    """Whether no start would continue the run. ValueError for a damaged record."""
    path = folder / RECORD_NAME
    return path.is_file() and _ending(path)[0] in ENDED


def _ending(path: Path) -> tuple[str, str | None]:
    """Status and reason of a record of any version: the rest is written anew. ValueError in one line for what no run writes."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
        status, reason = (record.get("status"), record.get("reason")) if isinstance(record, dict) else (None, None)
        if not isinstance(status, str) or status not in get_args(Status) or not isinstance(reason, str | None):
            raise ValueError(f"got status {status!r:.80} and reason {reason!r:.80}")
    except ValueError as error:  # of the text's encoding, too
        raise ValueError(
            f"{path}: not a readable run record: {error}; bring the file back, or give another --run.id, or remove the file: then the run "
            "continues from its last resume file, or from the beginning if it has none, and writes its record anew"
        ) from error
    return status, reason


class _Before:
    """What a folder held before a start."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, set(folder.iterdir())
        self.record = _stamp(folder / RECORD_NAME)
        self.config = _bytes(folder / CONFIG_NAME)

    def restore(self) -> None:
        """Unless the start came to train. Lightning opens its logger before anything is checked."""
        if _stamp(self.folder / RECORD_NAME) != self.record:
            return
        loggers = [self.folder / "hparams.yaml", *self.folder.glob("events.out.tfevents.*")]
        for path in set(loggers) - self.files:
            path.unlink(missing_ok=True)
        if self.config is None:
            (self.folder / CONFIG_NAME).unlink(missing_ok=True)
        elif self.config != _bytes(self.folder / CONFIG_NAME):
            write_atomic(self.folder / CONFIG_NAME, self.config)


def _keep_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the resolved configuration into a new run's folder; a run that has begun must have the same one."""
    path, kept = folder / CONFIG_NAME, begun_config(folder)
    if kept is not None:
        changed = differences(kept, config)
        if changed:
            raise ValueError(
                f"{folder}: the run was started with another configuration ({', '.join(changed[:5])} differ); compare with {path}, and go "
                "back to it, or make it a run of its own (a matrix: another name or a label of an axis; fit: another --run.id)"
            )
        return
    write_atomic(path, yaml.safe_dump(config, sort_keys=False).encode())


def begun_config(folder: Path) -> dict[str, Any] | None:
    """The configuration that a run began to train with; None before that, when a start may bring another one.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / CONFIG_NAME
    begun = (folder / RECORD_NAME).exists() or resume_file(folder) is not None
    if not begun or not path.is_file():
        return None
    try:
        kept = yaml.safe_load(path.read_text(encoding="utf-8"))  # as it was written: a text 1e3 is text again
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        kept = error
    if not isinstance(kept, dict):
        raise ValueError(
            f"{path}: damaged, got {type(kept).__name__}, expected the run's settings; give another --run.id"
        )
    return kept


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted names of the settings that make two resolved configurations two runs."""
    return _differences(_identity(old), _identity(new))


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what ``NOT_IDENTITY`` names, and without the settings of stages that are off."""
    kept = {name: _without(section, NOT_IDENTITY.get(name, ())) for name, section in config.items()}
    model = kept.get("model")
    if isinstance(model, dict) and isinstance(model.get("stages"), dict):
        kept["model"] = model | {"stages": {name: _if_enabled(stage) for name, stage in model["stages"].items()}}
    trainer = kept.get("trainer")
    if isinstance(trainer, dict) and trainer.get("callbacks"):
        named = [one for one in trainer["callbacks"] if NOT_IDENTITY.get(one["class_path"], ()) is not None]
        kept["trainer"] = trainer | {"callbacks": [_identity_of_callback(one) for one in named]}
    return kept


def _if_enabled(stage: Any) -> Any:
    return stage if isinstance(stage, dict) and stage.get("enabled") else None


def _identity_of_callback(callback: dict[str, Any]) -> dict[str, Any]:
    keys = NOT_IDENTITY.get(callback["class_path"], ())
    return callback | {"init_args": _without(callback.get("init_args") or {}, keys)}


def _without(section: Any, keys: tuple[str, ...] | None) -> Any:
    return (
        {key: value for key, value in section.items() if key not in (keys or ())}
        if isinstance(section, dict)
        else section
    )


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(old) + [key for key in new if key not in old]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)]
    return [] if old == new else [where]


def _stamp(path: Path) -> tuple[int, int] | None:
    """Differs after every write: a record is replaced, never changed in place."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
