"""Do eight conversations of twenty minutes leave a server as fast and as small as it was?

Each client resends its whole conversation with every message, as clients do, and keeps to a beat, so that every minute
asks for as much as any other. The clients are a process of their own, which knows how long first texts and tokens took,
minute by minute. The process of the server is weighed once a second. A quarter of the time is the warm-up of memory:
libraries keep what they have once made. Of the times, the last minute is compared with the second.

The machine may change in twenty minutes. So at the end comes one more minute in which each client takes turns between
its old conversation and a young one; those ratios know only the age.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from clients import Reply, ask
from openings import openings
from place import begin, finish
from served import Served, ours
from target import Target, print_targets

from streamllm.checkpoint import EMBEDDED
from streamllm.config import CacheConfig

MEGABYTE = 1_000_000

SHOWN = 10
"""Errors that the record has."""


@dataclass(frozen=True)
class Setting:
    """What to measure.

    Args:
        clients: that converse.
        minutes: of the soak.
        minute: seconds of each.
        beat: seconds from one message of a client to its next; a reply that takes longer is waited for.
        reply: tokens of each reply at most.
        window: of all conversations; ``None``: that of the model.
    """

    clients: int = 8
    minutes: int = 20
    minute: float = 60.0
    beat: float = 5.0
    reply: int = 128
    window: int | None = None


QUICK = Setting(clients=2, minutes=4, minute=3.0, beat=0.5, reply=8, window=60)


# ---- the clients, in a process of their own


@dataclass
class Minute:
    """What clients met in one minute; times in seconds."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    read: list[int] = field(default_factory=list)

    def take(self, reply: Reply) -> None:
        """Count a reply."""
        self.first.append(reply.first)
        self.between += reply.intervals
        self.read.append(reply.prompt - reply.cached)

    def told(self) -> dict[str, float]:
        """In few numbers."""
        found = {"first_s": self.first, "between_s": self.between, "read_tokens": [float(count) for count in self.read]}
        return {"turns": len(self.first), **{name: median(values) if values else 0.0 for name, values in found.items()}}


class Talker:
    """One conversation as a client holds it."""

    def __init__(self, url: str, model: str, setting: Setting, seed: int) -> None:
        self._url, self._openings, self._seed = url, openings(seed), seed
        self._body = {"model": model, "max_tokens": setting.reply, "temperature": 0.8, "stream": True}
        self._body["stream_options"] = {"include_usage": True}
        self._messages: list[dict[str, str]] = []
        self.turns = self.tokens = self.unknown = 0

    async def turn(self) -> Reply:
        """Say one thing more, with all that was said."""
        self.turns += 1
        said = [*self._messages, {"role": "user", "content": next(self._openings)}]
        seed = 1000 * self._seed + self.turns
        reply = await ask(self._url, "/v1/chat/completions", {**self._body, "messages": said, "seed": seed})
        if reply.error is None:
            self._messages = [*said, {"role": "assistant", "content": reply.text}]
            self.tokens = reply.prompt + reply.tokens
            self.unknown += reply.how != ("continued" if self.turns > 1 else "new")
        return reply


class Soak:
    """All conversations, and what comes of them."""

    def __init__(self, url: str, model: str, setting: Setting) -> None:
        self._setting, self._began = setting, time.perf_counter()
        self._talkers = [Talker(url, model, setting, seed) for seed in range(setting.clients)]
        self._young = [Talker(url, model, setting, setting.clients + seed) for seed in range(setting.clients)]
        self._minute, self._number = Minute(), 1
        self._errors: list[str] = []
        self._failed = 0
        self._minutes: list[dict[str, float]] = []

    async def run(self) -> dict[str, Any]:
        """Talk to the end; what was found."""
        setting = self._setting
        end = self._began + setting.minutes * setting.minute
        await asyncio.gather(*(self._talk(talker, end, n) for n, talker in enumerate(self._talkers)))
        self._close_minute()
        old, young = Minute(), Minute()
        pairs = zip(self._talkers, self._young, strict=True)
        await asyncio.gather(*(self._beside(*pair, old, young, n) for n, pair in enumerate(pairs)))
        return {
            "minutes": self._minutes,
            "beside": {"old": old.told(), "young": young.told()},
            "turns": [talker.turns for talker in self._talkers],
            "tokens": [talker.tokens for talker in self._talkers],
            "unknown": sum(talker.unknown for talker in self._talkers),
            "failed": self._failed,
            "errors": self._errors,
        }

    async def _talk(self, talker: Talker, end: float, number: int) -> None:
        """One client to the end of the soak."""
        setting = self._setting
        due = self._began + setting.beat * number / setting.clients  # not all at once
        while True:
            await asyncio.sleep(due - time.perf_counter())
            if time.perf_counter() >= end:
                return
            reply = await talker.turn()
            while reply.sent >= self._began + self._number * setting.minute:
                self._close_minute()
            self._count(reply, self._minute)
            due = max(due + setting.beat, time.perf_counter())

    async def _beside(self, talker: Talker, other: Talker, old: Minute, young: Minute, number: int) -> None:
        """One client in the minute after it: a turn in the old conversation, a turn in the young one, and so on."""
        setting = self._setting
        due = time.perf_counter() + setting.beat * number / setting.clients
        for turn in range(max(4, round(setting.minute / setting.beat))):
            await asyncio.sleep(due - time.perf_counter())
            who, whose = (other, young) if turn % 2 else (talker, old)
            reply = await who.turn()
            self._count(reply, whose)
            due = max(due + setting.beat, time.perf_counter())

    def _count(self, reply: Reply, minute: Minute) -> None:
        if reply.error is not None:
            self._failed += 1
            if len(self._errors) < SHOWN:
                self._errors.append(reply.error)
        elif reply.times:
            minute.take(reply)

    def _close_minute(self) -> None:
        """Keep of a minute that is over only few numbers."""
        if self._number <= self._setting.minutes:
            self._minutes.append(self._minute.told())
        self._minute, self._number = Minute(), self._number + 1


# ---- the other side


def measure(setting: Setting, folder: Path) -> tuple[dict[str, Any], list[Target]]:
    """Run everything; the figures and the targets."""
    flags = [] if setting.window is None else [f"--window={setting.window}"]
    with ours(folder, slots=setting.clients, resident=2 * setting.clients, flags=flags) as server:
        weights, found = weigh_while(server, setting)
        running = server.figure("streamllm:num_requests_running") + server.figure("streamllm:num_requests_waiting")
    per_minute = [median(weights[start : start + each]) for start, each in _minutes_of(weights, setting)]
    warm = setting.minutes // 4
    second, last = found["minutes"][1], found["minutes"][-1]
    old, young = found["beside"]["old"], found["beside"]["young"]
    window = setting.window or CacheConfig.window or 252
    targets = [
        Target("requests that failed", found["failed"], 0, unit="requests"),
        Target("turns that were not recognised", found["unknown"], 0, unit="turns"),
        Target("shortest conversation", min(found["tokens"]) / window, 2, at_least=True, unit="windows"),
        Target("growth of memory after a quarter", per_minute[-1] / per_minute[warm] - 1, 0.01, unit="of what it was"),
        Target("time between tokens, last minute / second", _ratio(last, second, "between_s"), 1.1),
        Target("time to the first text, last minute / second", _ratio(last, second, "first_s"), 1.1),
        Target("time between tokens, old / young conversation", _ratio(old, young, "between_s"), 1.1),
        Target("time to the first text, old / young conversation", _ratio(old, young, "first_s"), 1.1),
        Target("requests that are left", running, 0, unit="requests"),
    ]
    figures = {
        "setting": asdict(setting),
        **found,
        "rss_bytes_by_minute": [round(value) for value in per_minute],
        "rss_bytes_peak": max(weights),
        "targets": [target.to_dict() for target in targets],
    }
    return figures, targets


def weigh_while(server: Served, setting: Setting) -> tuple[list[int], dict[str, Any]]:
    """Let the clients talk; the memory of the server, once a second (of 60 in a minute), and what they found.

    Raises:
        RuntimeError: the clients failed.
    """
    weights: list[int] = []
    most = setting.minutes * 60
    given = json.dumps({"url": server.url, "model": server.model, "setting": asdict(setting)})
    with subprocess.Popen([sys.executable, __file__, "--talk", given], stdout=subprocess.PIPE, text=True) as clients:
        began = time.monotonic()
        while clients.poll() is None:
            if len(weights) < most:
                weights.append(server.rss)
            try:
                clients.wait(max(0.0, began + (len(weights)) * setting.minute / 60 - time.monotonic()) or 1.0)
            except subprocess.TimeoutExpired:
                continue
        told = "" if clients.stdout is None else clients.stdout.read()
    if clients.returncode:
        raise RuntimeError(f"The clients ended with {clients.returncode}.")
    return weights, json.loads(told)


def _minutes_of(weights: Sequence[int], setting: Setting) -> list[tuple[int, int]]:
    """Where each minute's weights begin, and how many they are."""
    each = max(1, len(weights) // setting.minutes)
    return [(number * each, each) for number in range(setting.minutes)]


def _ratio(above: dict[str, float], below: dict[str, float], name: str) -> float:
    return above[name] / below[name] if below[name] else float("inf")


def show(figures: dict[str, Any], targets: Sequence[Target]) -> None:
    """Print the tables."""
    print(f"{'minute':>8}{'turns':>8}{'first ms':>10}{'token ms':>10}{'read':>6}{'RSS MB':>9}")
    rows = enumerate(zip(figures["minutes"], figures["rss_bytes_by_minute"], strict=True), 1)
    for number, (found, rss) in rows:
        print(
            f"{number:>8}{found['turns']:>8}{1000 * found['first_s']:>10.1f}{1000 * found['between_s']:>10.2f}"
            f"{found['read_tokens']:>6.0f}{rss / MEGABYTE:>9.1f}"
        )
    turns, tokens = figures["turns"], figures["tokens"]
    print(f"\n{sum(turns):,} turns, {sum(tokens):,} tokens in {len(turns)} conversations\n")
    print_targets(targets)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=int, default=Setting.minutes, help="at least 4 (default: %(default)s)")
    parser.add_argument("--beat", type=float, default=Setting.beat, help="seconds of a turn (default: %(default)s)")
    parser.add_argument("--talk", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="to try the script; writes only to --out")
    parser.add_argument("--out", type=Path, help="where the record goes (default: docs/results/soak.json)")
    options = parser.parse_args(argv)
    if options.minutes < 4:
        parser.error("--minutes must be at least 4, so that there is something to compare")
    if options.talk:
        given = json.loads(options.talk)
        print(json.dumps(asyncio.run(Soak(given["url"], given["model"], Setting(**given["setting"])).run())))
        return

    record = begin("soak", argv, f"{EMBEDDED}, embedded", "float32")
    setting = QUICK if options.quick else Setting(minutes=options.minutes, beat=options.beat)
    with tempfile.TemporaryDirectory() as folder:
        figures, targets = measure(setting, Path(folder))
    record.figures.update(figures)
    show(figures, targets)
    finish(record, options.out, quick=options.quick)


if __name__ == "__main__":
    main()
