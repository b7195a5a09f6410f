"""The record of one run of an evaluation or a benchmark: what was measured, on what, by which command.

A figure without its machine, commit and command cannot be compared with anything, so they are written together, as one
JSON file. Names of hosts, users and folders are left out. Nothing here loads torch, but for the description of the
machine.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from streamllm.atomic import write_atomically
from streamllm.errors import InputError

FORMAT = 1
"""Of the file. One that is higher was written by a later streamllm."""

SOURCES = Path(__file__).resolve().parents[3]
"""The working tree, where streamllm runs from one."""

BUSY = 0.5
"""Load, in the minute before, from which on times are worth little."""


@dataclass(frozen=True)
class Record:
    """One run.

    Args:
        name: of the evaluation or benchmark.
        command: what to type to run it again.
        began: when, in UTC.
        commit: of the working tree; "-dirty" if other files than results differ from it, "unknown" without git.
        machine: processor, cores, memory, system, versions, threads, and how busy it was in the minute before.
        model: what was run.
        dtype: of its weights, and in how many bits they are kept if that is another.
        figures: what was measured.
        format: of the file.
    """

    name: str
    command: str
    began: str
    commit: str
    machine: dict[str, Any]
    model: str
    dtype: str
    figures: dict[str, Any]
    format: int = FORMAT

    @property
    def is_busy(self) -> bool:
        """Whether others used the machine when it began, so that times are noisy."""
        return (self.machine["load_before"] or 0) > BUSY

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write it to ``path``, wholly or not at all.

        Raises:
            OSError: the disk is full.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode())


def load_record(path: Path) -> Record:
    """Read the record in ``path``.

    Raises:
        InputError: it is none, or of a format that this version does not know.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The record {path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no record: it is not JSON.") from error
    known = [field.name for field in fields(Record)]
    if not isinstance(found, dict) or not set(known) - {"format"} <= found.keys():
        raise InputError(f"{path} is no record of streamllm: run the evaluation again.")
    if found.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"The record {path} has format {found['format']}, this version reads {FORMAT}: update streamllm, or run "
            "the evaluation again."
        )
    return Record(**{name: found[name] for name in known if name in found})


def begin_record(name: str, command: str, model: str, dtype: str, device: str = "cpu") -> Record:
    """Return a record without figures; call it before measuring, when the machine is as the measurement finds it.

    ``device``: as torch names it.
    """
    began = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(name, command, began, find_commit(), describe_machine(device), model, dtype, {})


def show_command(program: Sequence[str], argv: Sequence[str]) -> str:
    """The command line; of absolute paths only the last part, because folders of one machine mean nothing elsewhere."""
    return shlex.join([*program, *map(_without_folder, argv)])


def _without_folder(argument: str) -> str:
    flag, equals, value = argument.rpartition("=")
    return f"{flag}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def find_commit() -> str:
    """The commit of the working tree; results that were just written do not make it dirty."""
    if not (SOURCES / ".git").exists():  # installed, maybe inside the tree of something else
        return "unknown"
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", ":(exclude)docs/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changes else commit


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=SOURCES, check=True, capture_output=True, text=True).stdout.strip()


def describe_machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, memory, system, versions, threads and load; ``None`` for what the system does not tell.

    What computes comes first, if that is an accelerator.
    """
    import torch

    import streamllm

    memory = _line_of(Path("/proc/meminfo"), "MemTotal")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    accelerator = {"device": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {"device": device}
    return {
        **(accelerator if device != "cpu" else {}),
        "cpu": _line_of(Path("/proc/cpuinfo"), "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        "os": f"{_system()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "streamllm": streamllm.__version__,
        "threads": torch.get_num_threads(),
        "load_before": load and round(load, 2),
    }


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _line_of(file: Path, name: str) -> str | None:
    """The value of the first ``name : value`` line of ``file``."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)
