"""The process and its terminal: signals as a flag, stdin in pieces, stdout as the text comes, notes on stderr.

stdout carries the answer and nothing else. What is for a person (spinner, banner) goes to stderr, and only if that is
a terminal. Nothing here knows about models.
"""

from __future__ import annotations

import locale
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from streamllm.errors import InputError, StreamLLMError

if TYPE_CHECKING:
    from rich.status import Status

PIECE_BYTES = 65536
PIECE_CHARS = 1024
"""The prompt is handed on in pieces of so many characters; between two of them Ctrl-C is seen."""

PATIENCE = 1.0
"""Seconds of reading a prompt before a person is told about it."""

BLINK = 0.2
"""Seconds that a work may take without a spinner."""

REPORT_SECONDS = 30.0
"""Between two lines about a long work, where there is no terminal to draw a bar on."""

_CONTROL = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")


def harmless(text: str) -> str:
    """A text that does nothing to a terminal but to be read: what a model or a file says must not steer it."""
    return text.translate(_CONTROL)


def quit_now(number: int, _frame: FrameType | None = None) -> None:
    """Signal handler: leave at once, without a traceback and without waiting for threads of half-loaded libraries."""
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # a spinner hides the cursor
    os._exit(128 + number)


@contextmanager
def unwinding() -> Iterator[None]:
    """Within the block a signal raises ``SystemExit``, so that what is half made is taken away again."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in _STOPPING if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Signals:
    """Ctrl-C and its kin. They end the process at once, until ``defer``: then the first one is only noted.

    Attributes:
        received: the number of the signal that was noted, or ``None``.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._notice: str | None = None
        self._presses = self._left = 0  # signals until the one that ends the process: at first, and now
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        return self

    def defer(self, notice: str | None = None, *, presses: int = 2) -> None:
        """From now on note the first signal in ``received``; of several the last raises ``SystemExit``.

        Args:
            notice: what a person is told at the last but one, where it may take a while until the process leaves.
            presses: how many that is.
        """
        self._notice, self._presses, self._left = notice, presses, presses
        if threading.current_thread() is not threading.main_thread():
            return
        for name in _STOPPING:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup, background jobs
                self._before[number] = signal.signal(number, self._note)

    def forget(self) -> bool:
        """Take a Ctrl-C back that was noted; say whether one was. Signals that end the process stay noted."""
        if self.received != signal.SIGINT:
            return False
        self.received, self._left = None, self._presses
        return True

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._left -= 1
        if self._left <= 0:
            raise SystemExit(128 + number)
        if self.received in (None, signal.SIGINT):
            self.received = number
        if self._notice is not None and self._left == 1:
            with suppress(OSError):
                os.write(2, f"\n{self._notice}\n".encode())

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


STDIN = "-"
"""Name of the standard input among files."""


def read_stdin(signals: Signals, idle: Callable[[], None]) -> Iterator[str]:
    """Yield the text of standard input as it comes, unless it is a terminal; ends early when a signal was received.

    ``idle`` is called once if nothing at all comes for a while.

    Raises:
        InputError: the bytes are not UTF-8.
    """
    if sys.stdin is None or sys.stdin.isatty():
        return
    from streamllm.reading import decode_utf8

    yield from decode_utf8(read_bytes(signals, idle))


def read_bytes(signals: Signals, idle: Callable[[], None], size: int = PIECE_BYTES) -> Iterator[bytes]:
    """Yield standard input as it comes, at most ``size`` bytes at once; ends early when a signal was received.

    ``idle`` is called once if nothing at all comes for a while.
    """
    if sys.stdin is None:
        return
    began: float | None = time.monotonic()  # None: something came, or idle was called
    try:
        number: int | None = sys.stdin.fileno()
    except OSError:  # not a real file
        number = None
    while signals.received is None:
        if number is None:
            data: bytes = sys.stdin.buffer.read(size)
        elif os.name != "nt" and not select.select([number], [], [], 0.1)[0]:
            if began is not None and time.monotonic() - began > PATIENCE:
                began = None
                idle()
            continue  # a signal would not end a read that waits
        else:
            data = os.read(number, size)
        began = None
        if not data:
            return
        yield data


def join(piped: Iterable[str], given: str) -> Iterator[str]:
    """Yield the pieces of a prompt: what was piped in, then what was given, on a line of its own."""
    last = ""
    for piece in piped:
        if piece:
            yield piece
            last = piece[-1]
    if given:
        yield "\n" + given if last not in ("", "\n") else given


class Screen:
    """Notes for a person, on stderr.

    Args:
        quiet: print nothing.
        verbose: print also when stderr is no terminal.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self.talks = not quiet and (verbose or self.is_terminal)
        self.is_quiet = quiet
        self._spins = not quiet and self.is_terminal
        self._status: Status | None = None
        self._timer: threading.Timer | None = None
        self._text = ""
        self._lock = threading.RLock()

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()

    def spin(self, text: str) -> None:
        """Show a spinner with ``text``, or change its text; only on a terminal."""
        if not self._spins:
            return
        with self._lock:
            if self._status is None:
                from rich.console import Console

                self._status = Console(stderr=True).status(text)
                self._status.start()
            else:
                self._status.update(text)

    def spin_later(self, text: str, seconds: float = BLINK) -> None:
        """Show a spinner after so many seconds, unless ``settle`` comes first; or change the text of what is shown."""
        self._text = text
        if not self._spins or (self._timer is not None and self._status is None):
            return
        if self._status is not None:
            self.spin(text)
            return

        def begin() -> None:
            with self._lock:
                if self._timer is timer:
                    self.spin(self._text)

        self._timer = timer = threading.Timer(seconds, begin)
        timer.daemon = True
        timer.start()

    def settle(self) -> None:
        """Take the spinner away."""
        if self._status is None and self._timer is None:
            return
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._status is not None:
                self._status.stop()
                self._status = None

    def note(self, text: str) -> None:
        """Print a line for whoever watches."""
        if self.talks:
            self.line(text)

    def line(self, text: str, *, is_dim: bool = True) -> None:
        """Print a line in any case, dim on a terminal unless it shall not be."""
        self.settle()
        if sys.stderr is None:
            return
        dim = is_dim and self.is_terminal and not os.environ.get("NO_COLOR")
        with suppress(OSError):
            sys.stderr.write(f"\x1b[2m{text}\x1b[0m\n" if dim else text + "\n")
            sys.stderr.flush()

    @contextmanager
    def bar(self, total: int, *, done: int = 0) -> Iterator[Callable[[int, str], None]]:
        """Show how far a long work is; what is given is to be called with the steps done and a few words.

        A bar with the time left on a terminal, a line now and then elsewhere.
        """
        if not self._spins:
            yield self._report_lines(total, done)
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.settle()
        now = (BarColumn(), TextColumn("{task.percentage:.1f} %  {task.description}"), TimeElapsedColumn())
        columns = (*now, TextColumn("left"), TimeRemainingColumn())
        # Some steps take seconds, so the speed is that of the last hour.
        with Progress(*columns, console=Console(stderr=True), speed_estimate_period=3600) as progress:
            task = progress.add_task("", total=total, completed=done)
            yield lambda now, words: progress.update(task, completed=now, description=words)

    def _report_lines(self, total: int, done: int) -> Callable[[int, str], None]:
        began = last = time.monotonic()

        def report(now: int, words: str) -> None:
            nonlocal last
            if self.is_quiet or (time.monotonic() - last < REPORT_SECONDS and now < total):
                return
            last = time.monotonic()
            left = (last - began) / max(1, now - done) * (total - now)
            self.line(f"{now} of {total} · {words} · {left / 60:.0f} min left")

        return report

    def watch(self, pieces: Iterable[str], signals: Signals, note: Any) -> Iterator[str]:
        """Hand on the pieces of a prompt, cut small, until a signal comes; show ``note()`` if it takes long."""
        began = time.monotonic()
        for piece in pieces:
            for start in range(0, len(piece), PIECE_CHARS):
                if signals.received is not None:
                    return
                if time.monotonic() - began > PATIENCE:
                    self.spin(note())
                yield piece[start : start + PIECE_CHARS]


class Answer:
    """Standard output, written as the text comes.

    Attributes:
        is_closed: whether the reader has gone away.
        error: what else went wrong with writing, to be raised when everything is saved.
        is_terminal: whether a person reads it.
        is_unicode: whether it can show more than ASCII.
    """

    def __init__(self) -> None:
        if sys.stdout is None:
            raise InputError("There is no standard output to write to; run it with stdout open, or send it to a file.")
        self.is_closed = False
        self.error: StreamLLMError | None = None
        self.is_terminal = sys.stdout.isatty()
        # Python writes UTF-8 also where the locale says that the terminal reads something else (LC_ALL=C).
        encodings = [getattr(sys.stdout, "encoding", None), None if os.name == "nt" else locale.getencoding()]
        self.is_unicode = all(name.lower().replace("-", "") == "utf8" for name in encodings if name)
        with suppress(AttributeError):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]

    def write(self, text: str) -> bool:
        """Write ``text`` now. Returns whether it makes sense to go on."""
        if self.is_closed or self.error:
            return False
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            self.is_closed = True
        except OSError as error:
            self.error = StreamLLMError(f"Standard output cannot be written: {error.strerror}.")
        else:
            return True
        # What is left in the buffer must not be tried again when Python ends.
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        return False

    def shown(self, text: str) -> str:
        """A text as it may be written: on a terminal a harmless one, elsewhere the text itself."""
        return harmless(text) if self.is_terminal else text

    def table(self, rows: Sequence[tuple[str, ...]]) -> None:
        """Write aligned columns; the last one may be long."""
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
            name = f"\x1b[1m{cells[0]}\x1b[0m" if self.is_terminal and not os.environ.get("NO_COLOR") else cells[0]
            self.write("  ".join([name, *cells[1:], row[-1]]).rstrip() + "\n")
