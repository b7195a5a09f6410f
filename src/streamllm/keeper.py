"""A conversation on disk: how it begins there, how it is gone on with, and how its stream is saved.

The transcript is the truth; the stream beside it only saves reading. What does not fit is read anew from the
transcript, and said. Knows nothing of replies.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any

from streamllm.config import CacheConfig, SamplingConfig
from streamllm.context import Context
from streamllm.errors import ConfigError, StateError
from streamllm.scribe import Scribe
from streamllm.sessions import Session
from streamllm.snapshots import Snapshots
from streamllm.state import load_state, save_state
from streamllm.transcript import Transcript

SPELT = "The quick brown fox, 1234567890 times:\n\tna\u00efve \u4f60\u597d (why?) <a href='#'> x_y=z; ..."
"""A text that tokenizers spell differently."""


class Keeper:
    """Keeps the stream of one conversation in step with its transcript.

    Args:
        session: where it is kept; ``None``: nowhere, so nothing is saved.
        context, scribe, snapshots: of the conversation.
        notes: takes what a person should be told.
    """

    def __init__(
        self, session: Session | None, context: Context, scribe: Scribe, snapshots: Snapshots, notes: list[str]
    ) -> None:
        self.session, self.context, self.scribe, self.snapshots = session, context, scribe, snapshots
        self.notes = notes

    @property
    def transcript(self) -> Transcript:
        """All that was said."""
        return self.scribe.transcript

    def open(
        self, sampling: SamplingConfig, banned: Sequence[int], options: dict[str, Any], *, is_new_system: bool
    ) -> None:
        """Write the settings of a new conversation, or go on with one that is there.

        Args:
            sampling, banned: of its sampler.
            options: of its template.
            is_new_system: other instructions than before were given.
        """
        put, is_new = self.transcript.put, not self.transcript.count()
        fingerprint, spelling = dataclasses.asdict(self.context.cache.spec.fingerprint), self._spelling()
        if is_new:
            put("cache", dataclasses.asdict(self.context.asked))
            put("created", time.time())
            put("spelling", spelling)
            put("fingerprint", fingerprint)
        if is_new or is_new_system:
            put("system", self.context.template.system)
        if options != self.transcript.get("template", None):
            put("template", options)
        if json.loads(json.dumps(dataclasses.asdict(sampling))) != self.transcript.get("sampling"):
            put("sampling", dataclasses.asdict(sampling))
        if not is_new:
            self._go_on(sampling, banned, spelling, is_new_system=is_new_system)
            put("fingerprint", fingerprint)
        self.save()

    def save(self) -> None:
        """Save the stream; if that fails it is only slower to go on, for the transcript has everything."""
        context = self.context
        if self.session is None or not context.template.is_incremental or not self.scribe.is_whole:
            return
        chat, state = context.metadata(self.transcript), self.session.state
        try:
            save_state(state, context.cache, sampler=context.sampler, metadata={"chat": chat}, private=True)
        except StateError as error:
            self.tell(f"{error} The transcript has everything; going on will take a little longer.")

    def tell(self, note: str) -> None:
        """Note what a person should be told, once: what goes wrong at every turn is one note."""
        if note not in self.notes:
            self.notes.append(note)

    def rebuild(self) -> None:
        """Read the newest turns that fit into the window anew."""
        self.snapshots.clear()
        self.context.reread(self.transcript)

    def make_whole(self) -> None:
        """Read the window anew if an interrupt has left the cache half-written, or a turn half-read."""
        if not self.scribe.is_whole:
            self.notes.append("Reading was interrupted half-way; the window was read anew from the transcript.")
            self.rebuild()

    def _go_on(
        self, sampling: SamplingConfig, banned: Sequence[int], spelling: list[int], *, is_new_system: bool
    ) -> None:
        """Go on with a conversation that is on disk."""
        try:
            if self.transcript.get("spelling") != spelling:
                self.transcript.put("foreign", self.transcript.count())
                self.transcript.put("spelling", spelling)
                raise StateError("The session was said with another tokenizer.")  # noqa: TRY301 - same way out
            if is_new_system:
                raise StateError("The session has other instructions from here on.")  # noqa: TRY301
            if self.context.template.is_incremental:
                self._restore(sampling, banned)
            else:
                self.context.reopen(self.transcript)
        except (StateError, KeyError, TypeError, ValueError) as error:
            said = str(error) if isinstance(error, StateError) else f"The saved state is damaged ({error!r})."
            self.notes.append(f"{said} The window was read anew from the transcript.")
            self.rebuild()
        last = self.transcript.last()
        if last is not None and last.finish is None:  # of a process that died
            self.scribe.complete()
            self.transcript.end("interrupted")

    def _restore(self, sampling: SamplingConfig, banned: Sequence[int]) -> None:
        """Go on from the saved state, and from what the transcript has beyond it.

        Raises:
            StateError: there is none that fits.
            KeyError, TypeError, ValueError: it is damaged.
        """
        assert self.session is not None
        if not self.session.state.exists():
            raise StateError("The session has no saved state.")
        saved = load_state(self.session.state, self.context.model)
        if saved.sampler is None:
            raise StateError(f"{self.session.state} is no state of a session.")
        self.context.sampler = saved.sampler.changed(sampling, banned)
        self.context.catch_up(saved, saved.metadata["chat"], self.transcript)

    def _spelling(self) -> list[int]:
        """By what a tokenizer is known: how it spells a few texts, and how many tokens it has."""
        tokenizer = self.context.tokenizer
        return [len(tokenizer), *tokenizer(SPELT, add_special_tokens=False)["input_ids"]]


def settled_cache(transcript: Transcript, given: dict[str, Any]) -> CacheConfig:
    """The cache that is asked for now, or was when the conversation began.

    Raises:
        ConfigError: both are said, and are not the same.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    stored = transcript.get("cache", None)
    if stored is None:
        return CacheConfig(**chosen)
    for name, value in chosen.items():
        if value != stored.get(name):
            raise ConfigError(
                f"{name}={value} contradicts the session, which was made with "
                f"{stored.get(name) or 'the largest that fits'}: leave it out, or begin another session."
            )
    return CacheConfig(**stored)
