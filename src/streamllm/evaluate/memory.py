"""How much memory a process holds now."""

from __future__ import annotations

import os
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
