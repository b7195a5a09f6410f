"""What a client is shown of a session and of its turns. Knows chats and transcripts; changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from streamllm.session import Chat
from streamllm.transcript import TurnRow

TITLE_CHARS = 60
"""A title that was made from what was said is not longer."""


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session.

    Args:
        id: its name.
        title: given, or the first words that the user said; empty while nothing was.
        turns, tokens: so far.
        created, used: when, in seconds of Unix time.
        model: as it was named when the session began; ``None``: it is not known.
        system: the instructions.
        is_resident: it is in memory.
        is_busy: it is in use just now.
        is_named: somebody has made it by name, so it is never deleted to make room.
        window: tokens, bytes and turns, see ``window_of``; as it was when it was let go last. ``None``: not known.
        damage: why nothing else is known, in one sentence.
    """

    id: str
    title: str
    turns: int
    tokens: int
    created: float
    used: float
    model: str | None
    system: str | None
    is_resident: bool
    is_busy: bool
    is_named: bool
    window: dict[str, int] | None
    damage: str | None = None


@dataclass(frozen=True, slots=True)
class TurnView:
    """A turn: what was said, and how the reply ended (``None``: it goes on).

    ``recalled`` is what was put in front of the user's text; empty where nothing was.
    """

    turn: int
    user: str
    reply: str
    finish: str | None
    recalled: str
    began: float
    ended: float | None


def turn_view(row: TurnRow) -> TurnView:
    """Return a turn as it is shown."""
    return TurnView(row.number, row.user, row.reply, row.finish, row.preface.strip(), row.began, row.ended)


def window_of(chat: Chat) -> dict[str, int]:
    """Return how a chat's window is filled, in tokens but for ``bytes`` and ``turns_evicted``."""
    cache, config = chat.cache, chat.cache.config
    return {
        "sinks": config.sinks,
        "pinned": cache.rows[0].pinned,
        "window": config.window or 0,
        "block": config.block,
        "capacity": cache.capacity,
        "cached": cache.tokens_cached,
        "evicted": chat.tokens_evicted,
        "seen": chat.tokens_seen,
        "bytes": cache.bytes,
        "turns_evicted": chat.turns_evicted,
    }


def title_of(text: str) -> str:
    """Return the first words of a text, on one line."""
    words = text[: 4 * TITLE_CHARS].split()
    title = " ".join(words)
    if len(title) <= TITLE_CHARS:
        return title
    cut = title[:TITLE_CHARS].rsplit(" ", 1)[0] if " " in title[:TITLE_CHARS] else title[:TITLE_CHARS]
    return f"{cut} ..."
