"""Many streams in one process: slots, one decode step for all of them, and a queue that is fair.

One thread does all the work, in turns: streams come in and go out, one of those that still read reads a piece, all
that generate get one token. A piece is cut so that it takes about as long as four steps, so a long prompt does not
stall the others, and the others do not stall its first token. When more streams than slots are there, each keeps its
slot for a number of tokens and then goes to the end of the queue; its cache, of constant size, waits in memory or on
disk. Nothing here grows with the length of a stream or the number of streams that were served.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from streamllm.cache import SinkCache
from streamllm.config import PREFILL_CHUNK, CacheConfig, OnEnd, SamplingConfig
from streamllm.detokenize import Decoder
from streamllm.errors import BusyError, ConfigError, InputError
from streamllm.loop import Chunk, Turn
from streamllm.models import free_bytes
from streamllm.request import Request
from streamllm.sampling import Sampler, draw
from streamllm.slots import Slots, why_not
from streamllm.state import load_state, save_state

PIECE_STEPS = 4
"""Steps of the others that a piece of a prompt takes as long as, about; it counts as so many tokens of its share."""

LEAST_PIECE = 16
"""Tokens of a prompt that are read at once at least, however slow that is."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing.

    Args:
        running: streams in slots.
        waiting: streams that want one.
        suspended: streams that do not.
        on_disk: streams whose cache is on disk.
        slots: how many there are.
        bytes_per_stream: of a full cache.
        tokens_read, tokens_generated: since the engine began, over all streams.
        finished, failed: streams since the engine began.
    """

    running: int
    waiting: int
    suspended: int
    on_disk: int
    slots: int
    bytes_per_stream: int
    tokens_read: int
    tokens_generated: int
    finished: int
    failed: int


class Engine:
    """Serves many streams of one model; see the module. Threads may share it; ``with`` closes it.

    Args:
        model, tokenizer: as of ``load``.
        slots: streams that generate at the same time.
        config: of every stream's cache that is not brought along.
        columns: most tokens that a stream may cache; ``None``: what ``config`` needs. More is needed for streams that
            pin a longer head.
        compile: compile the decode step; each number of streams (1, 2, 4, ..) is compiled when it first occurs.
        memory: bytes for all caches, those of the slots and those of streams that read their prompt or wait;
            ``None``: four fifths of what is free now. Fewer slots than asked for are made if need be.
        folder: where caches go that memory has no room for; ``None``: such streams wait until others are done.
        waiting: streams that may be there beyond the slots, before ``submit`` refuses.
        quantum: tokens that a stream may generate before others that wait get its slot.
        note: told in one sentence what does not work as asked for; ``None``: a warning.

    Raises:
        ConfigError: a number is out of range, or memory does not suffice for one stream.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        slots: int = 8,
        config: CacheConfig | None = None,
        columns: int | None = None,
        compile: bool = False,
        memory: int | None = None,
        folder: str | Path | None = None,
        waiting: int = 64,
        quantum: int = 128,
        note: Callable[[str], None] | None = None,
    ) -> None:
        for name, value, least in (("slots", slots, 1), ("waiting", waiting, 0), ("quantum", quantum, 1)):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, you gave {value}.")
        self.model, self.tokenizer = model, tokenizer
        self.config = config or CacheConfig()
        probe = self._new_cache()
        self.columns = max(columns or 0, probe.capacity)
        self.bytes_per_stream = probe.bytes_when_full * self.columns // probe.capacity
        free = free_bytes(model.device)
        memory = (None if free is None else free * 4 // 5) if memory is None else memory
        fits = slots + waiting + 1 if memory is None else memory // self.bytes_per_stream
        if fits < 2:
            raise ConfigError(
                f"One stream needs {2 * self.bytes_per_stream:,} bytes, for its slot and for reading its prompt; "
                f"{memory:,} are there: choose a smaller window, kv_dtype='int8', or give more memory."
            )
        self._spec = probe.spec
        self._has_slots = why_not(probe) is None
        self._count = min(slots, fits - 1)
        self._most_apart = fits - self._count  # caches in memory that are not in slots
        self._slots = Slots(model, self._count, self.columns, compiles=compile, note=note)
        if compile and self._has_slots:
            self._prepare()
        self._folder = None if folder is None else Path(folder)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._most, self._quantum = self._count + waiting, quantum
        self._queue: deque[Request] = deque()  # wants a slot
        self._active: list[Request] = []  # has one, or reads its prompt to go into it
        self._apart: list[Request] = []  # suspended
        self._pieces: dict[int, Iterator[None]] = {}
        self._files: dict[int, Path] = {}
        self._submitted = self._finished = self._failed = self._read = self._generated = 0
        self._step_s = self._token_s = 0.0  # what a step and one token of a prompt have taken lately
        self._changed = threading.Condition()
        self._is_closing = self._is_draining = False
        self._thread = threading.Thread(target=self._work, name="streamllm-engine", daemon=True)
        self._thread.start()

    # ---- for its users

    def submit(
        self,
        prompt: str | Sequence[int] | None,
        *,
        max_tokens: int | None = None,
        sampling: SamplingConfig | Sampler | None = None,
        stop: Sequence[str] = (),
        stop_when: Callable[[Chunk], bool] | None = None,
        on_end: OnEnd = "stop",
        cache: SinkCache | None = None,
        decoder: Decoder | None = None,
    ) -> Request:
        """Queue a stream; returns at once.

        Args:
            prompt, max_tokens, sampling, stop, on_end, cache, decoder: as of ``stream``; the prompt is whole.
            stop_when: looks at each chunk and ends the stream by saying ``True``.

        Raises:
            BusyError: too many streams wait, or the engine is closing.
            ConfigError, InputError: as ``stream``.
        """
        if not (prompt is None or isinstance(prompt, (str, Sequence)) or hasattr(prompt, "tolist")):
            raise InputError(f"An engine takes a whole prompt, text or ids, not {type(prompt).__name__}.")
        if cache is not None and cache.capacity > self.columns:
            raise ConfigError(
                f"The stream may cache {cache.capacity} tokens, this engine was made for {self.columns}: make it with "
                f"columns={cache.capacity}."
            )
        if cache is not None and cache.config.kv_dtype != self.config.kv_dtype:
            raise ConfigError(
                f"The stream's cache has kv_dtype={cache.config.kv_dtype!r}, this engine's have "
                f"{self.config.kv_dtype!r}: make another engine for it."
            )
        turn = Turn(
            self.model,
            self.tokenizer,
            self._new_cache() if cache is None else cache,
            prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            on_end=on_end,
            decoder=decoder,
        )
        with self._changed:
            if self._is_closing or self._is_draining:
                raise BusyError("The engine is closing and takes no more streams.")
            if any(request.turn.cache is turn.cache for request in self._all()):
                raise BusyError("This cache belongs to a stream of the engine that is not done: wait for its end.")
            if len(self._queue) + len(self._active) + len(self._apart) >= self._most:
                raise BusyError(
                    f"{self._most} streams are here already, {self._count} of them in slots: wait until one is done, "
                    "or make the engine with more slots or a longer queue."
                )
            self._submitted += 1
            request = Request(self._submitted, turn, stop_when, self._wake)
            self._queue.append(request)
            self._changed.notify_all()
        return request

    def stats(self) -> EngineStats:
        """What the engine is doing now."""
        with self._changed:
            return EngineStats(
                running=len(self._active),
                waiting=len(self._queue),
                suspended=len(self._apart),
                on_disk=len(self._files),
                slots=self._count,
                bytes_per_stream=self.bytes_per_stream,
                tokens_read=self._read,
                tokens_generated=self._generated,
                finished=self._finished,
                failed=self._failed,
            )

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more streams and wait until all that are not suspended are done; whether they are, in time (s).

        A stream that nobody reads does not get done.
        """
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(lambda: not self._queue and not self._active, timeout)

    def close(self) -> None:
        """End what is left, and stop the thread. A stream that is on disk stays there: its error says where."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _new_cache(self) -> SinkCache:
        config = self.config
        known = getattr(self, "_spec", self.model)  # the model is looked at once
        return SinkCache(known, config.sinks, config.window, config.block, 1, config.reread, config.kv_dtype)

    def _prepare(self) -> None:
        """Compile for all numbers of streams before the first comes, not in the middle of others."""
        cache = self._new_cache()
        with torch.no_grad():
            self.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.model.device), past_key_values=cache)
        self._slots.take(cache)
        self._slots.prepare()
        self._slots.drop(cache)

    # ---- the thread

    def _work(self) -> None:
        """Serve until closed."""
        error: BaseException | None = None
        try:
            while not self._is_closing:
                self._come_and_go()
                busy = self._read_a_piece()
                busy |= self._step()
                if not busy:
                    with self._changed:
                        if not self._has_work():
                            self._changed.wait()
        except BaseException as unforeseen:  # a mistake of ours: nobody shall wait for ever
            error = unforeseen
        with self._changed:
            self._is_closing = True
            left = self._all()
        for request in left:
            path = self._files.pop(request.id, None)
            closed = BusyError("The engine was closed." + ("" if path is None else f" The stream is in {path}."))
            self._finish(request, error or (None if request.is_cancelled and path is None else closed))

    def _all(self) -> list[Request]:
        """All streams that are not done."""
        with self._changed:
            return [*self._active, *self._queue, *self._apart]

    def _has_work(self) -> bool:
        """Whether anything can be done now; called with the lock held."""
        return (
            self._is_closing
            or any(r.is_cancelled or r.is_suspended or not r.is_full for r in self._active)
            or any(r.is_cancelled or not r.is_suspended for r in self._apart)
            or any(r.is_cancelled or r.is_suspended for r in self._queue)
            or self._next() is not None
        )

    def _wake(self) -> None:
        """Something has changed for a request, whose lock may be held: never take it while holding this one."""
        with self._changed:
            self._changed.notify_all()

    # ---- who is where

    def _come_and_go(self) -> None:
        """Let streams out that were cancelled, suspended or had their share, and others in."""
        for request in self._all():
            if request.state == "done":  # its cache could not be put on disk to make room
                continue
            if request.is_cancelled:
                self._finish(request)
            elif request.is_suspended and request.state != "suspended":
                self._move(request, self._apart, "suspended")
            elif not request.is_suspended and request.state == "suspended":
                self._move(request, self._queue, "waiting")
        while (chosen := self._next()) is not None:
            if len(self._active) == self._count and (victim := self._victim()) is not None:
                self._move(victim, self._queue, "waiting")
            if chosen.state == "done":
                continue
            try:
                self._enter(chosen)
            except Exception as error:
                self._finish(chosen, error)

    def _next(self) -> Request | None:
        """Who gets a slot next: the first in the queue that can go on, and for whose cache there is room."""
        with self._changed:
            is_crowded = len(self._active) == self._count
            if is_crowded and self._victim() is None:
                return None
            for request in self._queue:
                needed = is_crowded + self._needs_room(request)
                if not request.is_full and (self._folder is not None or self._apart_now() + needed <= self._most_apart):
                    return request
            return None

    def _victim(self) -> Request | None:
        """Whose turn it is to leave for others: nobody reads it, or it has had its share."""
        stuck = [r for r in self._active if r.is_full]
        done = [r for r in self._active if r.tokens_in_slot >= self._quantum]
        return next(iter(stuck or sorted(done, key=lambda r: -r.tokens_in_slot)), None)

    def _needs_room(self, request: Request) -> bool:
        """Whether a stream's cache takes memory beside the slots when it enters, and did not before."""
        return not request.is_begun or request.id in self._files

    def _apart_now(self) -> int:
        """Caches in memory that are not in slots."""
        return sum(
            r.is_begun and r.id not in self._files and r.turn.cache not in self._slots.caches for r in self._all()
        )

    def _enter(self, request: Request) -> None:
        """Give a stream a slot, or let it read its prompt to get there."""
        with self._changed:
            self._queue.remove(request)
            self._active.append(request)
            request.tokens_in_slot = 0
            request.state = "decoding" if request.turn.drawn else "reading"
        if self._needs_room(request):
            self._make_room(1)
        if request.id in self._files:
            request.turn.cache = load_state(self._files[request.id], self.model).cache
            self._files.pop(request.id).unlink(missing_ok=True)
        request.is_begun = True
        if request.state == "decoding" and self._has_slots:
            self._slots.take(request.turn.cache)

    def _move(self, request: Request, target: Any, state: Any) -> None:
        """Take a stream out of its slot or queue."""
        if request.turn.cache in self._slots.caches:
            self._make_room(1)
            try:
                self._slots.release(request.turn.cache)
            except Exception as error:  # no memory
                self._finish(request, error)
                return
        with self._changed:
            self._remove(request)
            target.append(request)
            request.state = state
            self._changed.notify_all()

    def _make_room(self, count: int) -> None:
        """Put caches on disk, those first that get a slot last, until so many more fit into memory."""
        for request in [*reversed(self._apart), *reversed(self._queue)] if self._folder is not None else ():
            if self._apart_now() + count <= self._most_apart:
                return
            if not request.is_begun or request.id in self._files:
                continue
            assert self._folder is not None
            path = self._folder / f"engine-{os.getpid()}-{id(self):x}-{request.id}.stream"
            try:
                save_state(path, request.turn.cache)
            except Exception as error:  # no space
                self._finish(request, error)
                continue
            request.turn.cache = self._new_cache()  # one that holds nothing
            self._files[request.id] = path

    def _remove(self, request: Request) -> None:
        """Out of whichever group it is in; called with the lock held."""
        for group in (self._active, self._queue, self._apart):
            if request in group:
                group.remove(request)

    def _finish(self, request: Request, error: BaseException | None = None) -> None:
        """End a stream, well or not; raises nothing."""
        try:
            if request.turn.cache in self._slots.caches:
                self._slots.release(request.turn.cache)
            if request.id in self._files:
                request.turn.cache = load_state(self._files[request.id], self.model).cache
                self._files.pop(request.id).unlink(missing_ok=True)
        except Exception as failed:  # no memory: the stream's own is given up, and its file, if any, stays
            error = error or failed
            if request.turn.cache in self._slots.caches:
                self._slots.drop(request.turn.cache)
        self._files.pop(request.id, None)
        self._pieces.pop(request.id, None)
        with self._changed:
            self._remove(request)
            self._finished += error is None
            self._failed += error is not None
        request.end(error)  # not with the lock held: see ``_wake``
        self._wake()

    # ---- the work

    def _read_a_piece(self) -> bool:
        """Let the stream that has read least lately read a piece of its prompt; whether there was one."""
        reading = [r for r in self._active if r.state == "reading"]
        if not reading:
            return False
        request = reading[0]
        with self._changed:  # the next piece is another's
            self._active.remove(request)
            self._active.append(request)
        turn, before, began = request.turn, request.turn.cache.tokens_seen, time.perf_counter()
        request.tokens_in_slot += PIECE_STEPS
        try:
            if request.id not in self._pieces:
                self._pieces[request.id] = turn.read()
            turn.width = self._width()
            is_last = next(self._pieces[request.id], self) is self
            seconds = time.perf_counter() - began
            if is_last:
                self._begin(request)
        except Exception as error:
            self._finish(request, error)
            return True
        count = turn.cache.tokens_seen - before
        self._read += count
        if count and not is_last:
            self._token_s = _lately(self._token_s, seconds / count)
        return True

    def _width(self) -> int:
        """Tokens of a prompt that take about as long as ``PIECE_STEPS`` steps of the others."""
        if not any(r.state == "decoding" for r in self._active) or not self._token_s:
            return PREFILL_CHUNK
        return max(LEAST_PIECE, min(PREFILL_CHUNK, int(PIECE_STEPS * self._step_s / self._token_s)))

    def _begin(self, request: Request) -> None:
        """The prompt is read but for its end: draw the first token."""
        turn = request.turn
        del self._pieces[request.id]
        if turn.max_tokens == 0:
            request.push(turn.leave_unread())
            self._finish(request)
            return
        logits = turn.first_logits()
        request.state = "decoding"
        if self._has_slots:
            self._slots.take(turn.cache)
        self._show([request], [turn.sampler(logits)])

    def _step(self) -> bool:
        """One token for every stream that generates; whether there was one."""
        ready = [r for r in self._active if r.state == "decoding" and not r.is_full]
        if not ready:
            return False
        began = time.perf_counter()
        rows = self._forward(ready)
        alive = [(r, row) for r, row in zip(ready, rows, strict=True) if isinstance(row, Tensor)]
        drawn = self._draw([r for r, _ in alive], [row for _, row in alive])
        self._show([r for r, _ in alive], drawn)
        self._step_s = _lately(self._step_s, time.perf_counter() - began)
        return True

    def _forward(self, ready: list[Request]) -> Sequence[Tensor | None]:
        """The logits [V] of each; ``None`` for one that has failed and is finished."""
        caches = [r.turn.cache for r in ready]
        if self._has_slots:
            # If that fails, out of memory or else: whose fault it is, each one by itself tells, and needs less.
            with contextlib.suppress(Exception):
                return list(self._slots.step(caches, [cache.unread[-1] for cache in caches]))
        found: list[Tensor | None] = []
        for request in ready:
            try:
                found.append(request.turn.forward(request.turn.cache.unread))
            except Exception as error:
                self._finish(request, error)
                found.append(None)
        return found

    def _draw(self, requests: list[Request], rows: list[Tensor]) -> Sequence[int | Exception]:
        """An id for each stream, or why there is none."""
        samplers = [r.turn.sampler for r in requests]
        try:
            return draw(torch.stack(rows), samplers) if rows else []
        except Exception:  # no memory for all of them at once
            return [_one(row, sampler) for row, sampler in zip(rows, samplers, strict=True)]

    def _show(self, requests: list[Request], drawn: Sequence[int | Exception]) -> None:
        """Hand each stream its token."""
        for request, token in zip(requests, drawn, strict=True):
            if isinstance(token, Exception):
                self._finish(request, token)
                continue
            try:
                chunk = request.turn.take(token)
                self._generated += 1
                request.tokens_in_slot += 1
                is_enough = request.stop_when is not None and request.stop_when(chunk)
            except Exception as error:
                self._finish(request, error)
                continue
            request.push(chunk)
            if chunk.finish or is_enough:
                self._finish(request)


def _one(row: Tensor, sampler: Sampler) -> int | Exception:
    """The draw of one stream, or why there is none."""
    try:
        return sampler(row)
    except Exception as error:
        return error


def _lately(before: float, now: float) -> float:
    """A mean in which the newest counts a fifth."""
    return now if not before else 0.8 * before + 0.2 * now
