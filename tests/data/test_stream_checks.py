"""What a data module finds out about its folders before it serves a block."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.tokens import edited, indices, request

from ttt_lit.data.manifest import Manifest, prepare_command
from ttt_lit.data.stream import TokenDataModule


@pytest.fixture
def damaged(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "data")
    return tmp_path / "data"


def test_whole_shards_pass_the_check(damaged):
    TokenDataModule(short=str(damaged)).setup()


def flip(path):
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("verify", ["full", "size"])
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "damaged, got .* bytes"),
        (lambda path: path.write_bytes(b""), "damaged, got 0 bytes"),
        (Path.unlink, "missing"),
    ],
)
def test_a_damaged_shard_is_named_with_the_way_to_remake_it(damaged, damage, message, verify):
    damage(damaged / "train" / "chunk-0-1.bin")
    with pytest.raises(
        (ValueError, FileNotFoundError), match=f"chunk-0-1.bin: {message}.*python cli.py prepare"
    ) as caught:
        TokenDataModule(short=str(damaged), verify=verify).setup()
    assert "\n" not in str(caught.value)


def test_flipped_bits_and_foreign_shards_are_found_by_their_contents(damaged):
    flip(damaged / "validation" / "chunk-0-0.bin")
    with pytest.raises(ValueError, match=r"validation/chunk-0-0\.bin: damaged or from another data set"):
        TokenDataModule(short=str(damaged)).setup()
    TokenDataModule(short=str(damaged), verify="size").setup()


def test_ids_outside_the_vocabulary_are_found_when_read(damaged):
    path = damaged / "train" / "chunk-0-0.bin"
    words = np.fromfile(path, dtype=np.int32)
    words[3:] = 300
    words.tofile(path)
    module = TokenDataModule(short=str(damaged), verify="size")
    module.setup()
    with pytest.raises(ValueError, match=r"chunk-0-0\.bin: damaged or from another tokenizer.*0…299"):
        indices(module.open(request(num_batches=200)))


def test_a_missing_folder_names_the_config_that_makes_it(tmp_path, monkeypatch):
    configs = tmp_path / "configs" / "data"
    configs.mkdir(parents=True)
    (configs / "mine.yaml").write_text("output: artifacts/mine\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="artifacts/mine.*prepare --config configs/data/mine.yaml"):
        TokenDataModule(short="artifacts/mine").setup()
    assert prepare_command(Path("other")).endswith("configs/data/NAME.yaml")
    Path("artifacts/mine.partial").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="unfinished"):
        TokenDataModule(short="artifacts/mine").setup()


@pytest.mark.parametrize(
    "changes, message",
    [({"format_version": 99}, "format version 99"), ({"dtype": None, "new": 1}, "not a manifest")],
)
def test_a_manifest_of_another_kind_is_refused(damaged, changes, message):
    with edited(damaged / "manifest.json") as content:
        content.update(changes)
    with pytest.raises(ValueError, match=message):
        Manifest.load(damaged)


def test_only_one_process_of_a_machine_reads_every_byte(damaged):
    flip(damaged / "train" / "chunk-0-0.bin")
    other = TokenDataModule(short=str(damaged))
    other.trainer = SimpleNamespace(local_rank=1)
    other.setup()
    first = TokenDataModule(short=str(damaged))
    first.trainer = SimpleNamespace(local_rank=0)
    with pytest.raises(ValueError, match="SHA-256"):
        first.setup()


@pytest.mark.parametrize("changes", [{"split": "other"}, {"tokenizer_hash": "0"}, {"bos_id": 7}])
def test_short_and_long_must_share_tokenizer_bos_and_split(damaged, per_document, changes):
    with edited(damaged / "manifest.json") as content:
        content.update(changes)
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: got .*, expected the same"):
        TokenDataModule(short=str(damaged), long=str(per_document)).setup()


@pytest.mark.parametrize(
    "changes, vocab_size, message",
    [
        ({}, 299, "a text can need token 299, the model has 299"),
        ({"bos_id": 310}, 300, "blocks begin with token 310, the model has 300"),
        ({"bos_id": -1}, 300, "blocks begin with token -1"),
        ({"eos_id": 300}, 300, "EOS is token 300"),
        ({"tokenizer_hash": "0"}, 300, "made with tokenizer"),
    ],
)
def test_the_model_must_have_the_vocabulary_and_the_tokenizer(damaged, changes, vocab_size, message):
    known = Manifest.load(damaged).tokenizer_hash
    TokenDataModule(short=str(damaged)).check_model(300, known)
    TokenDataModule(short=str(damaged)).check_model(320, None)
    with edited(damaged / "manifest.json") as content:
        content.update(changes)
    with pytest.raises(ValueError, match=message):
        TokenDataModule(short=str(damaged)).check_model(vocab_size, known)
