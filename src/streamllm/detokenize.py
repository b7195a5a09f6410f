"""Ids to text, one id at a time, in constant memory; and stop strings.

Text comes out as soon as it is certain: a character whose bytes are spread over several ids is held back until it is
whole. Nothing here knows about models or prompts' templates. ``tokenizers.DecodeStream`` does the work where the
tokenizer is a fast one; alone it would grow for ever on ids without text and on broken bytes, so ``Decoder`` keeps
those from it and starts it afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from streamllm.errors import ConfigError, StateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_HELD = 8
"""Most ids held back. A character has at most 4 bytes, so more than 3 ids that end in no character are broken bytes."""

PRIME_TAIL = 16
"""Ids of a prompt that are enough to know how the text goes on after it."""

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Decoder:
    """Decodes one stream of ids.

    The pushed texts and the last ``flush()`` joined are ``tokenizer.decode(ids, skip_special_tokens=...)``, without
    its optional clean-up of spaces, wherever the bytes are UTF-8.

    Args:
        tokenizer: fast or slow; only ``decode`` is needed of a slow one.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._backend: Tokenizer | None = backend if isinstance(backend, Tokenizer) else None
        self._silent: frozenset[int] = frozenset(self._special_ids() if skip_special_tokens else ())
        # The stream's text is that of context + held, less that of context, which has been shown.
        self._context: list[int] = []
        self._held: list[int] = []
        self._stream = DecodeStream(ids=[], skip_special_tokens=skip_special_tokens)

    def push(self, id: int) -> str:
        """Take the next id; return the text that became certain, which may be empty."""
        if id in self._silent or not self._is_known(id):
            return ""
        self._held.append(id)
        try:
            text = self._step(id)
        except Exception:
            # DecodeStream has no narrower class for "Invalid prefix": a run of byte tokens turned out broken after its
            # head was shown.
            return self.flush()
        if text is None:
            return self._give_up() if len(self._held) >= MAX_HELD else ""
        self._context, self._held = self._held, []
        return text

    def prime(self, ids: Sequence[int]) -> None:
        """Take ids whose text is not wanted, such as a prompt's, so that the next text goes on after them."""
        tail = islice((id for id in reversed(ids) if id not in self._silent), PRIME_TAIL)
        for token in reversed(list(tail)):
            self.push(token)

    def flush(self) -> str:
        """Return what is held back, with U+FFFD for bytes that are no character."""
        if not self._held:
            return ""
        text = self._text_of_held()
        if text and not text.endswith(_BROKEN):
            self._restart(self._held)
        else:
            # Broken bytes must not mix with those to come, and what comes next is not the start of a text.
            self._restart(self._tokenizer.encode("a", add_special_tokens=False)[-1:])
        return text

    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on, ready for JSON; a few ids."""
        return {"context": list(self._context), "held": list(self._held), "skip_special_tokens": self._skip}

    @classmethod
    def from_state(cls, tokenizer: PreTrainedTokenizerBase, state: dict[str, Any]) -> Decoder:
        """Return a decoder that goes on where ``state()`` was taken.

        Raises:
            StateError: the state is incomplete or damaged.
        """
        try:
            decoder = cls(tokenizer, skip_special_tokens=bool(state["skip_special_tokens"]))
            context = [int(token) for token in state["context"]]
            held = [int(token) for token in state["held"]]
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"The saved decoder cannot be used ({type(error).__name__}: {error}); it is damaged or was written by "
                "another version, so start the stream with a new decoder."
            ) from error
        if strange := [token for token in context + held if not decoder._is_known(token)]:
            raise StateError(
                f"The saved decoder has the id {strange[0]}, which this tokenizer does not have; load it with the "
                "tokenizer that it was saved with."
            )
        decoder._restart(context)
        for token in held:
            decoder.push(token)
        return decoder

    def _step(self, id: int) -> str | None:
        """Return the text of context + held less that of context, or None while it is uncertain."""
        if self._backend is None:
            text = self._text_of_held()
            return None if not text or text.endswith(_BROKEN) else text
        return self._stream.step(self._backend, id)

    def _give_up(self) -> str:
        """Show held ids that are no text, but not the start of a character at their end nor characters among them."""
        held, whole = self._held, self._decode(self._held)

        def broken(cut: tuple[int, int]) -> int:
            texts = [self._decode(part) for part in (held[: cut[0]], held[cut[0] : cut[1]], held[cut[1] :])]
            # Slow tokenizers may leave broken bytes out, so fewer U+FFFD are no sign of whole characters.
            return "".join(texts) != whole if self._backend is None else "".join(texts).count(_BROKEN)

        ends = range(len(held) - 3, len(held) + 1)
        begin, end = min(((begin, end) for end in ends for begin in range(end + 1)), key=broken)
        cut = begin or end
        self._held = held[:cut]
        return self.flush() + "".join(self.push(token) for token in held[cut:])

    def _text_of_held(self) -> str:
        """Return the text of the held ids after the context."""
        shown, text = self._decode(self._context), self._decode(self._context + self._held)
        return text[len(shown) :] if text.startswith(shown) else self._decode(self._held)

    def _decode(self, ids: list[int]) -> str:
        """Return the text of a few ids."""
        if self._backend is not None:
            return self._backend.decode(ids, skip_special_tokens=self._skip)
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False))

    def _restart(self, context: list[int]) -> None:
        """Go on after ``context``, whose text has been shown, with nothing held."""
        self._context, self._held = context, []
        self._stream = DecodeStream(ids=context, skip_special_tokens=self._skip)

    def _special_ids(self) -> list[int]:
        """Return the ids that have no text when special tokens are skipped."""
        if self._backend is None:
            return list(self._tokenizer.all_special_ids)
        return [id for id, token in self._backend.get_added_tokens_decoder().items() if token.special]

    def _is_known(self, id: int) -> bool:
        """Say whether the vocabulary has this id."""
        if self._backend is None:
            return 0 <= id < len(self._tokenizer)
        return 0 <= id < 2**32 and self._backend.id_to_token(id) is not None


class StopStrings:
    """Finds the first stop string in a text that comes in pieces.

    Where the pieces are cut makes no difference: the stop that is complete first wins, and of several that end
    together the longest.

    Args:
        stops: strings that end the text; none of them is shown.

    Raises:
        ConfigError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(stops):
            raise ConfigError("A stop string is empty; it would stop the text before it begins, so leave it out.")
        self._stops = stops
        self._most = max(map(len, stops), default=1) - 1
        self._tail = ""
        self._hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text; return what is safe to show and whether a stop string was found.

        At most ``max(len(stop)) - 1`` characters are held back. Nothing is shown after a stop string.
        """
        if self._hit:
            return "", True
        text = self._tail + text
        ends = [(text.index(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
        if ends:
            end, length = min(ends)
            self._tail, self._hit = "", True
            return text[: end + length], True
        cut = len(text) - self._begun(text)
        self._tail = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        text, self._tail = self._tail, ""
        return text

    def _begun(self, text: str) -> int:
        """Return how many characters at the end of ``text`` may be the head of a stop string."""
        for count in range(min(self._most, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                return count
        return 0
