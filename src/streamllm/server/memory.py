"""How the process of a server takes memory, looks for garbage, and gives back what it does not need any more.

Without it a server that keeps the same things for days still becomes larger and larger. Knows neither models nor
routes, and holds nothing itself.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

ARENA_MAX = -8
"""M_ARENA_MAX of glibc's mallopt()."""

COLLECT = (5_000, 10, 10)
"""How many new objects make Python look for garbage, once the model is loaded. Each request leaves cycles behind, with
all its messages in them; before, what is made are libraries, and looking through these takes long (``__main__``)."""


def allocate_together() -> None:
    """Let all threads take memory from one place, where the C library is GNU's.

    By itself it gives threads places of their own, each of which stays as large as it once was: eight conversations of
    20 minutes, whose replies come from thousands of threads, had made a server of 0.6 GB one of 1.1 GB.
    """
    with suppress(OSError, AttributeError, TypeError):  # another library
        ctypes.CDLL(None).mallopt(ARENA_MAX, 1)


def collect_often() -> None:
    """Let Python look for garbage among what comes from now on, and there often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT)


def give_back() -> None:
    """Give the system the pages that hold nothing, where the C library is GNU's.

    By itself it gives back only those behind the last thing that is held. Between what is kept for long lie the gaps of
    what was needed for a moment, and what comes next does not always fit: in 20 minutes they grew by 150 MB.
    """
    with suppress(OSError, AttributeError, TypeError):  # another library
        ctypes.CDLL(None).malloc_trim(0)
