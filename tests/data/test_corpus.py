import gzip
import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest

from ttt_lit.data.corpus import Corpus, Document, left_out

TEXTS = ["first\ntext", "zweiter Text: ß", "三 😀"]
JSONL = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def write_parquet(path, column, values):
    pyarrow.parquet.write_table(pyarrow.table({column: values}), path)


def write_file(folder, suffix):
    path = folder / f"x{suffix}"
    if suffix == ".jsonl":
        path.write_bytes(JSONL)
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(JSONL))
    elif suffix == ".jsonl.zst":
        # Two frames, as concatenated files have.
        frames = (pyarrow.compress(part, codec="zstd", asbytes=True) for part in (JSONL[:20], JSONL[20:]))
        path.write_bytes(b"".join(frames))
    else:
        write_parquet(path, "body", TEXTS)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_format_gives_the_same_texts_in_order(tmp_path, suffix):
    path = write_file(tmp_path, suffix)
    corpus = Corpus(str(path), "body")
    assert [document.text for document in corpus] == TEXTS
    assert [document.id for document in corpus][0].startswith(path.name + ":")
    assert corpus.consumed_bytes == corpus.total_bytes == path.stat().st_size


def test_a_folder_is_read_by_name_and_a_glob_narrows_it(tmp_path):
    for name in ("b.txt", "a/z.txt", "a.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.id for document in Corpus(str(tmp_path))] == ["a.txt", "a/z.txt", "b.txt"]
    assert [document.text for document in Corpus(str(tmp_path / "*.txt"))] == ["a.txt", "b.txt"]
    with pytest.raises(ValueError, match=r"notes\.md"):
        Corpus(str(tmp_path / "*"))


def test_files_that_look_like_texts_and_are_not_read_are_named(tmp_path):
    for name in ("a.jsonl", "B.JSONL", "sub/c.json.gz", "d.jsonl.zstd", "e.csv", "notes.md", "model.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert left_out(str(tmp_path)) == ["B.JSONL", "d.jsonl.zstd", "e.csv", "sub/c.json.gz"]
    assert left_out(str(tmp_path / "*.jsonl")) == left_out("stdlib") == []


def test_linked_folders_are_read_as_a_glob_reads_them_and_a_circle_ends(tmp_path):
    for name in ("source/a.txt", "elsewhere/b.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    (tmp_path / "source" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "source")
    assert [document.id for document in Corpus(str(tmp_path / "source"))] == ["a.txt", "linked/b.txt"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_cut_off_file_is_an_error_that_names_it(tmp_path, suffix):
    path = write_file(tmp_path, suffix)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"x{suffix}.*cut off"):
        list(Corpus(str(path), "body"))


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"body": "a"}\n{"body": "b"\n', r":2: not JSON"),
        (b'{"text": "a"}\n', r":1: no field 'body'.*\['text'\]"),
        (b'["a"]\n', ":1: got list, expected an object"),
        (b'{"body": 1}\n', ":1: field 'body' is int, expected text"),
        (b'{"body": null}\n', r":1: field 'body' is null, expected text; take such rows out"),
        (b'{"body": "\xff"}\n', r":1: not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(Corpus(str(tmp_path), "body"))


def test_parquet_names_the_missing_column_and_the_row_without_text(tmp_path):
    write_parquet(tmp_path / "x.parquet", "other", ["a"])
    with pytest.raises(ValueError, match="no field 'body'.*other"):
        list(Corpus(str(tmp_path), "body"))
    write_parquet(tmp_path / "x.parquet", "body", ["a", None])
    with pytest.raises(ValueError, match="x.parquet:1: field 'body' is null"):
        list(Corpus(str(tmp_path), "body"))
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="x.parquet: cannot be read"):
        list(Corpus(str(tmp_path), "body"))


@pytest.mark.parametrize("source", ["missing", "missing/*.txt", "."])
def test_a_source_without_texts_is_an_error_that_says_what_is_expected(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"\.jsonl\.zst"):
        Corpus(source)


def test_lone_surrogates_become_replacement_characters(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert [document.text for document in Corpus(str(tmp_path))] == ["a\ufffdb 😀"]


def test_stdlib_is_long_files_in_order_without_installed_packages():
    documents = list(Corpus("stdlib"))
    ids = [document.id for document in documents]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids) > 100
    assert "argparse.py" in ids
    assert not any("site-packages" in name for name in ids)
    assert min(len(document.text) for document in documents) > 2000


def test_a_hugging_face_dataset_streams_its_train_split(monkeypatch):
    asked = []

    def load_dataset(name, subset, **options):
        asked.append((name, subset, options))
        return iter({"text": text} for text in TEXTS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    corpus = Corpus("hf:org/name:subset")
    assert list(corpus) == [Document(f"org/name:{i}", text) for i, text in enumerate(TEXTS)]
    assert asked == [("org/name", "subset", {"split": "train", "streaming": True})]
    assert corpus.total_bytes is None


def test_without_datasets_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets=="):
        list(Corpus("hf:org/name"))
