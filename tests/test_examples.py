"""The examples run on the embedded model, and the page about pipes shows what they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import streamllm
from streamllm.records import Split, split_records

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "pipe.md").read_text(encoding="utf-8")
SHOWN = {
    command: answers.splitlines() for command, answers in re.findall(r"^```console\n\$ (.+)\n((?s:.*?))```", PAGE, re.M)
}

DEMONSTRATIONS: dict[str, tuple[Split, int]] = {
    "examples/translate.sh German < examples/letter.txt": ("line", 1),
    "examples/questions.sh < examples/questions.jsonl": ("json", 1),
    "examples/watch_log.sh 5 < examples/server.log": ("line", 5),
    "examples/code_helper.py < examples/tasks.txt": ("paragraph", 1),
}
"""Each with what its records are, and how many make a turn."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A ``streamllm`` and a ``python3`` on the path that are those of the tests, and no settings."""
    folder = tmp_path_factory.mktemp("bin")
    for name, command in (("streamllm", f'"{sys.executable}" -m streamllm'), ("python3", f'"{sys.executable}"')):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLLM_")}
    return {
        **kept,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "STREAMLLM_CONFIG": "",
        "OMP_NUM_THREADS": "1",
    }


def test_every_example_is_shown_and_every_command_that_ends_is_run() -> None:
    """Reference: the files of the folder."""
    scripts = {file.name for file in (ROOT / "examples").iterdir() if os.access(file, os.X_OK) and file.is_file()}
    assert {Path(command.split()[0]).name for command in DEMONSTRATIONS} == scripts
    assert {command for command in SHOWN if command.startswith("examples/")} == DEMONSTRATIONS.keys()


@pytest.mark.parametrize("command", [command for command in SHOWN if not command.startswith("tail -F")])
def test_a_command_of_the_page_prints_what_it_shows(command: str, environment: dict[str, str]) -> None:
    """Reference: the page, where a line may be cut at ``[...]``; and as many answers as there are turns."""
    done = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        env=environment,
        timeout=300,
        check=True,
    )
    assert done.stderr == ""
    printed, shown = [line.rstrip() for line in done.stdout.rstrip("\n").splitlines()], SHOWN[command]
    assert len(printed) == len(shown)
    for found, want in zip(printed, shown, strict=True):
        assert found.startswith(want.removesuffix("[...]").rstrip()) if want.endswith("[...]") else found == want
    if command in DEMONSTRATIONS:
        split, every = DEMONSTRATIONS[command]
        texts = (ROOT / command.rsplit(maxsplit=1)[-1]).read_bytes()
        records = len(list(split_records([texts], split)))
        assert len([line for line in printed if line]) == records // every > 1


def test_the_python_of_the_page_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: as many answers as questions, with the embedded model in the place of the one that it names."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
    load = streamllm.load
    monkeypatch.setattr(streamllm, "load", lambda _: load())
    exec(code, {})
    assert len(capsys.readouterr().out.splitlines()) == 2
