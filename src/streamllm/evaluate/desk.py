"""Where an evaluation works: the model, the text, how far it is, and what is kept when it is broken off.

What was measured is put into a folder beside the results, part by part, and a long stream is saved now and then with
its curve, so that the same command goes on where it was broken off, even by ``kill -9``. The folder is named after
everything that decides the figures; a command that differs in any of it begins anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from streamllm.atomic import write_atomically
from streamllm.cache import SinkCache
from streamllm.config import PREFILL_CHUNK
from streamllm.console import Screen, Signals, read_stdin
from streamllm.errors import InputError, StateError
from streamllm.evaluate.curve import Curve
from streamllm.evaluate.memory import held_bytes
from streamllm.evaluate.scores import Ids, score_stream
from streamllm.evaluate.text import Text, encode_text
from streamllm.state import load_state, save_state

SAVE_SECONDS = 30.0
"""Between two checkpoints of a long stream."""

ABANDONED_SECONDS = 14 * 24 * 3600.0
"""After which unfinished work that nobody went on with is thrown away."""

MARK = "unfinished"
"""A file that lies in every folder of unfinished work, and nowhere else."""

WAITS = "waiting for standard input, which was named with --data -"
"""What is said when a pipe is open and nothing comes through it."""


class Interrupted(Exception):  # noqa: N818 -- nothing is wrong
    """A signal came; what was measured so far is kept."""


@dataclass
class Desk:
    """See the module.

    Args:
        model, tokenizer: that are evaluated.
        files: of text.
        out: folder of the results.
        name: of the evaluation.
        plan: whatever decides the figures, ready for JSON.
        screen, signals: of the process.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    files: tuple[str, ...]
    out: Path
    name: str
    plan: dict[str, Any]
    screen: Screen
    signals: Signals
    _parts: dict[str, Any] = field(default_factory=dict)
    _report: Callable[[int, str], None] = lambda done, words: None
    _done: int = 0
    _folder: Path | None = None

    # ---- text

    def text(self, tokens: int | None, *, least: int = 2, every_document: bool = False) -> Text:
        """The text of the evaluation; see ``encode_text``. What was measured on another one is not used again."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.screen.spin("encoding the text")
        text = encode_text(
            self.tokenizer,
            self.files,
            self.out,
            tokens=tokens,
            least=least,
            every_document=every_document,
            piped=self.piped(),
            watch=lambda: self.advance(0, ""),
        )
        self.screen.settle()
        self.plan["ids"] = hashlib.sha256(text.ids).hexdigest()  # type: ignore[arg-type]
        return text

    def piped(self) -> Iterator[str]:
        """What comes through standard input.

        Raises:
            InputError: there is no pipe, or the bytes are not UTF-8.
            Interrupted: a signal came.
        """
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError("Nothing is piped into standard input: name a file, or pipe text in.")
        yield from read_stdin(self.signals, lambda: None if self.screen.is_quiet else self.screen.line(WAITS))
        self.advance(0, "")

    # ---- how far it is

    @contextlib.contextmanager
    def work(self, total: int) -> Iterator[None]:
        """Show a bar of ``total`` steps, which ``advance`` counts."""
        self._done = 0
        with self.screen.bar(total) as self._report:
            yield

    def advance(self, count: int, words: str) -> None:
        """Note that ``count`` steps are done.

        Raises:
            Interrupted: a signal came.
        """
        self._done += count
        self._report(self._done, words)
        if self.signals.received is not None:
            raise Interrupted

    # ---- what is kept

    @property
    def folder(self) -> Path:
        """Where unfinished work lies; made when it is first asked for."""
        if self._folder is None:
            digest = hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()[:12]
            self._folder = self.out / f".{self.name}-{digest}"
            for mark in self.out.glob(f".{self.name}-{'[0-9a-f]' * len(digest)}/{MARK}"):
                if mark.parent != self._folder and time.time() - mark.parent.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(mark.parent, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / MARK).touch()
            with contextlib.suppress(OSError, ValueError):
                self._parts = json.loads((self._folder / "parts.json").read_text(encoding="utf-8"))
        return self._folder

    def part(self, name: str, measure: Callable[[], Any], *, steps: int = 0) -> Any:
        """What ``measure()`` finds, ready for JSON; measured once, also when the evaluation is broken off after it.

        ``steps``: that ``measure`` would have counted with ``advance``.
        """
        found = self.kept(name)
        if found is not None:
            self.advance(steps, name)
            return found
        found = measure()
        self.keep(name, found)
        return found

    def kept(self, name: str) -> Any:
        """What was kept under this name; ``None``: nothing."""
        _ = self.folder  # which reads what was kept before
        return self._parts.get(name)

    def keep(self, name: str, found: Any) -> None:
        """Keep something that is ready for JSON, instead of what had the name before."""
        folder = self.folder
        self._parts[name] = found
        write_atomically(folder / "parts.json", json.dumps(self._parts).encode())

    def finish(self) -> None:
        """Throw away what was kept: the results are written."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # ---- streams

    def stream(
        self,
        name: str,
        ids: Ids,
        make_cache: Callable[[], Cache],
        *,
        step: int = PREFILL_CHUNK,
        points: int | None = None,
        skip: int = 0,
    ) -> Curve:
        """The curve of one stream over ids [1, N], which counts N - 1 steps.

        Args:
            name: of the part.
            ids: [1, N] of the stream.
            make_cache: gives the cache to read with; a ``SinkCache`` is saved now and then.
            step: tokens of a forward at most.
            points: tokens that decide the length of the curve's stretches, if others than N; streams of different
                length can then be compared.
            skip: first losses that do not count.

        Raises:
            Interrupted: a signal came.
        """
        total = ids.shape[1] - 1
        found = self.part(
            name,
            lambda: self._stream(name, ids, make_cache, step, points or total, skip).to_dict(),
            steps=total,
        )
        self._file(name).unlink(missing_ok=True)
        return Curve.from_dict(found)

    def _file(self, name: str) -> Path:
        """Where a stream that is not finished is saved."""
        return self.folder / f"{name}.stream"

    def _stream(self, name: str, ids: Ids, make_cache: Callable[[], Cache], step: int, points: int, skip: int) -> Curve:
        file = self._file(name)
        cache, curve, read = self._resume(file) or (make_cache(), Curve(points), 0)
        began = saved = time.monotonic()
        self.advance(read, name)
        for scores in score_stream(self.model, ids, cache, begin=read, step=step):
            losses = scores.losses[0].cpu().numpy()
            first = max(0, skip - read)
            taken = (time.monotonic() - began) * (len(losses) - first) / len(losses)
            if first < len(losses):
                sizes = {"cache_bytes": cache_bytes(cache), "memory": held_bytes(self.model.device)}
                curve.add(losses[first:], seconds=taken, **sizes)
            read += len(losses)
            if isinstance(cache, SinkCache) and time.monotonic() - saved > SAVE_SECONDS:
                _save(file, cache, curve, read)
                saved = time.monotonic()
            try:
                self.advance(len(losses), f"{name} · perplexity {curve.perplexity:.2f}" if curve.done else name)
            except Interrupted:
                if isinstance(cache, SinkCache):
                    _save(file, cache, curve, read)
                raise
            began = time.monotonic()
        self.advance(ids.shape[1] - 1 - read, name)  # what a cache that grows could not read
        return curve

    def _resume(self, file: Path) -> tuple[Cache, Curve, int] | None:
        """The stream, its curve and its length that were saved; a file that cannot be used is as good as none."""
        if not file.exists():
            return None
        try:
            saved = load_state(file, self.model, self.tokenizer)
        except StateError:
            return None
        return saved.cache, Curve.from_dict(saved.metadata["curve"]), saved.metadata["read"]


def _save(file: Path, cache: SinkCache, curve: Curve, read: int) -> None:
    save_state(file, cache, metadata={"curve": curve.to_dict(), "read": read})


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values of any cache."""
    if isinstance(cache, SinkCache):
        return cache.bytes
    tensors = (t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None)))
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
