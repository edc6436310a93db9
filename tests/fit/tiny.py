"""A run small enough for a test: real text, real shards, a real checkpoint, a real command line."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from ttt_lit.checkpoint.receipt import Receipt
from ttt_lit.checkpoint.store import save_checkpoint
from ttt_lit.data.prepare import PrepareConfig, prepare
from ttt_lit.model.decoder import Decoder
from ttt_lit.model.spec import LayerSpec, ModelSpec

VOCAB, SHORT, LONG, CHUNK = 300, 16, 32, 8
GENERATION = '{"eos_token_id":   [0, 5]}'


def make_world(folder: Path) -> Path:
    """Write a corpus, a tokenizer, a short and a long data set and a dense checkpoint below ``folder``."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    (folder / "corpus").mkdir(parents=True)
    for number in range(40):
        (folder / "corpus" / f"{number:02d}.txt").write_text(" ".join(rng.choices(words, k=400)), encoding="utf-8")
    for name, context, layout in (("short", SHORT, "packed"), ("long", LONG, "per_document")):
        config = PrepareConfig(
            source=str(folder / "corpus"),
            tokenizer=str(folder / "tokenizer"),
            output=str(folder / name),
            context=context,
            layout=layout,
            train_tokenizer=VOCAB,
            validation_fraction=0.2,
            num_workers=0,
        )
        prepare(config, progress=False)
    make_checkpoint(folder / "checkpoint", tokenizer=folder / "tokenizer")
    return folder


def tiny_spec(num_layers: int = 4) -> ModelSpec:
    return ModelSpec(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        layers=(LayerSpec(),) * num_layers,
        qkv_bias=True,
    )


def make_checkpoint(path: Path, *, tokenizer: Path | None, seed: int = 1) -> None:
    spec = tiny_spec()
    decoder = Decoder(spec)
    decoder.initialise(0.1, torch.Generator().manual_seed(seed))
    save_checkpoint(
        path,
        spec=spec,
        state=dict(decoder.state_dict()),
        family="qwen2",
        receipt=Receipt.all_new(spec.parameter_shapes(), dtype="F32", note="a test"),
        lineage=(),
        generation_config=GENERATION,
        tokenizer=tokenizer,
    )


def arguments(world: Path, runs: Path, *extra: str, steps: int = 20) -> list[str]:
    """A bridge run B1 → B2 → C of ``steps`` optimiser steps of 128 tokens."""
    values = {
        "run.experiment": "tiny",
        "run.root": str(runs),
        "model.start.init_from": str(world / "checkpoint"),
        "model.ttt": '{"layers": "last_quarter"}',
        "model.size.short": SHORT,
        "model.size.long": LONG,
        "model.size.chunk": CHUNK,
        "model.size.window": SHORT,
        "model.size.tokens_per_step": 128,
        "model.size.micro_batch_tokens": 64,
        "model.budget.tokens": 128 * steps,
        "model.validation.blocks": 4,
        "model.validation.subset": 2,
        "model.validation.damage_blocks": 2,
        "model.validation.every_share": 0.25,
        "model.stages.B1": '{"enabled": true, "share": 0.2}',
        "model.stages.B2": '{"enabled": true, "share": 0.3}',
        "model.stages.C": '{"enabled": true}',
        "data.short": str(world / "short"),
        "data.long": str(world / "long"),
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }
    return [f"--{name}={value}" for name, value in values.items()] + list(extra)
