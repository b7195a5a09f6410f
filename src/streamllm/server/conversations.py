"""Conversations by their messages; a stand-in that keeps them in memory until the real one comes."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from streamllm.cache import SinkCache
from streamllm.engine import Engine
from streamllm.errors import StreamLLMError
from streamllm.loop import Chunk
from streamllm.reply import TurnRecord
from streamllm.server.history import Message


class UnknownSessionError(StreamLLMError):
    """There is no such session."""

    http_status = 404


class _Reply:
    def __init__(self, chat: _Chat, request: Any, turn: int, read: int) -> None:
        self._chat, self._request, self.turn, self.read = chat, request, turn, read
        self.finish: str | None = None
        self.generated, self.text = 0, ""

    def __iter__(self) -> Iterator[Chunk]:
        for chunk in self._request:
            self.generated += 1
            self.text += chunk.text
            self.finish = chunk.finish
            yield chunk

    def close(self) -> None:
        if self.finish is None:
            self._request.cancel()
            for _ in self._request:
                pass
            self.finish = "interrupted"

    @property
    def record(self) -> TurnRecord:
        cache = self._chat.cache
        return TurnRecord(
            self.turn, self.read, self.generated, cache.tokens_seen, cache.tokens_cached, cache.tokens_evicted, 0,
            None, 0, cache.tokens_cached / cache.capacity, (), self.finish, 0.0,
        )  # fmt: skip


class _Chat:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cache: SinkCache = engine._new_cache()
        self.turns, self.notes = 0, list[str]()
        self.system: str | None = None
        self.said: list[tuple[str, str]] = []

    def send(self, text: str, *, recall: Any = None, **options: Any) -> Any:
        ids = self.engine.tokenizer(text, add_special_tokens=not self.turns)["input_ids"]
        self.turns += 1
        request = self.engine.submit(ids, cache=self.cache, **options)
        return _Reply(self, request, self.turns, len(ids))


class Continuation:
    """A conversation that is held."""

    def __init__(self, owner: Any, chat: Any, session_id: str, how: str, text: str) -> None:
        self.chat, self.session_id, self.how, self.text = chat, session_id, how, text
        self.cached_tokens, self.read_tokens = chat.cache.tokens_seen, 0
        self._owner = owner

    def done(self, reply: Any) -> None:
        """The reply has ended."""
        self.chat.said.append((self.text, reply.text))

    def release(self) -> None:
        """Let go."""

    def __enter__(self) -> Continuation:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True)
class SessionView:
    """A session as it is shown."""

    id: str
    title: str | None = None
    turns: int = 0
    tokens: int = 0
    created: float = 0.0
    used: float = 0.0
    model: str = ""
    system: str | None = None
    is_resident: bool = True
    is_busy: bool = False
    is_named: bool = True
    window: Any = None


class Conversations:
    """All of them."""

    def __init__(self, engine: Engine, folder: Path, *, model_name: str, recall: str = "auto", **_: Any) -> None:
        self._engine, self._model = engine, model_name
        self._chats: dict[tuple[str, str], _Chat] = {}
        self._views: dict[tuple[str, str], SessionView] = {}
        self._responses: dict[tuple[str, str], tuple[str, int]] = {}
        self._lock = threading.Lock()
        self.notes: list[str] = []

    def continue_messages(self, owner: str, messages: Sequence[Message], *, copies: int = 1) -> list[Continuation]:
        """Find or begin."""
        said = [m.content for m in messages if m.role != "system"]
        pairs = list(zip(said[0::2], said[1::2], strict=False))
        if copies == 1:
            for (whose, name), chat in self._chats.items():
                if whose == owner and chat.said == pairs and pairs:
                    return [Continuation(self, chat, name, "continued", said[-1])]
        found = []
        for _ in range(copies):
            view = self.create(owner)
            text = "\n".join(said)
            found.append(Continuation(self, self._chats[owner, view.id], view.id, "new", text))
        return found

    def continue_turn(self, owner: str, session_id: str, turn: int, *, copies: int = 1) -> list[Continuation]:
        """Behind a turn."""
        return [self.open(owner, session_id)]

    def sweep(self) -> int:
        """Nothing."""
        return 0

    def open(self, owner: str, session_id: str) -> Continuation:
        """A session by its name."""
        return Continuation(self, self._chat(owner, session_id), session_id, "continued", "")

    def _chat(self, owner: str, id: str) -> _Chat:
        if (owner, id) not in self._chats:
            raise UnknownSessionError(f"There is no session {id!r}.")
        return self._chats[owner, id]

    def create(self, owner: str, session_id: str | None = None, **more: Any) -> SessionView:
        """Begin one."""
        name = session_id or uuid.uuid4().hex
        self._chats[owner, name] = _Chat(self._engine)
        more.pop("recall", None)
        self._views[owner, name] = SessionView(name, created=time.time(), used=time.time(), model=self._model, **more)
        return self._views[owner, name]

    def list(self, owner: str, *, after: str | None = None, limit: int = 100) -> list[SessionView]:
        """All of an owner."""
        names = [n for o, n in self._views if o == owner]
        return [self.view(owner, n) for n in names][:limit]

    def view(self, owner: str, id: str) -> SessionView:
        """One of them."""
        chat = self._chat(owner, id)
        return replace(self._views[owner, id], turns=chat.turns, tokens=chat.cache.tokens_seen)

    def turns(self, owner: str, id: str, *, after: int = 0, limit: int = 100) -> list[Any]:
        """What was said."""
        said = enumerate(self._chat(owner, id).said, 1)
        return [SimpleNamespace(turn=n, user=u, reply=r, finish="end", began=0.0, ended=0.0) for n, (u, r) in said][
            after : after + limit
        ]

    def delete(self, owner: str, id: str) -> None:
        """Forget one."""
        self._chat(owner, id)
        del self._chats[owner, id], self._views[owner, id]

    def rename(self, owner: str, id: str, title: str) -> None:
        """Give it a title."""
        self._views[owner, id] = replace(self._views[owner, id], title=title)

    def note_response(self, owner: str, response_id: str, session_id: str, turn: int) -> None:
        """Remember."""
        self._responses[owner, response_id] = (session_id, turn)

    def find_response(self, owner: str, response_id: str) -> tuple[str, int] | None:
        """Find."""
        return self._responses.get((owner, response_id))

    def drop_response(self, owner: str, response_id: str) -> None:
        """Forget."""
        self._responses.pop((owner, response_id), None)

    def stats(self) -> dict[str, float]:
        """How many."""
        return {"resident": len(self._chats), "on_disk": 0}

    def close(self) -> None:
        """End."""
