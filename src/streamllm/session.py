"""A conversation that never ends: only what is new is read, the instructions stay, and what left can be found.

``Chat`` holds together a context (what the model has before it), a transcript (all that was said, on disk), snapshots
(to take turns back) and the reply that goes on. How turns are spelt, evicted, searched or drawn is not known here.
Source: StreamingLLM, section 3.2 and table 8 (instructions need more than four pinned tokens); issue 6.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from streamllm.cache import SinkCache
from streamllm.config import CacheConfig, OnEnd, SamplingConfig
from streamllm.context import Context
from streamllm.detokenize import Decoder
from streamllm.errors import BusyError, CacheError, ConfigError, InputError, StateError
from streamllm.loop import Chunk, end_ids, stream
from streamllm.passages import Passage
from streamllm.recall import BUDGET_TOKENS, Index, WordIndex, matching, quote
from streamllm.reply import Reply, TurnRecord
from streamllm.sampling import Sampler
from streamllm.scribe import Scribe
from streamllm.sessions import Session
from streamllm.snapshots import Snapshots
from streamllm.state import load_state, save_state
from streamllm.stats import Stats
from streamllm.template import ChatTemplate
from streamllm.transcript import Transcript, TurnRow

Recall = Literal["auto", "off"]

SAVE_EVERY = 512
"""Tokens of a reply after which a session on disk is saved in its middle."""

PATIENCE = 0.5
"""Seconds to wait for another thread: more than a search takes, less than anyone would call hanging."""

RECALL_SHARE = 3
"""What is recalled for a turn takes at most one in so many tokens of the window."""


SPELT = "The quick brown fox, 1234567890 times:\n\tna\u00efve \u4f60\u597d (why?) <a href='#'> x_y=z; ..."
"""A text that tokenizers spell differently."""


class Chat:
    """A conversation with a model.

    Args:
        model, tokenizer: as of ``load``; without a chat template the tokenizer's texts are joined as they are.
        system: instructions that are pinned and never leave. ``None``: those of the session, or none.
        sinks, window, block, kv_dtype: see ``CacheConfig``; ``None``: those of the session, or the defaults.
        sampling: how to draw; the random numbers go on from turn to turn.
        max_tokens: tokens of a reply at most; ``None``: until it ends.
        on_end, stop: as of ``stream``.
        recall: "auto" puts passages that left the window, and match a turn, in front of it; "off" does not.
        index: makes what finds passages in a transcript, such as an ``EmbeddingIndex``.
        snapshots: how many turns can be taken back exactly; each costs a copy of the cache (see ``MAX_BYTES``).
        session: a session on disk, or its name, to go on with or to begin; ``None``: nothing is kept.
        compile: as of ``stream``.
        template_options: handed to the chat template, such as ``{"enable_thinking": False}``.

    Attributes:
        notes: sentences that a person should be told once; whoever shows them clears the list.

    Raises:
        ConfigError: an option cannot be used, the system prompt is larger than the window, or the session was made
            with another window.
        UnsupportedModelError: the model cannot stream.
        BusyError: another process holds the session.
        StateError: the session's transcript is damaged.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        sinks: int | None = None,
        window: int | None = None,
        block: int | None = None,
        kv_dtype: str | None = None,
        sampling: SamplingConfig | None = None,
        max_tokens: int | None = None,
        on_end: OnEnd = "stop",
        stop: Sequence[str] = (),
        recall: Recall = "auto",
        index: Callable[[Transcript], Index] = WordIndex,
        snapshots: int = 8,
        session: Session | str | None = None,
        compile: bool = False,
        template_options: dict[str, Any] | None = None,
    ) -> None:
        if recall not in ("auto", "off"):
            raise ConfigError(f"recall must be auto or off, you gave {recall!r}.")
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens, self.stop, self.recall, self.compile = max_tokens, tuple(stop), recall, compile
        self.notes: list[str] = []
        self.lock = threading.RLock()
        self._reply: Reply | None = None
        self._is_closed = False
        self._quoted: dict[int, set[int]] = {}  # ids of passages by the turn that they stand in front of
        self._stats: Stats | None = None
        self._snapshots = Snapshots(snapshots)
        self._on_end: OnEnd = on_end
        self._make_index = index
        self.session = Session(session) if isinstance(session, str) else session
        self.transcript = self.session.transcript if self.session else Transcript()
        try:
            given = {"sinks": sinks, "window": window, "block": block, "kv_dtype": kv_dtype}
            asked = self._settle_options(given)
            self._options = self.transcript.get("template", {}) if template_options is None else template_options
            before = self.transcript.get("system", None)
            template = ChatTemplate(tokenizer, before if system is None else system, **self._options)
            sampling = sampling or SamplingConfig(**self.transcript.get("sampling", {}))
            sampler = Sampler(sampling, device=model.device, banned=self._banned)
            self._context = Context(model, tokenizer, template, asked, sampler)
            self._scribe = Scribe(self.transcript, self._context)
            self._open(sampling, is_new_system=system is not None and system != before)
        except BaseException:
            self.transcript.close()
            if self.session:
                self.session.close()
            raise
        self.notes += template.notes
        self._index = index(self.transcript)
        self._sampling = self._context.sampler.config

    # ---- what is there

    @property
    def turns(self) -> int:
        """Turns so far."""
        return self.transcript.count()

    @property
    def cache(self) -> SinkCache:
        """What the model sees."""
        return self._context.cache

    @property
    def template(self) -> ChatTemplate:
        """How turns are spelt."""
        return self._context.template

    @property
    def system(self) -> str | None:
        """The instructions."""
        return self.template.system

    @property
    def is_plain(self) -> bool:
        """Whether the texts are joined as they are, because the tokenizer has no chat template."""
        return self.template.is_plain

    @property
    def can_resume(self) -> bool:
        """Whether the last reply was cut off and can go on."""
        last = self.transcript.last()
        return last is not None and last.finish not in ("end", "stop")

    @property
    def sampling(self) -> SamplingConfig:
        """How tokens are drawn; another one takes effect with the next reply."""
        return self._sampling

    @sampling.setter
    def sampling(self, config: SamplingConfig) -> None:
        with self._alone():
            self.transcript.put("sampling", dataclasses.asdict(config))
            self._sampling = config

    @property
    def on_end(self) -> OnEnd:
        """What an end token does; see ``stream``. Another one takes effect with the next reply."""
        return self._on_end

    @on_end.setter
    def on_end(self, on_end: OnEnd) -> None:
        with self._alone():
            self._on_end = on_end

    @property
    def stats(self) -> Stats | None:
        """Counters and speeds of the last reply; ``None`` before the first."""
        return self._stats

    @property
    def record(self) -> TurnRecord | None:
        """What the last turn has cost; ``None`` before the first."""
        return None if self._reply is None else self._reply.record

    @property
    def turns_evicted(self) -> int:
        """Turns that have left the window with all their tokens."""
        return self._context.oldest - 1

    @property
    def tokens_seen(self) -> int:
        """Tokens of the conversation so far."""
        return self._context.tokens_seen

    @property
    def tokens_evicted(self) -> int:
        """Tokens of the conversation that have left the window."""
        return self._context.tokens_evicted

    @property
    def tokens_reread(self) -> int:
        """Tokens that were read once more since the conversation was opened or forked."""
        return self._context.tokens_reread

    def history(self, last: int | None = None) -> Iterator[TurnRow]:
        """The turns from the transcript, in order; ``last``: only so many."""
        return self.transcript.turns(1 if last is None else max(1, self.turns - last + 1))

    def search(self, words: str, limit: int = 5) -> list[Passage]:
        """Passages of the whole conversation that match ``words``, the best first; waits while a token is drawn."""
        with self.lock:
            return self._index.search(words, limit=limit)

    # ---- what is said

    def send(
        self,
        text: str,
        *,
        recall: Sequence[Passage] | None = None,
        max_tokens: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Reply:
        """Say something; the reply is read from what is given back.

        Args:
            text: what to say. It is in the transcript when this returns.
            recall: passages to put in front of it; ``None``: as the conversation's ``recall`` says.
            max_tokens: of this reply, instead of the conversation's.
            progress: told the tokens that the cache has seen, after each step of reading a long text; what it raises
                breaks the reply off.

        Raises:
            InputError: the text is empty or cannot be encoded.
            BusyError: another thread is using the conversation.
            StateError: the transcript cannot be written.
        """
        with self._alone():
            if not isinstance(text, str) or not text.strip():
                raise InputError("The message is empty; say something, or go on with a reply that was cut off.")
            self._settle()
            found = tuple(self._recalled(text) if recall is None else recall)
            content = quote(found) + text
            number, context = self.turns + 1, self._context
            if self.template.is_incremental:
                self._make_whole()
                ids, closing = context.piece(content, self.transcript)
                snapshot = context.snapshot(number) if self._snapshots.most else None
                self.transcript.begin(text, preface=quote(found), prompt_ids=ids, count=self._count)
                if snapshot is not None:
                    self._snapshots.keep(snapshot)
                context.enter(number, closing)
            else:
                ids, first = context.whole(self.transcript, content, number)
                self.transcript.begin(text, preface=quote(found), prompt_ids=ids, count=self._count)
                context.forget(self.transcript.tokens() - len(ids), first)
                context.enter(number, 0, len(ids))
            self._quoted[number] = {passage.id for passage in found}
            return self._answer(number, ids, found, max_tokens, progress)

    def resume(self, *, max_tokens: int | None = None, progress: Callable[[int], None] | None = None) -> Reply:
        """Go on with the last reply, which was cut off.

        Args:
            max_tokens, progress: as of ``send``.

        Raises:
            CacheError: there is none, or it has ended by itself.
            BusyError, StateError: as ``send``.
        """
        with self._alone():
            self._settle()
            if not self.can_resume:
                raise CacheError("There is no reply that was cut off; send the next message, or regenerate() the last.")
            self._make_whole()
            ids = None
            if not self.template.is_incremental and not self.cache.tokens_seen:
                last = self.transcript.turn(self.turns)
                ids, first = self._context.whole(self.transcript, last.preface + last.user, last.number)
                ids += self.transcript.reply_ids(last.number)
                self._context.forget(self.transcript.tokens() - len(ids), first)
                self._context.enter(last.number, 0, len(ids))
            self.transcript.reopen()
            return self._answer(self.turns, ids, (), max_tokens, progress, self._scribe.decoder())

    def undo(self, turns: int = 1, *, rebuild: bool = False) -> None:
        """Take the last turns back.

        Args:
            turns: how many.
            rebuild: where no snapshot reaches so far, read the window anew from the transcript.

        Raises:
            ConfigError: there are not so many turns.
            CacheError: no snapshot reaches so far; the message says what is possible.
        """
        with self._alone():
            self._settle()
            if not 1 <= turns <= self.turns:
                raise ConfigError(f"Cannot take {turns} turns back: there are {self.turns}.")
            first = self.turns - turns + 1
            if self.template.is_incremental and not self._snapshots.has(first) and not rebuild:
                oldest = self._snapshots.oldest
                possible = "no turn can be taken back exactly" if oldest is None else f"turns from {oldest} on can be"
                raise CacheError(
                    f"Turn {first} cannot be taken back exactly, its snapshot is not kept; {possible}. With "
                    "rebuild=True (/undo rebuild) the window is read anew from the transcript."
                )
            self._take_back(turns)
            snapshot = self._snapshots.take(first)
            if snapshot is None or not self.template.is_incremental:
                self._rebuild()
            else:
                self._context.go_back(snapshot)
            self._save()

    def regenerate(self, *, rebuild: bool = False) -> Reply:
        """Take the last reply back and draw another one.

        Raises:
            ConfigError, CacheError: as ``undo``.
        """
        with self._alone():
            self._settle()
            return self.edit(max(1, self.turns), rebuild=rebuild)

    def edit(self, turn: int, text: str | None = None, *, rebuild: bool = False) -> Reply:
        """Say something else in ``turn`` (``None``: the same); it and all later turns are taken back.

        Raises:
            ConfigError, CacheError: as ``undo``.
        """
        with self._alone():
            self._settle()
            if not 1 <= turn <= self.turns:
                raise ConfigError(f"There is no turn {turn}: the conversation has {self.turns}.")
            said = self.transcript.turn(turn).user if text is None else text
            if not said.strip():
                raise InputError("The message is empty; say something else.")
            self.template.whole([{"role": "user", "content": said}])  # or it would be found out too late
            self.undo(self.turns - turn + 1, rebuild=rebuild)
            return self.send(said)

    def clear(self) -> None:
        """Begin anew; the transcript of a session keeps what was said, as taken back."""
        with self._alone():
            self._settle()
            if self.turns:
                self._take_back(self.turns)
            self._stats = None
            self._rebuild()
            self._save()

    def set_system(self, text: str | None) -> None:
        """Give other instructions; the window is read anew from the transcript, behind them.

        Raises:
            ConfigError: they are larger than the window.
        """
        with self._alone():
            self._settle()
            self._context.change(ChatTemplate(self.tokenizer, text, **self._options))
            self.transcript.put("system", text)
            self._rebuild()
            self._save()

    def fork(self, session: Session | str | None = None) -> Chat:
        """Another conversation that goes on from here; both draw alike.

        Args:
            session: a new session on disk, or its name, to keep it in.

        Raises:
            ConfigError: the session is not new.
        """
        with self._alone():
            self._settle()
            other = object.__new__(Chat)
            other.__dict__ = dict(self.__dict__)
            other.session = Session(session) if isinstance(session, str) else session
            if other.session is not None and not (other.session.is_new and not other.session.transcript.count()):
                other.session.close()
                raise ConfigError(f"The session {other.session.name!r} is not new; give another name.")
            try:
                other._context = self._context.copy()
                if other.session is None:
                    other.transcript = self.transcript.copy()
                else:
                    self.transcript.copy_into(other.session.transcript)
                    other.transcript = other.session.transcript
            except BaseException:
                if other.session is not None:
                    other.session.close()
                raise
            other.lock, other.notes, other._reply, other._is_closed = threading.RLock(), [], None, False
            other._quoted = dict(self._quoted)
            other._scribe = Scribe(other.transcript, other._context)
            other._snapshots = self._snapshots.copy()
            other._index = self._make_index(other.transcript)
            other._save()
            return other

    def close(self) -> None:
        """End a reply that goes on, save the session, and let it go; a second time does nothing."""
        with self._alone():
            if self._is_closed:
                return
            self._is_closed = True
            try:
                self._settle()
                self._save()
            finally:
                self.transcript.close()
                if self.session:
                    self.session.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what a reply tells

    def took(self, reply: Reply, chunk: Chunk) -> Chunk:
        """A chunk of ``reply`` has come: it goes to disk before it is shown."""
        self._scribe.took(chunk)
        context = self._context
        stats = replace(chunk.stats, tokens_seen=context.tokens_seen, tokens_evicted=context.tokens_evicted)
        self._stats = stats
        if reply.generated % SAVE_EVERY == 0 and not chunk.finish:
            self._save()
        return replace(chunk, stats=stats)

    def ended(self, reply: Reply, finish: str, end_id: int | None) -> None:
        """``reply`` has ended; if that cannot be written, it is tried again before anything else is said."""
        self._scribe.ended(finish, end_id)
        try:
            self._scribe.settle()
        except StateError as error:
            self.notes.append(f"{error} What is missing in the transcript is written before the next turn.")
        else:
            self._save()

    def measure(self, reply: Reply) -> TurnRecord:
        """The record of ``reply`` at this moment."""
        oldest, evicted = self._context.oldest, self.tokens_evicted
        return TurnRecord(
            turn=reply.turn,
            tokens_read=reply.read,
            tokens_generated=reply.generated,
            tokens_seen=self.tokens_seen,
            tokens_cached=self.cache.tokens_cached,
            tokens_evicted=evicted,
            turns_evicted=oldest - 1,
            evicted_now=(reply.oldest, oldest - 1) if oldest > reply.oldest else None,
            tokens_evicted_now=evicted - reply.evicted,
            occupancy=self.cache.tokens_cached / self.cache.capacity,
            recalled=reply.recalled,
            finish=reply.finish,
            seconds=reply.seconds,
        )

    # ---- inside

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Refuse a second thread, unless the first has done in a moment."""
        if not self.lock.acquire(timeout=PATIENCE):
            raise BusyError("Another thread is using this conversation; wait for it, or fork() the conversation.")
        try:
            yield
        finally:
            self.lock.release()

    def _settle(self) -> None:
        """End a reply that goes on, write what could not be written, and take over what was set meanwhile."""
        if self._reply is not None:
            self._reply.close()
        if self._scribe.settle():
            self._save()
        sampler = self._context.sampler
        if (sampler.config, list(sampler.banned)) != (self._sampling, self._banned):
            self._context.sampler = sampler.changed(self._sampling, self._banned)

    def _take_back(self, turns: int) -> None:
        """Take turns back in the transcript."""
        self.transcript.undo(turns)
        self._reply = None
        if self.transcript.get("foreign", 0) > self.turns:
            self.transcript.put("foreign", self.turns)

    def _answer(
        self,
        number: int,
        ids: list[int] | None,
        found: tuple[Passage, ...],
        most: int | None,
        progress: Callable[[int], None] | None,
        decoder: Decoder | None = None,
    ) -> Reply:
        """The reply that comes after ``ids`` are read."""
        self._scribe.begin()

        def begin() -> Iterator[Chunk]:
            return stream(
                self.model,
                self.tokenizer,
                ids,
                cache=self.cache,
                sampling=self._context.sampler,
                max_tokens=self.max_tokens if most is None else most,
                stop=self.stop,
                on_end=self._on_end,
                decoder=decoder,
                compile=self.compile,
                progress=progress,
            )

        oldest, evicted = self._context.oldest, self.tokens_evicted
        self._reply = Reply(
            self, begin, turn=number, read=len(ids or ()), recalled=found, oldest=oldest, evicted=evicted
        )
        return self._reply

    def _recalled(self, text: str) -> Sequence[Passage]:
        """Passages for a turn, if any have left."""
        if self.recall == "off" or not self.tokens_evicted:
            return ()
        budget = min(BUDGET_TOKENS, self._context.window // RECALL_SHARE)
        found = matching(self._index, text, self._context.place, count=self._count, budget_tokens=budget)
        # What stands in front of a turn that is in the window is in the window, too.
        self._quoted = {turn: ids for turn, ids in self._quoted.items() if self._context.oldest <= turn <= self.turns}
        quoted = set().union(*self._quoted.values())
        return [passage for passage in found if passage.id not in quoted]

    def _count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def _banned(self) -> list[int]:
        """Ids that are never drawn."""
        return sorted(end_ids(self.model, self.tokenizer)) if self._on_end == "ban" else []

    # ---- a conversation that is on disk

    def _settle_options(self, given: dict[str, Any]) -> CacheConfig:
        """The cache that was asked for, now or when the session began."""
        chosen = {name: value for name, value in given.items() if value is not None}
        stored = self.transcript.get("cache", None)
        if stored is None:
            return CacheConfig(**chosen)
        for name, value in chosen.items():
            if value != stored.get(name):
                raise ConfigError(
                    f"{name}={value} contradicts the session, which was made with {stored.get(name)}: leave "
                    "it out, or begin another session."
                )
        return CacheConfig(**stored)

    def _open(self, sampling: SamplingConfig, *, is_new_system: bool) -> None:
        """Write the settings of a new conversation, or go on with one that is on disk."""
        put, is_new = self.transcript.put, not self.turns
        fingerprint, spelling = dataclasses.asdict(self.cache.spec.fingerprint), self._spelling()
        if is_new:
            put("cache", dataclasses.asdict(self._context.asked))
            put("created", time.time())
            put("spelling", spelling)
            put("fingerprint", fingerprint)
        if is_new or is_new_system:
            put("system", self.template.system)
            put("template", self._options)
        if dataclasses.asdict(sampling) != self.transcript.get("sampling"):
            put("sampling", dataclasses.asdict(sampling))
        if not is_new:
            self._go_on(sampling, fingerprint, spelling, is_new_system=is_new_system)
        self._save()

    def _go_on(
        self, sampling: SamplingConfig, fingerprint: dict[str, Any], spelling: list[int], *, is_new_system: bool
    ) -> None:
        """Go on with a conversation that is on disk."""
        try:
            if self.transcript.get("spelling") != spelling:
                self.transcript.put("foreign", self.turns)
                self.transcript.put("spelling", spelling)
                raise StateError("The session was said with another tokenizer.")  # noqa: TRY301 - same way out
            if is_new_system:
                raise StateError("The session has other instructions from here on.")  # noqa: TRY301
            if self.template.is_incremental:
                self._restore(sampling)
        except (StateError, KeyError, TypeError, ValueError) as error:
            said = str(error) if isinstance(error, StateError) else f"The saved state is damaged ({error!r})."
            self.notes.append(f"{said} The window was read anew from the transcript.")
            self._rebuild()
        self.transcript.put("fingerprint", fingerprint)
        last = self.transcript.last()
        if last is not None and last.finish is None:  # of a process that died
            self._scribe.complete()
            self.transcript.end("interrupted")

    def _restore(self, sampling: SamplingConfig) -> None:
        """Go on from the saved state, and from what the transcript has beyond it.

        Raises:
            StateError: there is none that fits.
            KeyError, TypeError, ValueError: it is damaged.
        """
        assert self.session is not None
        if not self.session.state.exists():
            raise StateError("The session has no saved state.")
        saved = load_state(self.session.state, self.model)
        if saved.sampler is None:
            raise StateError(f"{self.session.state} is no state of a session.")
        self._context.sampler = saved.sampler.changed(sampling, self._banned)
        self._context.catch_up(saved, saved.metadata["chat"], self.transcript)

    def _spelling(self) -> list[int]:
        """By what a tokenizer is known: how it spells a few texts, and how many tokens it has."""
        return [len(self.tokenizer), *self.tokenizer(SPELT, add_special_tokens=False)["input_ids"]]

    def _rebuild(self) -> None:
        """Read the newest turns that fit into the window anew."""
        self._snapshots.clear()
        self._context.reread(self.transcript)

    def _make_whole(self) -> None:
        """Read the window anew if an interrupt has left the cache half-written, or a turn half-read."""
        if not self._scribe.is_whole:
            self.notes.append("Reading was interrupted half-way; the window was read anew from the transcript.")
            self._rebuild()

    def _save(self) -> None:
        """Save the state of a session; if that fails it is only slower to go on, for the transcript has everything."""
        if self.session is None or not self.template.is_incremental or not self._scribe.is_whole:
            return
        chat = self._context.metadata(self.transcript.last())
        sampler = self._context.sampler
        try:
            save_state(self.session.state, self.cache, sampler=sampler, metadata={"chat": chat}, private=True)
        except StateError as error:
            self.notes.append(f"{error} The transcript has everything; going on will take a little longer.")
