"""Toys that the tests of training share: a text of few words, and how to train on it in seconds."""

from __future__ import annotations

import random
from pathlib import Path

from test_command import run

FLAGS = ("--size", "toy", "--vocabulary", "320", "--context", "32", "--batch-tokens", "256", "--train-dtype", "float32")
WORDS = "Lily Tom saw had a big red ball dog and ran to the park with mom one day happy sad little".split()
FLAGS += ("--no-compile", "--measures", "2", "--quiet")


def write_text(file: Path) -> Path:
    """Short stories of a few words."""
    draw = random.Random(0)
    stories = [" ".join(draw.choices(WORDS, k=30)) + "." for _ in range(400)]
    file.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
    return file


def train(text: Path, out: Path, *flags: str, tokens: int = 6000) -> tuple[int, str, str]:
    """Train a toy: exit code, stdout, stderr."""
    return run("train", "--data", str(text), "--out", str(out), "--tokens", str(tokens), *FLAGS, *flags)
