"""Is an endless stream as fast and as small at token 100,000 as at token 2,000?

The story model that comes with streamllm writes on and on; chunks are dropped as they come. Around each mark, 2,000
tokens are timed in blocks of 64, one eviction in each: wall time, and processor time of all threads, per token. The
median over the blocks counts, the least is shown beside it. The process's memory is read at the mark, after a garbage
collection.

Minutes lie between the marks, and the machine may change meanwhile. So at the end a second, young stream takes turns
with the old one, block by block; that ratio ("beside a young stream") knows only the age of the stream.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from memory import rss_bytes
from record import begin_record, target_path
from target import Target, print_targets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import streamllm
from streamllm import Chunk, SamplingConfig
from streamllm.config import CacheConfig

BLOCK = CacheConfig.block
PROMPT = "Once upon a time"
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Setting:
    """Where to measure.

    Args:
        marks: tokens generated; the first is the one that others are compared with.
        compared: the mark of the targets (the last one, if the run ends before).
        width: tokens that are timed around each mark.
        tokens: of the whole run, but for the last half of ``width``.
        seed: of the stream.
    """

    marks: tuple[int, ...]
    compared: int
    width: int
    tokens: int
    seed: int = 1


MARKS = (2_000, 10_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000, 5_000_000, 10_000_000)
COMPARED = 100_000


def make_setting(tokens: int, seed: int, *, is_quick: bool) -> Setting:
    """Marks up to ``tokens``, which is one itself.

    Raises:
        ValueError: ``tokens`` leaves no second mark.
    """
    marks, width = ((400, 800), 4 * BLOCK) if is_quick else (MARKS, 2_000)
    if tokens <= marks[0]:
        raise ValueError(f"--tokens must be above {marks[0]}, you gave {tokens}")
    passed = (*(mark for mark in marks if mark < tokens), tokens)
    return Setting(passed, COMPARED if COMPARED in passed else passed[-1], width, tokens, seed)


@dataclass
class Blocks:
    """ms per token of blocks of 64 tokens: by the clock, and of the processor."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def read(self, chunks: Iterator[Chunk], count: int) -> None:
        """Draw ``count`` blocks from ``chunks`` and time each."""
        for _ in range(count):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(BLOCK):
                next(chunks)
            self.wall.append((time.perf_counter() - wall) * 1000 / BLOCK)
            self.cpu.append((time.process_time() - cpu) * 1000 / BLOCK)

    def to_dict(self) -> dict[str, float]:
        """Return medians and least values, in ms per token."""
        return {
            "wall_ms": round(median(self.wall), 5),
            "wall_ms_min": round(min(self.wall), 5),
            "cpu_ms": round(median(self.cpu), 5),
            "cpu_ms_min": round(min(self.cpu), 5),
        }


@dataclass(frozen=True)
class Mark:
    """What was found at one mark."""

    tokens: int
    blocks: Blocks
    rss: int
    cached: int
    cache_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        return {
            "tokens": self.tokens,
            **self.blocks.to_dict(),
            "rss_bytes": self.rss,
            "tokens_cached": self.cached,
            "cache_bytes": self.cache_bytes,
        }


class Stream:
    """A stream that counts its tokens."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        sampling = SamplingConfig(seed=seed)
        self.chunks = streamllm.stream(model, tokenizer, PROMPT, sampling=sampling, on_end="pass")
        self.drawn = 0

    def skip(self, until: int) -> None:
        """Draw tokens until there are ``until``."""
        while self.drawn < until:
            next(self.chunks)
            self.drawn += 1

    def read(self, blocks: Blocks, count: int) -> None:
        """Draw and time ``count`` blocks."""
        blocks.read(self.chunks, count)
        self.drawn += count * BLOCK

    def at(self, tokens: int, width: int) -> Mark:
        """Time ``width`` tokens around the one numbered ``tokens``, and weigh the process there."""
        half = width // 2 // BLOCK
        blocks = Blocks()
        self.skip(tokens - half * BLOCK)
        self.read(blocks, half)
        stats = next(self.chunks).stats
        self.drawn += 1
        gc.collect()
        rss = rss_bytes()
        self.read(blocks, half)
        return Mark(tokens, blocks, rss, stats.tokens_cached, stats.cache_bytes)


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting) -> list[Mark]:
    """Let one stream pass all marks, then take turns with a young one; the last mark is that of the young stream."""
    old = Stream(model, tokenizer, setting.seed)
    found: list[Mark] = []
    for mark in setting.marks:
        print(f"up to token {mark:,}", file=sys.stderr, flush=True)
        found.append(old.at(mark, setting.width))
    return found


def measure_beside(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting, old: Stream
) -> tuple[Blocks, Blocks]:
    """Blocks of the old stream and of a young one at the first mark, taken by turns."""
    young = Stream(model, tokenizer, setting.seed)
    count = setting.width // BLOCK
    young.skip(setting.marks[0] - count * BLOCK // 2)
    of_old, of_young = Blocks(), Blocks()
    for _ in range(count):
        old.read(of_old, 1)
        young.read(of_young, 1)
    return of_old, of_young
