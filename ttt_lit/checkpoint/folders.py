"""Output folders that are complete or absent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` that takes its name when the body ends well and vanishes when it does not.

    Raises:
        ValueError: ``path`` exists.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists already; choose another output folder or remove it")
    partial = path.absolute().with_name(f".{path.absolute().name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
