"""The record of one run of a benchmark: what was measured, on what, by which command.

A figure without its machine, commit and command cannot be compared with anything, so they are written together, as one
JSON file in docs/results/. Names of hosts, users and folders are left out.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"

STORIES = ROOT / "tests" / "models" / "stories260K"
"""The small model of others that long streams are measured on."""

BUSY = 0.5
"""Load, in the minute before, from which on times are worth little."""


@dataclass(frozen=True)
class Record:
    """One run.

    Args:
        name: of the benchmark.
        command: what to type to run it again.
        began: when, in UTC.
        commit: of the working tree; "-dirty" if other files than results differ from it, "unknown" without git.
        machine: processor, cores, memory, system, versions, threads, and how busy it was in the minute before.
        model: what was run.
        dtype: of its weights.
        figures: what was measured.
    """

    name: str
    command: str
    began: str
    commit: str
    machine: dict[str, Any]
    model: str
    dtype: str
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write it to ``path``, wholly or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                json.dump(self.to_dict(), file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).chmod(0o644)
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


def begin_record(name: str, argv: Sequence[str], model: str, dtype: str, *, folder: str = "benchmarks") -> Record:
    """Return a record without figures; call it before measuring, when the machine is as the measurement finds it.

    ``folder``: where the script lies.
    """
    began, machine = datetime.now(UTC).isoformat(timespec="seconds"), describe_machine()
    if (machine["load_before"] or 0) > BUSY:
        print(f"Others use this machine (load {machine['load_before']}): the times will be noisy.", file=sys.stderr)
    return Record(name, show_command(name, argv, folder), began, find_commit(), machine, model, dtype, {})


def target_path(name: str, out: Path | None, *, quick: bool) -> Path | None:
    """Where the record of benchmark ``name`` goes: ``out``, else docs/results/, and nowhere after a quick trial."""
    if out is not None:
        return out
    return None if quick else RESULTS / f"{name}.json"


def show_command(name: str, argv: Sequence[str], folder: str = "benchmarks") -> str:
    """The command line; of absolute paths only the last part, because folders of one machine mean nothing elsewhere."""
    return shlex.join(["python", f"{folder}/{name}.py", *map(_without_folder, argv)])


def _without_folder(argument: str) -> str:
    flag, equals, value = argument.rpartition("=")
    return f"{flag}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def find_commit() -> str:
    """The commit of the working tree; results that were just written do not make it dirty."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", ":(exclude)docs/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changes else commit


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, system, versions, threads and load; ``None`` for what the system does not tell."""
    import torch

    import streamllm

    memory = _line_of(Path("/proc/meminfo"), "MemTotal")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
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
