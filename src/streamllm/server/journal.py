"""The journal: a line of JSON for each request, on stderr, without what messages say unless that is asked for."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TextIO


class Journal:
    """Writes lines.

    Args:
        file: where to; ``None``: stderr. Nothing is written if there is none.
        is_quiet: write nothing.
    """

    def __init__(self, file: TextIO | None = None, *, is_quiet: bool = False) -> None:
        self._file, self._is_quiet = file, is_quiet
        self._lock = threading.Lock()

    def write(self, **fields: Any) -> None:
        """Write one line."""
        file = self._file or sys.stderr
        if self._is_quiet or file is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, **fields})
        with self._lock, suppress(OSError, ValueError):
            file.write(line + "\n")
            file.flush()

    def tell(self, text: str) -> None:
        """Write a sentence for the operator."""
        self.write(note=text)
