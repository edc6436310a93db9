"""Holds a source's headers against what its family and config demand, and reports what became of every key.

The audit reads no weights. Every stored key ends as inherited or dropped; missing, extra and misshapen keys are
collected and end the import together.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ttt_lit.checkpoint.headers import FLOAT_DTYPES
from ttt_lit.checkpoint.receipt import Receipt, TensorRecord
from ttt_lit.checkpoint.source import SourceFolder
from ttt_lit.families.family import Family, Source
from ttt_lit.model.spec import ModelSpec

TIED_COPY = "second copy of the tied embedding, equal byte for byte"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an import will do, known from the headers alone."""

    family: Family
    spec: ModelSpec
    sources: dict[str, Source]
    """Our parameter -> where it is stored."""
    receipt: Receipt
    tied_copy: tuple[str, str] | None
    """Stored names of the output head and the embedding that must prove equal, or None."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The report of one import."""

    source: str
    family: str
    files: tuple[dict[str, Any], ...]
    """Name, bytes and SHA-256 of each source file."""
    receipt: Receipt
    tokenizer: dict[str, Any]
    """Hash, files and highest token id, or the statement that there is none."""
    notes: tuple[str, ...]
    parity: dict[str, Any] | str
    """The parity report, or why there is none."""

    def to_json(self) -> str:
        document = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        document["counts"] = document.pop("receipt").counts()
        # One line per tensor: readable, and a difference between two audits shows as lines.
        head = json.dumps(document, indent=2).removesuffix("\n}")
        return head + ',\n"tensors": ' + self.receipt.to_json().partition(":")[2].lstrip()


def make_plan(source: SourceFolder, family: Family, allow: Mapping[str, str]) -> Plan:
    """Decide for every key of the source what becomes of it.

    Args:
        source: the folder, headers read.
        family: the one that its config.json names.
        allow: extra key -> reason why it may be dropped.

    Raises:
        ValueError: missing, extra, misshapen or quantised keys, or an exception that cannot be made; all are listed.
    """
    spec = family.spec_from_config(source.config)
    expected = family.stored_shapes(spec)
    stored = source.tensors
    droppable = family.dropped(spec) | dict(allow)
    copy = family.head_key if family.head_key not in expected and family.head_key not in allow else None
    extra = [key for key in stored if key not in expected and key not in droppable and key != copy]
    problems = {
        "missing": [key for key in expected if key not in stored],
        "extra": extra,
        "misshapen": [
            f"{key} {stored[key].shape} instead of {shape}"
            for key, shape in expected.items()
            if key in stored and stored[key].shape != shape
        ],
        "quantised": [f"{k} {t.dtype}" for k, t in stored.items() if k in expected and t.dtype not in FLOAT_DTYPES],
    }
    refused = _refused_exceptions(allow, expected, stored)
    if any(problems.values()) or refused:
        raise ValueError(_message(source, problems, refused))
    sources = family.sources(spec)
    records = [_inherited(name, shape, sources[name], source) for name, shape in spec.parameter_shapes().items()]
    reasons = {key: droppable.get(key, TIED_COPY) for key in stored if key not in expected}
    records += [
        TensorRecord(name=k, status="dropped", shape=stored[k].shape, dtype=stored[k].dtype, source=k, note=reason)
        for k, reason in reasons.items()
    ]
    embedding = sources["embed_tokens.weight"].key
    return Plan(
        family=family,
        spec=spec,
        sources=sources,
        receipt=Receipt(tuple(records)),
        tied_copy=(copy, embedding) if copy is not None and copy in stored else None,
    )


def parse_allow(allow: list[str] | None) -> dict[str, str]:
    """``["KEY=REASON"]`` -> key -> reason.

    Raises:
        ValueError: an entry without a key or a reason, or a key given twice.
    """
    result: dict[str, str] = {}
    for entry in allow or ():
        key, _, reason = (part.strip() for part in entry.partition("="))
        if not key or not reason or key in result:
            raise ValueError(f"allow: got {entry!r}, expected KEY=REASON with a reason, each key once")
        result[key] = reason
    return result


def print_audit(audit: Audit, console: Console) -> None:
    """The console's audit table: one row per kind of tensor, layers counted together."""
    table = Table(title=f"{audit.source} ({audit.family})", title_justify="left")
    for column in ("key", "layers", "status", "shape", "dtype", "note"):
        table.add_column(column, overflow="fold")
    rows: dict[tuple[str, str, str, str, str], int] = {}
    for record in audit.receipt.records:
        key = re.sub(r"(?<=[.\[])\d+(?=[.\]]|$)", "*", record.source or record.name)
        row = (key, record.status, " x ".join(map(str, record.shape)), record.dtype, record.note)
        rows[row] = rows.get(row, 0) + 1
    for (key, *rest), count in rows.items():
        table.add_row(key, str(count) if "*" in key else "", *rest)
    console.print(table)
    for status, totals in audit.receipt.counts().items():
        console.print(f"{status}: {totals['tensors']} tensors, {totals['parameters']:,} parameters")
    for file in audit.files:
        console.print(f"{file['name']}  {file['bytes']:,} bytes  sha256 {file['sha256']}", soft_wrap=True)
    console.print(f"tokenizer: {audit.tokenizer.get('sha256') or 'none in the source'}", soft_wrap=True)
    for note in audit.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if isinstance(audit.parity, str):
        console.print(f"parity: {audit.parity}", soft_wrap=True)


def _inherited(name: str, shape: tuple[int, ...], origin: Source, source: SourceFolder) -> TensorRecord:
    key = origin.key if origin.index is None else f"{origin.key}[{origin.index}]"
    dtype = source.tensors[origin.key].dtype
    return TensorRecord(name=name, status="inherited", shape=shape, dtype=dtype, source=key)


def _refused_exceptions(allow: Mapping[str, str], expected: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    refused = [f"{key} is part of the model, which cannot do without it" for key in allow if key in expected]
    return refused + [f"{key} is not in the checkpoint" for key in allow if key not in expected and key not in stored]


def _message(source: SourceFolder, problems: Mapping[str, list[str]], refused: list[str]) -> str:
    parts = [f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if refused:
        parts.append(f"--allow can only drop extra tensors, but {', '.join(refused)}")
    if problems["extra"]:
        parts.append("an extra tensor may be dropped with --allow KEY=REASON")
    return f"{source.name}: the checkpoint is not the model that its config.json describes: {'; '.join(parts)}"
