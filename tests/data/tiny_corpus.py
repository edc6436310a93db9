"""Texts of many lengths with duplicates, other scripts and literal special tokens."""

import random
from pathlib import Path

WORDS = ["the", "def", "return", "self", "import", "class", "naïve", "straße", "中文", "Ελλάδα", "emoji😀", "<|endoftext|>", "<s>", "▁", "<0x41>", "\t", "", "\n"]


def make_texts(count: int = 60) -> list[str]:
    random.seed(1)
    texts = [" ".join(random.choices(WORDS, k=random.randint(1, 120))) for _ in range(count)]
    return [*texts, *texts[:10]]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
