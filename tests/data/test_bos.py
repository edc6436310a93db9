"""Tokenizers that put BOS before a text: found out by encoding, recorded, and the first token of every block."""

import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.tokens import all_blocks, all_tokens, expected_documents
from tokenizers import Tokenizer

from ttt_lit.data.encode import encode_texts
from ttt_lit.data.manifest import Manifest
from ttt_lit.data.prepare import prepare
from ttt_lit.data.stream import TokenDataModule
from ttt_lit.data.tokenizer import load_tokenizer
from ttt_lit.data.train_tokenizer import EOS_TOKEN

BOS_TOKEN, BOS = "<|bos|>", 300
EOS = 0


def template(*tokens):
    """TemplateProcessing with ``$A`` for the text."""
    ids = {BOS_TOKEN: BOS, EOS_TOKEN: EOS}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}} if token == "$A" else {"SpecialToken": {"id": token, "type_id": 0}}
        for token in tokens
    ]
    special = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in tokens if token != "$A"}
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def after_bytes(processor):
    """As Llama 3's: the template is one of two post-processors."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    return {"type": "Sequence", "processors": [byte_level, processor]}


def make_tokenizer(source, folder, post_processor, **config):
    """The tokenizer of ``source`` with a BOS token of id 300 and a post-processor."""
    shutil.copytree(source, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"].append({"id": BOS, "content": BOS_TOKEN} | flags)
    content["post_processor"] = post_processor
    (folder / "tokenizer.json").write_text(json.dumps(content))
    given = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS_TOKEN, "bos_token": BOS_TOKEN} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(packed, packed_config, tmp_path_factory):
    return make_tokenizer(
        packed_config.tokenizer, tmp_path_factory.mktemp("bos") / "tokenizer", template(BOS_TOKEN, "$A")
    )


@pytest.fixture(scope="module")
def short_config(packed_config, tokenizer_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("short") / "data"
    return replace(packed_config, tokenizer=str(tokenizer_folder), train_tokenizer=None, output=str(output))


@pytest.fixture(scope="module")
def long_config(short_config, tmp_path_factory):
    output = tmp_path_factory.mktemp("long") / "data"
    return replace(short_config, output=str(output), context=64, layout="per_document")


@pytest.fixture(scope="module")
def short(short_config):
    """Folder of packed blocks of 17 tokens: BOS and 16 of text."""
    prepare(short_config)
    return Path(short_config.output)


@pytest.fixture(scope="module")
def long(long_config):
    """Folder of blocks of 65 tokens, BOS and 64 of text, none of which crosses a document."""
    prepare(long_config)
    return Path(long_config.output)


@pytest.fixture
def module(short, long):
    return TokenDataModule(short=str(short), long=str(long), seed=5)


# What a tokenizer puts before a text --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "post_processor, expected",
    [
        (template(BOS_TOKEN, "$A"), BOS),
        (template(BOS_TOKEN, "$A", EOS_TOKEN), BOS),
        (after_bytes(template(BOS_TOKEN, "$A")), BOS),
        (template("$A", EOS_TOKEN), None),
        (template("$A"), None),
        (None, None),
    ],
)
def test_bos_is_what_stands_before_an_encoded_text(packed, packed_config, tmp_path, post_processor, expected):
    folder = make_tokenizer(packed_config.tokenizer, tmp_path / "t", post_processor)
    assert load_tokenizer(str(folder)).bos_id == expected


@pytest.mark.parametrize("setting", [True, False])
def test_the_post_processor_decides_and_not_a_setting(packed, packed_config, tmp_path, setting):
    post_processor = template("$A") if setting else template(BOS_TOKEN, "$A")
    folder = make_tokenizer(packed_config.tokenizer, tmp_path / "t", post_processor, add_bos_token=setting)
    assert load_tokenizer(str(folder)).bos_id == (None if setting else BOS)


def test_other_tokens_before_a_text_are_refused_in_one_line(packed, packed_config, tmp_path):
    wrong = {"two": (BOS_TOKEN, EOS_TOKEN, "$A"), "twice": (BOS_TOKEN, BOS_TOKEN, "$A"), "other": (EOS_TOKEN, "$A")}
    for name, tokens in wrong.items():
        folder = make_tokenizer(packed_config.tokenizer, tmp_path / name, template(*tokens))
        with pytest.raises(ValueError, match=r"puts \['<.*'\] before a text, expected .* '<\|bos\|>'") as caught:
            load_tokenizer(str(folder))
        assert "\n" not in str(caught.value)
    nameless = make_tokenizer(packed_config.tokenizer, tmp_path / "t", template(BOS_TOKEN, "$A"), bos_token=None)
    with pytest.raises(ValueError, match="its bos_token alone, which is None"):
        load_tokenizer(str(nameless))


def test_the_spelling_of_bos_in_a_text_is_text(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    text = f"a{BOS_TOKEN}b"
    ids = encode_texts(Tokenizer.from_str(tokenizer.definition), [text])[0]
    assert BOS not in ids
    assert tokenizer.token_bytes[BOS] == 0
    assert tokenizer.token_bytes[ids].sum() == len(text)


# Folders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation"])
def test_shards_hold_the_text_alone(short, packed, split):
    assert all_tokens(short, split).tolist() == all_tokens(packed, split).tolist()
    entry = Manifest.load(short).side(split)
    assert entry.blocks * 16 + entry.tokens_not_served == entry.tokens
    assert entry.tokens_not_served < 16
    assert all(shard.tokens % 16 == 0 for shard in entry.shards[:-1])


def test_a_manifest_from_before_there_was_bos_means_none(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    content = json.loads(path.read_text())
    del content["bos_id"]
    path.write_text(json.dumps(content))
    assert Manifest.load(tmp_path / "data") == Manifest.load(packed)


# Blocks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation"])
def test_per_document_blocks_are_bos_and_a_documents_whole_contexts(module, long, long_config, split):
    expected, sources = [], []
    for number, (_, text) in enumerate(expected_documents(long_config, split)):
        ids = [*text, EOS]
        pieces = [[BOS, *ids[i : i + 64]] for i in range(0, len(ids) - 63, 64)]
        expected += pieces
        sources += [number] * len(pieces)
    assert len(set(sources)) < len(sources)
    tokens, source = all_blocks(module, "long", split, 65)
    assert tokens.tolist() == expected
    assert source.tolist() == sources
    assert module.manifest("long").side(split).blocks == len(expected)


def test_a_document_of_exactly_one_context_is_one_block(packed_config, tokenizer_folder, tmp_path):
    """Its EOS is what fills no block; without BOS that is the last target."""
    (tmp_path / "corpus").mkdir()
    texts = [character * 50 for character in "qxyzQXYZ"]
    (tmp_path / "corpus" / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for folder, blocks_begin, eos in ((tokenizer_folder, BOS, 0), (packed_config.tokenizer, None, 1)):
        manifest = prepare(
            replace(
                packed_config,
                source=str(tmp_path / "corpus"),
                tokenizer=str(folder),
                train_tokenizer=None,
                output=str(tmp_path / f"data{eos}"),
                context=50,
                layout="per_document",
                validation_fraction=0.5,
            )
        )
        assert manifest.bos_id == blocks_begin
        for side in (manifest.train, manifest.validation):
            assert side.blocks == side.documents
            assert side.tokens == side.documents * (50 + eos)
            assert len(np.load(tmp_path / f"data{eos}" / side.eos.file)) == side.documents * eos


@pytest.mark.parametrize("block_tokens", [2, 17, 100, 1234])
def test_packed_blocks_are_bos_and_the_text_without_a_gap(module, short, block_tokens):
    tokens = all_tokens(short, "train")
    assert len(module.manifest("short").train.shards) > 2
    blocks, source = all_blocks(module, "short", "train", block_tokens)
    starts = np.load(short / module.manifest("short").train.document_starts.file)
    assert source.tolist() == [(starts <= block * (block_tokens - 1)).sum() - 1 for block in range(len(blocks))]
    assert len(blocks) == len(tokens) // (block_tokens - 1)
    assert (blocks[:, 0] == BOS).all()
    assert blocks[:, 1:].flatten().tolist() == tokens[: len(blocks) * (block_tokens - 1)].tolist()


def test_the_targets_are_all_of_the_text_and_its_bytes(module):
    table = module.token_bytes("long")
    for split in ("train", "validation"):
        entry = module.manifest("long").side(split)
        targets = all_blocks(module, "long", split, 65)[0][:, 1:]
        assert BOS not in targets
        assert targets.numel() == entry.tokens
        assert table[targets].sum() == entry.stored_bytes


# The model and the other folder -------------------------------------------------------------------------------------


def with_manifest(folder, target, **changes):
    """A copy of a folder whose manifest says otherwise."""
    shutil.copytree(folder, target)
    (target / "manifest.json").write_text(dataclasses.replace(Manifest.load(folder), **changes).to_json())
    return str(target)


def test_bos_must_be_in_the_models_vocabulary(module, short, tmp_path):
    module.check_model(301, None)
    for bos_id in (BOS, 310, -1):
        other = TokenDataModule(short=with_manifest(short, tmp_path / str(bos_id), bos_id=bos_id))
        with pytest.raises(ValueError, match=f"blocks begin with token {bos_id}, the model has 300"):
            other.check_model(300, None)


def test_short_and_long_blocks_must_begin_alike(short, long, tmp_path):
    TokenDataModule(short=str(short), long=str(long)).setup()
    without = with_manifest(short, tmp_path / "short", bos_id=None)
    with pytest.raises(ValueError, match="bos_id: got None and 300"):
        TokenDataModule(short=without, long=str(long)).setup()
