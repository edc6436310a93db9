"""Our checkpoint folder: weights, and everything needed to know what they are.

::

    checkpoint.json        format version, family, SHA-256 of every other file, tokenizer hash
    model.safetensors      parameters by our names (sharded with an index above 5 GB)
    spec.json              the network
    receipt.json           what became of every tensor
    lineage.json           the commands that led here
    source/                config.json and generation_config.json of the origin, verbatim, when known
    tokenizer/             tokenizer files, verbatim, when known
    audit.json             the import's report, when imported

A folder is complete or absent: it is written beside its place and renamed. Loading is strict: names and shapes equal
``spec.parameter_shapes()``, or the error lists the keys.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ttt_lit.checkpoint.receipt import LineageStep, Receipt, lineage_from_json, lineage_to_json
from ttt_lit.checkpoint.tensors import (
    SHARD_BYTES,
    StoredTensor,
    check_shapes,
    dtype_name,
    read_headers,
    shapes_of,
    write_tensors,
)
from ttt_lit.checkpoint.tokenizer_files import copy_tokenizer
from ttt_lit.identity import hash_file, tokenizer_hash
from ttt_lit.model.spec import ModelSpec

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"
MANIFEST_FIELDS = {"format_version", "family", "tokenizer_hash", "files"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint folder, opened: descriptions are read, weights are not."""

    path: Path
    spec: ModelSpec
    family: str
    """Name in ``ttt_lit.families.FAMILIES``."""
    lineage: tuple[LineageStep, ...]
    receipt: Receipt
    source_config: str | None
    """Text of the config.json of the Hugging Face checkpoint it came from."""
    generation_config: str | None
    """Text of its generation_config.json."""
    tokenizer: Path | None
    """Folder with the tokenizer's files, or None when it is not known."""
    tokenizer_hash: str | None
    """SHA-256 that identifies the tokenizer; shards prepared with another one do not fit."""
    files: dict[str, str]
    """Relative path -> SHA-256 of every file of the folder except checkpoint.json."""

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Where each parameter lies on disk, in the order of the spec.

        Raises:
            ValueError: names or shapes differ from the spec's; the message lists the keys.
        """
        stored = read_headers(
            self.path / name for name in self.files if "/" not in name and name.endswith(".safetensors")
        )
        check_shapes(shapes_of(stored), self.spec.parameter_shapes(), where=str(self.path))
        return {name: stored[name] for name in self.spec.parameter_shapes()}

    def state(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """All parameters. On the CPU in the stored dtype they are memory-mapped and cost no memory until touched."""
        return {name: stored.read().to(device=device, dtype=dtype) for name, stored in self.tensors.items()}

    def verify(self) -> None:
        """Hash every file.

        Raises:
            ValueError: a file that differs from what was written, is missing or is too many; all are named.
        """
        present = _hashes(self.path)
        present.pop(MANIFEST)
        problems = [f"{name} is missing" for name in sorted(self.files.keys() - present)]
        problems += [f"{name} does not belong to it" for name in sorted(present.keys() - self.files)]
        problems += [f"{n} has changed" for n in sorted(present) if self.files.get(n, present[n]) != present[n]]
        if problems:
            raise ValueError(f"{self.path}: damaged checkpoint: {'; '.join(problems)}; make it anew")

    @property
    def weights_hash(self) -> str:
        """Identity of the weights, for lineages: the hash of the weight file, or over those of the shards in order."""
        hashes = [self.files[name] for name in sorted(self.files) if name.endswith(".safetensors")]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def save_checkpoint(
    path: str | Path,
    *,
    spec: ModelSpec,
    state: Mapping[str, torch.Tensor | StoredTensor],
    family: str,
    receipt: Receipt,
    lineage: tuple[LineageStep, ...],
    source_config: str | None = None,
    generation_config: str | None = None,
    tokenizer: Path | None = None,
    audit: Callable[[Path], str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Checkpoint:
    """Write a checkpoint folder.

    Args:
        path: the folder to make; must not exist.
        spec: the network.
        state: exactly the spec's parameters: tensors, or stored ones that are read when their turn comes.
        family: name in ``ttt_lit.families.FAMILIES``, decides what ``export`` writes.
        receipt: accounts for exactly the spec's parameters; its dtypes become those of ``state``.
        lineage: all steps, the newest last.
        source_config: text of the origin's config.json, kept verbatim.
        generation_config: text of the origin's generation_config.json, kept verbatim.
        tokenizer: folder whose tokenizer files are copied.
        audit: called with the folder once its weights are written; gives the text of audit.json, or raises.
        shard_bytes: weights above this size are split.

    Raises:
        ValueError: the folder exists, or state, receipt and spec do not fit each other; keys are listed.
    """
    shapes = spec.parameter_shapes()
    check_shapes(shapes_of(state), shapes, where="save_checkpoint")
    receipt = receipt.stored_as({name: dtype_name(value) for name, value in state.items()})
    receipt.check(shapes)
    with new_folder(path) as folder:
        write_tensors(folder, {name: state[name] for name in shapes}, shard_bytes=shard_bytes)
        texts = {
            "spec.json": spec.to_json(),
            "receipt.json": receipt.to_json(),
            "lineage.json": lineage_to_json(lineage),
            "source/config.json": source_config,
            "source/generation_config.json": generation_config,
            "audit.json": audit(folder) if audit is not None else None,
        }
        for name, text in texts.items():
            if text is not None:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder / "tokenizer")
        manifest = {
            "format_version": FORMAT_VERSION,
            "family": family,
            "tokenizer_hash": None if tokenizer is None else tokenizer_hash(tokenizer),
            "files": _hashes(folder),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return load_checkpoint(path)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint folder; weights are read by ``Checkpoint.state``.

    Raises:
        FileNotFoundError: no checkpoint of ours is there, or a part of it is missing.
        ValueError: another format version, or damaged descriptions.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        hint = "a Hugging Face folder needs `import` first" if (path / "config.json").is_file() else "nothing is there"
        raise FileNotFoundError(f"{path}: not a checkpoint of ttt_lit ({hint}); make one with the import command")
    try:
        return _load(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename}: the checkpoint is incomplete; make it anew") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: unusable checkpoint: {error}; make it anew with this version") from error


def _load(path: Path) -> Checkpoint:
    def text(name: str) -> str:
        return (path / name).read_text(encoding="utf-8")

    manifest = json.loads(text(MANIFEST))
    if (version := manifest.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"format_version is {version!r}, expected {FORMAT_VERSION}")
    if set(manifest) != MANIFEST_FIELDS:
        raise ValueError(f"{MANIFEST} has the fields {sorted(manifest)}, expected {sorted(MANIFEST_FIELDS)}")
    files = manifest["files"]
    if unsafe := [name for name in files if name.startswith(("/", "\\")) or ".." in Path(name).parts]:
        raise ValueError(f"{MANIFEST} names files outside the folder: {unsafe}")
    checkpoint = Checkpoint(
        path=path,
        spec=ModelSpec.from_json(text("spec.json")),
        family=manifest["family"],
        lineage=lineage_from_json(text("lineage.json")),
        receipt=Receipt.from_json(text("receipt.json")),
        source_config=text("source/config.json") if "source/config.json" in files else None,
        generation_config=text("source/generation_config.json") if "source/generation_config.json" in files else None,
        tokenizer=path / "tokenizer" if manifest["tokenizer_hash"] is not None else None,
        tokenizer_hash=manifest["tokenizer_hash"],
        files=files,
    )
    checkpoint.receipt.check(checkpoint.spec.parameter_shapes())
    return checkpoint


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` that takes its name when the body ends well and vanishes when it does not.

    Raises:
        ValueError: ``path`` exists.
    """
    refuse_existing(path)
    path = Path(path).absolute()
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in filter(Path.is_file, partial.rglob("*")):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(path: str | Path) -> None:
    """ValueError if an output folder is there already."""
    if Path(path).exists() or Path(path).is_symlink():
        raise ValueError(f"{path} exists already; choose another output folder or remove it")


def _hashes(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file."""
    return {p.relative_to(folder).as_posix(): hash_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}
