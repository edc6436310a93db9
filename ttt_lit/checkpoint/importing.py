"""Hugging Face folder -> our checkpoint: audit the headers, copy tensor by tensor, prove the copy against transformers.

One tensor is in memory at a time; dtypes are kept; the same input gives the same bytes. The output appears only after
the last check has passed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ttt_lit.checkpoint.announcer import Announcer
from ttt_lit.checkpoint.audit import Audit, Plan, make_plan, parse_allow, print_audit
from ttt_lit.checkpoint.folders import new_folder
from ttt_lit.checkpoint.headers import StoredTensor
from ttt_lit.checkpoint.parity import ParityConfig, ParityReport, check_parity
from ttt_lit.checkpoint.receipt import LineageStep
from ttt_lit.checkpoint.source import SourceFolder, find_source, open_source
from ttt_lit.checkpoint.store import Checkpoint, load_checkpoint, write_descriptions, write_weights
from ttt_lit.checkpoint.tensor_files import (
    SHARD_BYTES,
    TensorEntry,
    read_tensor,
    stored_tensors,
)
from ttt_lit.checkpoint.tokenizer_files import TOKENIZER_FILES, names_eos, read_tokenizer_file
from ttt_lit.families import family_of_config
from ttt_lit.identity import hash_file, tokenizer_hash


def import_checkpoint(
    source: str,
    output: str,
    *,
    allow: list[str] | None = None,
    parity: bool = True,
    parity_config: ParityConfig | None = None,
    shard_bytes: int = SHARD_BYTES,
    trained_by: Sequence[Mapping[str, Any]] | None = None,
    console: Console | None = None,
) -> Checkpoint:
    """Import a checkpoint, print its audit and leave ``output`` behind only if everything holds.

    Args:
        source: folder of a Hugging Face checkpoint, or a hub id.
        output: folder to make; must not exist.
        allow: ``KEY=REASON`` for each extra tensor that may be dropped.
        parity: compare with transformers; off only for models that do not fit twice into memory one after the other.
        parity_config: what parity compares.
        shard_bytes: weights above this size are split.
        trained_by: the runs that trained the source, oldest first, where they are known (``name``, ``stage``, ``gpu_seconds``, ``tokens``):
            a run that starts from the import counts them as parents.
        console: where the steps and the audit are printed; standard output by default.

    Raises:
        FileNotFoundError, ValueError: no such source; anything that makes the import untrue. One line.
    """
    console = console or Console()
    say = Announcer(console)
    exceptions = parse_allow(allow)
    say.step(f"reading the headers of {source}")
    folder = open_source(*find_source(source))
    plan = make_plan(folder, family_of_config(folder.config), exceptions)
    if parity and plan.family.config_from_spec is None:
        raise ValueError(f"family {plan.family.name} has no model in transformers to compare with; switch parity off")
    tokenizer, notes = _tokenizer_identity(folder, plan)
    size = sum(path.stat().st_size for path in folder.files) / 1e9
    say.step(
        f"audit: {len(folder.tensors)} tensors of a {plan.family.name} model, {plan.spec.num_layers} layers, "
        f"{plan.spec.num_parameters():,} parameters, {size:.2f} GB; every one is accounted for"
    )
    with new_folder(output) as partial, ThreadPoolExecutor(max_workers=1) as background:
        hashes = [background.submit(hash_file, path) for path in folder.files]
        files = _copy_weights(partial, folder, plan, shard_bytes, say)
        report: dict[str, Any] | str = "not checked: switched off"
        if parity:
            proof = _prove(partial, folder, plan, parity_config or ParityConfig(), say)
            console.print(proof.summary(), soft_wrap=True)
            report = dataclasses.asdict(proof)
        audit = Audit(
            source=folder.name,
            family=plan.family.name,
            files=_file_list(folder, [digest.result() for digest in hashes]),
            receipt=plan.receipt,
            tokenizer=tokenizer,
            notes=(*folder.notes, *notes),
            parity=report,
        )
        write_descriptions(
            partial,
            files=files,
            spec=plan.spec,
            family=plan.family.name,
            receipt=plan.receipt,
            lineage=(_lineage_step(audit, exceptions, trained_by),),
            source_config=folder.config_text,
            generation_config=folder.generation_text,
            tokenizer=folder.path if tokenizer["sha256"] else None,
            audit=audit.to_json(),
        )
    print_audit(audit, console)
    return load_checkpoint(output)


def _prove(partial: Path, folder: SourceFolder, plan: Plan, config: ParityConfig, say: Announcer) -> ParityReport:
    """Parity of what was just written, read back from disk. ValueError that names the first departing layer."""
    stored = stored_tensors(sorted(partial.glob("*.safetensors")))
    state = {name: read_tensor(stored[name]) for name in plan.spec.parameter_shapes()}
    report = check_parity(folder.path.resolve(), plan.spec, state, config=config, say=say)
    report.require(folder.name)
    return report


def _file_list(folder: SourceFolder, hashes: list[str]) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(folder.files, hashes, strict=True)
    )


def audit_headers(source: str, *, allow: list[str] | None = None) -> Plan:
    """What an import would do, from the headers alone: nothing is written and no weight is read."""
    folder = open_source(*find_source(source))
    return make_plan(folder, family_of_config(folder.config), parse_allow(allow))


def _copy_weights(partial: Path, folder: SourceFolder, plan: Plan, shard_bytes: int, say: Announcer) -> dict[str, str]:
    entries: dict[str, TensorEntry] = {}
    shapes = plan.spec.parameter_shapes()
    say.step(f"writing {len(shapes)} tensors, one at a time")
    for number, (name, shape) in enumerate(shapes.items(), start=1):
        stored = folder.tensors[plan.sources[name].key]

        def read(name: str = name, stored: StoredTensor = stored, number: int = number) -> torch.Tensor:
            origin = plan.sources[name]
            whole = read_tensor(stored)
            tensor = origin.to_ours(whole if origin.index is None else whole[origin.index])
            _require_finite(f"{folder.name}: {origin.key}", tensor)
            say.progress(f"writing: tensor {number} of {len(shapes)}")
            return tensor

        entries[name] = TensorEntry(dtype=stored.dtype, shape=shape, read=read)
    if plan.tied_copy is not None:
        _require_equal(folder, *plan.tied_copy)
    return write_weights(partial, spec=plan.spec, state=entries, shard_bytes=shard_bytes)


def _require_finite(key: str, tensor: torch.Tensor) -> None:
    if tensor.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):
        raise ValueError(f"{key} holds NaN or infinite values; the file is damaged or its training diverged")


def _require_equal(folder: SourceFolder, head: str, embedding: str) -> None:
    one, other = folder.tensors[head], folder.tensors[embedding]
    same = one.dtype == other.dtype and one.shape == other.shape
    if not same or not torch.equal(_bits(read_tensor(one)), _bits(read_tensor(other))):
        raise ValueError(
            f"{folder.name}: config.json ties the output head to the embedding, but the stored {head} is not "
            f"{embedding}; set tie_word_embeddings to false, or drop it with --allow {head}=REASON"
        )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def _tokenizer_identity(folder: SourceFolder, plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """The audit's entry, and notes; an id that a text can become and that has no row is an error."""
    digest = tokenizer_hash(folder.path)
    files = [path.name for path in folder.files if path.name in TOKENIZER_FILES]
    if digest is None:
        why = f"{', '.join(files)} alone are not read" if files else "the source has none"
        return {"sha256": None, "files": files, "highest_id": None}, [
            f"no tokenizer comes with the checkpoint ({why}); put the model's tokenizer.json into the source and import again"
        ]
    found, rows, notes = read_tokenizer_file(folder.path), plan.spec.vocab_size, []
    if found is not None and found.highest_text_id >= rows:
        raise ValueError(
            f"{folder.name}: tokenizer.json has ids up to {found.highest_text_id}, the embedding {rows} rows, and a text can "
            f"become that token ({found.highest_text_token!r}); the tokenizer belongs to another model"
        )
    if found is not None and found.highest_id >= rows:
        notes.append(
            f"the tokenizer's added tokens reach id {found.highest_id}, beyond the embedding's {rows} rows; no text becomes "
            "such a token, so nothing is lost"
        )
    if not names_eos(folder.path):
        eos = folder.config.get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        token = found.tokens.get(eos) if found is not None and isinstance(eos, int) else None
        known = f' (config.json\'s eos_token_id {eos} is "{token}")' if token is not None else ""
        notes.append(
            'tokenizer_config.json names no eos_token, which prepare needs: write {"eos_token": "TOKEN"} into that file of the '
            f"source{known} and import again"
        )
    return {"sha256": digest, "files": files, "highest_id": None if found is None else found.highest_id}, notes


def _lineage_step(
    audit: Audit, exceptions: Mapping[str, str], trained_by: Sequence[Mapping[str, Any]] | None
) -> LineageStep:
    lines = "".join(f"{file['sha256']}  {file['name']}\n" for file in audit.files)
    return LineageStep(
        operation="import",
        source=audit.source,
        source_hash=hashlib.sha256(lines.encode()).hexdigest(),
        parameters=({"allow": dict(exceptions)} if exceptions else {})
        | ({"trained_by": [dict(run) for run in trained_by]} if trained_by else {}),
    )
