"""Our checkpoint -> a Hugging Face folder that transformers loads.

Names go back through the family's rules, dtypes and bytes stay, and the config is the origin's wherever it still holds;
it claims no fewer positions than the model was trained on. What the family's model class cannot be (prime MLPs, windows
that differ) is refused by name: an export without it would be another model. No class has attention sinks of this kind.
What transformers runs and vLLM's own class does not is written only where it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ttt_lit.checkpoint.audit import TIED_COPY
from ttt_lit.checkpoint.folders import new_folder
from ttt_lit.checkpoint.store import load_checkpoint
from ttt_lit.checkpoint.tensor_files import (
    SHARD_BYTES,
    TensorEntry,
    read_tensor,
    write_tensors,
    write_text,
)
from ttt_lit.checkpoint.tokenizer_files import copy_tokenizer
from ttt_lit.families import family_named
from ttt_lit.families.family import Family
from ttt_lit.model.spec import ModelSpec

_CONFIG_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


Engine = Literal["any", "transformers"]
"""Who has to run the export: transformers and vLLM's own class, or transformers alone."""


def export_checkpoint(checkpoint: str, output: str, *, engine: Engine = "any", shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a checkpoint of ours as a Hugging Face folder.

    Args:
        checkpoint: folder of a dense or windowed model; every file is checked against its hash first.
        output: folder to make; must not exist.
        engine: ``any``: refuse what vLLM's own class would refuse, or run as another model. ``transformers``: write it.
        shard_bytes: weights above this size are split.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a damaged checkpoint, or a model that the family's class cannot express; the message names what.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine: got {engine!r}, expected one of {get_args(Engine)}")
    opened = load_checkpoint(checkpoint)
    opened.verify()
    copies = {
        record.source: "embed_tokens.weight"
        for record in opened.receipt.records
        if record.status == "dropped" and record.note == TIED_COPY and record.source is not None
    }
    entries = {
        name: TensorEntry(dtype=stored.dtype, shape=stored.shape, read=_reader(stored))
        for name, stored in opened.tensors.items()
    }
    return _write(
        output,
        spec=opened.spec,
        entries=entries,
        family=family_named(opened.family),
        engine=engine,
        source_config=opened.source_config,
        positions=max((step.parameters.get("context", 0) for step in opened.lineage), default=0),
        tokenizer=opened.tokenizer,
        generation_config=opened.generation_config,
        copies=copies,
        shard_bytes=shard_bytes,
    )


def _write(
    output: str | Path,
    *,
    spec: ModelSpec,
    entries: Mapping[str, TensorEntry],
    family: Family,
    engine: Engine,
    source_config: Mapping[str, Any] | None,
    positions: int,
    tokenizer: Path | None,
    generation_config: str | None,
    copies: Mapping[str, str],
    shard_bytes: int,
) -> Path:
    """``positions``: the longest context trained on. ``copies``: stored name -> our parameter that the origin stored twice."""
    if family.config_from_spec is None:
        raise ValueError(f"family {family.name} has no Hugging Face form, so it cannot be exported")
    if sinks := [index for index, layer in enumerate(spec.layers) if layer.sink_tokens]:
        raise ValueError(
            f"attention sinks (layers {sinks}): no class of transformers keeps the first tokens visible, so they cannot be exported"
        )
    config = family.config_from_spec(spec, source_config)
    if engine == "any" and (problems := family.refused_by_vllm(spec)):
        raise ValueError(
            f"vLLM's class for {config['model_type']} does not run {'; '.join(problems)}, transformers does: export with --engine "
            "transformers, and serve with `vllm serve --model-impl transformers`"
        )
    if positions > config.get("max_position_embeddings", family.default_positions):
        config["max_position_embeddings"] = positions
    # transformers reads the weights as what this field says, whatever they are stored as.
    for field in [name for name in ("torch_dtype", "dtype") if name in config] or ["torch_dtype"]:
        config[field] = _CONFIG_DTYPES[_common_dtype(entries)]
    theirs = {source.key: entries[name] for name, source in family.sources(spec).items()}
    theirs.update({key: entries[name] for key, name in copies.items()})
    with new_folder(output) as folder:
        write_tensors(folder, theirs, metadata={"format": "pt"}, shard_bytes=shard_bytes)
        write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        if generation_config is not None:
            write_text(folder / "generation_config.json", generation_config)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
    return Path(output)


def _common_dtype(entries: Mapping[str, TensorEntry]) -> str:
    """The dtype of most parameters, which is what transformers reads the checkpoint as."""
    sizes: dict[str, int] = {}
    for entry in entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _reader(stored: Any) -> Callable[[], torch.Tensor]:
    return lambda: read_tensor(stored)
