"""Tokenizers that put BOS before a text: found out by encoding, recorded, and the first token of every block."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.tokens import added_token, all_blocks, all_tokens, edited, expected_documents

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
    with edited(folder / "tokenizer.json") as content:
        content["added_tokens"].append(added_token(BOS, BOS_TOKEN, special=True))
        content["post_processor"] = post_processor
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


# What a tokenizer puts before a text --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "post_processor, config, expected",
    [
        (template(BOS_TOKEN, "$A"), {}, BOS),
        (template(BOS_TOKEN, "$A"), {"add_bos_token": False}, BOS),
        (template(BOS_TOKEN, "$A", EOS_TOKEN), {}, BOS),
        (after_bytes(template(BOS_TOKEN, "$A")), {}, BOS),
        (template("$A", EOS_TOKEN), {}, None),
        (template("$A"), {"add_bos_token": True}, None),
        (None, {}, None),
    ],
)
def test_bos_is_what_the_post_processor_puts_before_a_text(
    packed, packed_config, tmp_path, post_processor, config, expected
):
    folder = make_tokenizer(packed_config.tokenizer, tmp_path / "t", post_processor, **config)
    assert load_tokenizer(str(folder)).bos_id == expected


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
    with edited(tmp_path / "data" / "manifest.json") as content:
        assert content.pop("bos_id") is None
    assert Manifest.load(tmp_path / "data") == Manifest.load(packed)


# Blocks -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[None, BOS])
def folders(request):
    """(data module, config of its long folder, what its blocks begin with): with and without BOS."""
    begin = [] if request.param is None else [BOS]
    short, long, config = (
        request.getfixturevalue(name)
        for name in (("short", "long", "long_config") if begin else ("packed", "per_document", "packed_config"))
    )
    return TokenDataModule(short=str(short), long=str(long)), replace(config, context=64), begin


@pytest.mark.parametrize("split", ["train", "validation"])
def test_per_document_blocks_are_a_documents_whole_contexts_and_the_targets_all_of_its_text(folders, split):
    module, config, begin = folders
    size = 65 - len(begin)
    expected, sources = [], []
    for number, (_, text) in enumerate(expected_documents(config, split)):
        ids = [*text, EOS]
        pieces = [[*begin, *ids[i : i + size]] for i in range(0, len(ids) - size + 1, size)]
        expected += pieces
        sources += [number] * len(pieces)
    assert len(set(sources)) < len(sources)
    tokens, source = all_blocks(module, "long", split, 65)
    assert tokens.tolist() == expected
    assert source.tolist() == sources
    entry, served = module.manifest("long").side(split), tokens[:, len(begin) :].flatten()
    assert (entry.blocks, entry.tokens, entry.tokens_not_served) == (len(expected), len(served), 0)
    assert module.token_bytes("long")[served].sum() == entry.stored_bytes < entry.normalized_bytes
    eos = np.load(Path(module.folders["long"]) / entry.eos.file)
    assert np.flatnonzero(served == EOS).tolist() == eos.tolist()


@pytest.mark.parametrize("block_tokens", [5, 17, 1234])
def test_packed_blocks_are_the_text_without_a_gap_across_shards(folders, block_tokens):
    module, _, begin = folders
    folder, entry = Path(module.folders["short"]), module.manifest("short").train
    tokens, size = all_tokens(folder, "train"), block_tokens - len(begin)
    assert len(entry.shards) > 2
    blocks, source = all_blocks(module, "short", "train", block_tokens)
    assert len(blocks) == len(tokens) // size
    assert (blocks[:, : len(begin)] == BOS).all()
    assert blocks[:, len(begin) :].flatten().tolist() == tokens[: len(blocks) * size].tolist()
    starts = np.load(folder / entry.document_starts.file)
    assert source.tolist() == [(starts <= block * size).sum() - 1 for block in range(len(blocks))]


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
