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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ttt_lit.data.corpus import SPLITS, STDLIB, Corpus, Document, split_of, split_rule
from ttt_lit.data.encode import encode_exactly
from ttt_lit.data.manifest import FORMAT_VERSION, MANIFEST, Layout, Manifest, file_entry, partial_folder
from ttt_lit.data.shards import DTYPE, MAX_SHARD_TOKENS, import_litdata
from ttt_lit.data.tokenizer import TextTokenizer, load_tokenizer
from ttt_lit.data.train_tokenizer import UNNAMED_KIND, TokenizerKind, obtain_tokenizer
from ttt_lit.data.writer import ARRAYS, PROGRESS, SplitWriter
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
        layouts, kinds = get_args(Layout), get_args(TokenizerKind)
        expected = {
            "context": (self.context >= 1, "at least 1 token"),
            "layout": (self.layout in layouts, f"one of {layouts}"),
            "tokenizer_kind": (self.tokenizer_kind in kinds, f"one of {kinds}"),
            "validation_fraction": (0 < self.validation_fraction < 1, "a number between 0 and 1"),
            "max_documents": (self.max_documents is None or self.max_documents >= 1, "at least 1, or null"),
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1, or null"),
            "shard_tokens": (
                self.context < self.shard_tokens <= MAX_SHARD_TOKENS,
                f"from context + 1 to {MAX_SHARD_TOKENS}",
            ),
            "num_workers": (self.num_workers >= 0, "0 or more"),
            "text_field": (self.source != STDLIB or self.text_field == "text", "none: source stdlib has no fields"),
        }
        problems = [
            f"{name}: got {getattr(self, name)!r}, expected {what}"
            for name, (holds, what) in expected.items()
            if not holds
        ]
        if self.train_tokenizer is None and self.tokenizer_kind == "byte_fallback":
            problems.append(
                f"tokenizer_kind: got {self.tokenizer_kind!r} without train_tokenizer, so nothing is trained; set"
                " train_tokenizer or leave tokenizer_kind out"
            )
        if problems:
            raise ValueError("PrepareConfig: " + "; ".join(problems))

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
    _train_tokenizer(config, progress=progress)
    run = _Run(config, partial_folder(output), load_tokenizer(config.tokenizer))
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
    _train_tokenizer(config, progress=False)
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


def _train_tokenizer(config: PrepareConfig, *, progress: bool) -> None:
    if config.train_tokenizer is None:
        return

    def read() -> Iterator[Document]:
        corpus = Corpus(config.source, config.text_field)
        with _progress_bar("Reading text for the tokenizer", corpus.total_bytes, shown=progress) as advance:
            for document in islice(corpus, config.max_documents):
                advance(corpus.consumed_bytes)
                yield document

    obtain_tokenizer(
        Path(config.tokenizer),
        read,
        kind=config.tokenizer_kind,
        vocab_size=config.train_tokenizer,
        validation_fraction=config.validation_fraction,
        source=config.source,
    )


@contextmanager
def _progress_bar(title: str, total: int | None, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes how much of ``total`` is done; without a total, no estimate."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, disable=not shown) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)
        if total is not None:
            bar.update(task, completed=total)


class _Run:
    """One preparation: the partial folder, its journal, a writer per split."""

    def __init__(self, config: PrepareConfig, folder: Path, tokenizer: TextTokenizer) -> None:
        self.config, self.folder, self.tokenizer = config, folder, tokenizer
        self.journal = folder / PROGRESS / "journal.npz"
        options: Any = {"context": config.context, "layout": config.layout, "shard_tokens": config.shard_tokens}
        self.writers = {split: SplitWriter(folder, split, tokenizer, **options) for split in SPLITS}
        self.documents = 0
        self.chain = ""
        """Hash over the texts of all documents so far, in order: tells whether a resume reads the same source."""
        # Where documents are cut depends on BOS, which the hash alone does not decide.
        self.tokenizer_identity = [tokenizer.hash, tokenizer.bos_id]

    @property
    def tokens(self) -> int:
        return sum(writer.counts["tokens"] for writer in self.writers.values())

    def start(self) -> None:
        """Begin, or continue what the journal records."""
        if not self.journal.is_file():
            older = self.journal.with_suffix(".json").is_file()
            if older or any(self.folder.rglob("chunk-*.bin")):
                what = "begun by an older version" if older else f"shards without {self.journal.name}"
                raise ValueError(f"{self.folder}: {what}; delete it and run prepare again")
            self.journal.parent.mkdir(parents=True, exist_ok=True)
            self.save()
            return
        with np.load(self.journal) as saved:
            state = json.loads(str(saved["state"]))
            _check_same(self.config, state["config"], self.folder)
            if state["tokenizer"] != self.tokenizer_identity:
                raise ValueError(
                    f"{self.folder}: begun with another tokenizer than {self.config.tokenizer}; delete it and run"
                    " prepare again"
                )
            self.documents, self.chain = state["documents"], state["chain"]
            for split, writer in self.writers.items():
                writer.restore(state["splits"][split], {name: saved[f"{split}_{name}"] for name in ARRAYS})

    def save(self) -> None:
        """Record, in one file that replaces the last, that everything up to here need not be done again."""
        state = {
            "config": self.config.recorded(),
            "tokenizer": self.tokenizer_identity,
            "documents": self.documents,
            "chain": self.chain,
            "splits": {split: writer.plain() for split, writer in self.writers.items()},
        }
        arrays: dict[str, Any] = {}
        for split, writer in self.writers.items():
            arrays |= {f"{split}_{name}": array for name, array in writer.arrays().items()}
        temporary = self.journal.with_name("new.npz")
        np.savez(temporary, state=np.array(json.dumps(state)), **arrays)
        temporary.replace(self.journal)

    def write_documents(self, *, progress: bool) -> None:
        """Tokenise and write what is not yet written."""
        limit, fraction = self.config.max_tokens, self.config.validation_fraction
        corpus = Corpus(self.config.source, self.config.text_field)
        total = corpus.total_bytes if limit is None else limit
        with _progress_bar(f"Preparing {self.config.output}", total, shown=progress) as advance:
            documents = self._skip_done(islice(corpus, self.config.max_documents))
            for document, ids in encode_exactly(documents, self.tokenizer, self.config.num_workers):
                if limit is not None and self.tokens >= limit:
                    break
                self.documents += 1
                self.chain = _link(self.chain, document)
                if self.writers[split_of(document, fraction)].add(document, ids):
                    self.save()
                advance(corpus.consumed_bytes if limit is None else self.tokens)

    def _skip_done(self, documents: Iterator[Document]) -> Iterator[Document]:
        chain = ""
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
            if writer.counts["documents"] == 0:
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


def _link(chain: str, document: Document) -> str:
    return hashlib.sha256(chain.encode() + document.digest()).hexdigest()
