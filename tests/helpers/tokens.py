"""A tiny corpus, what its prepared folders must hold, and what tests ask of a stream."""

import json
import random
from contextlib import contextmanager
from pathlib import Path

import torch

from ttt_lit.data.corpus import Document, split_of
from ttt_lit.data.encode import encode_documents
from ttt_lit.data.manifest import Manifest
from ttt_lit.data.shards import TokenReader
from ttt_lit.data.stream import StreamRequest
from ttt_lit.data.tokenizer import load_tokenizer

PLAIN = "the def return self import class"
OTHER_SCRIPTS = "naïve straße 中文 Ελλάδα emoji😀"
SPECIAL = "<|endoftext|> <s> ▁ <0x41>"
WORDS = [*f"{PLAIN} {OTHER_SCRIPTS} {SPECIAL}".split(), "\t", "\n", ""]


def make_texts(count: int = 60) -> list[str]:
    """Texts of many lengths with duplicates, other scripts and literal special tokens."""
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 120))) for _ in range(count)]
    return [*texts, *texts[:10]]


def make_documents() -> list[Document]:
    return [Document(str(i), text) for i, text in enumerate(make_texts())]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def edited(path):
    """Yield the content of a JSON file, and write what has become of it."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


def added_token(index, content, *, special):
    """As tokenizer.json lists one."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, "special": special} | flags


def expected_documents(config, split):
    """(document, ids) of one side of the tiny corpus with at least one context of tokens, in its order."""
    definition = load_tokenizer(config.tokenizer).definition
    return [
        (document, ids.tolist())
        for document, ids in encode_documents(make_documents(), definition, 0)
        if split_of(document, config.validation_fraction) == split and len(ids) >= config.context
    ]


def all_tokens(folder, split):
    manifest = Manifest.load(folder)
    entry = manifest.side(split)
    return TokenReader(folder, entry, manifest.vocab_size).read(0, entry.tokens)


def request(**changes):
    defaults = {"dataset": "short", "split": "train", "block_tokens": 17, "batch_size": 4, "num_batches": 30}
    return StreamRequest(**defaults | changes)


def indices(stream):
    return [batch["index"].tolist() for batch in stream]


def all_blocks(module, dataset, split, block_tokens):
    """Tokens (blocks, block_tokens) and documents (blocks,) in the order of the split."""
    count = module.manifest(dataset).num_blocks(split, block_tokens)
    wanted = request(dataset=dataset, split=split, block_tokens=block_tokens, batch_size=1, num_batches=count)
    served = {batch["index"].item(): batch for batch in module.open(wanted)}
    return tuple(torch.cat([served[block][name] for block in range(count)]) for name in ("tokens", "source"))
