"""Folders as people have them: tokenizers with ids of their own, no description of the tokenizer, other formats of weights."""

import json

import pytest
from hf_imports import refused, run

from ttt_lit.checkpoint.importing import import_checkpoint

BEYOND = {
    "in the vocabulary alone": ({"b": 50}, []),
    "an added token of the vocabulary": ({"b": 50}, [{"id": 50, "content": "b", "special": False}]),
}
UNREACHED = {
    "special": ({}, [{"id": 50, "content": "<image>", "special": True}]),
    "added, and read as its letters": ({}, [{"id": 50, "content": "<tool>", "special": False}]),
    "special, and in the vocabulary": ({"b": 50}, [{"id": 50, "content": "b", "special": True}]),
    "swallows the blanks before it": ({"b": 50}, [{"id": 50, "content": "b", "special": False, "lstrip": True}]),
}


def add_tokenizer(folder, words, added):
    content = {"model": {"vocab": {"a": 0} | words}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("kind", BEYOND)
def test_an_id_beyond_the_rows_that_a_text_can_become_is_refused(hf_folder, tmp_path, quiet, kind):
    folder = hf_folder()
    add_tokenizer(folder, *BEYOND[kind])
    refused(folder, tmp_path, quiet, "ids up to 50, the embedding 50 rows, and a text can become that token .'b'")


@pytest.mark.parametrize("kind", UNREACHED)
def test_an_id_beyond_the_rows_that_no_text_becomes_is_a_note(hf_folder, tmp_path, quiet, kind):
    folder = hf_folder()
    add_tokenizer(folder, *UNREACHED[kind])
    run(folder, tmp_path, quiet)
    assert "reach id 50, beyond the embedding's 50 rows" in quiet.file.getvalue()


def test_a_unigram_vocabulary_is_counted_by_its_places(hf_folder, tmp_path, quiet):
    folder = hf_folder()
    pieces = [["<unk>", 0.0], *([f"p{i}", -1.0] for i in range(1, 51))]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": pieces, "unk_id": 0}}))
    refused(folder, tmp_path, quiet, "ids up to 50.*'p50'")


def test_a_tokenizer_that_names_no_eos_is_said_with_the_token_that_the_model_means(hf_folder, tmp_path, quiet):
    folder = hf_folder(eos_token_id=[7, 8])
    vocabulary = {"a": 0, "<|end|>": 7}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    run(folder, tmp_path, quiet)
    printed = quiet.file.getvalue()
    assert "note: tokenizer_config.json names no eos_token" in printed
    assert 'eos_token_id 7 is "<|end|>"' in printed
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    quiet.file.truncate(0)
    import_checkpoint(str(folder), str(tmp_path / "again"), parity=False, console=quiet)
    assert "names no eos_token" not in quiet.file.getvalue()


def test_a_source_without_a_readable_tokenizer_is_said(hf_folder, tmp_path, quiet):
    folder = hf_folder()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("{}")
    run(folder, tmp_path, quiet)
    assert "no tokenizer comes with the checkpoint (merges.txt, vocab.json alone are not read)" in quiet.file.getvalue()


@pytest.mark.parametrize("given", ["folder", "file"])
def test_gguf_gets_the_command_that_makes_an_ordinary_folder_of_it(tmp_path, quiet, given):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "m-Q4.gguf").write_bytes(b"GGUF")
    source = folder if given == "folder" else folder / "m-Q4.gguf"
    refused(source, tmp_path, quiet, r"m-Q4\.gguf: is GGUF.*gguf_file='m-Q4\.gguf'.*save_pretrained")


def test_an_adapter_is_told_from_a_model_that_lacks_its_config(hf_folder, tmp_path, quiet):
    folder = hf_folder()
    (folder / "config.json").rename(folder / "adapter_config.json")
    refused(folder, tmp_path, quiet, "is an adapter .LoRA.*merge_and_unload")


def test_gguf_beside_safetensors_is_no_obstacle(hf_folder, tmp_path, quiet):
    folder = hf_folder()
    (folder / "m.gguf").write_bytes(b"GGUF")
    run(folder, tmp_path, quiet)
