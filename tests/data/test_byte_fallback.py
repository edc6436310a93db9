"""The tokenizer of Gemma's kind: what it makes of texts, and that it is trained as its users will run it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_corpus import SPECIAL, WORDS, folder_bytes, make_texts
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from ttt_lit.data import tokenizer_kinds
from ttt_lit.data.corpus import Document
from ttt_lit.data.encode import build_tokenizer, encode_documents, encode_texts
from ttt_lit.data.manifest import Manifest
from ttt_lit.data.prepare import prepare
from ttt_lit.data.tokenizer import BYTE_PIECES, load_tokenizer
from ttt_lit.data.tokenizer_kinds import SPECIAL_TOKENS, common_characters
from ttt_lit.data.train_tokenizer import train_tokenizer

VOCAB = 400
CODE = "class A:\n    def f(self):\n        if x == 1234567890:\n            return self.x\n\n\n"
SPELLINGS = [*SPECIAL_TOKENS.values(), *SPECIAL.split(), "<0xFF>", "eos>", "<", "0x41>"]
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.text(CHARACTERS) | st.lists(st.sampled_from([*WORDS, *SPELLINGS, " ", "  ", CODE, "12", "é"])).map("".join)


def documents():
    return [Document(str(i), text) for i, text in enumerate([*make_texts(), *(CODE * n for n in range(1, 9))])]


def train(folder, read=documents, vocab_size=VOCAB):
    train_tokenizer(folder, read, kind="byte_fallback", vocab_size=vocab_size, validation_fraction=0.3, source="test")


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
    return build_tokenizer(loaded.definition)


def pieces(reader, text):
    return reader.encode(text, add_special_tokens=False).tokens


def read_as(text):
    """A ``▁`` stands for a space, so it is one."""
    return text.replace("▁", " ")


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_every_text_comes_back_and_has_its_bytes(loaded, reader, text):
    ids = encode_texts(reader, [text])[0]
    assert reader.decode(ids.tolist(), skip_special_tokens=False) == read_as(text)
    assert loaded.token_bytes[ids].sum() == len(read_as(text).encode())


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_special_tokens_never_arise_from_text(loaded, reader, text):
    ids = encode_texts(reader, [text])[0]
    assert not loaded.forbidden[ids].any()
    assert not set(range(len(SPECIAL_TOKENS))) & set(ids.tolist())


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_encoding_whole_documents_gives_the_pieces_of_the_words_trained_on(loaded, reader, text):
    split = build_tokenizer(loaded.definition)
    split.pre_tokenizer = pre_tokenizers.Split(Regex(tokenizer_kinds.WORDS), "isolated")
    assert pieces(reader, text) == pieces(split, text)


def test_the_literal_space_mark_is_one_byte_and_comes_back_as_a_space(loaded, reader):
    ids = encode_texts(reader, ["a▁b"])[0].tolist()
    assert ids == encode_texts(reader, ["a b"])[0].tolist()
    assert reader.decode(ids) == "a b"
    assert loaded.token_bytes[ids].sum() == 3


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
    tokenizer = load_tokenizer(config.tokenizer)
    texts = [document.text for document, _ in long_enough(config, tokenizer)]
    sides = (manifest.train, manifest.validation)
    assert sum(side.raw_bytes for side in sides) == sum(len(text.encode()) for text in texts)
    assert sum(side.normalized_bytes for side in sides) == sum(len(read_as(text).encode()) for text in texts)
    marks = sum(text.count("▁") for text in texts)
    assert marks > 0
    assert sum(side.raw_bytes - side.normalized_bytes for side in sides) == 2 * marks


def long_enough(config, tokenizer):
    given = [Document(str(i), text) for i, text in enumerate(make_texts())]
    return [pair for pair in encode_documents(given, tokenizer.definition, 0) if len(pair[1]) >= config.context]


def test_special_tokens_and_bytes_have_gemmas_places(loaded, whole):
    vocabulary = whole.get_vocab()
    assert [vocabulary[token] for token in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")] == [0, 1, 2, 3, 4]
    assert all(piece in vocabulary for piece in BYTE_PIECES)
    assert loaded.eos_id == 1
    assert loaded.vocab_size == VOCAB == len(vocabulary)
    assert set(np.flatnonzero(loaded.forbidden)) == set(range(5))


def test_the_file_is_built_as_gemmas():
    """As transformers itself builds a Gemma tokenizer, but for vocabulary, merges and added tokens."""
    from transformers import GemmaTokenizer

    trained, _ = tokenizer_kinds.train_byte_fallback(lambda: iter(["some text"]), 280)
    ours, theirs = (json.loads(backend.to_str()) for backend in (trained, GemmaTokenizer().backend_tokenizer))
    assert {key: ours[key] for key in ("normalizer", "pre_tokenizer", "decoder")} == {
        key: theirs[key] for key in ("normalizer", "pre_tokenizer", "decoder")
    }
    varying = ("vocab", "merges")
    assert {key: value for key, value in ours["model"].items() if key not in varying} == {
        key: value for key, value in theirs["model"].items() if key not in varying
    }


def test_indentation_and_blank_lines_become_pieces(reader):
    assert pieces(reader, "\n\n\n        return") == ["\n\n\n", "▁▁▁▁▁▁▁▁", "return"]


def test_digits_stand_alone_and_rare_characters_are_bytes(reader):
    assert [piece.strip("▁") for piece in pieces(reader, "1234 10")] == ["1", "2", "3", "4", "1", "0"]
    assert pieces(reader, "ﷺ") == ["<0xEF>", "<0xB7>", "<0xBA>"]


def test_no_piece_could_span_two_words(whole):
    word = Regex(rf"\A(?:{tokenizer_kinds.WORDS})\z")
    split = pre_tokenizers.Split(word, "removed")
    learned = [piece for piece in whole.get_vocab() if piece not in {*BYTE_PIECES, *SPECIAL_TOKENS.values()}]
    assert len(learned) > 100
    assert [piece for piece in learned if split.pre_tokenize_str(piece)] == []
    assert split.pre_tokenize_str("a(") != []


def test_training_is_reproducible(folder, tmp_path):
    train(tmp_path / "again")
    assert folder_bytes(tmp_path / "again") == folder_bytes(folder)


def test_equally_frequent_characters_are_chosen_by_their_code(monkeypatch):
    monkeypatch.setattr(tokenizer_kinds, "CHARACTER_COVERAGE", 0.5)
    assert common_characters(iter(["dcba ", "hgfe▁"])) == ["a", "b", "c", "▁"]


def test_the_receipt_counts_the_train_documents_once_and_names_the_kind(folder):
    receipt = json.loads((folder / "trained_on.json").read_text())
    assert receipt["kind"] == "byte_fallback"
    assert 0 < receipt["documents"] < len(documents())
    assert receipt["bytes"] < sum(document.num_bytes() for document in documents())


def test_a_vocabulary_without_room_for_the_characters_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"got 263, expected at least 264 \(5 special tokens, 256 bytes and 3 char"):
        train(tmp_path / "t", lambda: [Document("a", "ab ab")], 263)
    assert not list(tmp_path.iterdir())


def test_a_byte_level_tokenizer_in_the_folder_is_refused(packed, packed_config, tmp_path):
    config = replace(packed_config, output=str(tmp_path / "data"), tokenizer_kind="byte_fallback")
    with pytest.raises(ValueError, match="trained with kind 'byte_level', expected 'byte_fallback'") as caught:
        prepare(config)
    assert "\n" not in str(caught.value)


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
    reader = build_tokenizer(load_tokenizer(str(folder)).definition)
    ids = theirs(CODE, add_special_tokens=False)["input_ids"]
    assert ids == encode_texts(reader, [CODE])[0].tolist()
    assert theirs.decode(ids) == CODE


@pytest.fixture(scope="module")
def with_added_text(folder, tmp_path_factory):
    """Gemma's file lists some ordinary pieces as added tokens as well, found in the raw text before anything else."""
    copy = tmp_path_factory.mktemp("tokenizer") / "added"
    shutil.copytree(folder, copy)
    content = json.loads((copy / "tokenizer.json").read_text())
    rest = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    vocabulary = content["model"]["vocab"]
    content["added_tokens"] += [
        {"id": vocabulary[piece], "content": piece} | rest for piece in ("\n\n", "▁▁", "▁▁▁▁", "<")
    ]
    (copy / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(str(copy))


@settings(deadline=None, max_examples=100)
@given(TEXTS)
def test_pieces_that_are_added_tokens_too_keep_the_bytes_exact(with_added_text, text):
    ids = encode_texts(build_tokenizer(with_added_text.definition), [text])[0]
    assert with_added_text.token_bytes[ids].sum() == len(read_as(text).encode())
    assert not with_added_text.forbidden[ids].any()
