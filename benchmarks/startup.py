"""How long people wait: ``streamllm --help``, and the first token of ``streamllm run``.

Each is timed in processes of their own, from their start on. The first run may have to fetch files from the disk, so
it is told apart and the median is that of the others; "cold" means a new process, not an empty file cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from threading import Thread
from typing import IO, Any

from place import begin, finish
from target import Target, print_targets

from streamllm.checkpoint import EMBEDDED

COMMAND = (sys.executable, "-m", "streamllm")

MODULES_AFTER_HELP = """
import sys
from streamllm.__main__ import main
try:
    main()
except SystemExit as end:
    sys.stderr.write(repr((end.code, [name for name in ("torch", "transformers") if name in sys.modules])))
"""
"""Prints the help, and to stderr its exit code and which heavy modules it has loaded."""


def time_help() -> float:
    """Seconds that ``streamllm --help`` takes, from start to end."""
    began = time.perf_counter()
    subprocess.run([*COMMAND, "--help"], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def modules_after_help() -> list[str]:
    """Which of torch and transformers ``streamllm --help`` loads; none, if all is well."""
    script = [sys.executable, "-c", MODULES_AFTER_HELP, "--help"]
    done = subprocess.run(script, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    code, modules = literal_eval(done.stderr)
    if code not in (0, None):
        raise RuntimeError(f"streamllm --help ended with {code}")
    return list(modules)


def time_first_token() -> tuple[float, float]:
    """Seconds from the start of ``streamllm run -n 1`` to its first output, and to its end."""
    command = [*COMMAND, "run", "--max-tokens", "1", "--seed", "1", "--json", "--quiet", "Once upon a time"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        first = time.perf_counter() - began
        process.stdout.read()
    end = time.perf_counter() - began
    if process.returncode or json.loads(line)["type"] != "token":
        raise RuntimeError(f"streamllm run ended with {process.returncode}, its first line was {line!r}")
    return first, end


def time_since_torch() -> float:
    """Seconds from torch imported to the first output of ``streamllm run -n 1``, while Python logs imports."""
    command = [
        COMMAND[0],
        "-X",
        "importtime",
        *COMMAND[1:],
        "run",
        "-n",
        "1",
        "--seed",
        "1",
        "--quiet",
        "Once upon a time",
    ]
    imported = 0.0

    def watch(log: IO[bytes]) -> None:
        nonlocal imported
        for line in log:
            if line.split()[-1:] == [b"torch"]:
                imported = time.perf_counter()

    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        watcher = Thread(target=watch, args=(process.stderr,))
        watcher.start()
        written = process.stdout.read(1)
        first = time.perf_counter()
        process.stdout.read()
        watcher.join()
    if process.returncode or not written or not imported:
        raise RuntimeError(f"streamllm run ended with {process.returncode}, and wrote {written!r}")
    return first - imported


def _figures(seconds: Sequence[float]) -> dict[str, Any]:
    """The first run, and the median, least and most of the others (of all, if there is but one)."""
    later = seconds[1:] or seconds
    found = {"first": seconds[0], "median": median(later), "min": min(later), "max": max(later)}
    return {name: round(value, 4) for name, value in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10, help="of each, after the first (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one run of each; writes only to --out")
    parser.add_argument("--out", type=Path, help="where the record goes (default: docs/results/startup.json)")
    options = parser.parse_args(argv)
    runs = 1 if options.quick else options.runs + 1

    record = begin("startup", argv, f"{EMBEDDED}, embedded", "float32")
    helps = [time_help() for _ in range(runs)]
    tokens = [time_first_token() for _ in range(runs)]
    since_torch = [time_since_torch() for _ in range(runs)]
    modules = modules_after_help()
    seconds = {
        "streamllm --help": _figures(helps),
        "streamllm run -n 1, to the first token": _figures([first for first, _ in tokens]),
        "streamllm run -n 1, from torch to the first token": _figures(since_torch),
        "streamllm run -n 1, to the end": _figures([end for _, end in tokens]),
    }
    targets = [
        Target("streamllm --help", seconds["streamllm --help"]["median"], 0.4, unit="s"),
        Target(
            "from torch to the first token",
            seconds["streamllm run -n 1, from torch to the first token"]["median"],
            1.5,
            unit="s",
        ),
        Target("heavy modules loaded by --help", len(modules), 0, unit="modules"),
    ]
    record.figures.update(
        runs=runs, seconds=seconds, loaded_by_help=modules, targets=[target.to_dict() for target in targets]
    )

    print(f"{'seconds':<52}{'median':>9}{'min':>9}{'max':>9}{'first':>9}")
    for name, found in seconds.items():
        cells = "".join(f"{found[key]:>9.3f}" for key in ("median", "min", "max", "first"))
        print(f"{name:<52}{cells}")
    print(f"\ntorch or transformers loaded by --help: {', '.join(modules) or 'no'}\n")
    print_targets(targets)
    finish(record, options.out, quick=options.quick)


if __name__ == "__main__":
    main()
