"""``python cli.py probe``: measure what a conversion will do to a model, write down every result at once, and say what it means."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from ttt_lit.convert.fast_mlp import TTTConfig
from ttt_lit.data.stream import TokenDataModule
from ttt_lit.model.decoder import Decoder
from ttt_lit.probe.blocks import held_out_blocks
from ttt_lit.probe.config import (
    CLIP,
    Plan,
    Precision,
    ProbeConfig,
    choose_device,
    choose_precision,
    layer_policy,
    make_plan,
)
from ttt_lit.probe.figure import picture
from ttt_lit.probe.report import markdown, overlay, unfinished
from ttt_lit.probe.rows import Key, Rows
from ttt_lit.probe.summary import summarise
from ttt_lit.probe.tasks import Task, Tasks, Values
from ttt_lit.record.codec import write_atomic
from ttt_lit.report.drawing import png_bytes
from ttt_lit.train.origin import origin_of_checkpoint
from ttt_lit.train.parallel import fill
from ttt_lit.train.start import Start, StartConfig, resolve_start

SCHEMA_VERSION = 1
NAME = "probe.json"


def probe(config: ProbeConfig, command: str) -> int:
    """Run a probe, or continue the one in the same folder. Returns the exit status: 130 after Ctrl-C, which keeps what was measured."""
    data = TokenDataModule(long=config.data)
    data.setup()
    plan = make_plan(config, config.context or data.manifest("long").context)
    device = choose_device(config.device)
    precision = config.precision or choose_precision(device)
    start = _start(config)
    data.check_model(start.spec.vocab_size, start.origin.tokenizer_hash)
    results = Results(config, plan, precision, start, data)
    held_out = data.manifest("long").validation.documents
    tasks = _tasks(config, plan, device, start, data, results.rows)
    windows = ", ".join(f"{window:,}" for window in plan.windows)
    counts = f"{len(tasks.blocks)} of {held_out} held-out documents, {plan.context:,} tokens of each"
    print(f"{config.folder}: {counts}, windows {windows}, {precision} on {device}", flush=True)
    try:
        ended = _measure(tasks, results, config)
        readable = results.write(tasks, command)
    except KeyboardInterrupt:
        results.write(tasks, command)
        print(f"{config.folder}: stopped, what was measured is kept; the same command continues")
        return 130
    files = "; probe.md says what it means, probe.yaml is for fit --config" if readable else ""
    print(f"{config.folder}: {ended}{files}")
    return 0


def _measure(tasks: Tasks, results: Results, config: ProbeConfig) -> str:
    """Every task that has no rows yet. Returns how it ended, in words."""
    ahead = (task for _, phase in tasks.phases for task in phase() if not tasks.has(task))
    left = sum({(task.keys, task.block.id): task.work for task in ahead}.values())
    began, done = time.monotonic(), 0.0
    half = results.header["settings"]["precision"] == "bf16-mixed"
    for _, phase in tasks.phases:
        for task in phase():
            if tasks.has(task):
                continue
            spent = time.monotonic() - began
            if config.max_minutes is not None and done and spent * (1 + task.work / done) > 60 * config.max_minutes:
                return f"stopped before --max-minutes {config.max_minutes:g} are over; the same command continues"
            with torch.autocast(tasks.device.type, torch.bfloat16, enabled=half):
                found = list(task.run())
            done += task.work
            results.add(task, found, time.monotonic() - began - spent)
            results.save(tasks)
            minutes = (time.monotonic() - began) / done * max(0.0, left - done) / 60
            number = tasks.blocks.index(task.block) + 1
            print(
                f"about {minutes:.0f} min left; document {number} of {len(tasks.blocks)}, {task.title}: {_said(found)}",
                flush=True,
            )
    return "finished"


def _said(found: Sequence[tuple[Key, Values]]) -> str:
    """What a task found, in nats per token."""
    if "fresh" in found[0][1]:
        return f"{found[0][1]['dense']:.4f} → {found[0][1]['fresh']:.4f}"
    if len(found) == 1:
        return f"{found[0][1]['loss']:.4f}"
    key, values = min(found, key=lambda each: each[1]["loss"])
    return f"{values['loss']:.4f} at best, with {key[-1]:g}"


class Results:
    """What a folder holds of a probe, and the files that it is written to.

    Raises:
        ValueError: the folder holds a probe of something else.
    """

    def __init__(
        self, config: ProbeConfig, plan: Plan, precision: Precision, start: Start, data: TokenDataModule
    ) -> None:
        self.folder, self.plan, self.rows, self.seconds = config.folder, plan, Rows(), 0.0
        self.header: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "checkpoint": {
                "name": config.checkpoint,
                "digest": start.origin.weights_hash,
                "family": start.origin.family,
                "num_parameters": start.origin.spec.num_parameters(),
            },
            "data": {"name": config.data, "manifest": data.identity("long"), "context": plan.context},
            "settings": {
                "precision": precision,
                "chunk": plan.chunk,
                "clip": CLIP,
                "ttt_layers": list(start.spec.ttt_layers) if plan.rates else None,
                "imported_windows": [layer.window for layer in start.spec.layers],
            },
        }
        long = data.manifest("long")
        self.folder_of_data = {"folder_context": long.context, "held_out_documents": long.validation.documents}
        path = self.folder / NAME
        if path.is_file():
            self._continue(json.loads(path.read_text(encoding="utf-8")))

    def _continue(self, kept: dict[str, Any]) -> None:
        if kept.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{self.folder / NAME}: got another version of the file, expected {SCHEMA_VERSION}; give another --output"
            )
        # Without an inner rate nothing depends on these; what the folder has was measured with its own.
        settings = self.header["settings"]
        for name in ("chunk", "ttt_layers"):
            if settings[name] is None or kept["settings"].get(name) is None:
                settings[name] = kept["settings"][name] = settings[name] or kept["settings"].get(name)
        # Names are how files are reached, digests what they are.
        differing = [
            f"{part}.{key}"
            for part in ("checkpoint", "data", "settings")
            for key, now in self.header[part].items()
            if key != "name" and kept[part].get(key) != now
        ]
        if differing:
            raise ValueError(
                f"{self.folder / NAME} is of another probe ({', '.join(differing)} differ); give another --output, or delete it"
            )
        self.rows, self.seconds = Rows.from_json(kept["rows"]), float(kept["seconds"])

    def add(self, task: Task, found: Sequence[tuple[Key, Values]], seconds: float) -> None:
        """Keep what a task found."""
        for key, values in found:
            self.rows.add(key, task.block.id, task.block.document, values)
        self.seconds += seconds

    def save(self, tasks: Tasks) -> dict[str, Any]:
        """Write ``probe.json``, and return it."""
        summary = summarise(self.rows, self.plan)
        imported = summary["imported"] or {"blocks": 0, "documents": 0}
        counts = {name: imported[name] for name in ("blocks", "documents")} | {"planned_documents": len(tasks.blocks)}
        missing = tasks.missing()
        machine = {"seconds": self.seconds, "threads": torch.get_num_threads(), "torch": torch.__version__}
        whole = self.header | {"data": self.header["data"] | self.folder_of_data | counts}
        whole |= {"finished": not missing, "missing": missing} | summary | machine | {"rows": self.rows.to_json()}
        write_atomic(self.folder / NAME, json.dumps(whole, indent=1) + "\n")
        return whole

    def write(self, tasks: Tasks, command: str) -> bool:
        """Write the readable files, and a line to the terminal where something is missing. Returns whether there was enough
        for files."""
        whole = self.save(tasks)
        readable = whole["recommendation"] is not None
        if readable:
            write_atomic(self.folder / "probe.md", markdown(whole, command))
            write_atomic(self.folder / "probe.yaml", overlay(whole, self.folder / NAME))
            write_atomic(self.folder / "probe.png", png_bytes(picture(whole)))
        for line in unfinished(whole):
            print(f"{self.folder}: {line}")
        return readable


def _start(config: ProbeConfig) -> Start:
    """The network with prime MLPs that are copies, of a checkpoint that has none."""
    origin = origin_of_checkpoint(config.checkpoint)
    if origin.spec != origin.shape_only().spec:
        raise ValueError(
            f"--checkpoint: {config.checkpoint} has TTT layers already, or narrowed windows; a probe says what a conversion will do, so "
            "give it the checkpoint that is to be converted"
        )
    if origin.tokenizer_hash is None:
        raise ValueError(
            f"--checkpoint: {config.checkpoint} has no tokenizer, so nothing tells whether the data are its own; import it from a folder "
            "that holds its tokenizer"
        )
    return resolve_start(
        StartConfig(init_from=config.checkpoint), TTTConfig(layers=layer_policy(config.ttt_layers, origin.spec))
    )


def _tasks(
    config: ProbeConfig, plan: Plan, device: torch.device, start: Start, data: TokenDataModule, rows: Rows
) -> Tasks:
    blocks = held_out_blocks(data, plan.context, config.max_documents)
    with torch.device("meta"):
        decoder = Decoder(start.spec)
    fill(decoder.to_empty(device=device), start.state)
    decoder.requires_grad_(False)
    has_bos = data.manifest("long").bos_id is not None
    return Tasks(decoder, start.spec, blocks, config, plan, has_bos=has_bos, rows=rows)
