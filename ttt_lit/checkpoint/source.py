"""Finds a Hugging Face checkpoint, on disk or on the Hub, and reads its descriptions without trusting them.

Only safetensors, JSON and tokenizer files are ever read; no code of the checkpoint runs. Names in the index stay inside
the folder. Pickle files are refused: loading one can run anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ttt_lit.checkpoint.store import MANIFEST
from ttt_lit.checkpoint.tensors import INDEX_FILE, SINGLE_FILE, StoredTensor, read_headers
from ttt_lit.checkpoint.tokenizer_files import TOKENIZER_FILES

GGUF_SUFFIX = ".gguf"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON_BYTES = 50_000_000
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
DOWNLOAD_PATTERNS = ["*.safetensors", INDEX_FILE, CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class SourceFolder:
    """A checkpoint folder of somebody else's, with its headers read."""

    path: Path
    name: str
    """What reports call it: the hub id and commit, or the folder's name."""
    config: dict[str, Any]
    config_text: str
    generation_text: str | None
    tensors: dict[str, StoredTensor]
    """Every stored tensor by the family's name."""
    files: tuple[Path, ...]
    """The files that the import read: weights, index and descriptions."""
    notes: tuple[str, ...]
    """What a reader of the audit must know: files and code that were left aside."""


def find_source(source: str) -> tuple[Path, str]:
    """The folder of a source and its name in reports; a hub id is downloaded first.

    Raises:
        FileNotFoundError: neither a folder nor a hub id.
        ValueError: the Hub refuses or cannot be reached; one line that says what to do.
    """
    path = Path(source)
    if path.is_dir():
        return path, path.resolve().name
    if path.exists():
        if path.suffix == GGUF_SUFFIX:
            raise ValueError(_gguf_advice(path.parent, path.name))
        raise ValueError(f"{source}: is a file, expected the checkpoint's folder or a hub id")
    if not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(f"{source}: no such folder, and not a hub id of the form OWNER/NAME")
    return _download(source)


def open_source(path: Path, name: str) -> SourceFolder:
    """Read the descriptions and tensor headers of a folder; no weights.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ValueError: pickles only, an index that leaves the folder or contradicts the files, malformed JSON or headers.
    """
    present = sorted(file.name for file in path.iterdir())
    weights = [file for file in present if file.endswith(".safetensors")]
    gguf = [file for file in present if file.endswith(GGUF_SUFFIX)]
    if MANIFEST in present:
        raise ValueError(f"{path}: is a ttt_lit checkpoint already; import reads Hugging Face folders")
    if gguf and not weights:
        raise ValueError(_gguf_advice(path, gguf[0]))
    if "adapter_config.json" in present and CONFIG_FILE not in present:
        raise ValueError(
            f"{path}: is an adapter (LoRA), not a model; merge it into its base model (peft: merge_and_unload, then save_pretrained) "
            "and import that"
        )
    config_text = _read_text(path, CONFIG_FILE)
    config = _parse_object(path / CONFIG_FILE, config_text)
    pickles = [file for file in present if file.endswith(PICKLE_SUFFIXES)]
    used, index = _weight_files(path, weights, pickles)
    tensors = read_headers(contained_file(path, file) for file in used)
    if index is not None:
        _check_index(path, index, tensors)
    notes = [f"not read: {', '.join(pickles)} (pickle files can run code)"] if pickles else []
    if aside := [file for file in weights if file not in used]:
        notes.append(f"not read: {', '.join(aside)} (no part of the checkpoint's index)")
    if "auto_map" in config or any(file.endswith(".py") for file in present):
        notes.append("config.json or the folder names code of its own (auto_map); it was neither run nor copied")
    read = {CONFIG_FILE, GENERATION_FILE, INDEX_FILE, *TOKENIZER_FILES, *used}
    return SourceFolder(
        path=path,
        name=name,
        config=config,
        config_text=config_text,
        generation_text=_read_text(path, GENERATION_FILE) if GENERATION_FILE in present else None,
        tensors=tensors,
        files=tuple(path / file for file in present if file in read and (path / file).is_file()),
        notes=tuple(notes),
    )


def contained_file(folder: Path, name: str) -> Path:
    """A file directly inside ``folder``.

    The Hub's cache is the one layout where links may leave the folder: they lead to ``blobs`` beside ``snapshots``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the name is a path, or the file is a link that leads elsewhere.
    """
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII) or name in (".", ".."):
        raise ValueError(f"{folder}: names the file {name[:200]!r}; only plain file names are allowed")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; is the download complete?")
    root = folder.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if path.resolve().parent not in allowed:
        raise ValueError(f"{path}: is a link out of its folder; put the file itself there")
    return path


def _read_text(folder: Path, name: str) -> str:
    path = contained_file(folder, name)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None


def _parse_object(path: Path, text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({str(error)[:100]})") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(parsed).__name__}")
    return parsed


def _weight_files(path: Path, present: list[str], pickles: list[str]) -> tuple[list[str], dict[str, str] | None]:
    """Files to read, and the index's weight map if there is one."""
    indexed = (path / INDEX_FILE).is_file()
    if SINGLE_FILE in present and indexed:
        raise ValueError(f"{path}: holds both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is not meant")
    if SINGLE_FILE in present:
        return [SINGLE_FILE], None
    if indexed:
        index = _read_index(path)
        return sorted(set(index.values())), index
    if pickles and not present:
        raise ValueError(
            f"{path}: only pickle files ({', '.join(pickles)}), which can run code; if you trust them, convert to safetensors: "
            f"{_convert(path)}"
        )
    raise FileNotFoundError(f"{path}: no {SINGLE_FILE} and no {INDEX_FILE}; found {present or 'no safetensors file'}")


def _read_index(path: Path) -> dict[str, str]:
    index = _parse_object(path / INDEX_FILE, _read_text(path, INDEX_FILE)).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(v, str) for v in index.values()):
        raise ValueError(f"{path / INDEX_FILE}: weight_map has to map tensor names to file names")
    if other := sorted({name for name in index.values() if not name.endswith(".safetensors")}):
        raise ValueError(f"{path / INDEX_FILE}: names files that are not safetensors: {', '.join(other)[:200]}")
    return index


def _check_index(path: Path, index: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    found = {key: tensor.file.name for key, tensor in tensors.items()}
    problems = [
        f"{key} is in {found.get(key, 'no file')}, not in {index.get(key, 'the index')}"
        for key in sorted(index.keys() | found)
        if index.get(key) != found.get(key)
    ]
    if problems:
        raise ValueError(f"{path / INDEX_FILE}: contradicts the files: {'; '.join(problems)}")


def _gguf_advice(folder: Path, name: str) -> str:
    return (
        f"{folder / name}: is GGUF, which import does not read; let transformers make an ordinary folder of it "
        f"(pip install gguf accelerate) and import that: {_convert(folder, name)}"
    )


def _convert(folder: Path, gguf: str | None = None) -> str:
    """A command that lets transformers read a folder and save it as safetensors, with the tokenizer."""
    given = f"{str(folder)!r}" + ("" if gguf is None else f", gguf_file={gguf!r}")
    dtype = "auto" if gguf is None else "float32"
    # A dequantised model still says that it is quantised.
    plain = "" if gguf is None else "m.hf_quantizer = None; m.config.__dict__.pop('quantization_config', None); "
    return (
        f'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"m = M.from_pretrained({given}, dtype={dtype!r}); {plain}m.save_pretrained('OUT'); "
        f"T.from_pretrained({given}).save_pretrained('OUT')\""
    )


def _download(repo: str) -> tuple[Path, str]:
    try:
        path = Path(huggingface_hub.snapshot_download(repo, allow_patterns=DOWNLOAD_PATTERNS))
    except GatedRepoError:
        raise ValueError(
            f"{repo}: access is restricted; accept the licence at https://huggingface.co/{repo} and log in with "
            "`hf auth login` (or set HF_TOKEN)"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{repo}: no such folder here, no such model on the Hugging Face Hub; a private one needs `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise ValueError(
            f"{repo}: no such folder here, and the Hugging Face Hub cannot be reached to download it; "
            "go online, or give the folder of a copy"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{repo}: the download failed: {reason}; run the command again to continue it") from None
    return path, f"{repo}@{path.name}"
