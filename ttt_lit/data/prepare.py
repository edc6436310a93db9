"""Corpus → tokens → LitData shards and a manifest.

The output depends on the documents, the tokenizer and the config, never on the number of workers: tokenising is spread
over processes and put back in order, one process writes. The folder grows as ``OUTPUT.partial`` and gets its name when
it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ttt_lit.data.corpus import STDLIB, Corpus, Document
from ttt_lit.data.manifest import FORMAT_VERSION, MANIFEST, Layout, Manifest, file_entry, partial_folder
from ttt_lit.data.progress import progress_bar
from ttt_lit.data.round_trip import encode_exactly
from ttt_lit.data.shards import DTYPE, MAX_SHARD_TOKENS, import_litdata
from ttt_lit.data.split import SPLITS, split_of, split_rule
from ttt_lit.data.tokenizer import TextTokenizer, load_tokenizer
from ttt_lit.data.tokenizer_kinds import UNNAMED_KIND, TokenizerKind
from ttt_lit.data.train_tokenizer import check_trained, train_tokenizer
from ttt_lit.data.writer import PROGRESS, SplitWriter
from ttt_lit.identity import tokenizer_hash


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to prepare. One YAML file in configs/data holds one."""

    source: str
    """Folder, glob or file of .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet; 'stdlib'; or 'hf:org/name'
    ('hf:org/name:subset')."""
    tokenizer: str
    """The model's tokenizer: a Hugging Face folder, or a hub id."""
    output: str
    """Folder to make."""
    context: int
    """Tokens that a model reads at once. Blocks hold one more, and begin with BOS where the tokenizer puts it before a
    text; documents of fewer tokens are left out."""
    layout: Layout
    """packed: documents one after another, blocks cross them; EOS stands between two, BOS only at a block's start.
    per_document: a document's whole blocks only, none crosses a document."""
    train_tokenizer: int | None = None
    """Vocabulary size of a tokenizer to train on the train documents where the tokenizer folder does not exist. None:
    it must exist."""
    tokenizer_kind: TokenizerKind = "byte_level"
    """What train_tokenizer trains. byte_level: BPE over bytes, as Qwen's. byte_fallback: BPE over characters, with ▁ for
    the space and bytes for rare characters, as Gemma's."""
    text_field: str = "text"
    """Field or column that holds the text, for formats that have several."""
    validation_fraction: float = 0.05
    """Expected share of documents in validation. Equal fractions mean equal splits, whatever else differs."""
    max_documents: int | None = None
    """Read this many documents of the source, the first ones. None: all."""
    max_tokens: int | None = None
    """Stop after the document with which the shards hold this many tokens, both splits together. None: never."""
    shard_tokens: int = 4_194_304
    """Tokens per shard (4 bytes each), rounded down to whole blocks."""
    num_workers: int = 0
    """Processes that tokenise. 0: this one, with the tokenizers library's own threads."""

    def __post_init__(self) -> None:
        problems = []
        if self.context < 1:
            problems.append(f"context: got {self.context}, expected at least 1 token")
        if self.layout not in get_args(Layout):
            problems.append(f"layout: got {self.layout!r}, expected one of {get_args(Layout)}")
        problems += self._kind_problems()
        if not 0 < self.validation_fraction < 1:
            problems.append(f"validation_fraction: got {self.validation_fraction}, expected a number between 0 and 1")
        for name in ("max_documents", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name}: got {value}, expected at least 1, or null")
        if not self.context < self.shard_tokens <= MAX_SHARD_TOKENS:
            problems.append(f"shard_tokens: got {self.shard_tokens}, expected from context + 1 to {MAX_SHARD_TOKENS}")
        if self.num_workers < 0:
            problems.append(f"num_workers: got {self.num_workers}, expected 0 or more")
        if self.source == STDLIB and self.text_field != "text":
            problems.append("text_field: source stdlib has no fields; leave it out")
        if problems:
            raise ValueError("PrepareConfig: " + "; ".join(problems))

    def _kind_problems(self) -> list[str]:
        if self.tokenizer_kind not in get_args(TokenizerKind):
            return [f"tokenizer_kind: got {self.tokenizer_kind!r}, expected one of {get_args(TokenizerKind)}"]
        if self.train_tokenizer is None and self.tokenizer_kind != "byte_level":
            return [
                f"tokenizer_kind: got {self.tokenizer_kind!r} without train_tokenizer, so nothing is trained; set"
                " train_tokenizer or leave tokenizer_kind out"
            ]
        return []

    def recorded(self) -> dict[str, Any]:
        """The part that decides about the bytes of the output."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in ("output", "num_workers")}


def prepare(config: PrepareConfig, *, progress: bool = False) -> Manifest:
    """Make ``config.output`` and return its manifest; continue an interrupted run; leave a finished folder alone.

    Raises ValueError or FileNotFoundError, one line each, for bad input and for a folder that another config made.
    """
    output = Path(config.output)
    finished = _finished(config, output)
    if finished is not None:
        return finished
    import_litdata()
    _make_tokenizer(config, progress=progress)
    tokenizer = load_tokenizer(config.tokenizer)
    run = _Run(config, partial_folder(output), tokenizer)
    run.start()
    try:
        run.write_documents(progress=progress)
    except ValueError:
        if run.documents == 0:
            shutil.rmtree(run.folder)
        raise
    manifest = run.finish()
    run.folder.rename(output)
    shutil.rmtree(output / PROGRESS)
    return manifest


def _finished(config: PrepareConfig, output: Path) -> Manifest | None:
    if not output.is_dir() or not any(output.iterdir()):
        return None
    if not (output / MANIFEST).is_file():
        raise ValueError(f"output {output}: exists and was not made by prepare; name another folder")
    manifest = Manifest.load(output)
    _check_same(config, manifest.config, output)
    folder = Path(config.tokenizer)
    if config.train_tokenizer is not None:
        _make_tokenizer(config, progress=False)
    if folder.is_dir() and tokenizer_hash(folder) != manifest.tokenizer_hash:
        raise ValueError(
            f"output {output}: made with another tokenizer than {folder} holds now; delete it or name another output"
        )
    manifest.verify(output, "size")
    return manifest


def _check_same(config: PrepareConfig, found: dict[str, Any], folder: Path) -> None:
    expected = config.recorded()
    found = {"tokenizer_kind": UNNAMED_KIND} | found
    different = [
        f"{key} {found.get(key)!r} there, {expected.get(key)!r} here"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key) != expected.get(key)
    ]
    if different:
        raise ValueError(
            f"output {folder}: made with another config ({'; '.join(different)}); delete it or name another output"
        )


def _documents(config: PrepareConfig, corpus: Corpus) -> Iterator[Document]:
    return islice(corpus, config.max_documents)


def _make_tokenizer(config: PrepareConfig, *, progress: bool) -> None:
    folder = Path(config.tokenizer)
    if config.train_tokenizer is None:
        return
    if folder.is_dir():
        check_trained(
            folder,
            kind=config.tokenizer_kind,
            vocab_size=config.train_tokenizer,
            validation_fraction=config.validation_fraction,
        )
        return

    def read() -> Iterator[Document]:
        corpus = Corpus(config.source, config.text_field)
        with progress_bar("Reading text for the tokenizer", corpus.total_bytes, shown=progress) as advance:
            for document in _documents(config, corpus):
                advance(corpus.consumed_bytes)
                yield document

    train_tokenizer(
        folder,
        read,
        kind=config.tokenizer_kind,
        vocab_size=config.train_tokenizer,
        validation_fraction=config.validation_fraction,
        source=config.source,
    )


class _Run:
    """One preparation: the partial folder, its journal, a writer per split."""

    def __init__(self, config: PrepareConfig, folder: Path, tokenizer: TextTokenizer) -> None:
        self.config, self.folder, self.tokenizer = config, folder, tokenizer
        self.writers = {
            split: SplitWriter(
                folder, split, tokenizer, context=config.context, layout=config.layout, shard_tokens=config.shard_tokens
            )
            for split in SPLITS
        }
        self.documents = 0
        self.generation = 0
        self.chain = b""
        """Hash over the texts of all documents so far, in order: tells whether a resume reads the same source."""

    @property
    def journal(self) -> Path:
        return self.folder / PROGRESS / "journal.json"

    def start(self) -> None:
        """Begin, or continue what the journal records."""
        if not self.journal.is_file():
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            self.save()
            return
        state = json.loads(self.journal.read_text())
        _check_same(self.config, state["config"], self.folder)
        # Where documents are cut depends on BOS, which the hash alone does not decide.
        if (state["tokenizer_hash"], state.get("bos_id")) != (self.tokenizer.hash, self.tokenizer.bos_id):
            raise ValueError(
                f"{self.folder}: begun with another tokenizer than {self.config.tokenizer}; delete it and run prepare"
                " again"
            )
        self.documents, self.generation, self.chain = (
            state["documents"],
            state["generation"],
            bytes.fromhex(state["chain"]),
        )
        for split, writer in self.writers.items():
            writer.restore(state["splits"][split])

    def save(self) -> None:
        """Record that everything up to here need not be done again."""
        self.generation += 1
        splits = {split: writer.save(self.generation) for split, writer in self.writers.items()}
        state = {
            "config": self.config.recorded(),
            "tokenizer_hash": self.tokenizer.hash,
            "bos_id": self.tokenizer.bos_id,
            "documents": self.documents,
            "generation": self.generation,
            "chain": self.chain.hex(),
            "splits": splits,
        }
        temporary = self.journal.with_suffix(".new")
        temporary.write_text(json.dumps(state))
        temporary.replace(self.journal)
        kept = {split["pending"] for split in splits.values()}
        for path in self.journal.parent.glob("*-pending-*.npy"):
            if path.name not in kept:
                path.unlink()

    def write_documents(self, *, progress: bool) -> None:
        """Tokenise and write what is not yet written."""
        limit = self.config.max_tokens
        corpus = Corpus(self.config.source, self.config.text_field)
        total = corpus.total_bytes if limit is None else limit
        with progress_bar(f"Preparing {self.config.output}", total, shown=progress) as advance:
            documents = self._skip_done(_documents(self.config, corpus))
            for document, ids in encode_exactly(documents, self.tokenizer, self.config.num_workers):
                if limit is not None and self.tokens >= limit:
                    break
                self._write_document(document, ids)
                advance(corpus.consumed_bytes if limit is None else self.tokens)

    @property
    def tokens(self) -> int:
        return sum(writer.counts.tokens for writer in self.writers.values())

    def _write_document(self, document: Document, ids: np.ndarray) -> None:
        self.documents += 1
        self.chain = _link(self.chain, document)
        if self.writers[split_of(document, self.config.validation_fraction)].add(document, ids):
            self.save()

    def _skip_done(self, documents: Iterator[Document]) -> Iterator[Document]:
        chain = b""
        for document in islice(documents, self.documents):
            chain = _link(chain, document)
        if chain != self.chain:
            raise ValueError(
                f"source {self.config.source}: changed since {self.folder} was begun; delete that folder and run"
                " prepare again"
            )
        yield from documents

    def finish(self) -> Manifest:
        """Write what remains, and the manifest."""
        for split, writer in self.writers.items():
            if writer.counts.documents == 0:
                shutil.rmtree(self.folder)
                raise ValueError(
                    f"source {self.config.source}: {split} got no document of at least {self.config.context} tokens out"
                    f" of {self.documents} documents; give more text, a smaller context or another validation_fraction"
                )
        np.save(self.folder / "token_bytes.npy", self.tokenizer.token_bytes)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            config=self.config.recorded(),
            layout=self.config.layout,
            context=self.config.context,
            dtype=DTYPE,
            tokenizer_hash=self.tokenizer.hash,
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
            bos_id=self.tokenizer.bos_id,
            split=split_rule(self.config.validation_fraction),
            token_bytes=file_entry(self.folder, "token_bytes.npy"),
            train=self.writers["train"].finish(),
            validation=self.writers["validation"].finish(),
        )
        (self.folder / MANIFEST).write_text(manifest.to_json())
        return manifest


def _link(chain: bytes, document: Document) -> bytes:
    return hashlib.sha256(chain + document.digest()).digest()
