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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ttt_lit.checkpoint.folders import new_folder
from ttt_lit.checkpoint.headers import StoredTensor
from ttt_lit.checkpoint.receipt import LineageStep, Receipt, lineage_from_json, lineage_to_json
from ttt_lit.checkpoint.tensor_files import (
    SHARD_BYTES,
    TensorEntry,
    entry_of,
    read_tensor,
    stored_tensors,
    write_tensors,
    write_text,
)
from ttt_lit.checkpoint.tokenizer_files import copy_tokenizer
from ttt_lit.identity import hash_file, tokenizer_hash
from ttt_lit.model.spec import ModelSpec

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint folder, opened: descriptions are read, weights are not."""

    path: Path
    spec: ModelSpec
    family: str
    """Name in ``ttt_lit.families.FAMILIES``."""
    lineage: tuple[LineageStep, ...]
    receipt: Receipt
    source_config: dict[str, Any] | None
    """Parsed config.json of the Hugging Face checkpoint it came from."""
    tokenizer: Path | None
    """Folder with the tokenizer's files, or None when it is not known."""
    tokenizer_hash: str | None
    """SHA-256 that identifies the tokenizer; shards prepared with another one do not fit."""
    files: dict[str, str]
    """Relative path -> SHA-256 of every file of the folder except checkpoint.json."""

    @property
    def generation_config(self) -> str | None:
        """Text of the origin's generation_config.json."""
        name = "source/generation_config.json"
        return _read(self.path, name) if name in self.files else None

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Where each parameter lies on disk, in the order of the spec.

        Raises:
            ValueError: names or shapes differ from the spec's; the message lists the keys.
        """
        weights = [self.path / name for name in self.files if "/" not in name and name.endswith(".safetensors")]
        stored = stored_tensors(weights)
        check_state({name: tensor.shape for name, tensor in stored.items()}, self.spec, where=str(self.path))
        return {name: stored[name] for name in self.spec.parameter_shapes()}

    def state(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """All parameters. On the CPU in the stored dtype they are memory-mapped and cost no memory until touched."""
        return {name: read_tensor(stored).to(device=device, dtype=dtype) for name, stored in self.tensors.items()}

    def verify(self) -> None:
        """Hash every file.

        Raises:
            ValueError: a file that differs from what was written, is missing or is too many; all are named.
        """
        present = {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()} - {MANIFEST}
        problems = [f"{name} is missing" for name in sorted(set(self.files) - present)]
        problems += [f"{name} does not belong to it" for name in sorted(present - set(self.files))]
        problems += [
            f"{name} has changed"
            for name in sorted(present & set(self.files))
            if hash_file(self.path / name) != self.files[name]
        ]
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
    state: Mapping[str, torch.Tensor] | Mapping[str, TensorEntry],
    family: str,
    receipt: Receipt,
    lineage: tuple[LineageStep, ...],
    source_config: str | None = None,
    generation_config: str | None = None,
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Checkpoint:
    """Write a checkpoint folder.

    Args:
        path: the folder to make; must not exist.
        spec: the network.
        state: exactly the spec's parameters: tensors, or entries that are read one by one.
        family: name in ``ttt_lit.families.FAMILIES``, decides what ``export`` writes.
        receipt: accounts for exactly the spec's parameters; its dtypes become those of ``state``.
        lineage: all steps, the newest last.
        source_config: text of the origin's config.json, kept verbatim.
        generation_config: text of the origin's generation_config.json, kept verbatim.
        tokenizer: folder whose tokenizer files are copied.
        shard_bytes: weights above this size are split.

    Raises:
        ValueError: the folder exists, or state, receipt and spec do not fit each other; keys are listed.
    """
    with new_folder(path) as folder:
        files = write_weights(folder, spec=spec, state=state, shard_bytes=shard_bytes)
        write_descriptions(
            folder,
            files=files,
            spec=spec,
            family=family,
            receipt=receipt.stored_as({name: _entry(value).dtype for name, value in state.items()}),
            lineage=lineage,
            source_config=source_config,
            generation_config=generation_config,
            tokenizer=tokenizer,
        )
    return load_checkpoint(path)


def write_weights(
    folder: Path,
    *,
    spec: ModelSpec,
    state: Mapping[str, torch.Tensor] | Mapping[str, TensorEntry],
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """First half of ``save_checkpoint``, for callers that look at the weights before they describe them.

    Returns:
        File name -> SHA-256.
    """
    check_state({name: tuple(value.shape) for name, value in state.items()}, spec, where="save_checkpoint")
    entries = {name: _entry(state[name]) for name in spec.parameter_shapes()}
    return write_tensors(folder, entries, metadata={"format": "pt"}, shard_bytes=shard_bytes)


def write_descriptions(
    folder: Path,
    *,
    files: Mapping[str, str],
    spec: ModelSpec,
    family: str,
    receipt: Receipt,
    lineage: tuple[LineageStep, ...],
    source_config: str | None = None,
    generation_config: str | None = None,
    tokenizer: Path | None = None,
    audit: str | None = None,
) -> None:
    """Second half of ``save_checkpoint``: everything but the weights, whose ``files`` and hashes are given."""
    receipt.check(spec.parameter_shapes())
    written = dict(files)
    texts = {
        "spec.json": spec.to_json(),
        "receipt.json": receipt.to_json(),
        "lineage.json": lineage_to_json(lineage),
        "source/config.json": source_config,
        "source/generation_config.json": generation_config,
        "audit.json": audit,
    }
    for name, text in texts.items():
        if text is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            written[name] = write_text(folder / name, text)
    if tokenizer is not None:
        copied = copy_tokenizer(tokenizer, folder / "tokenizer")
        written.update({f"tokenizer/{name}": digest for name, digest in copied.items()})
    manifest = {
        "format_version": FORMAT_VERSION,
        "family": family,
        "tokenizer_hash": None if tokenizer is None else tokenizer_hash(tokenizer),
        "files": written,
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint folder; weights are read by ``Checkpoint.state``.

    Raises:
        FileNotFoundError: no checkpoint of ours is there.
        ValueError: another format version, or damaged descriptions; the message names the file.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    texts = {name: _read(path, name) for name in ("spec.json", "receipt.json", "lineage.json")}
    config = _read(path, "source/config.json") if "source/config.json" in manifest["files"] else None
    try:
        checkpoint = Checkpoint(
            path=path,
            spec=ModelSpec.from_json(texts["spec.json"]),
            family=manifest["family"],
            lineage=lineage_from_json(texts["lineage.json"]),
            receipt=Receipt.from_json(texts["receipt.json"]),
            source_config=None if config is None else json.loads(config),
            tokenizer=path / "tokenizer" if manifest["tokenizer_hash"] is not None else None,
            tokenizer_hash=manifest["tokenizer_hash"],
            files=manifest["files"],
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: damaged checkpoint: {error}; make it anew") from error
    checkpoint.receipt.check(checkpoint.spec.parameter_shapes())
    return checkpoint


def check_state(shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec, *, where: str) -> None:
    """Hold names and shapes against the spec.

    Raises:
        ValueError: missing, extra or misshapen keys, all listed.
    """
    expected = spec.parameter_shapes()
    found = {
        "missing": [name for name in expected if name not in shapes],
        "extra": [name for name in shapes if name not in expected],
        "misshapen": [f"{n} {shapes[n]} instead of {s}" for n, s in expected.items() if shapes.get(n, s) != s],
    }
    if any(found.values()):
        text = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in found.items() if keys)
        raise ValueError(f"{where}: the tensors do not fit the spec: {text}")


def _entry(value: torch.Tensor | TensorEntry) -> TensorEntry:
    return value if isinstance(value, TensorEntry) else entry_of(value)


def _read(path: Path, name: str) -> str:
    try:
        return (path / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path / name}: the checkpoint is incomplete; make it anew") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path / name}: damaged checkpoint: not UTF-8 text; make it anew") from None


def _read_manifest(path: Path) -> dict[str, Any]:
    if not (path / MANIFEST).is_file():
        hint = "a Hugging Face folder needs `import` first" if (path / "config.json").is_file() else "nothing is there"
        raise FileNotFoundError(f"{path}: not a checkpoint of ttt_lit ({hint}); make one with the import command")
    try:
        manifest = json.loads(_read(path, MANIFEST))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / MANIFEST}: damaged checkpoint: {error}; make it anew") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: checkpoint format {version!r}, expected {FORMAT_VERSION}; make it anew with this version"
        )
    fields = {"format_version": int, "family": str, "tokenizer_hash": str | None, "files": dict}
    wrong = [name for name, kind in fields.items() if not isinstance(manifest.get(name), kind)]
    if wrong or set(manifest) != set(fields):
        raise ValueError(f"{path / MANIFEST}: damaged checkpoint: fields {sorted(manifest)}; make it anew")
    if unsafe := [name for name in manifest["files"] if name.startswith(("/", "\\")) or ".." in Path(name).parts]:
        raise ValueError(f"{path / MANIFEST}: damaged checkpoint: names files outside the folder: {unsafe}")
    return manifest
