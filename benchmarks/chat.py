"""Does turn 1,000 of a conversation cost as much as turn 10, and what does keeping it on disk cost?

The embedded model talks in sessions on disk, with recall on. From turn 10 on, and up to turn 1,000, so many turns are
timed, which all have the same length: a message with numbers that are searched for and never found, and a reply of so
many tokens that no end token ends. The median counts. Between them messages have many lengths, as those of people do.
Minutes lie between them, so at the end a second, young conversation takes turns with the old one; that ratio knows only
their age.

Also: what saving the session at the end of a turn takes, within the conversation; what going on with it takes, from the
call of ``Chat`` on, in a process that has the model; and what a token costs in a conversation beside ``stream()``.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import torch
from place import begin, finish
from target import Target, print_targets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import streamllm
from streamllm import Chunk, SamplingConfig, keeper
from streamllm.checkpoint import EMBEDDED
from streamllm.config import CacheConfig
from streamllm.evaluate.memory import rss_bytes
from streamllm.session import Chat
from streamllm.sessions import Session
from streamllm.state import save_state

MESSAGE = "One day a little girl saw 1{0:05}, 2{0:05} and 3{0:05}."
"""Words that are searched for and said in every turn, and numbers that nobody has said before."""

FIRST = 12_345
"""The first number. Most others are cut into as many tokens; small ones, which have many zeros, are not."""

MORE, LENGTHS = " And then some more.", 40
"""What makes a message longer, up to so many times."""


SNAPSHOTS = 8
BLOCK = CacheConfig.block
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Setting:
    """What to measure.

    Args:
        early, late: turns that are compared.
        warm: turn from which on the memory counts.
        width: turns that are timed from each on, or up to the last one.
        reply: tokens of a reply.
        resumes: how often the conversation is gone on with.
        blocks: of 64 tokens, that are timed beside ``stream()``.
        window: of all conversations; ``None``: that of the model.
    """

    early: int = 10
    late: int = 1000
    warm: int = 100
    width: int = 50
    reply: int = 32
    resumes: int = 10
    blocks: int = 40
    window: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Of all conversations."""
        return {"window": self.window, "on_end": "ban", "snapshots": SNAPSHOTS, "sampling": SamplingConfig(seed=1)}


QUICK = Setting(early=8, late=12, warm=8, width=2, reply=4, resumes=1, blocks=1, window=60)


class Saves:
    """Stands in for what saves a session, and times it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, *given: Any, **options: Any) -> None:
        """Save, and note the seconds."""
        began = time.perf_counter()
        save_state(*given, **options)
        self.seconds.append(time.perf_counter() - began)


class Talk:
    """A conversation; ``read`` are the lengths of the turns that were timed, in tokens."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting, session: Session
    ) -> None:
        self.chat = Chat(model, tokenizer, **setting.options, session=session)
        self.reply, self.read = setting.reply, set[int]()
        self._tokenizer, self._numbers = tokenizer, count(FIRST)

    def turn(self, text: str) -> tuple[float, int]:
        """Seconds of one turn, and tokens that it read."""
        began = time.perf_counter()
        reply = self.chat.send(text, max_tokens=self.reply)
        for _ in reply:
            pass
        seconds = time.perf_counter() - began
        if reply.recalled:
            raise RuntimeError(f"Turn {reply.turn} was to recall nothing, it recalled {reply.recalled}.")
        return seconds, reply.read

    def up_to(self, turn: int) -> None:
        """Talk until there are so many turns."""
        while (turns := self.chat.turns) < turn:
            self.turn(self._message() + MORE * (7 * turns % LENGTHS))

    def timed(self, turns: int) -> list[float]:
        """Milliseconds of each of so many turns."""
        taken = []
        for _ in range(turns):
            seconds, read = self.turn(self._message())
            taken.append(1000 * seconds)
            self.read.add(read)
        return taken

    def _message(self) -> str:
        """The next message that has as many tokens as the first one."""
        texts = (MESSAGE.format(number) for number in self._numbers)
        return next(text for text in texts if self._count(text) == self._count(MESSAGE.format(FIRST)))

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text)["input_ids"])


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting, folder: Path
) -> tuple[dict[str, Any], list[Target]]:
    """Run everything; the figures and the targets."""
    saves = Saves()
    with patch.object(keeper, "save_state", saves):
        old = Talk(model, tokenizer, setting, Session("old", folder=folder))
        old.up_to(setting.early - 1)
        early = old.timed(setting.width)
        old.up_to(setting.warm)
        before = memory()
        _tell(f"up to turn {setting.late:,}")
        old.up_to(setting.late - setting.width)
        late = old.timed(setting.width)
        after = memory()
        saved = [1000 * seconds for seconds in saves.seconds]
        _tell("beside a young conversation")
        young = Talk(model, tokenizer, setting, Session("young", folder=folder))
        young.up_to(setting.early - 1)
        pairs = [(old.timed(1)[0], young.timed(1)[0]) for _ in range(setting.width)]
    if len(old.read | young.read) > 1:
        raise RuntimeError(f"All turns were to have the same length, they had {old.read | young.read} tokens.")
    young.chat.close()
    turns, tokens, cache_bytes, notes = old.chat.turns, old.chat.tokens_seen, old.chat.cache.bytes, old.chat.notes
    old.chat.close()

    _tell("going on")
    resumed = [resume(model, tokenizer, setting, folder, turns, notes) for _ in range(setting.resumes)]
    _tell("beside a plain stream")
    chat, plain = beside_stream(model, tokenizer, setting, folder)

    beside = median(a for a, _ in pairs) / median(b for _, b in pairs)
    growth = (after - before) / MEGABYTE
    name = f"turn {setting.late:,} / turn {setting.early}"
    targets = [
        Target(f"ms of {name}", median(late) / median(early), 1.1),
        Target(f"ms of turn {setting.late:,} / a young conversation's", beside, 1.1),
        Target(f"memory grown, turn {setting.warm} to {setting.late:,}", growth, 5.0, unit="MB"),
        Target("saving at the end of a turn", median(saved), 50, unit="ms"),
        Target("going on, beyond loading the model", median(resumed), 200, unit="ms"),
    ]
    figures = {
        "setting": asdict(setting),
        "tokens_of_a_turn": max(old.read) + setting.reply,
        "turns": turns,
        "tokens": tokens,
        "ms": {
            "early": spread(early),
            "late": spread(late),
            "old beside young": spread([a for a, _ in pairs]),
            "young beside old": spread([b for _, b in pairs]),
            "save": spread(saved),
            "resume": spread(resumed),
            "token of a conversation": spread(chat),
            "token of a stream": spread(plain),
        },
        "overhead_ms_per_token": {"median": median(chat) - median(plain), "mean": mean(chat) - mean(plain)},
        "bytes": {"warm": before, "end": after, "cache": cache_bytes, "snapshots": SNAPSHOTS * cache_bytes},
        "targets": [target.to_dict() for target in targets],
    }
    return figures, targets


def memory() -> int:
    """Bytes of the process after a garbage collection."""
    gc.collect()
    return rss_bytes()


def resume(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    folder: Path,
    turns: int,
    notes: list[str],
) -> float:
    """Milliseconds until a session can be gone on with; ``notes``: that it has anyhow, others mean it was rebuilt."""
    began = time.perf_counter()
    with Chat(model, tokenizer, **setting.options, session=Session("old", folder=folder)) as chat:
        taken = 1000 * (time.perf_counter() - began)
        if chat.turns != turns or chat.notes != notes:
            raise RuntimeError(f"The session has {chat.turns} turns, not {turns}: {chat.notes}")
    return taken


def beside_stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting, folder: Path
) -> tuple[list[float], list[float]]:
    """Milliseconds of a token, in blocks: of a reply in a session on disk, and of ``stream()``, which take turns."""
    text = MESSAGE.format(0)
    with Chat(model, tokenizer, **setting.options, session=Session("long", folder=folder)) as chat:
        reply: Iterator[Chunk] = chat.send(text)
        options = {name: setting.options[name] for name in ("window", "sampling", "on_end")}
        plain = streamllm.stream(model, tokenizer, text, **options)
        for chunks in (reply, plain):
            for _ in range(chat.cache.capacity):  # until both evict
                next(chunks)
        times = [(_block(reply), _block(plain)) for _ in range(setting.blocks)]
    return [a for a, _ in times], [b for _, b in times]


def _block(chunks: Iterator[Chunk]) -> float:
    """Milliseconds of a token, over one block of them."""
    began = time.perf_counter()
    for _ in range(BLOCK):
        next(chunks)
    return 1000 * (time.perf_counter() - began) / BLOCK


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, mean, least and most."""
    found = {"median": median(values), "mean": mean(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def show(figures: dict[str, Any], targets: Sequence[Target]) -> None:
    """Print the tables."""
    width = max(map(len, figures["ms"]))
    print(f"{'ms':<{width}}{'median':>10}{'mean':>10}{'min':>10}{'max':>10}")
    for name, found in figures["ms"].items():
        print(f"{name:<{width}}" + "".join(f"{value:>10.3f}" for value in found.values()))
    held = figures["bytes"]
    print(
        f"\n{figures['turns']:,} turns, {figures['tokens']:,} tokens; the process holds {held['end'] / MEGABYTE:.1f} "
        f"MB, a cache {held['cache'] / MEGABYTE:.2f} MB, the snapshots {held['snapshots'] / MEGABYTE:.1f} MB at most\n"
    )
    print_targets(targets)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=Setting.late, help="of the conversation (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own)")
    parser.add_argument("--quick", action="store_true", help="to try the script; writes only to --out")
    parser.add_argument("--out", type=Path, help="where the record goes (default: docs/results/chat.json)")
    options = parser.parse_args(argv)
    if (least := Setting.warm + Setting.width) > options.turns:
        parser.error(f"--turns must be at least {least}, so that there is something to compare")
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    model, tokenizer = streamllm.load()
    record = begin("chat", argv, f"{EMBEDDED}, embedded", str(model.dtype).removeprefix("torch."))
    with tempfile.TemporaryDirectory() as folder:
        setting = QUICK if options.quick else Setting(late=options.turns)
        figures, targets = measure(model, tokenizer, setting, Path(folder))
    record.figures.update(figures)
    show(figures, targets)
    finish(record, options.out, quick=options.quick)


if __name__ == "__main__":
    main()
