import functools
import json
import shutil
import sys
import unicodedata

import numpy as np
import pytest
import sentencepiece
from helpers.tokens import WORDS, added_token, edited, folder_bytes, make_documents, make_texts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ttt_lit.data.corpus import Document, split_of
from ttt_lit.data.encode import encode_texts
from ttt_lit.data.tokenizer import load_tokenizer, text_only
from ttt_lit.data.train_tokenizer import EOS_TOKEN, TRAINERS, obtain_tokenizer
from ttt_lit.identity import tokenizer_hash

AWKWARD = [
    "plain text",
    "naïve straße 中文 Ελλάδα 😀👩‍👩‍👧",
    f"a{EOS_TOKEN}b<s></s><unk><0x41><0xFF> ▁▁x<tool_call>",
    "  two  spaces\n\n\ttab\x00\x7f",
    "e\u0301 decomposed",
    "",
]


def train(folder, read=make_documents, kind="byte_level", vocab_size=300, validation_fraction=0.3):
    options = {"kind": kind, "vocab_size": vocab_size, "validation_fraction": validation_fraction}
    obtain_tokenizer(folder, read, **options, source="test")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "byte_level"
    train(folder)
    return folder


@pytest.fixture(scope="module")
def qwen_like(byte_level, tmp_path_factory):
    """The same vocabulary as a Qwen2 tokenizer, which normalises to NFC and adds control tokens of both kinds."""
    folder = tmp_path_factory.mktemp("tokenizer") / "qwen"
    shutil.copytree(byte_level, folder)
    with edited(folder / "tokenizer.json") as content:
        content["normalizer"] = {"type": "NFC"}
        content["added_tokens"].append(added_token(300, "<|im_start|>", special=True))
        content["added_tokens"].append(added_token(301, "<tool_call>", special=False))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": EOS_TOKEN}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    """A Llama-like folder: nothing but a SentencePiece BPE model with byte fallback."""
    folder = tmp_path_factory.mktemp("tokenizer") / "sentencepiece"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.replace("\n", " ") for text in make_texts() if text.strip()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


cached_tokenizer = functools.cache(load_tokenizer)


def encode(tokenizer, text):
    return encode_texts(Tokenizer.from_str(tokenizer.definition), [text])[0]


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from([*WORDS, EOS_TOKEN])).map("".join))
@example("  ".join(AWKWARD))
def test_any_text_has_its_bytes_and_no_special_token(byte_level, text):
    tokenizer = cached_tokenizer(str(byte_level))
    ids = encode(tokenizer, text)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.eos_id not in ids


@pytest.mark.parametrize("text", AWKWARD)
def test_sentencepiece_folder_encodes_as_sentencepiece_does(sentencepiece_folder, text):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    tokenizer = cached_tokenizer(str(sentencepiece_folder))
    # transformers puts no second space in front
    normalised = reference.normalize(text).replace("▁", " ").removeprefix(" " if text.startswith(" ") else "")
    ids = encode(tokenizer, text)
    assert tokenizer.token_bytes[ids].sum() == len(normalised.encode())
    assert text.startswith(" ") or ids.tolist() == reference.encode(text)


@settings(deadline=None, max_examples=200)
@given(text=st.lists(st.sampled_from([*WORDS, "<s>", "</s>", "<unk>", "<0x41>", "s>", "<"]), min_size=1).map("".join))
def test_sentencepiece_special_and_byte_pieces_never_arise_from_their_spelling(sentencepiece_folder, text):
    tokenizer = cached_tokenizer(str(sentencepiece_folder))
    ids = encode(tokenizer, text)
    assert tokenizer.token_bytes[ids].all()
    expected = text if text == "" or text.startswith("▁") else " " + text
    assert tokenizer.token_bytes[ids].sum() == len(expected.replace("▁", " ").encode())


def test_specials_are_recognised_by_the_model_and_are_text_for_us(qwen_like):
    text = f"a{EOS_TOKEN}b<|im_start|>c<tool_call>d"
    tokenizer = load_tokenizer(str(qwen_like))
    specials = {tokenizer.eos_id, 300, 301}
    assert specials <= set(AutoTokenizer.from_pretrained(str(qwen_like))(text)["input_ids"])
    ids = encode(tokenizer, text)
    assert not specials & set(ids.tolist())
    assert set(np.flatnonzero(tokenizer.token_bytes == 0)) == specials
    assert tokenizer.vocab_size == 302


def test_bytes_are_those_of_nfc_and_text_without_specials_is_encoded_as_transformers_does(qwen_like):
    tokenizer = load_tokenizer(str(qwen_like))
    theirs = AutoTokenizer.from_pretrained(str(qwen_like))
    for text in AWKWARD:
        ids = encode(tokenizer, text)
        assert tokenizer.token_bytes[ids].sum() == len(unicodedata.normalize("NFC", text).encode())
        assert "<" in text or ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]


def test_merges_that_spell_a_special_token_are_taken_out():
    full = {"model": {"merges": [["<", "s"], ["<s", ">"], "< s>", ["a", "b"]]}, "added_tokens": []}
    assert text_only(full, {"<s>"})["model"]["merges"] == [["<", "s"], ["a", "b"]]


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_is_reproducible_and_reads_train_documents_only(tmp_path, kind):
    train(tmp_path / "once", kind=kind, vocab_size=350)
    train(tmp_path / "again", kind=kind, vocab_size=350)
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "once")
    kept = [document for document in make_documents() if split_of(document, 0.3) == "train"]
    assert len(kept) < len(make_documents())
    train(tmp_path / "kept", lambda: kept, kind=kind, vocab_size=350)
    assert tokenizer_hash(tmp_path / "kept") == tokenizer_hash(tmp_path / "once")
    receipt = json.loads((tmp_path / "once" / "trained_on.json").read_text())
    assert receipt["kind"] == kind
    assert receipt["documents"] == len(kept)
    assert receipt["bytes"] == sum(document.num_bytes() for document in kept)


@pytest.mark.parametrize("kind", [AutoTokenizer, PreTrainedTokenizerFast])
def test_the_trained_folder_is_an_ordinary_one_with_eos(byte_level, kind):
    theirs, text = kind.from_pretrained(str(byte_level), local_files_only=True), "naïve 😀 text"
    assert theirs.eos_token == EOS_TOKEN
    assert theirs.decode(theirs(text)["input_ids"]) == text


def test_too_little_text_for_the_vocabulary_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected 5000"):
        train(tmp_path / "t", lambda: [Document("a", "abc abc")], vocab_size=5000, validation_fraction=0.01)
    assert not list(tmp_path.iterdir())


def test_another_kind_vocabulary_or_split_is_not_taken_for_ours(byte_level, tmp_path):
    shutil.copytree(byte_level, tmp_path / "old")
    with edited(tmp_path / "old" / "trained_on.json") as receipt:
        assert receipt.pop("kind") == "byte_level"  # as written before there were kinds
    for folder in (byte_level, tmp_path / "old"):
        train(folder)
        with pytest.raises(ValueError, match="kind 'byte_level', expected 'byte_fallback'"):
            train(folder, kind="byte_fallback")
    with pytest.raises(ValueError, match="vocab_size 300, expected 301"):
        train(byte_level, vocab_size=301)
    with pytest.raises(ValueError, match="split"):
        train(byte_level, validation_fraction=0.2)
    with pytest.raises(ValueError, match="not trained here"):
        train(tmp_path)


def test_a_tokenizer_without_exact_bytes_is_refused(byte_level, tmp_path):
    shutil.copytree(byte_level, tmp_path / "t")
    with edited(tmp_path / "t" / "tokenizer.json") as content:
        content["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(ValueError, match="byte-level BPE"):
        load_tokenizer(str(tmp_path / "t"))


def test_a_folder_without_tokenizer_or_with_a_broken_one_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot load it") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_a_package_missing_for_sentencepiece_is_named(sentencepiece_folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match="pip install sentencepiece==.* protobuf"):
        load_tokenizer(str(sentencepiece_folder))
