import json
import os
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpus import WORDS, folder_bytes, make_texts
from transformers import AutoTokenizer

from ttt_lit.data.corpus import Document
from ttt_lit.data.encode import build_tokenizer, encode_documents, encode_texts
from ttt_lit.data.split import split_of
from ttt_lit.data.tokenizer import load_tokenizer, text_only
from ttt_lit.data.tokenizer_kinds import EOS_TOKEN
from ttt_lit.data.train_tokenizer import check_trained, train_tokenizer
from ttt_lit.identity import tokenizer_hash

AWKWARD = [
    "plain text",
    "naïve straße 中文 Ελλάδα 😀👩‍👩‍👧",
    f"a{EOS_TOKEN}b<s></s><unk><0x41><0xFF> ▁▁x<tool_call>",
    "  two  spaces\n\n\ttab\x00\x7f",
    "e\u0301 decomposed",
    "",
]


def documents():
    return [Document(str(i), text) for i, text in enumerate(make_texts())]


def train(folder, read=documents, vocab_size=300, validation_fraction=0.3):
    train_tokenizer(
        folder,
        read,
        kind="byte_level",
        vocab_size=vocab_size,
        validation_fraction=validation_fraction,
        source="test",
    )


def check(folder, kind="byte_level", vocab_size=300, validation_fraction=0.3):
    check_trained(folder, kind=kind, vocab_size=vocab_size, validation_fraction=validation_fraction)


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
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    rest = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"].append({"id": 300, "content": "<|im_start|>", "special": True} | rest)
    content["added_tokens"].append({"id": 301, "content": "<tool_call>", "special": False} | rest)
    (folder / "tokenizer.json").write_text(json.dumps(content))
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


def encode(tokenizer, text):
    return encode_texts(build_tokenizer(tokenizer.definition), [text])[0]


def num_bytes(tokenizer, text):
    return int(tokenizer.token_bytes[encode(tokenizer, text)].sum())


@pytest.mark.parametrize("text", AWKWARD)
def test_bytes_of_a_byte_level_document_are_those_of_its_text(byte_level, text):
    assert num_bytes(load_tokenizer(str(byte_level)), text) == len(text.encode())


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"])) | st.lists(st.sampled_from([*WORDS, EOS_TOKEN])).map("".join))
def test_any_text_has_its_bytes_and_no_special_token(byte_level, text):
    tokenizer = cached(str(byte_level))
    ids = encode(tokenizer, text)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.eos_id not in ids


@pytest.mark.parametrize("text", AWKWARD)
def test_bytes_follow_the_tokenizers_normalisation(qwen_like, text):
    assert num_bytes(load_tokenizer(str(qwen_like)), text) == len(unicodedata.normalize("NFC", text).encode())


@pytest.mark.parametrize("text", AWKWARD)
def test_bytes_of_a_sentencepiece_document_are_those_of_its_normalised_text(sentencepiece_folder, text):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    normalised = reference.normalize(text).replace("▁", " ")
    if text.startswith(" "):
        normalised = normalised[1:]  # transformers puts no second space in front
    assert num_bytes(load_tokenizer(str(sentencepiece_folder)), text) == len(normalised.encode())


def test_sentencepiece_folder_encodes_as_sentencepiece_does(sentencepiece_folder):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    tokenizer = load_tokenizer(str(sentencepiece_folder))
    for text in AWKWARD:
        if not text.startswith(" "):
            assert encode(tokenizer, text).tolist() == reference.encode(text)


@settings(deadline=None, max_examples=200)
@given(text=st.lists(st.sampled_from([*WORDS, "<s>", "</s>", "<unk>", "<0x41>", "s>", "<"]), min_size=1).map("".join))
def test_sentencepiece_special_and_byte_pieces_never_arise_from_their_spelling(sentencepiece_folder, text):
    tokenizer = cached(str(sentencepiece_folder))
    ids = encode(tokenizer, text)
    assert not tokenizer.forbidden[ids].any()
    expected = text if text == "" or text.startswith("▁") else " " + text
    assert tokenizer.token_bytes[ids].sum() == len(expected.replace("▁", " ").encode())


def test_specials_are_recognised_by_the_model_and_are_text_for_us(qwen_like):
    text = f"a{EOS_TOKEN}b<|im_start|>c<tool_call>d"
    tokenizer = load_tokenizer(str(qwen_like))
    specials = {tokenizer.eos_id, 300, 301}
    assert specials <= set(AutoTokenizer.from_pretrained(str(qwen_like))(text)["input_ids"])
    ids = encode(tokenizer, text)
    assert not specials & set(ids.tolist())
    assert set(np.flatnonzero(tokenizer.forbidden)) == specials
    assert not tokenizer.token_bytes[list(specials)].any()
    assert tokenizer.vocab_size == 302


def test_text_without_specials_is_encoded_as_transformers_does(qwen_like):
    tokenizer = load_tokenizer(str(qwen_like))
    theirs = AutoTokenizer.from_pretrained(str(qwen_like))
    for text in AWKWARD:
        if "<" not in text:
            assert encode(tokenizer, text).tolist() == theirs(text, add_special_tokens=False)["input_ids"]


def test_merges_that_spell_a_special_token_are_taken_out():
    full = {"model": {"merges": [["<", "s"], ["<s", ">"], "< s>", ["a", "b"]]}, "added_tokens": []}
    assert text_only(full, {"<s>"})["model"]["merges"] == [["<", "s"], ["a", "b"]]


def test_training_is_reproducible_and_reads_train_documents_only(byte_level, tmp_path):
    train(tmp_path / "again")
    assert folder_bytes(tmp_path / "again") == folder_bytes(byte_level)
    held_out = [document for document in documents() if split_of(document, 0.3) == "validation"]
    kept = [document for document in documents() if split_of(document, 0.3) == "train"]
    assert held_out
    train(tmp_path / "kept", lambda: kept)
    assert tokenizer_hash(tmp_path / "kept") == tokenizer_hash(byte_level)


def test_the_trained_folder_loads_offline_with_eos(byte_level):
    code = (
        "import sys; from transformers import AutoTokenizer as A, PreTrainedTokenizerFast as F\n"
        "assert all(t.from_pretrained(sys.argv[1]).eos_token == '<|endoftext|>' for t in (A, F))\n"
        "t = A.from_pretrained(sys.argv[1]); text = 'naïve 😀 text'; assert t.decode(t(text)['input_ids']) == text"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, str(byte_level)], check=True, env=environment)


def test_too_little_text_for_the_vocabulary_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected 5000"):
        train(tmp_path / "t", lambda: [Document("a", "abc abc")], 5000, 0.01)
    assert not list(tmp_path.iterdir())


def test_another_kind_vocabulary_or_split_is_not_taken_for_ours(byte_level, tmp_path):
    check(byte_level)
    with pytest.raises(ValueError, match="kind 'byte_level', expected 'byte_fallback'"):
        check(byte_level, kind="byte_fallback")
    with pytest.raises(ValueError, match="vocab_size 300, expected 301"):
        check(byte_level, vocab_size=301)
    with pytest.raises(ValueError, match="split"):
        check(byte_level, validation_fraction=0.2)
    with pytest.raises(ValueError, match="not trained here"):
        check(tmp_path)


def test_a_receipt_from_before_there_were_kinds_means_byte_level(byte_level, tmp_path):
    shutil.copytree(byte_level, tmp_path / "old")
    path = tmp_path / "old" / "trained_on.json"
    receipt = json.loads(path.read_text())
    assert receipt.pop("kind") == "byte_level"
    path.write_text(json.dumps(receipt))
    check(tmp_path / "old")
    with pytest.raises(ValueError, match="kind 'byte_level', expected 'byte_fallback'"):
        check(tmp_path / "old", kind="byte_fallback")


def test_a_tokenizer_without_exact_bytes_is_refused(byte_level, tmp_path):
    shutil.copytree(byte_level, tmp_path / "t")
    content = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content))
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


def test_several_processes_give_the_same_tokens_in_the_same_order(byte_level, monkeypatch):
    monkeypatch.setattr("ttt_lit.data.encode.BATCH_CHARACTERS", 500)
    definition = load_tokenizer(str(byte_level)).definition
    alone = [(document.id, ids.tolist()) for document, ids in encode_documents(documents(), definition, 0)]
    assert [(document.id, ids.tolist()) for document, ids in encode_documents(documents(), definition, 2)] == alone


_loaded = {}


def cached(folder):
    return _loaded.setdefault(folder, load_tokenizer(folder))
