"""How much memory a process holds now, and the most that it held during a stretch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def held_bytes(device: torch.device) -> int:
    """Bytes of what runs on ``device``: of all tensors on a CUDA device, else resident ones of this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    return rss_bytes()


def rss_bytes(pid: int | None = None) -> int:
    """Resident bytes of process ``pid``, or of this one; 0 where there is no /proc to ask.

    Raises:
        OSError: there is no such process any more.
    """
    processes = Path("/proc")
    if pid is None and not processes.is_dir():
        return 0
    statm = processes / ("self" if pid is None else str(pid)) / "statm"
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Peak:
    """What ``peak_bytes`` finds. ``above``: the most bytes that were held beyond those at the beginning."""

    above: int = 0


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[Peak]:
    """Watch the memory of what runs on ``device`` during the context; 0 where the system does not tell.

    Memory that the process had before and used again is not seen, where it is that of a process.
    """
    found = Peak()
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.above = torch.cuda.max_memory_allocated(device) - before
        return
    before, is_reset = rss_bytes(), False
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the highest value so far
        is_reset = True
    yield found
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if is_reset else ():
            if line.startswith("VmHWM:"):
                found.above = max(0, int(line.split()[1]) * 1024 - before)
