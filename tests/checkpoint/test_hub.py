"""Hub ids with the download replaced: what each refusal of the Hub becomes. Nothing is downloaded."""

import shutil

import pytest
from huggingface_hub import errors

from ttt_lit.checkpoint.importing import import_checkpoint
from ttt_lit.checkpoint.source import find_source

HUB_ID = "someone/model-1b"


class Response:
    """What the Hub's errors ask of a response."""

    status_code = 403
    headers: dict = {}
    request = None
    url = "https://huggingface.co/x"
    text = ""


def refuse(monkeypatch, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)


@pytest.mark.parametrize(
    "error, words",
    [
        (
            errors.GatedRepoError("gated\nmany\nlines", response=Response()),
            ["accept the licence", f"huggingface.co/{HUB_ID}", "hf auth login", "HF_TOKEN"],
        ),
        (
            errors.RepositoryNotFoundError("404", response=Response()),
            ["no such folder", "no such model", "hf auth login"],
        ),
        (errors.LocalEntryNotFoundError("offline\nlines"), ["no such folder", "cannot be reached"]),
        (errors.OfflineModeIsEnabled("offline"), ["cannot be reached"]),
        (errors.HfHubHTTPError("500 broken\nmore", response=Response()), ["download failed", "500 broken"]),
        (ConnectionResetError("reset by peer"), ["download failed", "reset by peer", "again"]),
    ],
)
def test_each_refusal_is_one_line_that_says_what_to_do(monkeypatch, tmp_path, error, words):
    refuse(monkeypatch, error)
    with pytest.raises(ValueError, match=HUB_ID) as caught:
        import_checkpoint(HUB_ID, str(tmp_path / "out"))
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []
    assert not list(tmp_path.iterdir())


def test_only_weights_and_descriptions_are_asked_for(monkeypatch, hf_folder, tmp_path, quiet):
    asked = {}
    snapshot = tmp_path / "snapshots" / "0123abc"

    def download(repo, allow_patterns):
        asked.update(repo=repo, patterns=allow_patterns)
        shutil.copytree(hf_folder(), snapshot)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    checkpoint = import_checkpoint(HUB_ID, str(tmp_path / "out"), parity=False, console=quiet)
    assert asked["repo"] == HUB_ID
    assert not [p for p in asked["patterns"] if p.endswith((".py", ".bin", ".pt", ".pth", ".ckpt")) or p == "*"]
    assert checkpoint.lineage[0].source == f"{HUB_ID}@0123abc"


@pytest.mark.parametrize("source", ["absent", "./absent/x", "/absent/x", "../a/b", "a/b/c", "a/b c", "~/x"])
def test_what_is_no_hub_id_is_a_missing_folder_and_never_asked_for(monkeypatch, source, tmp_path):
    monkeypatch.chdir(tmp_path)
    refuse(monkeypatch, AssertionError("the Hub was asked"))
    with pytest.raises(FileNotFoundError, match="no such folder, and not a hub id"):
        find_source(source)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file"):
        find_source(str(tmp_path / "model.safetensors"))
