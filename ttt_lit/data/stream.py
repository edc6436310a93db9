"""Shards → batches: the LightningDataModule and the streams it opens.

A stream is a function of its request: order from (seed, stage), position = micro-batches of this stage already trained.
Nothing here has state to save, and every number of workers and every division of a global batch over ranks gives the
same sequences. Workers outlive the signals that ask a run to stop: it still needs batches on the way to its next save.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ttt_lit.data.manifest import MANIFEST, Manifest, text_tokens
from ttt_lit.data.shards import ShuffledOrder, TokenReader, check_torchvision, first_blocks, spread_block
from ttt_lit.identity import hash_file

Batch = dict[str, torch.Tensor]
"""tokens: (B, block_tokens), BOS first where the folder has one; index: (B,), the block's number in its split; source: (B,), the
number in its split of the document in which the block begins. All int64."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""What a launcher, a cluster (SIGUSR2 is its warning) or a terminal sends to a run and all its workers at once, and that is the run's
alone to handle: it saves at its next optimiser step."""

_LOOK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class StreamRequest:
    """What a stage wants to read."""

    dataset: str
    """short or long: which folder of the data module."""
    split: str
    """train or validation."""
    block_tokens: int
    """context + 1, BOS included."""
    batch_size: int
    """Sequences per rank and micro-batch."""
    num_batches: int | None
    """Micro-batches per rank in the whole stage. None: unsized, ends when should_stop() says so."""
    start_batch: int = 0
    """Position: micro-batches of this stage already trained."""
    accumulate: int = 1
    """should_stop is asked only when start_batch + yielded is a multiple of it."""
    stage: int = 0
    """The order depends on (seed, stage) only."""
    should_stop: Callable[[], bool] | None = None
    """Asked before a batch is handed over, never ahead of time."""

    def __post_init__(self) -> None:
        least = {"block_tokens": 2, "batch_size": 1, "start_batch": 0, "accumulate": 1, "stage": 0}
        if self.num_batches is not None:
            least["num_batches"] = self.start_batch
        problems = [
            f"{name}: got {getattr(self, name)}, expected at least {minimum}"
            for name, minimum in least.items()
            if getattr(self, name) < minimum
        ]
        if self.num_batches is None and (self.should_stop is None or self.split != "train"):
            problems.append(
                "num_batches: got None, expected a number (only a train stream with should_stop may go without)"
            )
        if problems:
            raise ValueError("StreamRequest: " + "; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class MicroBatches(Dataset[Batch]):
    """Micro-batch number → batch of one rank: sequences rank × batch_size … of the global micro-batch, in global
    order. A block is ``bos_id``, if there is one, and ``text_tokens`` tokens of the reader."""

    reader: TokenReader
    order: Callable[[int], int]
    document_starts: np.ndarray
    """(documents,) int64"""
    text_tokens: int
    bos_id: int | None
    batch_size: int
    rank: int
    world_size: int

    def __getitem__(self, number: int) -> Batch:
        first = (number * self.world_size + self.rank) * self.batch_size
        blocks = np.array([self.order(position) for position in range(first, first + self.batch_size)])
        tokens = np.stack([self.reader.read(start, self.text_tokens) for start in (blocks * self.text_tokens).tolist()])
        if self.bos_id is not None:
            tokens = np.insert(tokens, 0, self.bos_id, axis=1)
        found = {"tokens": tokens, "index": blocks, "source": self.sources(blocks)}
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def sources(self, blocks: np.ndarray) -> np.ndarray:
        """(B,) int64: the document, numbered in its split, in which each of ``blocks`` (B,) begins."""
        return np.searchsorted(self.document_starts, blocks * self.text_tokens, side="right") - 1


class Stream:
    """Iterates from start_batch until num_batches or should_stop. Every ``iter`` starts there again, and does nothing
    before the first ``next``."""

    def __init__(self, batches: MicroBatches, request: StreamRequest, num_workers: int) -> None:
        self.batches, self.request, self.num_workers = batches, request, num_workers

    def __len__(self) -> int:
        """Micro-batches of the whole stage, also when the stream continues one. TypeError where should_stop decides."""
        if self.request.num_batches is None:
            raise TypeError("stream without num_batches: has no length, should_stop ends it")
        return self.request.num_batches

    def __iter__(self) -> Iterator[Batch]:
        request = self.request
        loaded = self._loaded()
        for number in self._numbers():
            # Asked here and not where batches are made: workers make them ahead of time.
            if request.should_stop is not None and number % request.accumulate == 0 and request.should_stop():
                return
            yield next(loaded)

    def _numbers(self) -> Iterator[int]:
        return itertools.islice(itertools.count(), self.request.start_batch, self.request.num_batches)

    def _loaded(self) -> Iterator[Batch]:
        if self.num_workers == 0:
            return map(self.batches.__getitem__, self._numbers())
        loader = DataLoader(
            self.batches,
            sampler=self._numbers(),
            batch_size=None,
            num_workers=self.num_workers,
            # Its own: the loader draws a seed from it, which would move the run's random numbers.
            generator=torch.Generator(),
            worker_init_fn=functools.partial(_live_as_long_as, os.getpid()),
        )
        # Workers are born holding the signals, so there is no moment in which one ends them; this thread gets its own back.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class TokenDataModule(lightning.LightningDataModule):
    """Streams blocks of context + 1 tokens from prepared folders, one stream per stage."""

    def __init__(
        self,
        short: str | None = None,
        long: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
        verify: Literal["full", "size"] = "full",
    ) -> None:
        """Name the folders; nothing is read yet.

        Args:
            short: Folder of documents of at least one short context.
            long: Folder of documents of at least one long context.
            seed: Decides, with the stage, about the order of training blocks.
            num_workers: Processes that read ahead. 0 is fastest for local shards and changes no batch.
            verify: Check shards before the first step: full compares SHA-256 sums, size only sizes.
        """
        super().__init__()
        if seed < 0 or num_workers < 0:
            raise ValueError(f"TokenDataModule: seed {seed} and num_workers {num_workers} must not be negative")
        if verify not in ("full", "size"):
            raise ValueError(f"TokenDataModule.verify: got {verify!r}, expected 'full' or 'size'")
        self.folders = {"short": short, "long": long}
        self.seed = seed
        self.num_workers = num_workers
        self.verify: Literal["full", "size"] = verify
        self._manifests: dict[str, Manifest] = {}
        self._verified = False

    def setup(self, stage: str | None = None) -> None:
        """Check every named folder against its manifest, and the folders against each other, once. Raises before
        anything is trained."""
        if self._verified:
            return
        check_torchvision()
        manifests = {dataset: self.manifest(dataset) for dataset, folder in self.folders.items() if folder is not None}
        _check_together(manifests)
        # One process per machine reads every byte; the others would read the same ones.
        first_here = self.trainer is None or self.trainer.local_rank == 0
        for dataset, manifest in manifests.items():
            manifest.verify(self._folder(dataset), self.verify if first_here else "size")
        self._verified = True

    def check_model(self, vocab_size: int, tokenizer_hash: str | None) -> None:
        """The data must be the model's: every id that a block can hold below ``vocab_size``, and the same tokenizer where
        its hash is known. Ids that no text becomes need no row. Raises ValueError."""
        for dataset, folder in self.folders.items():
            if folder is None:
                continue
            manifest = self.manifest(dataset)
            highest = int(self.token_bytes(dataset).nonzero().max())
            uses = (("a text can need", highest), ("blocks begin with", manifest.bos_id), ("EOS is", manifest.eos_id))
            problems = [
                f"{use} token {token}, the model has {vocab_size} tokens"
                for use, token in uses
                if token is not None and not 0 <= token < vocab_size
            ]
            made = manifest.tokenizer_hash
            if tokenizer_hash is not None and made != tokenizer_hash:
                problems.append(f"made with tokenizer {made[:12]}…, the model's is {tokenizer_hash[:12]}…")
            if problems:
                raise ValueError(f"data folder {folder}: {'; '.join(problems)}; prepare it with the model's tokenizer")

    def manifest(self, dataset: str) -> Manifest:
        """The manifest of ``short`` or ``long``. Raises FileNotFoundError with the command that makes the folder."""
        if dataset not in self._manifests:
            self._manifests[dataset] = Manifest.load(self._folder(dataset))
        return self._manifests[dataset]

    def identity(self, dataset: str) -> str:
        """SHA-256 of the manifest, which names every byte of the folder by its own hash."""
        self.manifest(dataset)
        return hash_file(self._folder(dataset) / MANIFEST)

    def token_bytes(self, dataset: str) -> torch.Tensor:
        """(vocab_size,) int64: bytes of normalised text that each token id stands for."""
        entry = self.manifest(dataset).token_bytes
        return torch.from_numpy(np.load(self._folder(dataset) / entry.file).astype(np.int64))

    def unigram_entropy(self, dataset: str) -> float:
        """Nats per token: entropy of the token frequencies of a data set's validation split."""
        manifest = self.manifest(dataset)
        reader = TokenReader(self._folder(dataset), manifest.side("validation"), manifest.vocab_size)
        return reader.unigram_entropy()

    def open(self, request: StreamRequest, rank: int = 0, world_size: int = 1) -> Stream:
        """The stream of one rank. Has a length exactly if the request has. Raises ValueError for what the folder
        cannot serve."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank} of {world_size}, expected 0 to {world_size - 1}")
        manifest, folder = self.manifest(request.dataset), self._folder(request.dataset)
        side, size = manifest.side(request.split), text_tokens(request.block_tokens, manifest.bos_id)
        num_blocks = manifest.num_blocks(request.split, request.block_tokens)
        what = f"{folder} ({request.split})"
        if num_blocks == 0:
            raise ValueError(
                f"{what}: holds no block of {request.block_tokens} tokens; give more text or a smaller context"
            )
        reader = TokenReader(folder, side, manifest.vocab_size)
        order: Callable[[int], int]
        if request.split == "train":
            order = ShuffledOrder(first_blocks(reader.starts, size), seed=self.seed, stage=request.stage)
        else:
            per_batch = request.batch_size * world_size
            wanted = (request.num_batches or 0) * per_batch
            order = functools.partial(spread_block, num_blocks, wanted)
            if wanted > num_blocks:
                raise ValueError(
                    f"{what}: asked for {request.num_batches} batches of {per_batch} sequences, but there are"
                    f" {num_blocks} blocks of {request.block_tokens} tokens: at most {num_blocks // per_batch} batches"
                )
        batches = MicroBatches(
            reader=reader,
            order=order,
            document_starts=np.load(folder / side.document_starts.file, mmap_mode="r"),
            text_tokens=size,
            bos_id=manifest.bos_id,
            batch_size=request.batch_size,
            rank=rank,
            world_size=world_size,
        )
        return Stream(batches, request, self.num_workers)

    def train_dataloader(self) -> Stream:
        """The stream of the current stage, as the LightningModule's ``train_request`` wants it."""
        trainer: Any = self.trainer
        return self.open(
            trainer.lightning_module.train_request(trainer.current_epoch), trainer.global_rank, trainer.world_size
        )

    def val_dataloader(self) -> Stream:
        """The validation stream, as the LightningModule's ``validation_request`` wants it."""
        trainer: Any = self.trainer
        return self.open(trainer.lightning_module.validation_request(), trainer.global_rank, trainer.world_size)

    def _folder(self, dataset: str) -> Path:
        folder = self.folders.get(dataset)
        if folder is None:
            expected = [name for name, value in self.folders.items() if value is not None]
            raise ValueError(
                f"dataset: got {dataset!r}, but the data module names a folder for {expected or 'none'}; set"
                f" data.{dataset}"
            )
        return Path(folder)


def _check_together(manifests: dict[str, Manifest]) -> None:
    """Short and long documents of one run share tokenizer, BOS and split, or one's validation would be in the other's
    training."""
    if len(manifests) < 2:
        return
    for name, way_out in (
        ("tokenizer_hash", "the model's tokenizer"),
        ("bos_id", "the model's tokenizer, anew"),
        ("split", "one fraction"),
    ):
        short, long = (getattr(manifests[dataset], name) for dataset in ("short", "long"))
        if short != long:
            raise ValueError(
                f"data folders short and long: {name}: got {short!r} and {long!r}, expected the same; prepare both with"
                f" {way_out}"
            )


def _live_as_long_as(run: int, _worker: int) -> None:
    """A DataLoader's ``worker_init_fn``: hold the signals for good, and end when process ``run`` says so or is gone.

    To ignore SIGTERM would be too much: by that signal the run ends workers that it has not closed, and then waits for them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with, args=(run, os.getppid()), daemon=True).start()


def _end_with(run: int, parent: int) -> None:
    """The parent is the run itself, or the fork server, which ends with it."""
    # A worker has a copy of the run's lock: as long as it lives, no other start gets the run, and it may be waiting for a disk.
    while os.getppid() == parent:
        told = signal.sigtimedwait(STOP_SIGNALS, _LOOK_SECONDS)
        if told is not None and told.si_signo == signal.SIGTERM and told.si_pid == run:
            break
    os._exit(0)
