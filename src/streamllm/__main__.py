"""The process: run the command line and turn what it raises into one sentence and an exit code.

The one table of errors is the exception tree itself (``errors``): each class knows its exit code.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress


def main() -> None:
    """Run ``streamllm``."""
    from streamllm.console import quit_now

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


def _is_debugging() -> bool:
    return "--debug" in sys.argv[1:] or os.environ.get("STREAMLLM_DEBUG", "").lower() in ("1", "true", "yes", "on", "t")


def _fail(message: str, code: int) -> None:
    with suppress(OSError, AttributeError):  # stderr may be closed
        sys.stderr.write(f"streamllm: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
