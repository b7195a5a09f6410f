"""``streamllm pipe`` carried out: every record of standard input is answered on a line of its own, as long as any come.

Knows the terminal, forms and pipes, but no flags (``cli_pipe``). From the moment on that the stream begins, Ctrl-C is
only noted: the answer that is being written ends after the token, is printed as far as it is, and what was read and
written is saved. A long record that is being read is broken off, and waits in what is saved.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from streamllm.config import CacheConfig, SamplingConfig, check_count
from streamllm.console import PATIENCE, Answer, Screen, Signals, read_bytes
from streamllm.errors import ConfigError, InputError, StateError
from streamllm.form import Form
from streamllm.records import Record, split_records
from streamllm.run import check_target, go_on_drawing, open_stream, reading, show_banner, told

if TYPE_CHECKING:
    from streamllm.loop import Chunk
    from streamllm.pipe import Pipe

OnError = Literal["stop", "skip"]

ON_ERROR: tuple[OnError, ...] = ("stop", "skip")

PIECE_BYTES = 4096
"""Most that is read beyond the end of the record that is being answered."""

SAVED = Record(0, 0, b"")
"""Stands for the records that wait in a saved stream and are enough to be answered."""


@dataclass(frozen=True)
class PipeJob:
    """What one run of a pipe shall do; see the flags of ``streamllm pipe``.

    Args:
        every: how many records make one turn, answered after the last of them.
        explicit: names of the settings that stand on the command line itself. Only they may change a saved stream.

    Raises:
        ConfigError: a value cannot be used.
    """

    form: Form
    system: str | None
    every: int
    on_error: OnError
    model: str | None
    device: str
    dtype: str
    quantize: str
    cache: CacheConfig
    compile: bool
    sampling: SamplingConfig
    explicit: frozenset[str]
    max_tokens: int
    stop: tuple[str, ...]
    template_options: dict[str, Any]
    save: Path | None
    resume: Path | None
    stats: bool
    json: bool
    quiet: bool
    verbose: bool

    def __post_init__(self) -> None:
        check_count("every", self.every, 1)
        check_count("max_tokens", self.max_tokens, 1)
        if self.on_error not in ON_ERROR:
            raise ConfigError(f"on_error must be one of {', '.join(ON_ERROR)}, you gave {self.on_error!r}.")

    def run(self) -> int:
        """Carry it out; return the exit status.

        Raises:
            StreamLLMError: something expected went wrong; what can be saved is saved before.
        """
        with Signals() as signals, Screen(quiet=self.quiet, verbose=self.verbose) as screen:
            # 1. what can be refused before the model is loaded
            answer = Answer()
            if self.save is not None:
                check_target(self.save)

            # 2. the model, and the stream to go on with
            pipe, waiting = self._open(screen)

            # 3. the records
            signals.defer()
            error: InputError | None = None
            last: Chunk | None = None
            with told(screen):
                try:
                    for chunk, line in self._answers(pipe, waiting, screen, signals):
                        last = chunk
                        if not answer.write(answer.shown(line) + "\n"):
                            break
                except InputError as found:
                    error = InputError(f"{found} --on-error skip leaves such records out.")
                    error.__cause__ = found

            # 4. leave in order
            if self.save is not None:
                from streamllm.state import save_state

                metadata = {"pipe": {**pipe.state(), "waiting": waiting}}
                save_state(self.save, pipe.cache, sampler=pipe.sampler, metadata=metadata)
                screen.note(f"saved to {self.save}; go on with --resume {self.save}")
            if signals.received is not None and len(waiting) >= self.every:
                kept = "" if self.save is None else "; --resume answers it first"
                screen.line(f"broken off while it was read: the last record has no answer{kept}")
            elif waiting and self.save is None and signals.received is None:
                screen.note(f"not answered at the end: {len(waiting)} of --every {self.every} records")
            if last is not None and self.stats:
                screen.line(last.stats.line())
            if answer.error or error:
                raise answer.error or error  # type: ignore[misc]
            return 0 if signals.received is None else 128 + signals.received

    def _open(self, screen: Screen) -> tuple[Pipe, list[str]]:
        """Load the model, and begin a pipe or go on with a saved one and the texts that wait in it."""
        from streamllm import models
        from streamllm.checkpoint import shown
        from streamllm.pipe import Pipe

        folder = models.locate(self.model)
        name = shown(folder)
        screen.spin(f"loading {name}")
        model, tokenizer = models.load(folder, device=self.device, dtype=self.dtype, quantize=self.quantize)
        saved = open_stream(model, tokenizer, self.cache, self.resume, self.explicit)
        kept = saved.metadata.get("pipe")
        system, waiting = (self.system, []) if self.resume is None else self._kept(kept)
        pipe = Pipe(
            model,
            tokenizer,
            system=system,
            cache=saved.cache,
            sampling=go_on_drawing(model, saved.sampler, self.sampling, self.explicit),
            max_tokens=self.max_tokens,
            stop=self.stop,
            compile=self.compile,
            template_options=self.template_options,
            state=kept,
        )
        show_banner(screen, name, pipe.cache, model)
        for note in pipe.template.notes:
            screen.note(note)
        return pipe, waiting

    def _kept(self, state: Any) -> tuple[str | None, list[str]]:
        """Return the instructions and the waiting texts of a saved pipe, or of a stream that was none."""
        try:
            system = None if state is None or state["system"] is None else str(state["system"])
            waiting = [] if state is None else [str(text) for text in state["waiting"]]
        except (KeyError, TypeError) as error:
            raise StateError(f"{self.resume} is damaged ({error}); it cannot be resumed.") from error
        if {"system", "preset_name"} & self.explicit and self.system not in (None, system):
            raise ConfigError(
                f"The system prompt contradicts {self.resume}, which was saved with another one and keeps it: leave "
                "out --system and --preset, or begin a new stream."
            )
        return system, waiting

    def _answers(self, pipe: Pipe, waiting: list[str], screen: Screen, signals: Signals) -> Iterator[tuple[Chunk, str]]:
        """Answer what waits whenever it is enough; yield the last chunk of an answer and its line.

        Raises:
            InputError: a record cannot be used, and that is to stop the pipe.
        """

        def idle() -> None:
            screen.note("waiting for records on standard input; Ctrl-D, or the end of the pipe, ends it")

        records = split_records(read_bytes(signals, idle, PIECE_BYTES), self.form.split)
        if len(waiting) >= self.every:  # they were read when the stream was saved, and have no answer
            records = itertools.chain([SAVED], records)
        for record in records:
            if signals.received is not None:  # and the input may be cut off in the middle of a record
                return
            try:
                text = "" if record is SAVED else self.form.fill(record)
                if len(waiting) + 1 < self.every:
                    with _naming(record):
                        pipe.check(text)  # now, so that no other record is lost by it
                    waiting.append(text)
                    continue
                answer = self._answer(pipe, "".join([*waiting, text]), record, screen, signals)
            except InputError as error:
                if self.on_error == "stop":
                    raise
                screen.line(f"left out: {error}")
                if record is SAVED:
                    waiting.clear()
                continue
            if answer is None:
                waiting.extend([] if record is SAVED else [text])
                return
            waiting.clear()
            chunk, said = answer
            yield chunk, self._line(record, said, chunk)

    def _answer(
        self, pipe: Pipe, text: str, record: Record, screen: Screen, signals: Signals
    ) -> tuple[Chunk, str] | None:
        """Answer one text, until it ends or a signal comes; return the last chunk and the answer.

        ``None``: the signal came while a long text was read, and the stream is as it was before.
        """
        began = time.monotonic()

        def progress(_seen: int) -> None:
            if signals.received is not None:
                raise _BrokenOffError
            if time.monotonic() - began > PATIENCE:
                screen.spin(reading(pipe.cache))

        chunks: Any = pipe.answer(text, progress=progress)  # a generator
        said = ""
        try:
            with contextlib.closing(chunks), _naming(record):
                for chunk in chunks:
                    said += chunk.text
                    if signals.received is not None:
                        break
                    if time.monotonic() - began > PATIENCE:
                        screen.spin(f"answering record {record.number}")
        except _BrokenOffError:
            return None
        finally:
            screen.settle()
        return chunk, said

    def _line(self, record: Record, said: str, chunk: Chunk) -> str:
        """An answer as one line."""
        if not self.json:
            return " ".join(line.strip() for line in said.splitlines() if line.strip())
        stats = chunk.stats
        return json.dumps(
            {
                "record": record.number,
                "answer": said,
                "finish": chunk.finish or "interrupted",
                "stats": {
                    "tokens_seen": stats.tokens_seen,
                    "tokens_cached": stats.tokens_cached,
                    "tokens_evicted": stats.tokens_evicted,
                },
            }
        )


class _BrokenOffError(Exception):
    """A signal came while a text was read."""


@contextlib.contextmanager
def _naming(record: Record) -> Iterator[None]:
    """Name the line of a record in what is wrong with its text.

    Raises:
        InputError: as the block did.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"Line {record.line}: {error}") from error
