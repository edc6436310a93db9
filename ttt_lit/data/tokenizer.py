"""The model's own tokenizer, made to read nothing but text.

Special tokens never arise from a text, every token's bytes are known, and one text has one encoding.

Two kinds are understood: byte-level BPE (a token is a string over an alphabet of 256 characters, one per byte) and
SentencePiece-style BPE with byte fallback (a piece is text with ``▁`` for the space, or ``<0xNN>`` for one byte).
Anything else has no exact table of bytes and is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ttt_lit.identity import DEFINING_FILES, FAST_FILE, tokenizer_hash
from ttt_lit.tokenizer_json import special_strings

SPACE_PIECE = "▁"
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))

# GPT-2's alphabet: printable bytes of Latin-1 stand for themselves, the others for U+0100 and up.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
"""Character of a byte-level token -> the byte that it stands for."""


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """A tokenizer reduced to what reading text needs."""

    name: str
    """The folder or hub id it was loaded from."""
    hash: str
    """Identity: see ``tokenizer_hash``."""
    vocab_size: int
    """Largest token id + 1, added tokens included. A model's embedding may be longer (padding), never shorter."""
    eos_id: int
    """The token between documents."""
    bos_id: int | None
    """The token that the tokenizer itself puts before a text, so that the model has seen no sequence without it. None: it
    puts none."""
    byte_level: bool
    """Whether tokens are spelt in bytes, or in text with ``▁`` for the space."""
    spelling: tuple[bytes, ...]
    """The normalised text that each token stands for; empty for tokens that never arise from text."""
    token_bytes: np.ndarray
    """(vocab_size,) int32: bytes of normalised text per token; 0 exactly for tokens that never arise from text."""
    definition: str
    """JSON of the ``tokenizers.Tokenizer`` that encodes text: no special tokens, post-processor, padding,
    truncation, dropout."""

    def spell(self, ids: np.ndarray) -> str:
        """The text that ``ids``, (tokens,) int32, stand for, as normalised."""
        return b"".join(map(self.spelling.__getitem__, ids.tolist())).decode("utf-8", "replace")


def load_tokenizer(name: str) -> TextTokenizer:
    """Load a Hugging Face tokenizer folder, or fetch a hub id. Code that comes with a tokenizer is never run.

    Ids are those of tokenizer.json where there is one, whatever class tokenizer_config.json names: transformers 5
    rebuilds that class with its own normalizer and pre-tokenizer.
    """
    folder = _find_folder(name)
    digest = tokenizer_hash(folder)
    if digest is None:
        raise FileNotFoundError(
            f"tokenizer {name}: expected a folder with one of {', '.join(DEFINING_FILES)}; give the model's folder, or"
            " import the model first: python cli.py import --source MODEL --output FOLDER (its tokenizer:"
            " FOLDER/tokenizer)"
        )
    has_fast = (folder / FAST_FILE).is_file()
    if not has_fast:
        _check_sentencepiece(name)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind: Any = PreTrainedTokenizerFast if has_fast else AutoTokenizer
    try:
        tokenizer: Any = kind.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (ImportError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"tokenizer {name}: transformers cannot load it ({reason}); expected tokenizer.json and"
            f" tokenizer_config.json in {folder}"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"tokenizer {name}: {type(tokenizer).__name__} has no fast form; expected a folder with tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {name}: names no EOS token; set eos_token in {folder / 'tokenizer_config.json'}, or, where that belongs"
            " to an imported checkpoint, in its source, and import again"
        )
    full = json.loads(backend.to_str())
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    vocab_size = max(vocabulary.values()) + 1
    byte_level = _is_byte_level(full, name)
    blocked = special_strings(full) | {tokenizer.eos_token}
    definition = text_only(full, blocked)
    added = {token["content"] for token in definition["added_tokens"]}
    spelling = [b""] * vocab_size
    for token, index in vocabulary.items():
        if token not in blocked:
            # Added tokens are spelt as themselves, not in the alphabet of bytes.
            spelling[index] = _spell_token(token, byte_level=byte_level and token not in added)
    return TextTokenizer(
        name=name,
        hash=digest,
        vocab_size=vocab_size,
        eos_id=int(tokenizer.eos_token_id),
        bos_id=_find_bos(tokenizer, name),
        byte_level=byte_level,
        spelling=tuple(spelling),
        token_bytes=np.array([len(spelt) for spelt in spelling], dtype=np.int32),
        definition=json.dumps(definition, ensure_ascii=False),
    )


def step_kinds(part: Any) -> list[str]:
    """Types of a normalizer's or pre-tokenizer's steps, in order."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers") or ()
    own = [part["type"]] if part["type"] != "Sequence" else []
    return own + [kind for step in inner for kind in step_kinds(step)]


def _find_folder(name: str) -> Path:
    """The local folder of a tokenizer; a hub id is fetched first (tokenizer files only, no code, no pickles)."""
    folder = Path(name)
    # A path has a leading dot or slash, or more than one slash; ORGANISATION/NAME has neither.
    hub_id = name.count("/") == 1 and not name.startswith((".", "/")) and not folder.parent.is_dir()
    if folder.is_dir() or not hub_id:
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["tokenizer*", "spiece.model", "special_tokens_map.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"tokenizer {name}: no such folder, and not to be had from the Hugging Face hub"
            f" ({type(error).__name__}); give the model's folder, or log in with `hf auth login` and accept the"
            " model's licence on its page"
        ) from error


def _check_sentencepiece(name: str) -> None:
    """Without these packages transformers takes a SentencePiece model for something else, and says so."""
    try:
        for package in ("sentencepiece", "google.protobuf"):
            import_module(package)
    except ImportError as error:
        raise ValueError(
            f"tokenizer {name}: reading a SentencePiece model without {FAST_FILE} needs two more packages: pip"
            " install sentencepiece==0.2.3 protobuf"
        ) from error


def _find_bos(tokenizer: Any, name: str) -> int | None:
    """What stands before a text once it is encoded. No setting tells: many tokenizers name a BOS token and put none, and
    a post-processor may put one whatever ``add_bos_token`` says."""
    whole: list[int] = tokenizer("x")["input_ids"]
    text: list[int] = tokenizer("x", add_special_tokens=False)["input_ids"]
    starts = (start for start in range(len(whole)) if whole[start : start + len(text)] == text)
    before = whole[: next(starts, len(whole))]
    if not before:
        return None
    if before != [tokenizer.bos_token_id]:
        raise ValueError(
            f"tokenizer {name}: puts {tokenizer.convert_ids_to_tokens(before)} before a text, expected nothing or"
            f" its bos_token alone, which is {tokenizer.bos_token!r}; correct bos_token or the post_processor in the"
            " tokenizer's folder"
        )
    return int(tokenizer.bos_token_id)


def text_only(full: dict[str, Any], blocked: set[str]) -> dict[str, Any]:
    """The tokenizer without ``blocked`` strings: not recognised, nor reachable by merges (nor are byte pieces). Without
    dropout, which leaves out merges at random."""
    model = dict(full["model"]) | {"dropout": None}
    unreachable = blocked.union(BYTE_PIECES) if model.get("byte_fallback") else blocked
    model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in unreachable]
    added = [token for token in full["added_tokens"] if token["content"] not in blocked]
    return full | {"model": model, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}


def _spell_token(token: str, *, byte_level: bool) -> bytes:
    """The text that a token stands for."""
    if byte_level:
        # A token outside the alphabet cannot arise: the pre-tokenizer writes nothing else.
        return bytes(BYTE_OF[character] for character in token if character in BYTE_OF)
    if token in BYTE_PIECES:
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE_PIECE, " ").encode()


def _is_byte_level(full: dict[str, Any], name: str) -> bool:
    model = full["model"]
    if model["type"] == "BPE":
        if "ByteLevel" in step_kinds(full["pre_tokenizer"]):
            return True
        if model.get("byte_fallback") and all(piece in model["vocab"] for piece in BYTE_PIECES):
            return False
    raise ValueError(
        f"tokenizer {name}: bytes per token are exact for byte-level BPE and for BPE with byte fallback and all 256"
        f" byte pieces; got {model['type']} with neither"
    )


def _merged(merge: Any) -> str:
    # Old files write a merge as "a b", new ones as ["a", "b"].
    return "".join(merge.split(" ", 1) if isinstance(merge, str) else merge)
