"""A long text through a pipe: ``cat text | streamllm run -n 10`` must take no more memory at its end than at its start.

The text goes into a process of its own, whose resident memory is read all the while. It is made as it is written, from
a file over and over or from made-up sentences, so that nothing of it lies in memory here either.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

from place import STORIES, begin, finish
from target import Target, print_targets

from streamllm.evaluate.memory import rss_bytes

MEGABYTE = 1_000_000

MOST_SAMPLES = 60
"""Samples that the record shows, evenly spread."""

PEOPLE = ("Lily", "Tom", "the little dog", "an old bear", "Mia", "Ben", "the red bird", "her mom")
DEEDS = ("found", "wanted", "lost", "painted", "looked for", "hid", "carried", "dreamed of")
THINGS = ("a shiny stone", "the big ball", "a warm hat", "some cake", "the lost key", "a tiny boat", "two apples")
PLACES = ("in the park", "by the river", "under a tree", "at home", "on the hill", "near the sea")


def made_up_stories() -> Iterator[str]:
    """Sentences of a story that never ends, always the same."""
    draw = random.Random(0)
    for number in itertools.count(1):
        person, deed, thing, place = (draw.choice(words) for words in (PEOPLE, DEEDS, THINGS, PLACES))
        sentence = f"{person} {deed} {thing} {place}"
        gap = " " if number % 8 else "\n"
        yield f"{sentence[0].upper()}{sentence[1:]}.{gap}"


def repeat_file(file: Path) -> Iterator[str]:
    """The lines of ``file``, which is not empty, over and over."""
    while True:
        with file.open(encoding="utf-8") as lines:
            yield from lines


def cut(pieces: Iterator[str], size: int, batch: int = 65536) -> Iterator[bytes]:
    """The pieces as UTF-8 in batches, until they are ``size`` bytes or, to end with a whole piece, a little more."""
    waiting = bytearray()
    while size > 0:
        piece = next(pieces).encode()
        waiting += piece
        size -= len(piece)
        if len(waiting) >= batch or size <= 0:
            yield bytes(waiting)
            waiting.clear()


class Feeder(threading.Thread):
    """Writes a text into a pipe and closes it."""

    def __init__(self, batches: Iterator[bytes], pipe: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self.batches, self.pipe = batches, pipe
        self.written = 0
        self.error: Exception | None = None

    def run(self) -> None:
        """Write until the text or the reader ends."""
        try:
            with suppress(BrokenPipeError), self.pipe:  # who reads says itself why it stopped
                for batch in self.batches:
                    self.pipe.write(batch)
                    self.written += len(batch)
        except Exception as error:
            self.error = error


@dataclass(frozen=True)
class Sample:
    """Memory of the process ``seconds`` after its start, when ``written`` bytes had been handed over."""

    seconds: float
    written: int
    rss: int


def measure(batches: Iterator[bytes], every: float, threads: int | None = None) -> dict[str, Any]:
    """Run the command on ``batches`` and sample its memory ``every`` so many seconds; the figures.

    ``rss_early_bytes`` is the median while the second tenth of the text was handed over, ``rss_late_bytes`` while the
    last tenth was.

    Raises:
        RuntimeError: the command failed.
    """
    command = [sys.executable, "-m", "streamllm", "run", "--model", str(STORIES), "--max-tokens", "10"]
    command += ["--seed", "1", "--json", "--quiet"]
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment)
        assert process.stdin is not None
        feeder = Feeder(batches, process.stdin)
        feeder.start()
        try:
            samples = list(_watch(process, feeder, began, every))
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - began
        feeder.join()
        out.seek(0)
        err.seek(0)
        lines, complaint = out.read().decode().splitlines(), err.read().decode().strip()
    if feeder.error is not None:
        raise feeder.error
    if process.returncode or not lines:
        raise RuntimeError(f"streamllm run ended with {process.returncode}: {complaint}")
    stats = json.loads(lines[-1])
    read = stats["tokens_seen"] - max(0, stats["tokens_generated"] - 1)  # the last token drawn is never read
    early, late = _stretch(samples, 0.1, 0.2), _stretch(samples, 0.9, 1.0)
    return {
        "bytes_written": feeder.written,
        "tokens_read": read,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(read / seconds, 1),
        "prefill_tokens_per_s": round(stats["prefill_tokens_per_s"], 1),
        "ttft_s": round(stats["ttft_s"], 2),
        "rss_early_bytes": early,
        "rss_late_bytes": late,
        "rss_grown_bytes": late - early,
        "rss_peak_bytes": stats["peak_rss_bytes"],
        "cache_bytes": stats["cache_bytes"],
        "samples": [
            {"seconds": round(sample.seconds, 1), "written": sample.written, "rss_bytes": sample.rss}
            for sample in samples[:: max(1, -(-len(samples) // MOST_SAMPLES))]
        ],
    }


def _watch(process: subprocess.Popen[bytes], feeder: Feeder, began: float, every: float) -> Iterator[Sample]:
    """Samples of the memory of ``process`` until it ends."""
    while process.poll() is None:
        with suppress(OSError, IndexError):  # it has just ended
            rss = rss_bytes(process.pid)
            if rss:
                yield Sample(time.perf_counter() - began, feeder.written, rss)
        with suppress(subprocess.TimeoutExpired):
            process.wait(every)


def _stretch(samples: Sequence[Sample], begin: float, end: float) -> int:
    """Median memory while ``begin`` to ``end`` of the text was handed over; of the nearest sample, if there is none."""
    total = samples[-1].written
    found = [sample.rss for sample in samples if begin * total <= sample.written <= end * total]
    nearest = min(samples, key=lambda sample: abs(sample.written - end * total))
    return int(median(found or [nearest.rss]))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mb", type=float, default=20.0, help="text to write, in MB (default: %(default)g)")
    parser.add_argument("--text", type=Path, help="a file to repeat (default: made-up sentences)")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between samples (default: %(default)g)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own)")
    parser.add_argument("--quick", action="store_true", help="to try the script; writes only to --out")
    parser.add_argument("--out", type=Path, help="where the record goes (default: docs/results/pipe.json)")
    options = parser.parse_args(argv)
    if options.text is not None and not (options.text.is_file() and options.text.stat().st_size):
        parser.error(f"--text needs a file with text in it, {options.text} is none")
    size = int((0.02 if options.quick else options.mb) * MEGABYTE)
    pieces = made_up_stories() if options.text is None else repeat_file(options.text)

    record = begin("pipe", argv, "stories260K", "float32")
    if options.threads is not None:
        record.machine["threads"] = options.threads
    figures = measure(cut(pieces, size), options.every, options.threads)
    targets = [Target("memory grown, second to last tenth", figures["rss_grown_bytes"] / MEGABYTE, 2.0, unit="MB")]
    record.figures.update(figures, targets=[target.to_dict() for target in targets])

    print(f"{figures['bytes_written'] / MEGABYTE:.2f} MB, {figures['tokens_read']:,} tokens read")
    print(f"{figures['seconds']:,.1f} s in all, {figures['tokens_per_s']:,.0f} tokens/s with the start")
    print(f"{figures['prefill_tokens_per_s']:,.0f} tokens/s in the model alone")
    early, late, peak = (figures[f"rss_{name}_bytes"] / MEGABYTE for name in ("early", "late", "peak"))
    print(f"RSS {early:.1f} MB early, {late:.1f} MB late, {peak:.1f} MB at most\n")
    print_targets(targets)
    finish(record, options.out, quick=options.quick)


if __name__ == "__main__":
    main()
