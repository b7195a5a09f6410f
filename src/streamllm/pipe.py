"""Pipes: every text that comes is read and answered, one after the other, in one stream without end.

Earlier texts and answers stay in the window as turns, and leave it as whole turns; nothing is kept of what has left.
Where texts come from and where answers go is not known here.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from streamllm.cache import SinkCache
from streamllm.config import ANSWER_TOKENS, PREFILL_CHUNK, SamplingConfig, check_count
from streamllm.errors import ConfigError, StateError
from streamllm.loop import Chunk, stream
from streamllm.sampling import Sampler
from streamllm.template import ChatTemplate


class Pipe:
    """Answers texts in one stream.

    Args:
        model, tokenizer: as of ``load``, by preference an instruct model. Without a chat template the texts are joined
            as they are, and an answer is one line, unless ``stop`` says where it ends.
        system: instructions, pinned: they never leave the window.
        cache: the stream, new or to be gone on with; ``None`` makes one.
        sampling: how to draw; the random numbers go on from answer to answer.
        max_tokens: tokens of an answer at most.
        stop: strings that end an answer; they are not shown.
        compile: as of ``stream``.
        template_options: handed to the chat template, such as ``{"enable_thinking": False}``.
        state: what ``state()`` gave when the cache was saved.

    Attributes:
        cache, sampler, template: its parts. A text that is broken off brings another ``cache`` object.

    Raises:
        ConfigError: an option cannot be used, or the instructions are larger than the window.
        UnsupportedModelError: the model cannot stream.
        StateError: the state is damaged.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        cache: SinkCache | None = None,
        sampling: SamplingConfig | Sampler | None = None,
        max_tokens: int = ANSWER_TOKENS,
        stop: Sequence[str] = (),
        compile: bool = False,
        template_options: dict[str, Any] | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        check_count("max_tokens", max_tokens, 1)
        self.template = ChatTemplate(tokenizer, system, **(template_options or {}))
        self.cache = SinkCache(model) if cache is None else cache
        if not isinstance(sampling, Sampler):
            sampling = Sampler(sampling or SamplingConfig(), device=model.device)
        self.sampler = sampling
        self._model, self._tokenizer = model, tokenizer
        self._max_tokens, self._compile = max_tokens, compile
        self._stop, self._is_one_line = tuple(stop), self.template.is_plain and not stop
        self._end_id: int | None = None
        self._is_closed = False  # the last answer has ended with its line, and nothing need close it
        self._said: deque[list[str]] = deque()  # texts and answers, kept only where every turn is spelt anew
        self._before = 0  # tokens read before the cache was last emptied
        if self.cache.tokens_seen == 0:
            self._pin()
        if state is not None:
            self._restore(state)

    def check(self, text: str) -> None:
        """Refuse a text that could not be answered; nothing is read.

        Raises:
            InputError: it cannot be encoded, or the template refuses it.
        """
        self._spell(text)

    def answer(self, text: str, *, progress: Callable[[int], None] | None = None) -> Iterator[Chunk]:
        """Read a text and write the answer to it.

        Args:
            text: what to read.
            progress: told the tokens that the cache has seen, after each step of reading a text of more than
                ``PREFILL_CHUNK`` tokens. What it raises breaks the reading off, and the stream is as if the text had
                never come; while such a text is read there is a second copy of the cache for that.

        Yields:
            One chunk a token. Breaking off leaves a stream that can go on with the next text.

        Raises:
            InputError: before anything is read, if the text cannot be encoded.
        """
        ids, closing, said = self._spell(text)
        is_breakable = progress is not None and len(ids) > PREFILL_CHUNK
        border = self._border() if is_breakable else None
        if said is not None:  # every turn is spelt anew: the window is emptied for it
            self._said = said
            self._before += self.cache.tokens_seen
            self.cache.reset()
        self._end_id, self._is_closed = None, False
        self.cache.mark(len(self.cache.unread) + closing)
        chunks = self._stream(ids, progress if is_breakable else None)
        try:
            for chunk in _one_line(chunks) if self._is_one_line else chunks:
                border = None  # the text was read
                if self._said:
                    self._said[-1][1] += chunk.text
                if chunk.finish == "end":
                    self._end_id, self.cache.unread = chunk.id, []  # the next turn closes this one
                self._is_closed = self._is_one_line and chunk.finish == "stop"
                yield self._counted(chunk)
        except BaseException:
            if border is not None:
                self._go_back(border)
            raise

    def state(self) -> dict[str, Any]:
        """Return all that is needed besides the cache and the sampler to go on, ready for JSON."""
        return {
            "system": self.template.system,
            "end_id": self._end_id,
            "is_closed": self._is_closed,
            "said": list(self._said),
            "before": self._before,
        }

    # ---- inside

    def _pin(self) -> None:
        """Make room for the head of every conversation."""
        head, cache = len(self.template.head), self.cache
        window = cache.config.window or 0
        if head > max(cache.config.sinks, window):
            raise ConfigError(
                f"The system prompt has {head} tokens, the window {window}: shorten it, or give a larger window."
            )
        if head > cache.rows[0].pinned:
            try:
                cache.pin(head)
            except ConfigError as error:
                raise ConfigError(f"The system prompt has {head} tokens, which do not fit: {error}") from error

    def _restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        try:
            self._end_id = None if state["end_id"] is None else int(state["end_id"])
            self._is_closed = bool(state["is_closed"])
            self._said.extend([str(text), str(answer)] for text, answer in state["said"])
            self._before = int(state["before"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"The saved pipe is damaged ({type(error).__name__}: {error}); begin anew.") from error

    def _border(self) -> _Border:
        return _Border(
            self.cache.fork(), tuple(self.sampler.recent), self._end_id, self._is_closed, self._said, self._before
        )

    def _go_back(self, border: _Border) -> None:
        self.cache = border.cache
        self.sampler.recent.clear()
        self.sampler.observe(border.recent)
        self._end_id, self._is_closed = border.end_id, border.is_closed
        self._said, self._before = border.said, border.before

    def _stream(self, ids: Sequence[int], progress: Callable[[int], None] | None) -> Iterator[Chunk]:
        self.sampler.begin()
        return stream(
            self._model,
            self._tokenizer,
            ids,
            cache=self.cache,
            sampling=self.sampler,
            max_tokens=self._max_tokens,
            stop=self._stop,
            compile=self._compile,
            progress=progress,
        )

    def _spell(self, text: str) -> tuple[list[int], int, deque[list[str]] | None]:
        """Return the ids of a text's turn, how many of them still belong to the last one, and what ``_said`` will be.

        The last is ``None`` where turns are not spelt anew.
        """
        template = self.template
        if not template.is_incremental:
            return self._spell_anew(text)
        if not self.cache.tokens_seen and not self.cache.unread:
            return template.head + template.opening(text), 0, None
        if self._is_closed:
            return template.opening(text), 0, None
        return template.following(text, self._end_id), template.closing(self._end_id), None

    def _spell_anew(self, text: str) -> tuple[list[int], int, deque[list[str]]]:
        """Return the ids of as many turns as fit into the window."""
        said = self._said.copy()
        said.append([text, ""])
        while True:
            *past, (asked, _) = said
            ids = self.template.whole(
                [
                    {"role": role, "content": content}
                    for turn in past
                    for role, content in zip(("user", "assistant"), turn, strict=True)
                ]
                + [{"role": "user", "content": asked}]
            )
            if len(ids) <= (self.cache.config.window or 0) or not past:
                return ids, 0, said
            said.popleft()

    def _counted(self, chunk: Chunk) -> Chunk:
        """Count what was read before the cache was emptied, too."""
        stats = chunk.stats
        seen, evicted = stats.tokens_seen + self._before, stats.tokens_evicted + self._before
        return dataclasses.replace(chunk, stats=dataclasses.replace(stats, tokens_seen=seen, tokens_evicted=evicted))


@dataclass(frozen=True)
class _Border:
    """A pipe where a text began. Reading draws nothing, so the random numbers are not among it."""

    cache: SinkCache
    recent: tuple[int, ...]
    end_id: int | None
    is_closed: bool
    said: deque[list[str]]
    before: int


def _one_line(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Hand on chunks up to the end of the first line with something in it."""
    has_begun = False
    for chunk in chunks:
        line, end, _ = (chunk.text if has_begun else chunk.text.lstrip()).partition("\n")
        has_begun = has_begun or bool(line)
        yield dataclasses.replace(chunk, text=line, finish=chunk.finish or ("stop" if end else None))
        if end:
            return
