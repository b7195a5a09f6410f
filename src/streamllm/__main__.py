"""The process: run the command line and turn what it raises into one sentence and an exit code.

The one table of errors is the exception tree itself (``errors``): each class knows its exit code.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from contextlib import suppress

COLLECT = (100_000, 50, 100)
"""How many new objects make Python look for garbage. Its own 700 make it look through all the libraries again and again
while they load: 1.8 s from torch to the first token, and 1.4 s so. What a stream leaves behind is far less."""


def main() -> None:
    """Run ``streamllm``."""
    from streamllm.console import quit_now

    spin_less()
    gc.set_threshold(*COLLECT)
    atexit.register(gc.freeze)  # or Python looks for garbage among the libraries once more, which takes a second

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # background jobs ignore Ctrl-C, and shall
            signal.signal(number, quit_now)

    from streamllm.cli import app
    from streamllm.errors import StreamLLMError

    try:
        app()
    except StreamLLMError as error:
        if _is_debugging():
            raise
        _fail(str(error), error.exit_code)
    except MemoryError:
        _fail("The memory is used up: use a smaller --window, --dtype bfloat16, or a smaller model.", 1)


def spin_less() -> None:
    """Let waiting threads sleep soon, unless the user has said how they shall wait; before torch is loaded."""
    from streamllm.config import WAITING

    if sys.platform == "linux" and not WAITING.keys() & os.environ.keys():
        os.environ.update(WAITING)


def _is_debugging() -> bool:
    return "--debug" in sys.argv[1:] or os.environ.get("STREAMLLM_DEBUG", "").lower() in ("1", "true", "yes", "on", "t")


def _fail(message: str, code: int) -> None:
    with suppress(OSError, AttributeError):  # stderr may be closed
        sys.stderr.write(f"streamllm: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
