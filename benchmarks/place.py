"""What all benchmarks and recipes share: where results go, the small model of others, and how a record begins."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from streamllm.evaluate.record import Record, begin_record, show_command

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"

STORIES = ROOT / "tests" / "models" / "stories260K"
"""The small model of others that long streams are measured on."""


def begin(name: str, argv: Sequence[str], model: str, dtype: str, *, folder: str = "benchmarks") -> Record:
    """A record without figures, of the script ``name`` in ``folder``."""
    record = begin_record(name, show_command(["python", f"{folder}/{name}.py"], argv), model, dtype)
    if record.is_busy:
        print(
            f"Others use this machine (load {record.machine['load_before']}): the times will be noisy.", file=sys.stderr
        )
    return record


def target_path(name: str, out: Path | None, *, quick: bool) -> Path | None:
    """Where the record of benchmark ``name`` goes: ``out``, else docs/results/, and nowhere after a quick trial."""
    if out is not None:
        return out
    return None if quick else RESULTS / f"{name}.json"


def finish(record: Record, out: Path | None, *, quick: bool) -> None:
    """Write the record to its ``target_path``, and print it as the last line."""
    path = target_path(record.name, out, quick=quick)
    if path is not None:
        record.save(path)
    print(json.dumps(record.to_dict()))
