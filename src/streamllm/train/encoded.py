"""The corpus as ids on disk: encoded once, in constant memory, then mapped, so that its size does not matter.

``NAME.bin`` holds the ids, two or four bytes each; ``NAME.json`` says what they were made from. An encoded corpus is
used again only if its sources (path, size, time of change) and its tokenizer are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamllm.atomic import write_atomically
from streamllm.corpus import Piece, Source, no_text, read_file
from streamllm.errors import InputError
from streamllm.train.sequences import Stretch
from streamllm.train.vocabulary import encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """An encoded corpus. ``utf8_bytes``: of its text, to compare losses of models with different tokenizers."""

    ids: NDArray[np.unsignedinteger]
    stretches: list[Stretch]
    utf8_bytes: int

    def part(
        self, share: float, *, least: int, most: int, spell: Callable[[list[int]], str]
    ) -> tuple[Encoded, dict[str, Encoded]]:
        """This corpus without the end of each stretch, and those ends by name.

        Args:
            share: of a stretch that its end is, within ``least`` and ``most`` tokens. A stretch that would have no more
                left than it gives is kept whole.
            spell: the text of ids, whose bytes are counted.

        Raises:
            InputError: every stretch is too short.
        """
        kept, ends = [], {}
        for number, stretch in enumerate(self.stretches):
            length = stretch.end - stretch.begin
            held = min(most, max(least, round(share * length)))
            if length < 2 * held:
                kept.append(stretch)
                continue
            cut = stretch.end - held
            kept.append(Stretch(stretch.begin, cut, stretch.weight))
            ids = self.ids[cut : stretch.end]
            name = "held-out" if len(self.stretches) == 1 else f"held-out-{number}"
            ends[name] = Encoded(ids, [Stretch(0, held)], len(spell(ids.tolist()).encode()))
        if not ends:
            raise InputError(
                f"The text has {len(self.ids)} tokens, too few to hold {least} out for measuring: give more text, a "
                "text with --heldout, or a smaller --context."
            )
        return Encoded(self.ids, kept, self.utf8_bytes), ends


def encode_corpus(
    sources: Sequence[Source], tokenizer: Tokenizer, name: Path, *, watch: Callable[[int], None] = lambda done: None
) -> Encoded:
    """Encode ``sources`` into ``name.bin``, unless that was done before; ``watch`` is told the ids so far.

    Raises:
        ConfigError: the tokenizer has no ids for the text.
        InputError: a source cannot be read, or there is no text in any.
        OSError: the disk is full.
    """
    index, data = name.with_suffix(".json"), name.with_suffix(".bin")
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
    made_from = _describe(sources, tokenizer)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return _read(index, data, dtype, made_from)
    index.unlink(missing_ok=True)  # it must never describe other ids than those beside it
    found = {"made_from": made_from, **_write(sources, tokenizer, data, dtype, watch)}
    write_atomically(index, json.dumps(found, indent=1).encode())
    return _read(index, data, dtype, made_from)


def _describe(sources: Sequence[Source], tokenizer: Tokenizer) -> dict[str, Any]:
    files = []
    for source in sources:
        try:
            facts = source.file.stat()
        except OSError as error:
            raise InputError(f"{source.file} cannot be read: {error.strerror}; put it back.") from error
        files.append([str(source.file.resolve()), facts.st_size, facts.st_mtime_ns, source.weight])
    return {"files": files, "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest()}


def _read(index: Path, data: Path, dtype: np.dtype[Any], made_from: dict[str, Any]) -> Encoded:
    """What was encoded before.

    Raises:
        OSError, ValueError, KeyError, TypeError: there is nothing, or it cannot be used.
    """
    found = json.loads(index.read_text(encoding="utf-8"))
    if found["made_from"] != made_from or data.stat().st_size != found["bytes"]:
        raise ValueError("of another text or tokenizer")
    stretches = [Stretch(**stretch) for stretch in found["stretches"]]
    return Encoded(np.memmap(data, dtype, mode="r"), stretches, int(found["utf8_bytes"]))


def _write(
    sources: Sequence[Source], tokenizer: Tokenizer, data: Path, dtype: np.dtype[Any], watch: Callable[[int], None]
) -> dict[str, Any]:
    """Encode into a file beside ``data``, which takes its place when it is complete, and say what is in it."""
    part = data.with_suffix(".part")  # a fixed name: what a process that was killed left is written over
    total = size = 0
    stretches: list[Stretch] = []

    def measured(pieces: Iterator[Piece]) -> Iterator[Piece]:
        nonlocal size
        for piece in pieces:
            size += len(piece.text.encode())
            yield piece

    try:
        with part.open("wb") as out:
            for source in sources:
                begin = total
                for ids in encode(tokenizer, measured(read_file(source))):
                    out.write(np.asarray(ids, dtype).tobytes())
                    total += len(ids)
                    watch(total)
                if stretches and stretches[-1].weight == source.weight:  # windows may run over the border
                    begin = stretches.pop().begin
                stretches.append(Stretch(begin, total, source.weight))
            out.flush()
            os.fsync(out.fileno())
        if not total:
            raise no_text(sources)
        part.replace(data)
    finally:
        part.unlink(missing_ok=True)
    stretches = [stretch for stretch in stretches if stretch.end > stretch.begin]
    return {"stretches": [asdict(s) for s in stretches], "utf8_bytes": size, "bytes": total * dtype.itemsize}
