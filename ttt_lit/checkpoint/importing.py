"""Hugging Face folder -> our checkpoint: audit the headers, copy the tensors, prove the copy against transformers.

Every stored key ends as inherited or dropped. Dtypes are kept; the same input gives the same bytes. The output appears
only after the last check has passed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ttt_lit.checkpoint.announcer import Announcer
from ttt_lit.checkpoint.parity import ParityConfig, ParityReport, check_parity
from ttt_lit.checkpoint.receipt import LineageStep, Receipt, TensorRecord
from ttt_lit.checkpoint.source import SourceFolder, find_source, open_source
from ttt_lit.checkpoint.store import Checkpoint, refuse_existing, save_checkpoint
from ttt_lit.checkpoint.tensors import DTYPES, SHARD_BYTES, StoredTensor, listed, mismatch, read_headers, shapes_of
from ttt_lit.checkpoint.tokenizer_files import describe_tokenizer
from ttt_lit.families import family_of_config
from ttt_lit.families.family import Family
from ttt_lit.identity import hash_file
from ttt_lit.model.spec import ModelSpec

TIED_COPY = "second copy of the tied embedding, equal byte for byte"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an import will do, known from the headers alone."""

    folder: SourceFolder
    family: Family
    spec: ModelSpec
    stored: dict[str, StoredTensor]
    """Our parameter -> where it is stored."""
    exceptions: dict[str, str]
    """Stored tensor that is dropped on request -> reason."""
    receipt: Receipt


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
    say.step(f"reading the headers of {source}")
    plan = audit_headers(source, allow=allow)
    folder, spec = plan.folder, plan.spec
    tokenizer, notes = describe_tokenizer(folder.path, rows=spec.vocab_size, eos=folder.config.get("eos_token_id"))
    refuse_existing(output)
    size = sum(path.stat().st_size for path in folder.files) / 1e9
    say.step(
        f"audit: {len(folder.tensors)} tensors of a {plan.family.name} model, {spec.num_layers} layers, "
        f"{spec.num_parameters():,} parameters, {size:.2f} GB; every one is accounted for"
    )
    _check_values(plan, say)
    say.step(f"hashing {len(folder.files)} files")
    audit: dict[str, Any] = {
        "source": folder.name,
        "family": plan.family.name,
        "files": [{"name": p.name, "bytes": p.stat().st_size, "sha256": hash_file(p)} for p in folder.files],
        "tokenizer": tokenizer,
        "notes": [*folder.notes, *notes],
        "parity": "not checked: switched off",
        "counts": plan.receipt.counts(),
    }

    def finish(written: Path) -> str:
        if parity:
            proof = _prove(written, plan, parity_config, say)
            console.print(proof.summary(), soft_wrap=True)
            audit["parity"] = dataclasses.asdict(proof)
        # One line per tensor: readable, and a difference between two audits shows as lines.
        return json.dumps(audit, indent=2).removesuffix("\n}") + ",\n" + plan.receipt.to_json().removeprefix("{")

    say.step(f"writing {len(plan.stored)} tensors")
    checkpoint = save_checkpoint(
        output,
        spec=spec,
        state=plan.stored,
        family=plan.family.name,
        receipt=plan.receipt,
        lineage=(_lineage_step(plan, audit["files"], trained_by),),
        source_config=folder.config_text,
        generation_config=folder.generation_text,
        tokenizer=folder.path if tokenizer["sha256"] else None,
        audit=finish,
        shard_bytes=shard_bytes,
    )
    _print_audit(audit, plan.receipt, console)
    return checkpoint


def audit_headers(source: str, *, allow: list[str] | None = None) -> Plan:
    """What an import would do, from the headers alone: nothing is written and no weight is read.

    Raises:
        FileNotFoundError, ValueError: no such source; missing, extra, misshapen or quantised keys, or an exception that
            cannot be made; all are listed.
    """
    exceptions = _parse_allow(allow)
    folder = open_source(*find_source(source))
    family = family_of_config(folder.config)
    spec, stored = family.spec_from_config(folder.config), folder.tensors
    names = family.stored_names(spec)
    expected = {names[name]: shape for name, shape in spec.parameter_shapes().items()}
    reasons = dict(exceptions)
    if (head := family.stored_name("lm_head.weight")) not in expected:
        reasons.setdefault(head, TIED_COPY)
    kept = {key: tensor for key, tensor in stored.items() if key in expected or key not in reasons}
    problems = mismatch(shapes_of(kept), expected)
    if quantised := [f"{key} {kept[key].dtype}" for key in expected if key in kept and kept[key].dtype not in DTYPES]:
        problems["quantised"] = quantised
    refused = [f"{key} is part of the model, which cannot do without it" for key in exceptions if key in expected]
    refused += [f"{key} is not in the checkpoint" for key in exceptions if key not in expected and key not in stored]
    if refused:
        problems["--allow can only drop extra tensors, but"] = refused
    if problems:
        hint = "; an extra tensor may be dropped with --allow KEY=REASON" if "extra" in problems else ""
        raise ValueError(
            f"{folder.name}: the checkpoint is not the model that its config.json describes: {listed(problems)}{hint}"
        )
    records = [
        TensorRecord(name=name, status="inherited", shape=stored[key].shape, dtype=stored[key].dtype, source=key)
        for name, key in names.items()
    ]
    records += [
        TensorRecord(name=k, status="dropped", shape=t.shape, dtype=t.dtype, source=k, note=reasons[k])
        for k, t in stored.items()
        if k not in expected
    ]
    return Plan(
        folder=folder,
        family=family,
        spec=spec,
        stored={name: stored[key] for name, key in names.items()},
        exceptions=exceptions,
        receipt=Receipt(tuple(records)),
    )


def _parse_allow(allow: list[str] | None) -> dict[str, str]:
    """``["KEY=REASON"]`` -> key -> reason. ValueError for an entry without a key or a reason, or a key given twice."""
    result: dict[str, str] = {}
    for entry in allow or ():
        key, _, reason = (part.strip() for part in entry.partition("="))
        if not key or not reason or key in result:
            raise ValueError(f"allow: got {entry!r}, expected KEY=REASON with a reason, each key once")
        result[key] = reason
    return result


def _check_values(plan: Plan, say: Announcer) -> None:
    """ValueError for values that are not finite, and for a head that should be the embedding's copy and is not."""
    name = plan.folder.name
    for number, stored in enumerate(plan.stored.values(), start=1):
        tensor = stored.read()
        if tensor.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):
            raise ValueError(
                f"{name}: {stored.name} holds NaN or infinite values; the file is damaged or its training diverged"
            )
        say.progress(f"checking: tensor {number} of {len(plan.stored)}")
    for record in plan.receipt.records:
        if record.note == TIED_COPY:
            head, embedding = plan.folder.tensors[record.name], plan.stored["embed_tokens.weight"]
            same = head.dtype == embedding.dtype and head.shape == embedding.shape
            if not same or not torch.equal(*(t.read().view(-1).view(torch.uint8) for t in (head, embedding))):
                raise ValueError(
                    f"{name}: config.json ties the output head to the embedding, but the stored {head.name} is not "
                    f"{embedding.name}; set tie_word_embeddings to false, or drop it with --allow {head.name}=REASON"
                )


def _prove(written: Path, plan: Plan, config: ParityConfig | None, say: Announcer) -> ParityReport:
    """Parity of what was just written, read back from disk. ValueError that names the first departing layer."""
    state = {name: stored.read() for name, stored in read_headers(written.glob("*.safetensors")).items()}
    report = check_parity(plan.folder.path.resolve(), plan.spec, state, config=config, say=say)
    report.require(plan.folder.name)
    return report


def _lineage_step(
    plan: Plan, files: Sequence[Mapping[str, Any]], trained_by: Sequence[Mapping[str, Any]] | None
) -> LineageStep:
    lines = "".join(f"{file['sha256']}  {file['name']}\n" for file in files)
    return LineageStep(
        operation="import",
        source=plan.folder.name,
        source_hash=hashlib.sha256(lines.encode()).hexdigest(),
        parameters=({"allow": plan.exceptions} if plan.exceptions else {})
        | ({"trained_by": [dict(run) for run in trained_by]} if trained_by else {}),
    )


def _print_audit(audit: Mapping[str, Any], receipt: Receipt, console: Console) -> None:
    """One row per kind of tensor, layers counted together; then files, tokenizer and notes."""
    table = Table(title=f"{audit['source']} ({audit['family']})", title_justify="left")
    for column in ("key", "layers", "status", "shape", "dtype", "note"):
        table.add_column(column, overflow="fold")
    rows: dict[tuple[str, str, str, str, str], int] = {}
    for record in receipt.records:
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", record.source or record.name)
        row = (key, record.status, " x ".join(map(str, record.shape)), record.dtype, record.note)
        rows[row] = rows.get(row, 0) + 1
    for (key, *rest), count in rows.items():
        table.add_row(key, str(count) if "*" in key else "", *rest)
    console.print(table)
    lines = [f"{s}: {t['tensors']} tensors, {t['parameters']:,} parameters" for s, t in audit["counts"].items()]
    lines += [f"{file['name']}  {file['bytes']:,} bytes  sha256 {file['sha256']}" for file in audit["files"]]
    lines.append(f"tokenizer: {audit['tokenizer']['sha256'] or 'none in the source'}")
    lines += [f"note: {note}" for note in audit["notes"]]
    if isinstance(audit["parity"], str):
        lines.append(f"parity: {audit['parity']}")
    console.print("\n".join(lines), soft_wrap=True)
