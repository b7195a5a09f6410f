"""What of a conversation can be changed between two replies: how tokens are drawn, and how a reply ends.

Knows names and values as a person types and reads them; what they mean is known by the conversation.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from streamllm.config import OnEnd, check_count
from streamllm.errors import ConfigError
from streamllm.settings import SETTINGS

if TYPE_CHECKING:
    from streamllm.session import Chat

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
NAMES = (*SAMPLING, "max_tokens", "stop", "endless", "recall")

RECALL = ("auto", "off")

_NOTHING = ("", "none", "off")


def change(chat: Chat, name: str, text: str) -> None:
    """Set one of ``NAMES`` to what was typed.

    Raises:
        ConfigError: there is no such name, or it cannot have this value.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name.replace("-", "_"), NAMES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(NAMES)}."
        raise ConfigError(f"There is no {name!r} to set: {hint}")
    value = _value(name, text)
    if name in SAMPLING:
        chat.sampling = chat.sampling.replace(**{name: value})
    elif name == "endless":
        chat.on_end = endless(chat.is_plain) if value else "stop"
    else:
        if name == "max_tokens" and value is not None:
            check_count("max_tokens", value, 1)
        setattr(chat, name, value)


def in_force(chat: Chat) -> Iterator[tuple[str, str]]:
    """Yield each of ``NAMES`` with its value, as a person would type it."""
    for name in NAMES:
        if name in SAMPLING:
            yield name, _written(getattr(chat.sampling, name))
        else:
            yield name, _written(chat.on_end != "stop" if name == "endless" else getattr(chat, name))


def endless(is_plain: bool) -> OnEnd:
    """What an end token does in a reply without end: a plain text goes on behind it, a turn never draws it."""
    return "pass" if is_plain else "ban"


def _value(name: str, text: str) -> Any:
    """A value as it was typed; JSON where it looks like that.

    Raises:
        ConfigError: it is of the wrong kind.
    """
    kind = SETTINGS[name].kind
    if name == "recall" and text in RECALL:
        return text
    if name in ("seed", "max_tokens", "stop") and text.lower() in _NOTHING:
        return () if name == "stop" else None
    try:
        value = json.loads({"on": "true", "off": "false"}.get(text, text))
    except ValueError:
        value = text
    if kind is list:
        parts = value if isinstance(value, list) else [value if isinstance(value, str) else text]
        if all(isinstance(part, str) and part for part in parts):
            return tuple(parts)
    elif kind is not str and (type(value) is kind or (kind is float and type(value) is int)):
        return value
    raise ConfigError(f"{name} cannot be {text!r}; {SETTINGS[name].help}")


def _written(value: Any) -> str:
    """A value as a person would type it."""
    if value is None or value == ():
        return "none"
    if isinstance(value, (list, tuple)):
        return json.dumps(list(value), ensure_ascii=False)
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
