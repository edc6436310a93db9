"""Tokenizers that put BOS before a text: found out by encoding, recorded, and the first token of every block."""

import dataclasses
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_corpus import folder_bytes, make_texts

import ttt_lit.data.writer as writer_module
from ttt_lit.data.corpus import Document
from ttt_lit.data.encode import build_tokenizer, encode_documents, encode_texts
from ttt_lit.data.manifest import Manifest, text_tokens
from ttt_lit.data.prepare import prepare
from ttt_lit.data.shards import TokenReader, write_shard
from ttt_lit.data.split import split_of
from ttt_lit.data.stream import StreamRequest, TokenDataModule
from ttt_lit.data.tokenizer import load_tokenizer
from ttt_lit.data.tokenizer_kinds import EOS_TOKEN

# On one core torch finds any number of workers excessive.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

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


def request(**changes):
    defaults = {"dataset": "short", "split": "train", "block_tokens": 17, "batch_size": 4, "num_batches": 30}
    return StreamRequest(**defaults | changes)


def all_tokens(folder, split):
    manifest = Manifest.load(folder)
    entry = manifest.side(split)
    return TokenReader(folder, entry, manifest.vocab_size).read(0, entry.tokens)


def all_blocks(module, dataset, split, block_tokens):
    """(blocks, block_tokens) in the order of the split."""
    count = module.manifest(dataset).num_blocks(split, block_tokens)
    wanted = request(dataset=dataset, split=split, block_tokens=block_tokens, batch_size=1, num_batches=count)
    served = {batch["index"].item(): batch["tokens"][0] for batch in module.open(wanted)}
    return torch.stack([served[block] for block in range(count)])


def documents(config, split):
    """Ids and EOS of each document of a split that has one context of tokens."""
    tokenizer = load_tokenizer(config.tokenizer)
    given = [Document(str(i), text) for i, text in enumerate(make_texts())]
    return [
        [*ids.tolist(), EOS]
        for document, ids in encode_documents(given, tokenizer.definition, 0)
        if split_of(document, config.validation_fraction) == split and len(ids) >= config.context
    ]


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


def test_a_tokenizer_without_any_bos_puts_none(packed, packed_config):
    assert load_tokenizer(packed_config.tokenizer).bos_id is None


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
    ids = encode_texts(build_tokenizer(tokenizer.definition), [text])[0]
    assert BOS not in ids
    assert tokenizer.forbidden[BOS]
    assert tokenizer.token_bytes[BOS] == 0
    assert tokenizer.token_bytes[ids].sum() == len(text)


# Folders ------------------------------------------------------------------------------------------------------------


def test_a_block_is_text_but_for_bos():
    assert text_tokens(17, None) == 17
    assert text_tokens(17, BOS) == 16


@pytest.mark.parametrize("split", ["train", "validation"])
def test_shards_hold_the_text_alone(short, packed, split):
    assert all_tokens(short, split).tolist() == all_tokens(packed, split).tolist()
    entry = Manifest.load(short).side(split)
    assert entry.blocks * 16 + entry.tokens_not_served == entry.tokens
    assert entry.tokens_not_served < 16
    assert all(shard.tokens % 16 == 0 for shard in entry.shards[:-1])


def test_the_manifest_names_bos_and_null_where_there_is_none(short, packed):
    assert json.loads((short / "manifest.json").read_text())["bos_id"] == BOS
    assert json.loads((packed / "manifest.json").read_text())["bos_id"] is None


def test_a_manifest_from_before_there_was_bos_means_none(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    content = json.loads(path.read_text())
    del content["bos_id"]
    path.write_text(json.dumps(content))
    assert Manifest.load(tmp_path / "data") == Manifest.load(packed)


class Interrupted(Exception):
    pass


def interrupt(config, monkeypatch):
    """Prepare until the third shard."""
    calls = itertools.count()

    def failing(*arguments, **options):
        if next(calls) == 2:
            raise Interrupted
        return write_shard(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_shard", failing)
        with pytest.raises(Interrupted):
            prepare(config)


def test_workers_and_interruptions_change_no_byte(long, long_config, tmp_path, monkeypatch):
    monkeypatch.setattr("ttt_lit.data.encode.BATCH_CHARACTERS", 2000)
    config = replace(long_config, output=str(tmp_path / "data"), num_workers=1)
    interrupt(config, monkeypatch)
    prepare(config)
    assert folder_bytes(tmp_path / "data") == folder_bytes(long)


def test_a_folder_begun_without_bos_is_not_continued_with_it(long_config, tmp_path, monkeypatch):
    config = replace(long_config, output=str(tmp_path / "data"))
    interrupt(config, monkeypatch)
    journal = tmp_path / "data.partial" / ".progress" / "journal.json"
    content = json.loads(journal.read_text())
    assert content.pop("bos_id") == BOS
    journal.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="begun with another tokenizer"):
        prepare(config)


# Blocks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validation"])
def test_per_document_blocks_are_bos_and_a_documents_whole_contexts(module, long, long_config, split):
    expected, sources = [], []
    for number, ids in enumerate(documents(long_config, split)):
        pieces = [[BOS, *ids[i : i + 64]] for i in range(0, len(ids) - 63, 64)]
        expected += pieces
        sources += [number] * len(pieces)
    assert len(set(sources)) < len(sources)
    assert all_blocks(module, "long", split, 65).tolist() == expected
    assert module.manifest("long").side(split).blocks == len(expected)
    wanted = request(dataset="long", split=split, block_tokens=65)
    assert module.sources(wanted, torch.arange(len(expected))).tolist() == sources


def test_a_document_of_exactly_one_context_is_one_block(packed_config, tokenizer_folder, tmp_path):
    """Its EOS is what fills no block; without BOS that is the last target."""
    (tmp_path / "corpus").mkdir()
    texts = [character * 50 for character in "qxyzQXYZ"]
    (tmp_path / "corpus" / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    counts = {len(encode_texts(build_tokenizer(load_tokenizer(str(tokenizer_folder)).definition), texts)[0])}
    assert counts == {50}
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
    blocks = all_blocks(module, "short", "train", block_tokens)
    assert len(blocks) == len(tokens) // (block_tokens - 1)
    assert (blocks[:, 0] == BOS).all()
    assert blocks[:, 1:].flatten().tolist() == tokens[: len(blocks) * (block_tokens - 1)].tolist()


def test_the_targets_are_all_of_the_text_and_its_bytes(module):
    table = module.token_bytes("long")
    for split in ("train", "validation"):
        entry = module.manifest("long").side(split)
        targets = all_blocks(module, "long", split, 65)[:, 1:]
        assert BOS not in targets
        assert targets.numel() == entry.tokens
        assert table[targets].sum() == entry.stored_bytes


def test_a_packed_block_is_of_the_document_of_its_first_text_token(module, short):
    count = module.manifest("short").train.blocks
    starts = np.load(short / module.manifest("short").train.document_starts.file)
    expected = [int((starts <= block * 16).sum()) - 1 for block in range(count)]
    assert module.sources(request(), torch.arange(count)).tolist() == expected
    assert len(set(expected)) > 2


def indices(stream):
    return [index for batch in stream for index in batch["index"].tolist()]


def test_a_pass_takes_every_block_once(module):
    count = module.manifest("short").train.blocks
    order = indices(module.open(request(batch_size=1, num_batches=2 * count)))
    assert sorted(order[:count]) == sorted(order[count:]) == list(range(count))


def test_validation_is_spread_over_all_blocks_and_ends_with_them(module):
    count = module.manifest("short").validation.blocks
    served = indices(module.open(request(split="validation", batch_size=1, num_batches=count)))
    assert served == list(range(count))
    half = indices(module.open(request(split="validation", batch_size=1, num_batches=count // 2)))
    assert half == [position * count // (count // 2) for position in range(count // 2)]
    with pytest.raises(ValueError, match=rf"there are {count} blocks of 17 tokens"):
        module.open(request(split="validation", batch_size=1, num_batches=count + 1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_workers_and_resumes_read_the_same_sequences(module, short, long, num_workers):
    for wanted in (request(num_batches=8), request(dataset="long", block_tokens=65, num_batches=8)):
        whole = [batch["tokens"] for batch in module.open(wanted)]
        other = TokenDataModule(short=str(short), long=str(long), seed=5, num_workers=num_workers)
        part = replace(wanted, batch_size=2, start_batch=3)
        ranks = [[batch["tokens"] for batch in other.open(part, rank, 2)] for rank in (0, 1)]
        joined = [torch.cat(parts) for parts in zip(*ranks, strict=True)]
        assert len(joined) == 5
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(whole[3:], joined, strict=True))
        assert all((tokens[:, 0] == BOS).all() for tokens in joined)


def test_a_per_document_folder_still_serves_its_own_context_only(module):
    with pytest.raises(ValueError, match="got 64, but the folder is per_document with blocks of 65"):
        module.open(request(dataset="long", block_tokens=64))


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
        with pytest.raises(ValueError, match=f"blocks begin with token {bos_id}, the model has 300 tokens"):
            other.check_model(300, None)


def test_short_and_long_blocks_must_begin_alike(short, long, tmp_path):
    TokenDataModule(short=str(short), long=str(long)).setup()
    without = with_manifest(short, tmp_path / "short", bos_id=None)
    with pytest.raises(ValueError, match=r"blocks begin differently \(bos_id None, 300\)"):
        TokenDataModule(short=without, long=str(long)).setup()
