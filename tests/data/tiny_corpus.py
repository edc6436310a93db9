"""Texts of many lengths with duplicates, other scripts and literal special tokens."""

import random
from pathlib import Path

PLAIN = "the def return self import class"
OTHER_SCRIPTS = "naïve straße 中文 Ελλάδα emoji😀"
SPECIAL = "<|endoftext|> <s> ▁ <0x41>"
WORDS = [*f"{PLAIN} {OTHER_SCRIPTS} {SPECIAL}".split(), "\t", "\n", ""]


def make_texts(count: int = 60) -> list[str]:
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 120))) for _ in range(count)]
    return [*texts, *texts[:10]]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
