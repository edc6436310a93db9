"""Our checkpoint -> a Hugging Face folder that transformers loads.

Names go back to the family's, dtypes and bytes stay, and the config is the origin's wherever it still holds; it claims
no fewer positions than the model was trained on. What the family's model class cannot be (prime MLPs, windows that
differ) is refused by name: an export without it would be another model. No class has attention sinks of this kind. What
transformers runs and vLLM's own class does not is written only where it is asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

from ttt_lit.checkpoint.importing import TIED_COPY
from ttt_lit.checkpoint.store import Checkpoint, load_checkpoint, new_folder
from ttt_lit.checkpoint.tensors import DTYPES, SHARD_BYTES, num_bytes, write_tensors
from ttt_lit.checkpoint.tokenizer_files import copy_tokenizer
from ttt_lit.families import family_named

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
    config = _config(opened, engine)
    stored = family_named(opened.family).stored_names(opened.spec)
    state = {stored[name]: tensor for name, tensor in opened.tensors.items()}
    for record in opened.receipt.records:
        if record.status == "dropped" and record.note == TIED_COPY:
            state[record.name] = opened.tensors["embed_tokens.weight"]
    with new_folder(output) as folder:
        write_tensors(folder, state, shard_bytes=shard_bytes)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if opened.generation_config is not None:
            (folder / "generation_config.json").write_text(opened.generation_config, encoding="utf-8")
        if opened.tokenizer is not None:
            copy_tokenizer(opened.tokenizer, folder)
    return Path(output)


def _config(checkpoint: Checkpoint, engine: Engine) -> dict[str, Any]:
    """config.json of the export. ValueError for what the engine cannot run."""
    spec, family = checkpoint.spec, family_named(checkpoint.family)
    if sinks := [index for index, layer in enumerate(spec.layers) if layer.sink_tokens]:
        raise ValueError(
            f"attention sinks (layers {sinks}): no class of transformers keeps the first tokens visible, so they cannot be exported"
        )
    source = checkpoint.source_config
    config = family.config_from_spec(spec, None if source is None else json.loads(source))
    if engine == "any" and (problems := family.refused_by_vllm(spec)):
        raise ValueError(
            f"vLLM's class for {config['model_type']} does not run {'; '.join(problems)}, transformers does: export with --engine "
            "transformers, and serve with `vllm serve --model-impl transformers`"
        )
    trained = max((step.parameters.get("context", 0) for step in checkpoint.lineage), default=0)
    if trained > config.get("max_position_embeddings", family.default_positions):
        config["max_position_embeddings"] = trained
    # transformers reads the weights as what this field says, whatever they are stored as: the dtype of most parameters.
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + num_bytes(tensor)
    for field in [name for name in ("torch_dtype", "dtype") if name in config] or ["torch_dtype"]:
        config[field] = str(DTYPES[max(sizes, key=lambda dtype: sizes[dtype])]).removeprefix("torch.")
    return config
