"""What a client sent that resends everything: the instructions, the turns so far, and what the user says now.

Clients spell one conversation in several ways, so it is brought into one form: system messages in front are joined, and
so are neighbours of one role, by a blank line. A system message further down is read as the user's. Knows no sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from streamllm.errors import InputError

Role = Literal["system", "user", "assistant"]

BETWEEN = "\n\n"
"""Joins messages of one role."""


@dataclass(frozen=True, slots=True)
class Message:
    """What one side said, as a client sent it."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class History:
    """A conversation in its one form.

    Args:
        system: the instructions; ``None``: there are none.
        turns: what the user said, and the reply, of each turn that is over. Only the first user's text may be empty,
            where the assistant has begun.
        text: what the user says now.
    """

    system: str | None
    turns: tuple[tuple[str, str], ...]
    text: str

    @property
    def beginning(self) -> str:
        """The first text of the user."""
        return next((user for user, _ in self.turns if user.strip()), self.text)


def canonical(messages: Sequence[Message]) -> History:
    """Return messages in their one form.

    Raises:
        InputError: they do not end with one of the user, or hold something that is no text.
    """
    for number, message in enumerate(messages, 1):
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"Message {number} holds half a character (a lone surrogate), so it cannot be read; send whole text."
            ) from error
    first = next((place for place, message in enumerate(messages) if message.role != "system"), len(messages))
    leading = [message.content for message in messages[:first]]
    system = BETWEEN.join(leading) if leading else None
    sides: list[tuple[bool, list[str]]] = []  # whether it is the user's, and its parts
    for message in messages[first:]:
        is_user = message.role != "assistant"
        if not sides and not is_user:
            sides.append((True, [""]))
        if sides and sides[-1][0] == is_user:
            sides[-1][1].append(message.content)
        else:
            sides.append((is_user, [message.content]))
    if not sides or not sides[-1][0]:
        last = messages[-1].role if messages else "nothing"
        raise InputError(f"The messages must end with one of the user, yours end with {last}; add what is to be said.")
    *texts, text = [BETWEEN.join(parts) for _, parts in sides]
    if not text.strip():
        raise InputError("The last message is empty; say something.")
    return History(system, tuple(zip(texts[::2], texts[1::2], strict=True)), text)
