"""Chat templates that the server keeps: the same as one that is set up for the occasion, and only for a while."""

from __future__ import annotations

import pytest

from chats import talker
from streamllm.errors import ConfigError
from streamllm.server import templates as module
from streamllm.server.templates import Templates
from streamllm.template import ChatTemplate


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The instructions of the templates that were set up."""
    calls: list[str | None] = []

    def make(tokenizer: object, system: str | None = None, **options: object) -> ChatTemplate:
        calls.append(system)
        return ChatTemplate(tokenizer, system, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "ChatTemplate", make)
    return calls


def test_a_template_is_set_up_once_and_spells_as_its_own(made: list[str | None]) -> None:
    """Reference: ``ChatTemplate`` itself."""
    tokenizer, templates = talker()[1], Templates(100)
    for _ in range(3):
        for system in (None, "Be kind.", "Be brief."):
            one, reference = templates(tokenizer, system), ChatTemplate(tokenizer, system)
            assert (one.system, one.head, one.notes) == (reference.system, reference.head, reference.notes)
            assert one.opening("Hello") == reference.opening("Hello")
            assert one.following("And?", None) == reference.following("And?", None)
    assert made == [None, "Be kind.", "Be brief."]
    first, second = templates(tokenizer, None), templates(tokenizer, None)
    first._fronts = ([], [])
    assert second._fronts != first._fronts  # what one finds out later is its own


def test_what_is_kept_has_bounds(made: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """In number, in time, in size; and a template that fails is not kept."""
    monkeypatch.setattr(module, "MOST", 2)
    tokenizer, templates = talker()[1], Templates(40)
    for system in ("a", "b", "a", "c", "a", "b"):
        templates(tokenizer, system)
    assert made == ["a", "b", "c", "b"]
    templates(tokenizer, "long " * 40)
    assert len(templates._kept) == 2
    assert "long " * 40 not in {system for system, _ in templates._kept}
    with pytest.raises(ConfigError):
        templates(tokenizer, "a", chat_template="{{ raise_exception('no') }}")
    monkeypatch.setattr(module, "SECONDS", 0.0)
    before = len(made)
    templates(tokenizer, "a")
    templates(tokenizer, "a")
    assert len(made) == before + 2
