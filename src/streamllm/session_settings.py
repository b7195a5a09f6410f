"""What may stand in the settings of a session that comes from elsewhere: known names, and values of the right kind.

Settings are put to use when a conversation is opened, so nothing is let in that would fail there, or that would run: a
chat template is a program, and that of the tokenizer is the only one. Knows no files and no transcripts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from streamllm.config import CacheConfig, SamplingConfig
from streamllm.errors import ConfigError, StateError

LARGEST = 2**31 - 1
"""No number is larger, but for seeds and times."""

LATEST = 1e11
"""No time is later: seconds since 1970, so this is the year 5138."""


def check_settings(settings: dict[str, Any], what: str) -> None:
    """Refuse settings that no session can have.

    Args:
        settings: by name.
        what: they are called in messages.

    Raises:
        StateError: one has a name that is not known, or a value that cannot be; the message names it.
    """
    for name, value in settings.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()  # half a character is JSON, but no text
            _CHECKS.get(name, _unknown)(value)
        except (ConfigError, TypeError, ValueError) as error:
            reason = str(error).rstrip(".")
            raise StateError(f"{what} cannot be used, {name[:40]!r}: {reason}; export the session again.") from error


def _unknown(_value: Any) -> None:
    raise ConfigError("there is no setting of that name")


def _text(value: Any) -> None:
    _need(isinstance(value, str | None), "it must be text", value)


def _number(value: Any) -> None:
    _need(_is_number(value) and 0 <= value <= LATEST, "it must be a time", value)


def _count(value: Any) -> None:
    _need(type(value) is int and 0 <= value < 2**63, "it must be a whole number", value)


def _spelling(value: Any) -> None:
    _need(isinstance(value, list), "it must be a list of ids", value)
    for each in value:
        _count(each)


def _cache(value: Any) -> None:
    _bounded(value)
    CacheConfig(**value)


def _sampling(value: Any) -> None:
    _bounded(value)
    SamplingConfig(**value)


def _template(value: Any) -> None:
    _object(value)
    _need("chat_template" not in value, "it must not bring a chat_template, which is a program", value)
    for each in value.values():
        _need(isinstance(each, str | int | float | None), "its values must be text, numbers or yes and no", each)


def _fingerprint(value: Any) -> None:
    _object(value)
    _need(all(isinstance(each, str) for each in value.values()), "its values must be text", value)


def _named(value: Any) -> None:
    _need(isinstance(value, bool), "it must be true or false", value)


def _recall(value: Any) -> None:
    _need(value in ("auto", "off"), "it must be auto or off", value)


def _bounded(value: Any) -> None:
    """Refuse what is no object, or has a number in it that would overflow."""
    _object(value)
    for name, each in value.items():
        is_fine = abs(each) <= (2**63 if name == "seed" else LARGEST) if _is_number(each) else True
        _need(is_fine, f"{name} must be a number of at most {LARGEST}", each)


def _object(value: Any) -> None:
    _need(isinstance(value, dict), "it must be an object", value)


def _need(is_fine: bool, what: str, value: Any) -> None:
    if not is_fine:
        raise ConfigError(f"{what}, not {value!r:.60}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_CHECKS: dict[str, Callable[[Any], None]] = {
    "cache": _cache,
    "created": _number,
    "embeddings": _count,
    "fingerprint": _fingerprint,
    "foreign": _count,
    "model": _text,
    "named": _named,
    "recall": _recall,
    "sampling": _sampling,
    "spelling": _spelling,
    "system": _text,
    "template": _template,
    "title": _text,
}
