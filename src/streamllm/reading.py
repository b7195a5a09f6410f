"""Text of any length to ids, piece by piece, in constant memory; and bytes to text.

The ids are those of ``tokenizer(whole_text)``. Text is encoded in overlapping stretches. The end of a stretch waits for
more text, because what follows can change its tokens; at the front stands text whose ids were given out before, and new
ids are taken only from where both stretches have the same tokens. Where no merge crosses a border, the tokens after it
do not depend on those before. Nothing here knows about models.

Two things cannot be exact in bounded memory and are cut instead: one token for more than ``LONGEST_WAIT`` characters
(some tokenizers make one unknown token of a long run), and a word longer than ``HOLD_BACK`` that is split from its
right end. Slow tokenizers tell no offsets; with them the text is cut before whitespace, which is exact for those that
split there.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from streamllm.errors import ConfigError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ_BATCH = 8_192
"""Most characters that are encoded at once; longer stretches are no faster and make the first ids wait."""

HOLD_BACK = 256
"""Characters, besides the longest added token, that may still change the tokens before them."""

LONGEST_WAIT = 65_536
"""Characters held back at most where no border between tokens is found."""

OVERLAPS = (48, 49, 50, 256)
"""Tokens of context tried in front of a stretch, in turn until it is in step; neighbours, since digits go in threes."""

CONTEXT_CHARS = 8_192
"""Characters of context at most, however long its tokens are."""

CHECKED = 16
"""Tokens before the border that must be the same in both stretches."""

HEADS = ("", "\n", "a")
"""Texts tried in front of the context, because many tokenizers treat the start of a text differently."""

_Stretch = tuple[list[int], list[tuple[int, int]], int, int]
"""Ids, their spans, what to add to a span to get a place in the text, and the index of the first new token."""

_END = itemgetter(1)
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_ids(
    tokenizer: PreTrainedTokenizerBase,
    pieces: str | Iterable[str],
    *,
    add_special_tokens: bool = True,
    batch_chars: int = READ_BATCH,
) -> Iterator[list[int]]:
    """Yield the ids of ``tokenizer(text).input_ids`` in lists, as the text arrives.

    Args:
        tokenizer: a fast tokenizer, or a slow one (see above).
        pieces: the text, whole or in pieces of any size.
        add_special_tokens: begin with the special tokens that the tokenizer puts in front, such as BOS. Those that it
            would append, such as EOS, are never added.
        batch_chars: characters encoded at once, >= 1.

    Raises:
        ConfigError: ``batch_chars`` is below 1.
        InputError: the text cannot be encoded.
    """
    if batch_chars < 1:
        raise ConfigError(f"batch_chars must be at least 1, you gave {batch_chars}.")
    return _read(tokenizer, [pieces] if isinstance(pieces, str) else pieces, add_special_tokens, batch_chars)


def decode_utf8(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the text of UTF-8 bytes that come in chunks of any size; a byte order mark at the start is left out.

    Raises:
        InputError: the bytes are not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset = 0  # of the first byte that the decoder has not given out
    begun = False
    for chunk in chain(chunks, [None]):
        waiting = decoder.getstate()[0]
        try:
            text = decoder.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            raise InputError(
                f"The input is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + error.start} "
                f"({error.reason}); convert it first, for example with `iconv -f LATIN1 -t UTF-8`."
            ) from error
        offset += len(waiting) + len(chunk or b"") - len(decoder.getstate()[0])
        if text:
            text = text if begun else text.removeprefix("\ufeff")
            begun = True
            yield text


def _read(
    tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str], add_special_tokens: bool, batch_chars: int
) -> Iterator[list[int]]:
    """Yield the ids; see ``read_ids``."""
    waiting = _leading_ids(tokenizer) if add_special_tokens else []
    reader = _OffsetReader(tokenizer) if getattr(tokenizer, "is_fast", False) else _Reader(tokenizer)
    for piece in pieces:
        for start in range(0, len(piece), batch_chars):
            waiting += reader.push(piece[start : start + batch_chars])
            if waiting:
                yield waiting
                waiting = []
    waiting += reader.finish()
    if waiting:
        yield waiting


class _Reader:
    """Encodes a text in stretches that end before whitespace; all that can be done without offsets.

    ``_text`` is the context, whose ids were given out, and then the text that waits from ``_given`` on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self._hold = HOLD_BACK + max((len(token.content) for token in added), default=0)
        self._text = ""
        self._given = 0
        self._dropped = 0  # characters of the stream before _text
        self._enough = 2 * self._hold  # waiting characters that make an attempt worth its time

    def push(self, text: str) -> list[int]:
        """Take more text; return the ids that became certain."""
        self._text += text
        waiting = len(self._text) - self._given
        if waiting < self._enough:
            return []
        ids = self._take(len(self._text) - self._hold, forced=waiting >= LONGEST_WAIT)
        # Without a border the same text is encoded again, so wait for twice as much.
        self._enough = 2 * self._hold if ids else min(2 * waiting, LONGEST_WAIT)
        return ids

    def finish(self) -> list[int]:
        """Return the ids of all that waits."""
        return self._take(None, forced=True)

    def _take(self, limit: int | None, *, forced: bool) -> list[int]:
        """Give out ids up to a border before character ``limit``, or all; a border is made if forced."""
        cut = len(self._text) if limit is None else self._last_gap(limit)
        if cut is None:
            if not forced:
                return []
            cut = limit
        context, new = self._text[: self._given], self._text[self._given : cut]
        before, both = self._encode(context)["input_ids"], self._encode(context + new)["input_ids"]
        in_step = both[: len(before)] == before
        ids: list[int] = both[len(before) :] if in_step else self._encode(new)["input_ids"]
        self._given += len(new)
        self._drop(max(0, self._given - HOLD_BACK))
        return ids

    def _last_gap(self, limit: int) -> int | None:
        """Return where the last run of whitespace between what was given and ``limit`` begins."""
        for i in range(limit - 1, self._given, -1):
            if self._text[i].isspace() and not self._text[i - 1].isspace():
                return i
        return None

    def _drop(self, count: int) -> None:
        """Forget ``count`` characters at the front."""
        self._text = self._text[count:]
        self._given -= count
        self._dropped += count

    def _encode(self, text: str, **options: Any) -> Any:
        """Return the tokenizer's encoding of ``text`` alone, without special tokens around it."""
        try:
            return self._tokenizer(
                text,
                add_special_tokens=False,
                truncation=False,
                padding=False,
                verbose=False,
                **options,
            )
        except Exception as error:
            if half := _SURROGATE.search(self._text):
                raise InputError(
                    f"The text has the lone surrogate {half.group()!a} at character {self._dropped + half.start()}, "
                    "which is half a character and cannot be encoded; read the text as UTF-8 with errors='replace'."
                ) from error
            raise InputError(
                f"The tokenizer cannot encode the text after character {self._dropped} ({type(error).__name__}: "
                f"{error}); check that the text is plain text and the tokenizer belongs to the model."
            ) from error


class _OffsetReader(_Reader):
    """Encodes a text in overlapping stretches and finds by the offsets where they are in step."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self._known: list[tuple[int, int, int]] = []  # id, start, end in _text of the last tokens given out
        self._heads: tuple[str, ...] = HEADS

    def _take(self, limit: int | None, *, forced: bool) -> list[int]:
        ids, spans, shift, first = self._encode_in_step()
        # All tokens of one character end at the same place, so a character is never cut.
        last = len(ids) if limit is None else bisect_right(spans, limit - shift, key=_END)
        if last <= first and forced:
            last = len(ids)
        if last > first:
            span_of = zip(ids[first:last], spans[first:last], strict=True)
            self._remember([(id, start + shift, end + shift) for id, (start, end) in span_of])
        return ids[first:last]

    def _encode_in_step(self) -> _Stretch:
        """Encode the waiting text with as much context as puts it in step."""
        for start in self._starts():
            is_middle = self._dropped + start > 0
            for head in self._heads if is_middle else ("",):
                ids, spans, shift, first = self._stretch(head, start)
                if self._is_in_step(ids[:first], spans[:first], shift):
                    if is_middle:  # what worked once most likely works again
                        self._heads = (head, *(h for h in HEADS if h != head))
                    return ids, spans, shift, first
        # Never in step: begin afresh at the border, after a line end if that is a token of its own.
        ids, spans, shift, first = self._stretch("\n", self._given)
        is_clean = first == len(ids) or spans[first][0] + shift >= self._given
        return (ids, spans, shift, first) if is_clean else self._stretch("", self._given)

    def _stretch(self, head: str, start: int) -> _Stretch:
        """Encode ``head`` and the text from ``start`` on."""
        encoded = self._encode(head + self._text[start:], return_offsets_mapping=True)
        shift = start - len(head)
        spans = encoded["offset_mapping"]
        # Some tokens of whitespace have an empty span; at the very front they must not be taken for old ones.
        first = bisect_right(spans, self._given - shift, key=_END) if self._given > shift else 0
        return encoded["input_ids"], spans, shift, first

    def _starts(self) -> list[int]:
        """Return places in the context where a token ends, the nearest first."""
        starts: list[int] = []
        for width in OVERLAPS if self._known else ():
            if not self._dropped and width >= len(self._known):
                return [*starts, 0]  # the true start of the text
            starts.append(self._known[-width:][0][2])
        return starts if self._dropped else [*starts, 0]

    def _is_in_step(self, ids: list[int], spans: list[tuple[int, int]], shift: int) -> bool:
        """Say whether these tokens end with the last ones that were given out."""
        known = self._known[-CHECKED:]
        tail = zip(ids[-len(known) :], spans[-len(known) :], strict=True) if known else ()
        return known == [(id, s + shift, e + shift) for id, (s, e) in tail]

    def _remember(self, new: list[tuple[int, int, int]]) -> None:
        """Record tokens given out, and forget the text that no stretch will begin in any more."""
        self._given = new[-1][2]
        known = [token for token in (self._known + new)[-OVERLAPS[-1] :] if token[1] >= self._given - CONTEXT_CHARS]
        if len(self._known) + len(new) <= len(known):
            self._known = known
            return
        cut = known[0][2] if known else self._given
        self._known = [(id, start - cut, end - cut) for id, start, end in known]
        self._drop(cut)


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special ids that the tokenizer puts in front of a text."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    front = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return full[: next(front, 0)]
