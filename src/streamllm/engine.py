"""Many streams in one process: slots, one decode step for all of them, and a queue that is fair.

One thread does all the work, in turns: streams come in and go out, those that still read read pieces of their prompts,
all that generate get one token. Pieces are cut so that all of one turn take about as long as four steps, so a long
prompt does not stall the others, and the others do not stall its first token. When more streams than slots are there,
each keeps its slot for a number of tokens and then goes to the end of the queue; its cache, of constant size, waits in
memory or on disk. Nothing here grows with the length of a stream or the number of streams that were served.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from streamllm.cache import SinkCache
from streamllm.config import PREFILL_CHUNK, CacheConfig, OnEnd, SamplingConfig, check_count
from streamllm.detokenize import Decoder
from streamllm.errors import BusyError, ConfigError, InputError, StreamLLMWarning
from streamllm.loop import Chunk, Turn
from streamllm.models import free_bytes
from streamllm.places import Places
from streamllm.request import Request
from streamllm.sampling import Sampler, draw
from streamllm.slots import NOT_COMPILED, Slots, why_not
from streamllm.stats import EngineStats

PIECE_STEPS = 4
"""Steps of the others that the pieces read between two of them take as long as, about; a piece counts as so many tokens
of its stream's share."""

LEAST_PIECE = 16
"""Tokens of a prompt that are read at once at least, however slow that is."""


class Engine:
    """Serves many streams of one model; see the module. Threads may share it; ``with`` closes it.

    Attributes:
        bytes_per_stream: of a full cache.
        longest_head: most tokens that a stream may pin.

    Args:
        model, tokenizer: as of ``load``.
        slots: streams that generate at the same time.
        config: of every stream's cache that is not brought along.
        columns: most tokens that a stream may cache; ``None``: what ``config`` needs. More is needed for streams that
            pin a longer head.
        compile: compile the decode step, for 1, 2, 4, .. streams, before the first comes: up to a minute each the first
            time, and a second from then on.
        memory: bytes for all caches, those of the slots and those of streams that read their prompt or wait;
            ``None``: four fifths of what is free now. Fewer slots than asked for are made if need be. Without
            a folder, ``suspend`` can go beyond it.
        folder: where caches go that memory has no room for; ``None``, or if nothing more can be written there: such
            streams wait until others are done.
        waiting: streams that may be there beyond the slots, before ``submit`` refuses.
        quantum: tokens that a stream may generate before others that wait get its slot.
        note: told in one sentence what does not work as asked for; ``None``: a warning.

    Raises:
        ConfigError: a number is out of range, the folder cannot be made, or memory does not suffice for one stream.
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
            check_count(name, value, least)
        for name, size in (("columns", columns), ("memory", memory)):
            if size is not None:
                check_count(name, size, 1)
        disk = None if folder is None else _made(Path(folder))
        self.model, self.tokenizer = model, tokenizer
        self.config = config or CacheConfig()
        probe = self._new_cache()
        self.columns = max(columns or 0, probe.capacity)
        self.longest_head = self.columns - probe.capacity + probe.config.sinks
        self.bytes_per_stream = probe.bytes_when_full * self.columns // probe.capacity
        free = free_bytes(model.device)
        memory = (None if free is None else free * 4 // 5) if memory is None else memory
        reason = why_not(probe)
        least = 1 if reason else 2  # caches of one stream: with slots, it is read beside the one that it goes to
        fits = slots + waiting + 1 if memory is None else memory // self.bytes_per_stream
        if fits < least:
            raise ConfigError(
                f"One stream needs {least * self.bytes_per_stream:,} bytes"
                + ("" if reason else ", for its slot and for reading its prompt")
                + f"; {memory:,} are there: choose a smaller window, kv_dtype='int8', or give more memory."
            )
        self._spec = probe.spec
        self._note = note or (lambda text: warnings.warn(text, StreamLLMWarning, stacklevel=3))
        count = min(slots, fits - least + 1)
        self._most = count + waiting
        self._slots = None
        if reason is None:
            self._slots = Slots(model, count, self.columns, compiles=compile, note=note)
        elif compile:
            self._note(NOT_COMPILED.format(reason) + ".")
        self._changed = threading.Condition()
        self._places = Places(
            model,
            self._slots,
            count,
            fits if self._slots is None else fits - count,
            disk,
            quantum,
            self._changed,
            self._new_cache,
            self._finish,
            self._tell,
        )
        self._pieces: dict[int, Iterator[None]] = {}  # of the prompts that are being read
        self._submitted = self._finished = self._failed = self._read = self._generated = self._repeated = 0
        self._step_s = self._token_s = 0.0  # what a step and one token of a prompt have taken lately
        self._is_closing = self._is_draining = self._is_blamed = False
        self._why_closed = "The engine is closing and takes no more streams."
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, name="streamllm-engine", daemon=True)
        self._thread.start()
        try:
            self._ready.result()
        except BaseException:  # Ctrl-C too
            self._is_closing = True
            raise

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
        logprobs: int | None = None,
    ) -> Request:
        """Queue a stream; returns at once.

        Args:
            prompt, max_tokens, sampling, stop, on_end, cache, decoder, logprobs: as of ``stream``; the prompt is whole.
            stop_when: looks at each chunk and ends the stream by saying ``True``; called in the engine's thread, where
                it holds up all streams.

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
        if cache is not None and self._slots is not None and (reason := why_not(cache)):
            raise ConfigError(f"The stream cannot be read in this engine's slots, since {reason}: use stream() for it.")
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
            logprobs=logprobs,
        )
        with self._changed:
            if any(request.turn.cache is turn.cache for request in self._places.all()):
                raise BusyError("This cache belongs to a stream of the engine that is not done: wait for its end.")
            self.look_for_room()
            self._submitted += 1
            request = Request(self._submitted, turn, stop_when, self._wake, self._thread)
            self._places.add(request)
        return request

    def look_for_room(self) -> None:
        """See whether a stream could be queued now.

        Raises:
            BusyError: too many streams wait, or the engine is closing.
        """
        with self._changed:
            if self._is_closing or self._is_draining:
                raise BusyError(self._why_closed)
            if len(self._places.all()) >= self._most:
                raise BusyError(
                    f"{self._most} streams are here already, {self._places.count} of them in slots: wait until one is "
                    "done, or make the engine with more slots or a longer queue."
                )

    def stats(self) -> EngineStats:
        """What the engine is doing now."""
        with self._changed:
            return EngineStats(
                running=len(self._places.active),
                waiting=len(self._places.queue),
                suspended=len(self._places.apart),
                on_disk=len(self._places.files),
                slots=self._places.count,
                bytes_per_stream=self.bytes_per_stream,
                tokens_read=self._read,
                tokens_generated=self._generated,
                finished=self._finished,
                failed=self._failed,
                repeated=self._repeated,
            )

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more streams and wait until all that are not suspended are done; whether they are, in time (s).

        A stream that nobody reads does not get done.

        Raises:
            RuntimeError: ``stop_when`` calls it.
        """
        self._refuse_own_thread("drain")
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(lambda: not self._places.queue and not self._places.active, timeout)

    def close(self) -> None:
        """End what is left, and stop the thread. A stream that is on disk stays there: its error says where.

        Raises:
            RuntimeError: ``stop_when`` calls it.
        """
        self._refuse_own_thread("close")
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_own_thread(self, name: str) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"{name}() waits for the thread that calls stop_when: call it from another thread.")

    def _new_cache(self) -> SinkCache:
        config = self.config
        known = getattr(self, "_spec", self.model)  # the model is looked at once
        return SinkCache(known, config.sinks, config.window, config.block, 1, config.reread, config.kv_dtype)

    def _prepare(self) -> None:
        """Compile for all numbers of streams before the first comes, not in the middle of others.

        A graph of an accelerator is recorded by the thread that replays it, so that is the engine's.
        """
        slots = self._slots
        if slots is None or not slots.compiles:
            return
        cache = self._new_cache()
        with torch.no_grad():
            self.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.model.device), past_key_values=cache)
        slots.take(cache)
        slots.prepare()
        slots.drop(cache)

    # ---- the thread

    def _work(self) -> None:
        """Serve until closed."""
        try:
            self._prepare()
        except BaseException as unready:  # whoever makes the engine is told
            self._ready.set_exception(unready)
            return
        self._ready.set_result(None)
        error: BaseException | None = None
        try:
            while not self._is_closing:
                self._come_and_go()
                busy = self._read_pieces()
                busy |= self._step()
                if not busy:
                    with self._changed:
                        if not self._has_work():
                            self._changed.wait()
        except BaseException as unforeseen:  # a mistake of ours: nobody shall wait for ever
            error = unforeseen
        with self._changed:
            self._is_closing = True
            if error is not None:
                why = f"{type(error).__name__}, {str(error)[:100].strip()}"
                self._why_closed = f"The engine has stopped by a mistake of its own: {why}; make another one."
        for request in self._places.all():
            path = self._places.files.pop(request.id, None)
            closed = BusyError("The engine was closed." + ("" if path is None else f" The stream is in {path}."))
            self._finish(request, error or (None if request.is_cancelled and path is None else closed))

    def _has_work(self) -> bool:
        """Whether anything can be done now; called with the lock held."""
        return (
            self._is_closing
            or any(r.is_cancelled or r.is_suspended or not r.is_full for r in self._places.active)
            or any(r.is_cancelled or not r.is_suspended for r in self._places.apart)
            or any(r.is_cancelled or r.is_suspended for r in self._places.queue)
            or self._places.next() is not None
        )

    def _tell(self, text: str) -> None:
        """A sentence from the engine's thread, which goes on whatever becomes of it."""
        with contextlib.suppress(Exception):
            self._note(text)

    def _wake(self) -> None:
        """Something has changed for a request, whose lock may be held: never take it while holding this one."""
        with self._changed:
            self._changed.notify_all()

    def _come_and_go(self) -> None:
        """Let streams out that were cancelled, suspended or had their share, and others in."""
        places = self._places
        for request in places.all():
            if request.state == "done":  # its cache was in pieces when it was to be put on disk
                continue
            if request.is_cancelled:
                self._finish(request)
            elif request.is_suspended and request.state != "suspended":
                places.move(request, places.apart, "suspended")
            elif not request.is_suspended and request.state == "suspended":
                places.move(request, places.queue, "waiting")
        while (chosen := places.next()) is not None:
            try:
                places.enter(*chosen)
            except Exception as error:
                self._finish(chosen[0], error)

    def _finish(self, request: Request, error: BaseException | None = None) -> None:
        """End a stream, well or not; raises nothing."""
        _let_go(error)
        failed = self._places.leave(request)
        error = error or failed
        self._pieces.pop(request.id, None)
        with self._changed:
            self._finished += error is None
            self._failed += error is not None
        request.end(error)  # not with the lock held: see ``_wake``
        self._wake()

    # ---- the work

    def _read_pieces(self) -> bool:
        """Let streams read pieces of their prompts for as long as ``PIECE_STEPS`` steps; whether there was one.

        A step may once have taken long for other reasons, so there is an end to what is read in one turn.
        """
        end, most = time.perf_counter() + PIECE_STEPS * self._step_s, self._read + PREFILL_CHUNK
        if not self._read_a_piece(end):
            return False
        while self._read < most and time.perf_counter() + LEAST_PIECE * self._token_s < end and self._read_a_piece(end):
            pass
        return True

    def _read_a_piece(self, end: float) -> bool:
        """Let the stream that has read least lately read a piece, until ``end``; whether there was one."""
        reading = [r for r in self._places.active if r.state == "reading"]
        if not reading:
            return False
        request = reading[0]
        self._places.rotate(request)  # the next piece is another's
        turn, before, began = request.turn, request.turn.cache.tokens_seen, time.perf_counter()
        request.tokens_in_slot += PIECE_STEPS
        try:
            if request.id not in self._pieces:
                self._pieces[request.id] = turn.read()
            turn.width = self._width(end - began)
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

    def _width(self, seconds: float) -> int:
        """Tokens of a prompt that take about so long, if others would wait for it."""
        if not any(r.state == "decoding" for r in self._places.active) or not self._token_s:
            return PREFILL_CHUNK
        return max(LEAST_PIECE, min(PREFILL_CHUNK, int(seconds / self._token_s)))

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
        self._places.settle(request)
        self._show([request], [turn.sampler(logits)], [logits])

    def _step(self) -> bool:
        """One token for every stream that generates; whether there was one."""
        ready = [r for r in self._places.active if r.state == "decoding" and not r.is_full]
        if not ready:
            return False
        began = time.perf_counter()
        rows = self._forward(ready)
        alive = [(r, row) for r, row in zip(ready, rows, strict=True) if isinstance(row, Tensor)]
        requests, logits = [r for r, _ in alive], [row for _, row in alive]
        drawn = self._draw(requests, logits)
        self._step_s = _lately(self._step_s, time.perf_counter() - began)
        self._show(requests, drawn, logits)
        return True

    def _forward(self, ready: list[Request]) -> Sequence[Tensor | None]:
        """The logits [V] of each; ``None`` for one that has failed and is finished."""
        caches = [r.turn.cache for r in ready]
        if self._slots is not None:
            try:
                return list(self._slots.step(caches, [cache.unread[-1] for cache in caches]))
            except Exception as error:  # whose fault it is, each one by itself tells, and needs less memory
                self._repeated += 1
                self._blame(error)
        found: list[Tensor | None] = []
        for request in ready:
            try:
                found.append(request.turn.forward(request.turn.cache.unread))
            except Exception as error:
                self._finish(request, error)
                found.append(None)
        return found

    def _blame(self, error: Exception) -> None:
        """Tell once of a step that failed, unless it was for want of memory: one that always fails is slow, no more."""
        is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
        if not is_memory and not self._is_blamed:
            self._is_blamed = True
            self._tell(
                f"A decode step failed and is repeated stream by stream, which is slower: "
                f"{type(error).__name__}, {str(error)[:100].strip()}."
            )

    def _draw(self, requests: list[Request], rows: list[Tensor]) -> Sequence[int | Exception]:
        """An id for each stream, or why there is none."""
        samplers = [r.turn.sampler for r in requests]
        with contextlib.suppress(Exception):  # no memory for all of them at once
            return draw(torch.stack(rows), samplers) if rows else []
        return [_one(row, sampler) for row, sampler in zip(rows, samplers, strict=True)]

    def _show(self, requests: list[Request], drawn: Sequence[int | Exception], rows: list[Tensor]) -> None:
        """Hand each stream the token that was drawn from its row of logits."""
        for request, token, row in zip(requests, drawn, rows, strict=True):
            if isinstance(token, Exception):
                self._finish(request, token)
                continue
            try:
                chunk = request.turn.take(token, row)
                self._generated += 1
                request.tokens_in_slot += 1
                is_enough = request.stop_when is not None and request.stop_when(chunk)
            except (StopIteration, StopAsyncIteration) as error:  # whoever iterates would take it for the end
                failure = RuntimeError(f"stop_when raised {type(error).__name__}")
                failure.__cause__ = error
                self._finish(request, failure)
                continue
            except BaseException as error:  # of the callback; Ctrl-C comes to another thread
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


def _let_go(error: BaseException | None) -> None:
    """Free what an error that is kept holds: its traceback has the variables of all that ran, tensors among them."""
    known: set[int] = set()
    while error is not None and id(error) not in known:
        known.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _made(folder: Path) -> Path:
    """The folder, which is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Caches cannot go to {folder}: {error.strerror or error}; name another folder.") from error
    return folder


def _lately(before: float, now: float) -> float:
    """A mean in which the newest counts a fifth."""
    return now if not before else 0.8 * before + 0.2 * now
