"""A tiny corpus and two folders prepared from it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tokens import make_texts

from ttt_lit.data.prepare import PrepareConfig, prepare
from ttt_lit.data.stream import TokenDataModule


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts()
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[:-1]))
    (folder / "b.txt").write_text(texts[-1])
    return folder


@pytest.fixture(scope="session")
def packed_config(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return PrepareConfig(
        source=str(corpus),
        tokenizer=str(folder / "tokenizer"),
        train_tokenizer=300,
        output=str(folder / "data"),
        context=16,
        layout="packed",
        validation_fraction=0.3,
        shard_tokens=1000,
    )


@pytest.fixture(scope="session")
def packed(packed_config):
    """Folder of packed blocks of 17 tokens in several shards."""
    prepare(packed_config)
    return Path(packed_config.output)


@pytest.fixture(scope="session")
def per_document(packed, packed_config, tmp_path_factory):
    """Folder of whole blocks of 65 tokens of the same corpus, by the same tokenizer."""
    output = tmp_path_factory.mktemp("long") / "data"
    prepare(replace(packed_config, output=str(output), context=64, layout="per_document"))
    return output


@pytest.fixture
def module(packed, per_document):
    return TokenDataModule(short=str(packed), long=str(per_document), seed=5)
