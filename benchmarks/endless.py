"""Is an endless stream as fast and as small at token 100,000 as at token 2,000?

The model stories260K writes on and on; chunks are dropped as they come. Around each mark, 2,000
tokens are timed in blocks of 64, one eviction in each: wall time, and processor time of all threads, per token. The
median over the blocks counts, the least is shown beside it; the record has the mean too, in which the blocks with a
rebase weigh more. The process's memory is read at the mark, after a garbage
collection.

Minutes lie between the marks, and the machine may change meanwhile. So at the end a second, young stream takes turns
with the old one, block by block; that ratio ("beside a young stream") knows only the age of the stream.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from place import STORIES, begin, finish
from target import Target, print_targets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import streamllm
from streamllm import Chunk, SamplingConfig
from streamllm.config import CacheConfig
from streamllm.evaluate.memory import rss_bytes

BLOCK = CacheConfig.block
PROMPT = "Once upon a time"
MEGABYTE = 1_000_000


MARKS = (2_000, 10_000, 50_000, 100_000, 200_000, 500_000, 1_000_000, 2_000_000, 5_000_000, 10_000_000)
COMPARED = 100_000
WIDTH = 2_000


@dataclass(frozen=True)
class Setting:
    """Where to measure.

    Args:
        tokens: of the whole run, but for the last half of ``width`` and what comes beside the young stream.
        marks: tokens generated, the last of them ``tokens``; the first is the one that others are compared with.
        compared: the mark of the targets.
        width: tokens that are timed around each mark.
        seed: of the stream.
    """

    tokens: int
    marks: tuple[int, ...]
    compared: int
    width: int
    seed: int


def make_setting(tokens: int | None, seed: int, *, is_quick: bool) -> Setting:
    """Marks up to ``tokens``, which is the last one; ``None``: 100,000, or few for a trial.

    Raises:
        ValueError: ``tokens`` leaves no second mark.
    """
    marks, width = ((400,), 4 * BLOCK) if is_quick else (MARKS, WIDTH)
    if tokens is None:
        tokens = marks[0] + 2 * width if is_quick else COMPARED
    if tokens < marks[0] + width:
        raise ValueError(f"--tokens must be at least {marks[0] + width}, so that there is something to compare")
    passed = (*(mark for mark in marks if mark <= tokens - width), tokens)
    return Setting(tokens, passed, COMPARED if COMPARED in passed else tokens, width, seed)


@dataclass
class Blocks:
    """ms per token of blocks of 64 tokens: by the clock, and of the processor."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def read(self, chunks: Iterator[Chunk], count: int) -> None:
        """Draw ``count`` blocks from ``chunks``, each timed."""
        for _ in range(count):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(BLOCK):
                next(chunks)
            self.wall.append((time.perf_counter() - wall) * 1000 / BLOCK)
            self.cpu.append((time.process_time() - cpu) * 1000 / BLOCK)

    def to_dict(self) -> dict[str, float]:
        """Return means, medians and least values, in ms per token."""
        return {
            "wall_ms_mean": round(mean(self.wall), 5),
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


def take_turns(old: Stream, young: Stream, count: int) -> tuple[Blocks, Blocks]:
    """``count`` blocks of each, a block of one after a block of the other."""
    of_old, of_young = Blocks(), Blocks()
    for _ in range(count):
        old.read(of_old, 1)
        young.read(of_young, 1)
    return of_old, of_young


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting
) -> tuple[dict[str, Any], list[Target]]:
    """Run everything; the figures and the targets."""
    old = Stream(model, tokenizer, setting.seed)
    marks: dict[int, Mark] = {}
    for tokens in setting.marks:
        _tell(f"up to token {tokens:,}")
        marks[tokens] = old.at(tokens, setting.width)
    _tell("beside a young stream")
    young, count = Stream(model, tokenizer, setting.seed), setting.width // BLOCK
    young.skip(setting.marks[0] - count * BLOCK // 2)
    of_old, of_young = take_turns(old, young, count)

    first, last = marks[setting.marks[0]], marks[setting.compared]
    growth = (last.rss - first.rss) / MEGABYTE
    span = f"token {last.tokens:,} / {first.tokens:,}"
    targets = [
        Target(f"ms per token, {span}", _ratio(last.blocks.wall, first.blocks.wall), 1.05),
        Target(f"memory grown, token {first.tokens:,} to {last.tokens:,}", growth, 2.0, unit="MB"),
    ]
    figures = {
        "setting": asdict(setting),
        "marks": [mark.to_dict() for mark in marks.values()],
        "ratios": {
            f"wall, median, {span}": _ratio(last.blocks.wall, first.blocks.wall),
            f"wall, least, {span}": min(last.blocks.wall) / min(first.blocks.wall),
            f"processor, median, {span}": _ratio(last.blocks.cpu, first.blocks.cpu),
            f"processor, least, {span}": min(last.blocks.cpu) / min(first.blocks.cpu),
            f"wall, median, token {setting.tokens:,} beside a young stream": _ratio(of_old.wall, of_young.wall),
            f"processor, median, token {setting.tokens:,} beside a young stream": _ratio(of_old.cpu, of_young.cpu),
        },
        "beside": {"old": of_old.to_dict(), "young": of_young.to_dict()},
        "targets": [target.to_dict() for target in targets],
    }
    return figures, targets


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return round(median(above) / median(below), 4)


def show(figures: dict[str, Any], targets: Sequence[Target]) -> None:
    """Print the tables."""
    names = ("wall ms", "least", "cpu ms", "least", "RSS MB", "cached", "cache kB")
    print(f"{'token':>12}" + "".join(f"{name:>10}" for name in names))
    for mark in figures["marks"]:
        times = (mark[name] for name in ("wall_ms", "wall_ms_min", "cpu_ms", "cpu_ms_min"))
        print(
            f"{mark['tokens']:>12,}"
            + "".join(f"{time:>10.4f}" for time in times)
            + f"{mark['rss_bytes'] / MEGABYTE:>10.2f}{mark['tokens_cached']:>10,}{mark['cache_bytes'] / 1000:>10,.0f}"
        )
    print()
    width = max(map(len, figures["ratios"]))
    for name, value in figures["ratios"].items():
        print(f"{name:<{width}}  {value:.3f}")
    print()
    print_targets(targets)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, help="length of the stream (default: 100000)")
    parser.add_argument("--seed", type=int, default=1, help="of the stream (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own)")
    parser.add_argument("--quick", action="store_true", help="to try the script; writes only to --out")
    parser.add_argument("--out", type=Path, help="where the record goes (default: docs/results/endless.json)")
    options = parser.parse_args(argv)
    try:
        setting = make_setting(options.tokens, options.seed, is_quick=options.quick)
    except ValueError as error:
        parser.error(str(error))
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    model, tokenizer = streamllm.load(STORIES)
    dtype = str(model.dtype).removeprefix("torch.")
    record = begin("endless", argv, "stories260K", dtype)
    figures, targets = measure(model, tokenizer, setting)
    record.figures.update(figures)
    show(figures, targets)
    finish(record, options.out, quick=options.quick)


if __name__ == "__main__":
    main()
