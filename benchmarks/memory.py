"""How much memory a process holds now (Linux)."""

from __future__ import annotations

import os
from pathlib import Path


def rss_bytes(pid: int | None = None) -> int:
    """Resident bytes of process ``pid``, or of this one.

    Raises:
        OSError: there is no such process any more, or no /proc.
    """
    statm = Path("/proc") / ("self" if pid is None else str(pid)) / "statm"
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
