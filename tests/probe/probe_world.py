"""A small world to probe: real text, a real folder of long documents, a real checkpoint."""

import random

import torch
from helpers.tiny import decoder_of, random_state, tiny_spec

from ttt_lit.checkpoint.receipt import Receipt
from ttt_lit.checkpoint.store import save_checkpoint
from ttt_lit.data.prepare import PrepareConfig, prepare
from ttt_lit.model.spec import LayerSpec

CONTEXT = 32


def write_checkpoint(folder, *layers, tokenizer, seed=0):
    spec = tiny_spec(*layers, vocab_size=300)
    state = random_state(spec, seed=seed, dtype=torch.float32)
    receipt = Receipt.all_new(spec.parameter_shapes(), dtype="F32", note="a test")
    save_checkpoint(folder, spec=spec, state=state, family="qwen2", receipt=receipt, lineage=(), tokenizer=tokenizer)
    return decoder_of(spec, state)


def make_world(folder):
    """Write ``corpus``, ``tokenizer``, the folder ``long`` with several blocks of each document, and the dense ``checkpoint``."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    (folder / "corpus").mkdir()
    for number in range(40):
        (folder / "corpus" / f"{number:02d}.txt").write_text(" ".join(rng.choices(words, k=120)), encoding="utf-8")
    config = PrepareConfig(
        source=str(folder / "corpus"),
        tokenizer=str(folder / "tokenizer"),
        output=str(folder / "long"),
        context=CONTEXT,
        layout="per_document",
        train_tokenizer=300,
        validation_fraction=0.4,
        num_workers=0,
    )
    prepare(config, progress=False)
    write_checkpoint(folder / "checkpoint", *(LayerSpec(),) * 4, tokenizer=folder / "tokenizer")
    return folder
