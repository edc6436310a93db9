"""Shards → batches: the LightningDataModule and the streams it opens.

A stream is a function of its request: order from (seed, stage), position = micro-batches of this stage already trained.
Nothing here has state to save, and every number of workers and every division of a global batch over ranks gives the
same sequences.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ttt_lit.data.entropy import unigram_entropy
from ttt_lit.data.manifest import MANIFEST, Manifest
from ttt_lit.data.order import ShuffledOrder, SpreadOrder, first_blocks
from ttt_lit.data.shards import TokenReader, torchvision_problem
from ttt_lit.data.workers import live_as_long_as, stop_signals_held
from ttt_lit.identity import hash_file

Batch = dict[str, torch.Tensor]
"""tokens: (batch, block_tokens) int64, BOS first where the folder has one; index: (batch,) int64, the block's number in its split."""


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
        problems = []
        for name, least in (
            ("block_tokens", 2),
            ("batch_size", 1),
            ("start_batch", 0),
            ("accumulate", 1),
            ("stage", 0),
        ):
            if getattr(self, name) < least:
                problems.append(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if self.num_batches is None and (self.should_stop is None or self.split != "train"):
            problems.append(
                "num_batches: got None, expected a number (only a train stream with should_stop may go without)"
            )
        if self.num_batches is not None and not self.start_batch <= self.num_batches:
            problems.append(f"num_batches: got {self.num_batches}, expected at least start_batch, {self.start_batch}")
        if problems:
            raise ValueError("StreamRequest: " + "; ".join(problems))


class MicroBatches(Dataset[Batch]):
    """Micro-batch number → batch of one rank: sequences rank × batch_size … of the global micro-batch, in global
    order."""

    def __init__(
        self,
        reader: TokenReader,
        order: Callable[[int], int],
        *,
        text_tokens: int,
        bos_id: int | None,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        """A block is ``bos_id``, if there is one, and ``text_tokens`` tokens of the reader."""
        self.reader, self.order, self.text_tokens, self.bos_id = reader, order, text_tokens, bos_id
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size

    def __getitem__(self, number: int) -> Batch:
        first = (number * self.world_size + self.rank) * self.batch_size
        blocks = [self.order(position) for position in range(first, first + self.batch_size)]
        tokens = np.stack([self.reader.read(block * self.text_tokens, self.text_tokens) for block in blocks])
        if self.bos_id is not None:
            tokens = np.insert(tokens, 0, self.bos_id, axis=1)
        return {"tokens": torch.from_numpy(tokens), "index": torch.tensor(blocks, dtype=torch.int64)}


class UnsizedStream:
    """Iterates from start_batch until should_stop. Every ``iter`` starts there again, and does nothing before the
    first ``next``."""

    def __init__(self, batches: MicroBatches, request: StreamRequest, num_workers: int) -> None:
        self.batches, self.request, self.num_workers = batches, request, num_workers

    def __iter__(self) -> Iterator[Batch]:
        request = self.request
        loaded = self._loaded()
        for number in self._numbers():
            # Asked here and not where batches are made: workers make them ahead of time.
            if request.should_stop is not None and number % request.accumulate == 0 and request.should_stop():
                return
            yield next(loaded)

    def _numbers(self) -> Iterator[int]:
        if self.request.num_batches is None:
            return itertools.count(self.request.start_batch)
        return iter(range(self.request.start_batch, self.request.num_batches))

    def _loaded(self) -> Iterator[Batch]:
        if self.num_workers == 0:
            return map(self.batches.__getitem__, self._numbers())
        # A generator of its own: the loader draws a seed from it, which would move the run's random numbers.
        own = torch.Generator()
        loader = DataLoader(
            self.batches,
            sampler=self._numbers(),
            batch_size=None,
            num_workers=self.num_workers,
            generator=own,
            worker_init_fn=functools.partial(live_as_long_as, os.getpid()),
        )
        with stop_signals_held():
            return iter(loader)


class SizedStream(UnsizedStream):
    """A stream of a known number of micro-batches: that of the whole stage, also when it continues one."""

    def __len__(self) -> int:
        assert self.request.num_batches is not None
        return self.request.num_batches


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
        problem = torchvision_problem()
        if problem is not None:
            raise ValueError(f"{problem}; pip uninstall torchvision (nothing here needs it)")
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
            if (text := int(self.token_bytes(dataset).nonzero().max())) >= vocab_size:
                raise ValueError(
                    f"data folder {folder}: a text can need a vocabulary of {text + 1} tokens, the model has {vocab_size};"
                    " prepare it with the model's tokenizer"
                )
            for name, token in (("begin with", manifest.bos_id), ("hold the EOS", manifest.eos_id)):
                if token is not None and not 0 <= token < vocab_size:
                    raise ValueError(
                        f"data folder {folder}: blocks {name} token {token}, the model has {vocab_size} tokens;"
                        " prepare it with the model's tokenizer"
                    )
            if tokenizer_hash is not None and manifest.tokenizer_hash != tokenizer_hash:
                raise ValueError(
                    f"data folder {folder}: made with tokenizer {manifest.tokenizer_hash[:12]}…, the model's is"
                    f" {tokenizer_hash[:12]}…; prepare it with the model's tokenizer"
                )

    def manifest(self, dataset: str) -> Manifest:
        """The manifest of ``short`` or ``long``. Raises FileNotFoundError with the command that makes the folder."""
        if dataset not in self._manifests:
            self._manifests[dataset] = Manifest.load(self._folder(dataset))
        return self._manifests[dataset]

    def sources(self, request: StreamRequest, index: torch.Tensor) -> torch.Tensor:
        """(B,) int64: the document, numbered in its split, in which each block of ``index`` (B,) begins."""
        manifest = self.manifest(request.dataset)
        starts = np.load(self._folder(request.dataset) / manifest.side(request.split).document_starts.file)
        first = index.numpy() * manifest.text_tokens(request.block_tokens)
        return torch.from_numpy(np.searchsorted(starts, first, side="right") - 1)

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
        return unigram_entropy(TokenReader(self._folder(dataset), manifest.side("validation"), manifest.vocab_size))

    def open(self, request: StreamRequest, rank: int = 0, world_size: int = 1) -> UnsizedStream:
        """The stream of one rank. Has a length exactly if the request has. Raises ValueError for what the folder
        cannot serve."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank} of {world_size}, expected 0 to {world_size - 1}")
        manifest = self.manifest(request.dataset)
        folder = self._folder(request.dataset)
        num_blocks = manifest.num_blocks(request.split, request.block_tokens)
        text_tokens = manifest.text_tokens(request.block_tokens)
        per_batch = request.batch_size * world_size
        what = f"{folder} ({request.split})"
        if num_blocks == 0:
            raise ValueError(
                f"{what}: holds no block of {request.block_tokens} tokens; give more text or a smaller context"
            )
        reader = TokenReader(folder, manifest.side(request.split), manifest.vocab_size)
        order: SpreadOrder | ShuffledOrder
        if request.split == "train":
            order = ShuffledOrder(first_blocks(reader.starts, text_tokens), seed=self.seed, stage=request.stage)
        else:
            wanted = (request.num_batches or 0) * per_batch
            order = SpreadOrder(num_blocks, wanted)
            if wanted > num_blocks:
                raise ValueError(
                    f"{what}: asked for {request.num_batches} batches of {per_batch} sequences, but there are"
                    f" {num_blocks} blocks of {request.block_tokens} tokens: at most {num_blocks // per_batch} batches"
                )
        batches = MicroBatches(
            reader,
            order,
            text_tokens=text_tokens,
            bos_id=manifest.bos_id,
            batch_size=request.batch_size,
            rank=rank,
            world_size=world_size,
        )
        kind = UnsizedStream if request.num_batches is None else SizedStream
        return kind(batches, request, self.num_workers)

    def train_dataloader(self) -> UnsizedStream:
        """The stream of the current stage, as the LightningModule's ``train_request`` wants it."""
        trainer: Any = self.trainer
        return self.open(
            trainer.lightning_module.train_request(trainer.current_epoch), trainer.global_rank, trainer.world_size
        )

    def val_dataloader(self) -> UnsizedStream:
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
    short, long = manifests["short"], manifests["long"]
    if short.tokenizer_hash != long.tokenizer_hash:
        raise ValueError("data folders short and long: made with different tokenizers; prepare both with the model's")
    if short.bos_id != long.bos_id:
        raise ValueError(
            f"data folders short and long: blocks begin differently (bos_id {short.bos_id}, {long.bos_id}); prepare both"
            " anew with the model's tokenizer"
        )
    if short.split != long.split:
        raise ValueError(
            f"data folders short and long: split differently ({short.split!r}, {long.split!r}); prepare both with one"
            " fraction"
        )
