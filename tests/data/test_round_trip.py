"""What prepare accepts spells the text that it read; what does not is refused by the name of the step."""

import json
import unicodedata
from dataclasses import replace

import pytest
from helpers.tokens import make_texts
from tokenizers import Tokenizer, pre_tokenizers

from ttt_lit.data import encode
from ttt_lit.data.corpus import Document
from ttt_lit.data.encode import PROBE, encode_exactly
from ttt_lit.data.prepare import prepare
from ttt_lit.data.tokenizer import BYTE_OF, load_tokenizer
from ttt_lit.data.train_tokenizer import EOS_TOKEN, TRAINERS

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NFC = {"type": "NFC"}


def split(pattern, behaviour):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behaviour, "invert": False}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def replaced(old, new):
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


@pytest.fixture(scope="module")
def trained():
    """tokenizer.json and tokenizer_config.json of both kinds."""
    made = {kind: train(lambda: iter(make_texts()), 380) for kind, train in TRAINERS.items()}
    return {kind: (json.loads(tokenizer.to_str()), config) for kind, (tokenizer, config) in made.items()}


@pytest.fixture
def save(trained, tmp_path):
    def save(kind="byte_level", *, name="tokenizer", config=None, model=None, **parts):
        content, settings = trained[kind]
        folder = tmp_path / name
        folder.mkdir()
        changed = content | parts | {"model": content["model"] | (model or {})}
        (folder / "tokenizer.json").write_text(json.dumps(changed))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | (config or {})))
        return folder

    return save


def read(folder, texts=()):
    """Ids of each text, checked as prepare checks them."""
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    return [ids.tolist() for _, ids in encode_exactly(documents, load_tokenizer(str(folder)), 0)]


def without_bytes(content, lost):
    """The model of a tokenizer that was trained without the whole alphabet."""
    return {
        "vocab": {token: i for token, i in content["model"]["vocab"].items() if not set(token) & set(lost)},
        "merges": [merge for merge in content["model"]["merges"] if not set("".join(merge)) & set(lost)],
    }


LOSING = {
    "Lowercase": {"normalizer": {"type": "Lowercase"}},
    "NFKC": {"normalizer": {"type": "NFKC"}},
    "NFD + StripAccents": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}
    },
    "Strip": {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
    "Replace": {"normalizer": replaced("\r\n", "\n")},
    "WhitespaceSplit + ByteLevel": {"pre_tokenizer": sequence({"type": "WhitespaceSplit"}, BYTES)},
    "Split + ByteLevel": {"pre_tokenizer": sequence(split(r"\d", "Removed"), BYTES)},
    # A prefix before every piece of the first step, not before the text.
    "Digits + ByteLevel": {
        "pre_tokenizer": sequence({"type": "Digits", "individual_digits": True}, BYTES | {"add_prefix_space": True})
    },
    "pre-tokenizer ByteLevel": {"model": {"end_of_word_suffix": "</w>"}},
}


@pytest.mark.parametrize("step", LOSING)
def test_a_step_that_loses_text_is_refused_by_its_name(save, step):
    with pytest.raises(ValueError, match="loses text") as caught:
        read(save(**LOSING[step]))
    assert step in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("normalizer", [{"type": "Lowercase"}, {"type": "NFKC"}, None])
def test_text_pieces_are_held_to_the_same(save, normalizer):
    """Without a normalizer a blank has no piece, and becomes a byte that stands for itself; only the words are lost."""
    steps = [replaced(" ", "▁")] + ([normalizer] if normalizer else [replaced("a", "")])
    with pytest.raises(ValueError, match=r"loses text.*normalizer Replace \+"):
        read(save("byte_fallback", normalizer={"type": "Sequence", "normalizers": steps}))


def test_bytes_without_a_token_are_noticed_before_any_document(save, trained):
    with pytest.raises(ValueError, match="loses text.*where our test text has"):
        read(save(model=without_bytes(trained["byte_level"][0], "ĉ")))


def test_an_unknown_token_in_the_place_of_bytes_is_refused(save, trained):
    model = without_bytes(trained["byte_level"][0], "ĉ") | {"unk_token": EOS_TOKEN}
    with pytest.raises(ValueError, match="^our test text: its text became the special token 0"):
        read(save(model=model))


KEEPING = {
    "as trained": {},
    "NFC": {"normalizer": NFC},
    "digits by threes": {"pre_tokenizer": sequence(split(r"\d{1,3}", "Isolated"), BYTES)},
    "padding": {
        "padding": {
            "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
            "pad_token": EOS_TOKEN,
        }
    },
    "truncation": {"truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}},
    "dropout": {"model": {"dropout": 0.5}},
}  # fmt: skip


# Gemma's kind keeps the normalizer and pre-tokenizer that it cannot do without.
ACCEPTED = [("byte_level", name) for name in KEEPING] + [
    ("byte_fallback", name) for name, parts in KEEPING.items() if not {"normalizer", "pre_tokenizer"} & set(parts)
]


@pytest.mark.parametrize("kind, settings", ACCEPTED)
def test_what_is_accepted_decodes_to_the_text_and_claims_its_bytes(save, kind, settings):
    folder = save(kind, **KEEPING[settings])
    tokenizer = load_tokenizer(str(folder))
    reader = Tokenizer.from_str(tokenizer.definition)
    for text, ids in zip(texts := make_texts(), read(folder, texts), strict=True):
        meant = text.replace("▁", " ") if kind == "byte_fallback" else text
        meant = unicodedata.normalize("NFC", meant) if settings == "NFC" else meant
        assert reader.decode(ids, skip_special_tokens=False) == meant
        assert int(tokenizer.token_bytes[ids].sum()) == len(meant.encode())


@pytest.mark.parametrize("kind", TRAINERS)
def test_one_space_in_front_is_read_and_counted(save, kind):
    prefixed = {
        "byte_level": {"pre_tokenizer": BYTES | {"add_prefix_space": True}},
        "byte_fallback": {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "▁"}, replaced(" ", "▁")],
            }
        },
    }
    folder = save(kind, **prefixed[kind])
    (ids,) = read(folder, ["river stone"])
    tokenizer = load_tokenizer(str(folder))
    assert b"".join(tokenizer.spelling[i] for i in ids) == b" river stone"
    assert int(tokenizer.token_bytes[ids].sum()) == len(" river stone")


@pytest.mark.parametrize("kind", TRAINERS)
def test_dropout_is_switched_off_so_that_a_text_has_one_encoding(save, kind):
    texts = [" ".join(make_texts())]
    assert read(save(kind, name="random", model={"dropout": 0.9}), texts) == read(save(kind), texts)


@pytest.mark.parametrize("named", ["Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_ids_are_those_of_the_file_whatever_class_the_config_names(save, named):
    pre_tokenizer = sequence(split(r"\d{1,3}", "Isolated"), BYTES)
    folder = save(pre_tokenizer=pre_tokenizer, config={"tokenizer_class": named})
    texts = ["650841823 of 1997, 12345 the the", *make_texts(5)]
    file = Tokenizer.from_str((folder / "tokenizer.json").read_text())
    plain = [text for text in texts if EOS_TOKEN not in text]
    assert read(folder, plain) == [file.encode(text, add_special_tokens=False).ids for text in plain]
    assert len(plain) > 1


def test_every_byte_of_utf8_is_in_the_probe_and_the_alphabet_is_the_librarys():
    possible = set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
    assert set(PROBE.text.encode()) == possible
    assert set(BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(PROBE.text)
    assert bytes(BYTE_OF[character] for piece, _ in pieces for character in piece) == PROBE.text.encode()


def test_prepare_refuses_and_leaves_nothing_behind(packed_config, save, tmp_path):
    folder = save(normalizer={"type": "Lowercase"})
    config = replace(packed_config, tokenizer=str(folder), train_tokenizer=None, output=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="normalizer Lowercase"):
        prepare(config)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    prepare(replace(config, tokenizer=str(save(name="another"))))
    assert (tmp_path / "data").is_dir()


def test_the_source_is_sampled_and_not_only_the_probe(save, monkeypatch):
    """A loss that the probe does not hold shows in the first documents, and is looked for up to the sample's length."""
    folder = save(normalizer=replaced("river", "stone"))
    with pytest.raises(ValueError, match=r"spell 'a stone' where document 1 has 'a river'"):
        read(folder, ["plain", "a river"])
    monkeypatch.setattr(encode, "SAMPLE_CHARACTERS", len(PROBE.text) + 5)
    assert len(read(folder, ["plain", "a river"])) == 2
