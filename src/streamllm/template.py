"""How a conversation is spelt in ids for one tokenizer, turn by turn; the past is never spelt again.

A conversation is its head, the first turn, and then for every reply what closes it and the next turn. Each piece is cut
from a short conversation that the model's own chat template renders: the system prompt, an invented exchange, the new
text. So the cost of a turn does not grow with the conversation, and all that the template does to a text, such as
trimming, is done. At the start a trial conversation is spelt both ways. A template whose pieces are not the whole, such
as one that moves the system prompt to the last turn, or whose closing melts into the reply, is not incremental.

Replies are not spelt here: they stay in the cache as the model wrote them. So do blanks at their ends and reasoning,
which many templates take away from past replies.

A user's text that holds a control token, such as ``<|im_end|>``, gets the ids of its letters, or anyone could forge
turns. This is the ``sanitize_control_tokens`` of transformers; every other text has the ids that its template gives.
Plain text, for models without a template, has no turns to forge, and is read as everywhere else.

Nothing here knows about models, caches or windows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any

from streamllm.errors import ConfigError, InputError
from streamllm.reading import read_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""``role`` ("user" or "assistant") and ``content``."""

ASKED, REPLIES = "Hello", ("Yes", "No")
"""The invented exchange. The replies end in different tokens, so that where they end can be seen."""

BEGINNINGS = ("a", "7", "é", "(", " b", "    b", "    ", "\n", "\n\n", "\t", "")
"""Beginnings of a user's text that may melt into what stands before it, each in another way."""

TRIAL = (
    ("Hello", "Hello there."),
    ("  What is 12 + 30?\n", "42"),
    ("Two lines:\n\n- one\n- two", "First:\n\n1. one\n2. two!"),
    ("naïve café 你好", "Café 😀"),
    ("(why?)", "```\ndef f(x):\n    return x\n```"),
    ("'s <b> 1,000", 'He said "yes" (so):'),
    *((mark, f"Yes{mark}") for mark in '?)"*。'),
    ("\tgo on", ""),
)
"""User's texts and the replies to them, of which the last is yet to come. A reply's end may melt into its closing."""

REASONED = (("Hello", "<think>\nHm.\n</think>\n\nHello there."), ("Why?", ""))
"""A reply with reasoning."""

ATTEMPTS = 2
"""A clock in the template may go on while ids are compared; it will hardly do so twice."""

SHOWN = 6
"""Tokens shown from where the pieces and the whole part."""


class ChatTemplate:
    """The ids of a conversation, piece by piece.

    Args:
        tokenizer: the model's. Without a chat template the conversation is plain text.
        system: the system prompt; ``None`` leaves it to the template, which may have one of its own.
        options: what the template knows besides the messages, such as ``enable_thinking=False``; and ``chat_template``,
            a template or the name of one of the tokenizer's.

    Attributes:
        is_plain: there is no chat template.
        is_incremental: the pieces give the ids of the whole. If not, only ``head`` and ``whole`` can be used.
        notes: what the user should be told once, a sentence each.
        head: ids to pin, with which every conversation begins: what the template puts before the first turn, with the
            system prompt. If the template puts a date there, it is that of the construction.

    Raises:
        ConfigError: the template fails or leaves the user's text out, or an option is unknown.
        InputError: the system prompt cannot be encoded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None, **options: Any) -> None:
        self._tokenizer = tokenizer
        self._system = system
        self._options = options
        self._has_system_role = True
        self.is_plain = not (options.get("chat_template") or getattr(tokenizer, "chat_template", None))
        self.is_incremental = True
        self.notes: tuple[str, ...] = ()
        self._closing = 0
        self._check_options()
        self.head = self._read(f"{system}\n" if system else "", add_special_tokens=True)
        if self.is_plain:
            self.notes += ("The model has no chat template, so the chat is plain text that the model goes on with.",)
            return
        added = [token for token in tokenizer.added_tokens_decoder.values() if not token.content.isspace()]
        self._control = [token.content for token in added]
        # Others, such as </think>, may be what the template looks for in a reply.
        self._control_in_reply = [token.content for token in added if token.special]
        try:
            self._set_up()
        except InputError as error:
            raise ConfigError(
                f"The model's chat template cannot be used ({_reason(error.__cause__ or error)}); choose another model."
            ) from error

    def opening(self, text: str) -> list[int]:
        """Return the ids of the first turn after ``head``, through the generation prompt.

        Args:
            text: the user's text, without the system prompt.

        Raises:
            InputError: the text cannot be encoded, or the template refuses it.
            ConfigError: the template is not incremental.
        """
        return self._read(text) if self.is_plain else self._behind(0, text)

    def following(self, text: str, end_id: int | None) -> list[int]:
        """Return the ids from the end of a reply on: what closes it, the next turn, the generation prompt.

        Args:
            text: the user's text.
            end_id: the end token that the model drew after the reply and that has not been read; ``None`` if the reply
                was cut off. Plain text puts it back, or a line end. A template closes a reply itself and ignores it.

        Raises:
            InputError: the text cannot be encoded, or the template refuses it.
            ConfigError: the template is not incremental.
        """
        if self.is_plain:
            return [*(self._read("\n") if end_id is None else [end_id]), *self._read(text)]
        return self._behind(1, text)

    def whole(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation rendered at once, from its head through the generation prompt.

        Args:
            messages: turns of the user and the assistant, the first and the last the user's. The system prompt is put
                in front. In plain text a line end follows every reply.

        Raises:
            InputError: the roles are others, a text cannot be encoded, or the template refuses it.
        """
        roles = [message["role"] for message in messages]
        if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
            given = ", ".join(roles) or "nothing"
            raise InputError(f"A conversation to be continued goes user, assistant, ..., user; you gave {given}.")
        if not self.is_plain:
            return self._spell(messages)
        first, *later = [message["content"] for message in messages]
        exchanges = zip(later[::2], later[1::2], strict=True)
        pieces = ((self._read(reply), self.following(text, None)) for reply, text in exchanges)
        return [*self.head, *self._read(first), *chain.from_iterable(chain.from_iterable(pieces))]

    def closing(self, end_id: int | None) -> int:
        """Return how many ids of ``following`` close the reply; the next turn begins behind them.

        Args:
            end_id: as of ``following``.
        """
        if self.is_plain:
            return len(self._read("\n")) if end_id is None else 1
        return self._closing

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self._system

    # ---- at the start

    def _check_options(self) -> None:
        """Refuse options that the template does not mention; jinja would ignore them."""
        try:
            source = "" if self.is_plain else self._tokenizer.get_chat_template(self._options.get("chat_template"))
        except ValueError as error:
            raise ConfigError(f"The model has several chat templates, name one as chat_template: {error}") from error
        for name in self._options.keys() - {"chat_template"}:
            if not re.search(rf"\b{re.escape(name)}\b", source):
                what = "has none" if self.is_plain else "does not mention it"
                raise ConfigError(f"{name!r} is an option for a chat template, and the model's {what}; leave it out.")

    def _set_up(self) -> None:
        """Learn what the template does, and say what is unusual."""
        if self._system is not None and not self._finds_system_role():
            self._has_system_role = False
            if self._system:
                self.notes += ("The chat template takes no system prompt, so yours goes into the first message.",)
        for _ in range(ATTEMPTS):
            self._fronts = self._measure()
            difference = self._difference(TRIAL)
            if difference is None:
                break
        self.is_incremental = difference is None
        self.head = list(self._fronts[0])
        if difference is not None:
            because = f"The chat template cannot be applied turn by turn ({difference})"
            self.notes += (f"{because}, so the window is read again at every turn.",)
        elif self._difference(REASONED) is not None:
            self.notes += ("The chat template leaves reasoning out of past replies; here it stays in the window.",)

    def _finds_system_role(self) -> bool:
        """Say whether the template neither refuses a system prompt nor drops it."""
        try:
            one, other = (self._render([_message("system", text), _message("user", ASKED)]) for text in REPLIES)
        except InputError:
            return False
        return one != other

    def _measure(self) -> tuple[list[int], list[int]]:
        """Return what stands before a piece: the head, and the short conversation through the end of its reply."""
        past, other = ([_message("user", ASKED), _message("assistant", reply)] for reply in REPLIES)
        for _ in range(ATTEMPTS):
            known, changed = (self._spell([*before, _message("user", ASKED)]) for before in (past, other))
            through_reply = known[: len(known) - _common_suffix(known, changed)]
            first, later = self._shared([]), self._shared(past)[len(through_reply) :]
            with suppress(InputError):
                # What closes a reply may also close the system prompt, as part of the head. The turn begins after it.
                ended, changed = (self._spell(before, prompt=False) for before in (past, other))
                closing = ended[len(ended) - _common_suffix(ended, changed) :]
                self._closing = len(_common_prefix(later, closing))
                later = later[self._closing :]
            # A template may count the messages in its head.
            head = _common_prefix(first[: len(first) - _common_suffix(first, later)], known)
            if known == self._spell(self._short(ASKED)):
                break
        return head, through_reply

    def _shared(self, past: list[Message]) -> list[int]:
        """Return the ids that come before any text after ``past``."""
        spelt = self._spell([*past, _message("user", ASKED)])
        shared = spelt
        for text in BEGINNINGS:
            with suppress(InputError):  # some templates refuse an empty text
                shared = _common_prefix(shared, self._spell([*past, _message("user", text)]))
        if shared == spelt:
            raise ConfigError("The model's chat template leaves the user's text out; choose another model.")
        return shared

    def _difference(self, exchanges: Iterable[tuple[str, str]]) -> str | None:
        """Say where the whole of these exchanges is not their pieces; ``None`` if it is."""
        said: list[Message] = []
        pieces: list[int] = []
        for text, reply in exchanges:
            whole = self._spell([*said, _message("user", text)])
            if said:
                later = self._spell(self._short(text))[len(self._fronts[1]) :]
                # A reply may begin otherwise than alone: with a blank, say, which the model then writes itself.
                ids = whole[len(pieces) : len(whole) - len(later)]
                alone = self._tokenizer(said[-1]["content"], add_special_tokens=False)["input_ids"]
                pieces += [*(ids if self._letters(ids) == self._letters(alone) else alone), *later]
                if pieces != whole:
                    at = len(_common_prefix(pieces, whole))
                    wanted, got = (self._tokenizer.decode(ids[at : at + SHOWN]) for ids in (whole, pieces))
                    is_same_text = self._letters(whole) == self._letters(pieces)
                    there = "it in other tokens" if is_same_text else repr(got)
                    return f"it gives {wanted!r} where the turns alone give {there}"
            pieces = whole
            said += [_message("user", text), _message("assistant", reply)]
        return None

    def _letters(self, ids: list[int]) -> str:
        """Return the text of ids without blanks in front."""
        return str(self._tokenizer.decode(ids)).lstrip()

    # ---- at every turn

    def _short(self, text: str) -> list[Message]:
        """Return the invented exchange and the text."""
        return [_message("user", ASKED), _message("assistant", REPLIES[0]), _message("user", text)]

    def _behind(self, place: int, text: str) -> list[int]:
        """Return what comes after the head (``place`` 0) or after the invented reply (1)."""
        if not self.is_incremental:
            raise ConfigError("This chat template cannot be applied turn by turn; read whole(messages) instead.")
        for _ in range(ATTEMPTS):
            ids = self._spell(self._short(text) if place else [_message("user", text)])
            front = self._fronts[place]
            if ids[: len(front)] == front:
                return ids[len(front) :]
            self._fronts = self._measure()  # a template that dates itself has another head on another day
        raise InputError(
            "The model's chat template changes what stands before this text because of it, so it cannot be read alone; "
            "say it in other words."
        )

    def _spell(self, messages: Sequence[Message], *, prompt: bool = True) -> list[int]:
        """Return the ids of a conversation with the system prompt."""
        first, *later = messages
        if self._system is not None and self._has_system_role:
            messages = [_message("system", self._system), *messages]
        elif self._system:
            messages = [_message("user", f"{self._system}\n\n{first['content']}"), *later]
        return self._render(messages, prompt=prompt)

    def _render(self, messages: Sequence[Message], *, prompt: bool = True) -> list[int]:
        """Return the ids of what the template makes of these messages."""
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(  # type: ignore[assignment]
                [dict(message) for message in messages],
                add_generation_prompt=prompt,
                # Only where there is one, since looking for them takes long if the tokenizer has thousands.
                sanitize_control_tokens=self._hold_control_token(messages),
                return_dict=False,
                tokenizer_kwargs={"verbose": False},
                **self._options,
            )
        except Exception as error:
            for message in messages:
                self._read(message["content"])  # says it better, if it is the text that cannot be encoded
            raise InputError(
                f"The model's chat template refuses this text ({_reason(error)}); say it in other words."
            ) from error
        return ids

    def _hold_control_token(self, messages: Sequence[Message]) -> bool:
        """Say whether the text of a message holds a control token."""
        replies = "\n".join(message["content"] for message in messages if message["role"] == "assistant")
        others = "\n".join(message["content"] for message in messages if message["role"] != "assistant")
        # Some tokenizers have thousands of these, which a loop of Python would take its time over.
        return any(map(others.__contains__, self._control)) or any(map(replies.__contains__, self._control_in_reply))

    def _read(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of a text alone."""
        return list(chain.from_iterable(read_ids(self._tokenizer, text, add_special_tokens=add_special_tokens)))


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _common_prefix(one: list[int], other: list[int]) -> list[int]:
    """Return the ids with which both begin."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:at]


def _common_suffix(one: list[int], other: list[int]) -> int:
    """Return with how many ids both end."""
    return len(_common_prefix(one[::-1], other[::-1]))


def _reason(error: BaseException) -> str:
    """Return the class of an error and its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
