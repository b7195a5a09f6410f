"""How the server makes the chat of a session: new, from disk, or as a copy of another one.

All chats of a server have the engine's cache, so a session that was made with another one is read anew. Knows one
session at a time; nothing here knows who asks for it.
"""

from __future__ import annotations

import dataclasses
import functools
import secrets
import time
from typing import Any

from streamllm.engine import Engine
from streamllm.errors import ConfigError
from streamllm.server.shelf import Shelf
from streamllm.server.templates import Templates
from streamllm.session import Chat, Recall
from streamllm.sessions import Session

SHARED = ("sinks", "window", "block", "kv_dtype")
"""What all caches of a server have in common."""


@dataclasses.dataclass(frozen=True)
class Opener:
    """See the module.

    Args:
        engine: reads and writes for all chats.
        model_name: as the server calls the model.
        recall: of sessions that do not say.
        snapshots: turns of each chat that can be taken back exactly.
        template_options: handed to the chat template.
    """

    engine: Engine
    model_name: str
    recall: Recall
    snapshots: int
    template_options: dict[str, Any]

    @functools.cached_property
    def templates(self) -> Templates:
        """Makes the chat templates."""
        return Templates(self.engine.columns)

    def new(self, shelf: Shelf, name: str, *, is_named: bool, system: str | None, recall: Recall | None = None) -> Chat:
        """The chat of a session that is not there yet.

        Raises:
            ConfigError: the instructions do not fit, or ``recall`` is unknown.
            StateError: it cannot be written.
        """
        config = self.engine.config
        shared = {name: getattr(config, name) for name in SHARED}
        chat = self._chat(Session(name, folder=shelf.folder), recall, system=system, **shared)
        self._settle(chat, is_named=is_named)
        if recall is not None:
            chat.transcript.put("recall", recall)
        return chat

    def there(self, shelf: Shelf, name: str) -> Chat:
        """The chat of a session on disk.

        Raises:
            BusyError: another process holds the session.
            UnknownSessionError: there is no such session.
            StateError: it is damaged.
        """
        shelf.require(name)
        return self._of(Session(name, create=False, folder=shelf.folder))

    def forked(self, shelf: Shelf, chat: Chat, turns: int, name: str, *, is_named: bool) -> Chat:
        """The chat of a new session, which has the first turns of another one in memory.

        Raises:
            StateError: it cannot be written.
        """
        return self._settle(chat.fork(Session(name, folder=shelf.folder), turns=turns), is_named=is_named)

    def copied(self, shelf: Shelf, source: str, turns: int, name: str, *, is_named: bool) -> Chat:
        """The same from the transcript of the other one, which may be in use; the window is read anew.

        Raises:
            ConfigError: there are not so many turns.
            StateError: it cannot be read or written.
        """
        chat = self._of(shelf.copied(source, turns, name))
        chat.notes.clear()  # that there is no state to go on from is no news
        return self._settle(chat, is_named=is_named)

    def check_system(self, system: str | None) -> None:
        """See whether a chat can have these instructions.

        Raises:
            ConfigError: they do not fit.
            InputError: they cannot be read.
        """
        head, room = (
            len(self.templates(self.engine.tokenizer, system, **self.template_options).head),
            self.engine.longest_head,
        )
        if head > room:
            raise ConfigError(
                f"The instructions take {head} tokens, this server has room for {room}: shorten them, or let the "
                "operator allow more."
            )

    def redraw(self, chat: Chat) -> None:
        """Let a chat that was forked draw otherwise than the one that it was forked from."""
        chat.sampling = chat.sampling.replace(seed=secrets.randbits(63))

    # ---- inside

    def _of(self, session: Session) -> Chat:
        """The chat of a session in which something was said, maybe."""
        try:
            self._fit(session)
            recall = session.transcript.get("recall")
        except BaseException:
            session.close()
            raise
        return self._chat(session, recall)

    def _chat(self, session: Session, recall: Recall | None, **options: Any) -> Chat:
        engine = self.engine
        try:
            self.check_system(options.get("system") or session.transcript.get("system", None))
            chat = Chat(
                engine.model,
                engine.tokenizer,
                engine=engine,
                session=session,
                recall=recall or self.recall,
                snapshots=self.snapshots,
                template_options=self.template_options,
                templates=self.templates,
                **options,
            )
        except BaseException:
            session.close()
            raise
        return chat

    def _fit(self, session: Session) -> None:
        """Give a session the engine's cache; if it had another one, its stream is of no use."""
        transcript = session.transcript
        config, stored = dataclasses.asdict(self.engine.config), transcript.get("cache")
        if stored is not None and any(stored.get(name) != config[name] for name in SHARED):
            session.state.unlink(missing_ok=True)
            transcript.put("cache", stored | {name: config[name] for name in SHARED})

    def _settle(self, chat: Chat, *, is_named: bool) -> Chat:
        """Write down what a session of a server says of itself."""
        try:
            for key, value in (("model", self.model_name), ("created", time.time()), ("named", is_named)):
                chat.transcript.put(key, value)
        except BaseException:
            chat.close()
            raise
        return chat
