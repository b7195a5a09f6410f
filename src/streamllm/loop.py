"""The stream loop: read the prompt as it arrives, then draw, show and read, over and over, in constant memory.

Knows nothing about layers or positions (``cache``), nor about how a token is drawn (``sampling``) or spelt
(``detokenize``). A stream that is broken off leaves a cache that holds everything read so far; the last id given out,
which was not read yet, stays in ``cache.unread`` and is read first by whatever goes on with that cache. ``Turn`` has
the steps one by one, for whoever drives many streams (``engine``); ``stream()`` drives one.
"""

from __future__ import annotations

import inspect
import operator
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from streamllm.cache import SinkCache
from streamllm.config import ON_END, PREFILL_CHUNK, CacheConfig, OnEnd, SamplingConfig
from streamllm.detokenize import Decoder, StopStrings
from streamllm.errors import ConfigError, InputError, StreamLLMWarning
from streamllm.logprobs import Logprobs, check_logprobs, measure
from streamllm.quick_forms import QuickForms
from streamllm.reading import read_ids
from streamllm.sampling import Sampler
from streamllm.slots import Slots, why_not
from streamllm.stats import Meter, Stats

Finish = Literal["end", "stop", "length"]

COLUMNS = 64
"""A slot has a multiple of so many, so that heads of other lengths do not each need a step compiled for them."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one token brought.

    Args:
        text: text that became certain with this token; may be empty.
        id: the token; ``None`` if nothing was generated (``max_tokens=0``).
        stats: counters and speeds so far.
        finish: set on the last chunk: "end" (an end token), "stop" (a stop string) or "length" (``max_tokens``).
        document_end: the token is an end token that was passed; a new document begins after it.
        logprobs: how likely the model held ``id``, if asked for. It belongs to the id, not to ``text``, which may be
            that of earlier tokens, or wait for later ones.
    """

    text: str
    id: int | None
    stats: Stats
    finish: Finish | None = None
    document_end: bool = False
    logprobs: Logprobs | None = None

    @property
    def shown(self) -> str:
        """The text, with a blank line where a document ended and another one follows."""
        return f"{self.text}\n\n" if self.document_end else self.text


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[int] | Iterable[str] | None = None,
    *,
    sinks: int | None = None,
    window: int | None = None,
    block: int | None = None,
    max_tokens: int | None = None,
    sampling: SamplingConfig | Sampler | None = None,
    stop: Sequence[str] = (),
    cache: SinkCache | None = None,
    on_end: OnEnd = "stop",
    decoder: Decoder | None = None,
    logprobs: int | None = None,
    compile: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Chunk]:
    """Generate without end, in constant memory.

    Args:
        model: any causal language model of transformers whose positions can be moved.
        tokenizer: its tokenizer.
        prompt: text, ids, or an iterable of pieces of text of any total length, read as it arrives. ``None``: go on
            with ``cache``.
        sinks, window, block: see ``CacheConfig``; only without ``cache``.
        max_tokens: tokens to generate at most; ``None``: no limit; 0: only read the prompt (its last id, whose logits
            begin a text, stays in ``cache.unread``).
        sampling: how to draw; a ``Sampler`` goes on with its state, and its reply too: ``begin()`` begins another.
        stop: strings that end the stream; they are not shown.
        cache: a stream to go on with (one row); ``None`` begins a new one.
        on_end: what an end token does: "stop" ends the stream, "pass" keeps it and goes on with a new document,
            "ban" never draws it.
        decoder: spells the ids, with what it knows of earlier ones; ``None``: a new one.
        logprobs: tell with each token how likely the model held it and so many of the most likely ones (``Logprobs``),
            0 to 20; ``None``: do not.
        compile: compile the step that reads one token, which takes up to a minute the first time and a second from
            then on; where that cannot be, a ``StreamLLMWarning`` says so and the stream goes on without.
        progress: told the tokens that the cache has seen, after each step of reading a long prompt; what it raises
            breaks the stream off.

    Yields:
        One ``Chunk`` a token. Closing the iterator leaves ``cache`` usable.

    Raises:
        ConfigError, InputError, UnsupportedModelError: before the first token, when an option, the prompt or the
            model cannot be used.
    """
    if cache is None:
        default = CacheConfig()
        cache = SinkCache(
            model,
            sinks=default.sinks if sinks is None else sinks,
            window=window,
            block=default.block if block is None else block,
        )
    elif (sinks, window, block) != (None, None, None):
        raise ConfigError("sinks, window and block cannot be changed on a cache that exists; make a new SinkCache.")
    turn = Turn(
        model,
        tokenizer,
        cache,
        prompt,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop,
        on_end=on_end,
        decoder=decoder,
        logprobs=logprobs,
    )
    return _run(turn, compiles=compile, progress=progress)


def _run(turn: Turn, *, compiles: bool, progress: Callable[[int], None] | None) -> Iterator[Chunk]:
    """Drive one stream."""
    for _ in turn.read():
        if progress is not None:
            progress(turn.cache.tokens_seen)
    if turn.max_tokens == 0:
        yield turn.leave_unread()
        return
    logits = turn.first_logits()
    slots = _one_slot(turn) if compiles else None
    while True:
        chunk = turn.take(turn.sampler(logits), logits)
        yield chunk
        if chunk.finish:
            return
        assert chunk.id is not None
        logits = turn.forward([chunk.id]) if slots is None else slots.step([turn.cache], [chunk.id])[0]


def _one_slot(turn: Turn) -> Slots | None:
    """A slot with the stream in it; ``None``, and a warning, if it cannot be read there."""
    if reason := why_not(turn.cache):
        warnings.warn(f"Decoding is not compiled, which is slower: {reason}.", StreamLLMWarning, stacklevel=3)
        return None
    columns = -(-turn.cache.capacity // COLUMNS) * COLUMNS
    slots = Slots(turn.model, 1, columns, compiles=True)
    slots.take(turn.cache)
    return slots


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[int] | Iterable[str] | None = None,
    **options: Any,
) -> str:
    """The text of ``stream()``, joined; same arguments and errors."""
    return "".join(chunk.text for chunk in stream(model, tokenizer, prompt, **options))


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a document: the end tokens of model and tokenizer, and the token that begins the next one."""
    found: set[int] = set()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(decoder=True), "eos_token_id", None),
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
    ):
        found.update(value if isinstance(value, (list, tuple)) else [value] if isinstance(value, int) else [])
    return frozenset(found)


def _as_ids(prompt: Any) -> list[int] | None:
    """The ids of a prompt that is a sequence of them (list, 1-D or [1, T] tensor or array); ``None``: it is text."""
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
        if len(prompt) == 1 and isinstance(prompt[0], list):
            prompt = prompt[0]
    if isinstance(prompt, (bytes, bytearray)):
        raise InputError("The prompt is bytes; decode it to text first, for example with prompt.decode().")
    if not isinstance(prompt, Sequence) or (prompt and isinstance(prompt[0], str)):
        return None
    try:
        return [operator.index(x) for x in prompt]
    except TypeError as error:
        raise InputError(
            f"The prompt must be text, ids of one row, or pieces of text, not a sequence with {error}."
        ) from error


def _pieces(prompt: Any) -> Iterator[str]:
    """The pieces of a text, checked."""
    for piece in [prompt] if isinstance(prompt, str) else prompt:
        if not isinstance(piece, str):
            raise InputError(f"The prompt must come in pieces of text, this one is {type(piece).__name__}.")
        yield piece


class Turn:
    """One stream on its way, step by step: ``read`` to its end, ``first_logits``, then ``take`` for every token.

    Arguments and errors are those of ``stream``, with a cache that is there.

    Attributes:
        width: most tokens that one step of ``read`` reads; may be changed between two.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: SinkCache,
        prompt: str | Sequence[int] | Iterable[str] | None,
        *,
        max_tokens: int | None = None,
        sampling: SamplingConfig | Sampler | None = None,
        stop: Sequence[str] = (),
        on_end: OnEnd = "stop",
        decoder: Decoder | None = None,
        logprobs: int | None = None,
    ) -> None:
        if max_tokens is not None and max_tokens < 0:
            raise ConfigError(f"max_tokens must be at least 0, you gave {max_tokens}; leave it out for no limit.")
        if on_end not in ON_END:
            raise ConfigError(f"on_end must be one of {', '.join(ON_END)}, you gave {on_end!r}.")
        check_logprobs(logprobs)
        if len(cache.rows) != 1:
            raise ConfigError(f"A stream has one row, this cache has {len(cache.rows)}.")
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.max_tokens, self.on_end, self.logprobs = max_tokens, on_end, logprobs
        self.ends = end_ids(model, tokenizer)
        # What was left unread is known already to a sampler or decoder that was there when it was drawn.
        unread = cache.unread
        if not isinstance(sampling, Sampler):
            banned = sorted(self.ends) if on_end == "ban" else ()
            sampling = Sampler(sampling or SamplingConfig(), device=model.device, banned=banned)
            sampling.observe(unread)
        elif on_end == "ban" and not self.ends.issubset(sampling.banned):
            raise ConfigError(
                f"on_end='ban' needs a Sampler made with banned={sorted(self.ends)}, the end ids; this one bans "
                f"{list(sampling.banned)}."
            )
        if decoder is None:
            decoder = Decoder(tokenizer)
            decoder.prime(unread)
        self.sampler, self.decoder, self.stops = sampling, decoder, StopStrings(stop)
        self.meter = Meter()
        self.width = PREFILL_CHUNK
        self.drawn = 0
        self._waiting: list[int] = []  # ids that belong to the stream and are not read yet
        self._prompt = prompt
        self._size = self._cached_before = 0  # bytes of the cache are asked again only after an eviction
        only_last = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if only_last else {}

    def read(self) -> Iterator[None]:
        """Read what was left unread, and the prompt as it arrives; pause after each forward.

        What one forward takes is left, for the one that also makes logits.

        Raises:
            InputError: the prompt cannot be read.
        """
        self._waiting = self.cache.unread
        for batch in self._prompt_ids(self._prompt):
            self.sampler.observe(batch)
            self.decoder.prime(batch)
            self._waiting += batch
            # The last token waits for the forward that also makes logits.
            while len(self._waiting) > (width := self.cache.columns(None, self.width)):
                self._read(self._waiting[:width])
                del self._waiting[:width]
                yield
        if not self._waiting:
            raise InputError("The prompt is empty: give at least one token to go on from.")

    def leave_unread(self) -> Chunk:
        """Read all but the last id, which is kept for whoever goes on: only its logits can begin a text."""
        if self._waiting[:-1]:
            self._read(self._waiting[:-1])
        self.cache.unread = self._waiting[-1:]
        return Chunk("", None, self.stats(), "length")

    def first_logits(self) -> Tensor:
        """Read the rest of the prompt; the logits [V] after it."""
        began = time.perf_counter()
        logits = self.forward(self._waiting)
        self.meter.prefilled(len(self._waiting), time.perf_counter() - began)
        return logits

    def forward(self, ids: list[int]) -> Tensor:
        """Read ``ids``; the logits [V] after the last one."""
        with torch.no_grad():
            output = self.model(
                input_ids=self._tensor(ids), past_key_values=self.cache, use_cache=True, **self._options
            )
        logits: Tensor = output.logits[0, -1]
        return logits

    def take(self, token: int, logits: Tensor) -> Chunk:
        """Take an id that was drawn: from here on it belongs to the stream, even if nobody comes back for more.

        ``logits``: those [V] that it was drawn from.
        """
        self.cache.unread = [token]
        logprobs = None if self.logprobs is None else measure(logits, token, self.logprobs)
        self.drawn += 1
        self.meter.decoded()
        is_end = token in self.ends
        text, stopped = self.stops.push(self.decoder.push(token))
        finish: Finish | None = None
        if stopped:
            finish = "stop"
        elif is_end and self.on_end == "stop":
            finish = "end"
        elif self.drawn == self.max_tokens:
            finish = "length"
        document_end = is_end and self.on_end == "pass"
        if not stopped and (finish or document_end):
            text += self._held_back()
        return Chunk(text, token, self.stats(), finish, document_end, logprobs)

    def stats(self) -> Stats:
        """Counters and speeds so far."""
        cache = self.cache
        cached = cache.tokens_cached
        if not self._size or cached <= self._cached_before:
            self._size = cache.bytes
        self._cached_before = cached
        return self.meter.stats(
            seen=cache.tokens_seen, cached=cached, evicted=cache.tokens_evicted, cache_bytes=self._size
        )

    def _prompt_ids(self, prompt: str | Sequence[int] | Iterable[str] | None) -> Iterator[list[int]]:
        """Ids of the prompt as they become known."""
        if prompt is None:
            return
        ids = None if isinstance(prompt, str) else _as_ids(prompt)
        if ids is None:
            begins = self.cache.tokens_seen == 0
            yield from read_ids(self.tokenizer, _pieces(prompt), add_special_tokens=begins)
            return
        size = len(self.model.get_input_embeddings().weight)  # type: ignore[arg-type]
        if strange := [x for x in ids if not 0 <= x < size]:
            raise InputError(f"{strange[0]} is no id of this model, whose ids run from 0 to {size - 1}.")
        yield ids

    def _read(self, ids: list[int]) -> None:
        """Read ``ids``, without logits."""
        began = time.perf_counter()
        with torch.no_grad(), QuickForms():
            self.model.get_decoder()(input_ids=self._tensor(ids), past_key_values=self.cache, use_cache=True)
        self.meter.prefilled(len(ids), time.perf_counter() - began)

    def _tensor(self, ids: list[int]) -> Tensor:
        """[1, T] ids on the model's device."""
        return torch.tensor([ids], device=self.model.device)

    def _held_back(self) -> str:
        """What decoder and stop strings still keep, when no more text can follow to decide it."""
        text, stopped = self.stops.push(self.decoder.flush())
        return text if stopped else text + self.stops.flush()
