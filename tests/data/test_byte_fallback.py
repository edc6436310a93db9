"""The tokenizer of Gemma's kind: what it makes of texts, and that it is trained as its users will run it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers.tokens import SPECIAL, WORDS, added_token, edited, expected_documents, make_documents
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from ttt_lit.data import train_tokenizer as kinds
from ttt_lit.data.corpus import Document
from ttt_lit.data.encode import encode_texts
from ttt_lit.data.manifest import Manifest
from ttt_lit.data.prepare import prepare
from ttt_lit.data.tokenizer import BYTE_PIECES, load_tokenizer
from ttt_lit.data.train_tokenizer import SPECIAL_TOKENS, common_characters, obtain_tokenizer

VOCAB = 400
CODE = "class A:\n    def f(self):\n        if x == 1234567890:\n            return self.x\n\n\n"
SPELLINGS = [*SPECIAL_TOKENS.values(), *SPECIAL.split(), "<0xFF>", "eos>", "<", "0x41>"]
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.text(CHARACTERS) | st.lists(st.sampled_from([*WORDS, *SPELLINGS, " ", "  ", CODE, "12", "é"])).map("".join)


def documents():
    return [*make_documents(), *(Document(str(n), CODE * n) for n in range(1, 9))]


def train(folder, read=documents, vocab_size=VOCAB):
    options = {"vocab_size": vocab_size, "validation_fraction": 0.3, "source": "test"}
    obtain_tokenizer(folder, read, kind="byte_fallback", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "byte_fallback"
    train(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def whole(folder):
    """The saved tokenizer as it is."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def reader(loaded):
    """The tokenizer that reads text."""
    return Tokenizer.from_str(loaded.definition)


def read_as(text):
    """A ``▁`` stands for a space, so it is one."""
    return text.replace("▁", " ")


def pieces(reader, text):
    return reader.encode(text, add_special_tokens=False).tokens


@settings(deadline=None, max_examples=300)
@given(TEXTS)
@example("a▁b")
def test_every_text_comes_back_has_its_bytes_and_no_special_token(loaded, reader, text):
    ids = encode_texts(reader, [text])[0]
    assert reader.decode(ids.tolist(), skip_special_tokens=False) == read_as(text)
    assert loaded.token_bytes[ids].sum() == len(read_as(text).encode())
    assert loaded.token_bytes[ids].all()
    assert not set(range(len(SPECIAL_TOKENS))) & set(ids.tolist())


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_encoding_whole_documents_gives_the_pieces_of_the_words_trained_on(loaded, reader, text):
    split = Tokenizer.from_str(loaded.definition)
    split.pre_tokenizer = pre_tokenizers.Split(Regex(kinds.WORDS), "isolated")
    assert pieces(reader, text) == pieces(split, text)


def test_a_prepared_folder_counts_space_marks_as_spaces(tmp_path, packed_config):
    config = replace(
        packed_config,
        tokenizer=str(tmp_path / "tokenizer"),
        output=str(tmp_path / "data"),
        tokenizer_kind="byte_fallback",
        train_tokenizer=VOCAB,
    )
    manifest = prepare(config)
    assert manifest == Manifest.load(tmp_path / "data")
    for split in ("train", "validation"):
        side, texts = manifest.side(split), [document.text for document, _ in expected_documents(config, split)]
        assert side.raw_bytes == sum(len(text.encode()) for text in texts)
        assert side.normalized_bytes == sum(len(read_as(text).encode()) for text in texts) < side.raw_bytes


def test_special_tokens_and_bytes_have_gemmas_places(loaded, whole):
    vocabulary = whole.get_vocab()
    assert [vocabulary[token] for token in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")] == [0, 1, 2, 3, 4]
    assert all(piece in vocabulary for piece in BYTE_PIECES)
    assert loaded.eos_id == 1
    assert loaded.vocab_size == VOCAB == len(vocabulary)
    assert set(np.flatnonzero(loaded.token_bytes == 0)) == set(range(5))
    assert loaded.bos_id is None  # Gemma's own puts one before every text


def test_indentation_is_a_piece_digits_stand_alone_and_rare_characters_are_bytes(reader):
    assert pieces(reader, "\n\n\n        return") == ["\n\n\n", "▁▁▁▁▁▁▁▁", "return"]
    assert [piece.strip("▁") for piece in pieces(reader, "1234 10")] == ["1", "2", "3", "4", "1", "0"]
    assert pieces(reader, "ﷺ") == ["<0xEF>", "<0xB7>", "<0xBA>"]


def test_no_piece_could_span_two_words(whole):
    word = Regex(rf"\A(?:{kinds.WORDS})\z")
    split = pre_tokenizers.Split(word, "removed")
    learned = [piece for piece in whole.get_vocab() if piece not in {*BYTE_PIECES, *SPECIAL_TOKENS.values()}]
    assert len(learned) > 100
    assert [piece for piece in learned if split.pre_tokenize_str(piece)] == []
    assert split.pre_tokenize_str("a(") != []


def test_equally_frequent_characters_are_chosen_by_their_code(monkeypatch):
    monkeypatch.setattr(kinds, "CHARACTER_COVERAGE", 0.5)
    assert common_characters(iter(["dcba ", "hgfe▁"])) == ["a", "b", "c", "▁"]


def test_a_vocabulary_without_room_for_the_characters_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"got 263, expected at least 264 \(5 special tokens, 256 bytes and 3 char"):
        train(tmp_path / "t", lambda: [Document("a", "ab ab")], 263)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_transformers_loads_it_offline_as_a_gemma_tokenizer(folder, tmp_path, beside_a_model):
    shutil.copytree(folder, tmp_path / "t")
    if beside_a_model:
        config = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
        (tmp_path / "t" / "config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "t"), local_files_only=True)
    assert type(theirs).__name__ == "GemmaTokenizer"
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id) == (0, 1, 2, 3)
    assert len(theirs) == VOCAB
    reader = Tokenizer.from_str(load_tokenizer(str(folder)).definition)
    ids = theirs(CODE, add_special_tokens=False)["input_ids"]
    assert ids == encode_texts(reader, [CODE])[0].tolist()
    assert theirs.decode(ids) == CODE


@pytest.fixture(scope="module")
def with_added_text(folder, tmp_path_factory):
    """Gemma's file lists some ordinary pieces as added tokens as well, found in the raw text before anything else."""
    copy = tmp_path_factory.mktemp("tokenizer") / "added"
    shutil.copytree(folder, copy)
    with edited(copy / "tokenizer.json") as content:
        for piece in ("\n\n", "▁▁", "▁▁▁▁", "<"):
            content["added_tokens"].append(added_token(content["model"]["vocab"][piece], piece, special=False))
    return load_tokenizer(str(copy))


@settings(deadline=None, max_examples=100)
@given(TEXTS)
def test_pieces_that_are_added_tokens_too_keep_the_bytes_exact(with_added_text, text):
    ids = encode_texts(Tokenizer.from_str(with_added_text.definition), [text])[0]
    assert with_added_text.token_bytes[ids].sum() == len(read_as(text).encode())
    assert with_added_text.token_bytes[ids].all()
