import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import litdata
import numpy as np
import pytest
from helpers.tokens import all_tokens, edited, expected_documents, folder_bytes, make_texts

import ttt_lit.data.prepare as prepare_module
import ttt_lit.data.shards as shards_module
import ttt_lit.data.writer as writer_module
from ttt_lit.data.corpus import Document, split_of
from ttt_lit.data.manifest import Manifest
from ttt_lit.data.prepare import PrepareConfig, prepare
from ttt_lit.data.shards import TokenReader
from ttt_lit.data.stream import TokenDataModule


def again(config, tmp_path, **changes):
    return replace(config, output=str(tmp_path / "data"), **changes)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_packed_shards_hold_every_document_and_an_eos_after_each(packed, packed_config, split):
    manifest = Manifest.load(packed)
    documents = expected_documents(packed_config, split)
    tokens = all_tokens(packed, split)
    assert tokens.tolist() == [token for _, ids in documents for token in (*ids, manifest.eos_id)]
    entry = manifest.side(split)
    assert len(entry.shards) > 1
    assert entry.documents == len(documents)
    assert entry.raw_bytes == sum(len(document.text.encode()) for document, _ in documents)
    assert entry.raw_bytes == entry.normalized_bytes == entry.stored_bytes
    assert np.load(packed / entry.eos.file).tolist() == np.flatnonzero(tokens == manifest.eos_id).tolist()
    starts = np.load(packed / entry.document_starts.file)
    assert starts.tolist() == [0, *(np.load(packed / entry.eos.file)[:-1] + 1)]
    assert entry.blocks * 17 + entry.tokens_not_served == entry.tokens == len(tokens)
    assert all(shard.tokens % 17 == 0 for shard in entry.shards[:-1])


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_litdata_itself_serves_the_same_blocks(packed):
    manifest = Manifest.load(packed)
    theirs = litdata.StreamingDataset(
        str(packed / "train"), item_loader=litdata.TokensLoader(block_size=17), shuffle=False
    )
    ours = TokenReader(packed, manifest.train, manifest.vocab_size)
    assert len(theirs) == manifest.train.blocks
    for block in range(manifest.train.blocks):
        assert theirs[block].tolist() == ours.read(block * 17, 17).tolist()


def test_the_bytes_do_not_depend_on_the_number_of_workers(packed, packed_config, tmp_path, monkeypatch):
    monkeypatch.setattr("ttt_lit.data.encode.BATCH_CHARACTERS", 2000)
    prepare(again(packed_config, tmp_path, num_workers=2))
    assert folder_bytes(tmp_path / "data") == folder_bytes(packed)


class Interrupted(Exception):
    pass


def interrupt(config, monkeypatch, number, module=writer_module, name="write_shard"):
    """Prepare until the function's n-th call. Returns the unfinished folder."""
    calls, original = iter(range(1000)), getattr(module, name)

    def interrupted(*arguments, **options):
        if next(calls) == number:
            raise Interrupted
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(Interrupted):
            prepare(config)
    assert not Path(config.output).exists()
    return Path(config.output).with_name("data.partial")


@pytest.mark.parametrize("number", [0, 2, 4])
def test_an_interrupted_run_resumes_to_the_same_bytes(packed, packed_config, tmp_path, monkeypatch, number):
    config = again(packed_config, tmp_path)
    interrupt(config, monkeypatch, number)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("chunk-*.bin")}
    assert len(kept) == number
    prepare(config)
    assert folder_bytes(tmp_path / "data") == folder_bytes(packed)
    moved = {Path(str(path).replace("data.partial", "data")): time for path, time in kept.items()}
    assert {path: path.stat().st_mtime_ns for path in moved} == moved
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


KILLED = """
import dataclasses, json, os, signal, sys
import litdata.streaming
from ttt_lit.data.prepare import PrepareConfig, prepare
done, calls = litdata.streaming.Cache.done, iter(range(100))
def killed(self):
    written = done(self)
    if next(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return written
litdata.streaming.Cache.done = killed
prepare(PrepareConfig(**json.loads(sys.argv[1])))
"""


def test_a_killed_run_resumes_to_the_same_bytes(packed, packed_config, tmp_path):
    config = again(packed_config, tmp_path)
    command = [sys.executable, "-c", KILLED, json.dumps(dataclasses.asdict(config))]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("chunk-*.bin"))) == 3  # two finished, one on its way
    prepare(config)
    assert folder_bytes(tmp_path / "data") == folder_bytes(packed)


def test_a_shard_that_the_journal_does_not_know_yet_is_written_again(packed, packed_config, tmp_path, monkeypatch):
    config = again(packed_config, tmp_path)
    partial = interrupt(config, monkeypatch, 3, prepare_module.np, "savez")
    assert len(list(partial.rglob("chunk-*.bin"))) == 3
    prepare(config)
    assert folder_bytes(tmp_path / "data") == folder_bytes(packed)


def test_shards_without_a_journal_are_not_taken_for_ours(packed_config, tmp_path, monkeypatch):
    config = again(packed_config, tmp_path)
    (interrupt(config, monkeypatch, 3) / ".progress" / "journal.npz").unlink()
    with pytest.raises(ValueError, match="shards without journal.npz"):
        prepare(config)
    (tmp_path / "data.partial" / ".progress" / "journal.json").write_text("{}")
    with pytest.raises(ValueError, match="begun by an older version; delete it"):
        prepare(config)


def test_resuming_refuses_what_is_not_as_it_was(packed_config, tmp_path, monkeypatch):
    """A damaged shard, another config, tokens put before a text, a changed source."""
    source = tmp_path / "source"
    shutil.copytree(packed_config.source, source)
    config = again(packed_config, tmp_path, source=str(source))
    partial = interrupt(config, monkeypatch, 3)
    with pytest.raises(ValueError, match="made with another config.*context 16 there, 17 here"):
        prepare(replace(config, context=17))
    shard = sorted(partial.rglob("chunk-*.bin"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match=rf"{shard.name}.*damaged"):
        prepare(config)
    shard.write_bytes(content)
    with monkeypatch.context() as patch:
        load = prepare_module.load_tokenizer
        patch.setattr(prepare_module, "load_tokenizer", lambda name: replace(load(name), bos_id=7))
        with pytest.raises(ValueError, match="begun with another tokenizer"):
            prepare(config)
    lines = (source / "a.jsonl").read_text().splitlines()
    (source / "a.jsonl").write_text("\n".join([json.dumps({"text": "new"}), *lines]))
    with pytest.raises(ValueError, match="changed since"):
        prepare(config)


def test_a_finished_folder_is_left_alone_and_loads_neither_torch_nor_tokenizer(packed, packed_config, monkeypatch):
    monkeypatch.setattr(prepare_module, "load_tokenizer", None)
    monkeypatch.setattr(prepare_module, "import_litdata", None)
    before = {path: path.stat().st_mtime_ns for path in packed.rglob("*")}
    assert prepare(replace(packed_config, num_workers=3)) == Manifest.load(packed)
    assert {path: path.stat().st_mtime_ns for path in packed.rglob("*")} == before


def test_another_config_for_a_finished_folder_is_an_error_that_names_the_difference(packed, packed_config):
    with pytest.raises(ValueError, match="layout 'packed' there, 'per_document' here"):
        prepare(replace(packed_config, layout="per_document"))


def test_a_tokenizer_that_changed_after_preparing_is_noticed(packed, packed_config, tmp_path):
    shutil.copytree(packed_config.tokenizer, tmp_path / "tokenizer")
    config = again(packed_config, tmp_path, tokenizer=str(tmp_path / "tokenizer"), train_tokenizer=None)
    prepare(config)
    with (tmp_path / "tokenizer" / "tokenizer.json").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match="another tokenizer"):
        prepare(config)


def test_a_foreign_output_folder_is_not_touched(packed_config, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="not made by prepare"):
        prepare(again(packed_config, tmp_path))
    assert folder_bytes(tmp_path) == {"data/mine": b"mine"}


def test_no_document_is_on_both_sides_even_if_repeated(packed, per_document, packed_config):
    texts = make_texts()
    assert len(set(texts)) < len(texts)

    def first_tokens(folder, split):
        manifest = Manifest.load(folder)
        starts = np.load(folder / manifest.side(split).document_starts.file)
        tokens = all_tokens(folder, split)
        return {tuple(tokens[start : start + 17].tolist()) for start in starts}

    train = first_tokens(packed, "train") | first_tokens(per_document, "train")
    validation = first_tokens(packed, "validation") | first_tokens(per_document, "validation")
    assert len(train) > 5
    assert len(validation) > 5
    assert not train & validation


def test_the_split_share_is_the_fraction():
    sides = [split_of(Document("", str(number)), 0.2) for number in range(5000)]
    assert abs(sides.count("validation") / 5000 - 0.2) < 0.02


def test_max_documents_and_max_tokens_limit_the_run(packed_config, tmp_path):
    few = prepare(again(packed_config, tmp_path / "a", max_documents=20))
    sides = (few.train, few.validation)
    assert sum(side.documents + side.documents_too_short for side in sides) == 20
    small = prepare(again(packed_config, tmp_path / "b", max_tokens=3000))
    longest = max(len(text.encode()) for text in make_texts())
    assert 3000 <= small.train.tokens + small.validation.tokens <= 3000 + longest
    assert small.train.documents + small.validation.documents < 70


def test_too_few_documents_for_a_split_is_an_error_and_leaves_nothing(packed_config, tmp_path):
    with pytest.raises(ValueError, match="no document of at least 5000 tokens"):
        prepare(again(packed_config, tmp_path, context=5000, shard_tokens=10000))
    assert not list(tmp_path.iterdir())


def test_a_bad_config_names_every_field():
    rest = {"source": "s", "tokenizer": "t", "output": "o"}
    with pytest.raises(ValueError, match="context: got 0.*layout: got 'x'.*validation_fraction.*num_workers") as caught:
        PrepareConfig(**rest, context=0, layout="x", validation_fraction=1.0, num_workers=-1)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="tokenizer_kind: got 'byte_fallback' without train_tokenizer"):
        PrepareConfig(**rest, context=4, layout="packed", tokenizer_kind="byte_fallback")
    with pytest.raises(ValueError, match="tokenizer_kind: got 'unigram', expected one of"):
        PrepareConfig(**rest, context=4, layout="packed", train_tokenizer=300, tokenizer_kind="unigram")


def test_a_folder_from_before_there_were_kinds_of_tokenizers_is_still_ours(packed, packed_config, tmp_path):
    shutil.copytree(packed, tmp_path / "data")
    with edited(tmp_path / "data" / "manifest.json") as content:
        assert content["config"].pop("tokenizer_kind") == "byte_level"
    prepare(again(packed_config, tmp_path))
    with pytest.raises(ValueError, match="tokenizer_kind 'byte_level' there, 'byte_fallback' here"):
        prepare(again(packed_config, tmp_path, tokenizer_kind="byte_fallback"))


def test_a_missing_litdata_or_a_broken_torchvision_is_named(packed_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "litdata.streaming", None)
    with pytest.raises(ValueError, match="pip install --no-deps litdata=="):
        prepare(again(packed_config, tmp_path))

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(shards_module, "find_spec", lambda name: object())
    monkeypatch.setattr(shards_module, "import_module", broken)
    for start in (lambda: prepare(again(packed_config, tmp_path)), TokenDataModule().setup):
        with pytest.raises(ValueError, match="torchvision is installed but broken.*pip uninstall torchvision"):
            start()


def test_progress_is_shown_only_when_asked(packed_config, tmp_path, capsys):
    prepare(again(packed_config, tmp_path / "quiet"))
    assert capsys.readouterr() == ("", "")
    prepare(again(packed_config, tmp_path / "shown"), progress=True)
    assert "Preparing" in capsys.readouterr().out
