"""The documents tell the truth: commands parse, the Python runs, links resolve, both languages show the same code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from typer.testing import CliRunner

from streamllm.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
RUN_SECONDS = 300
"""The README's Python takes some 5 seconds; on a busy machine many times that."""


def blocks(language: str, text: str = README) -> list[str]:
    return [code for name, code in BLOCK.findall(text) if name == language]


def prose(text: str) -> str:
    return BLOCK.sub("", text)


def command_lines() -> list[str]:
    """Every command that the README shows, in code blocks and within the text; pipes are cut apart."""
    shown = [line[2:] for code in blocks("console") for line in code.splitlines() if line.startswith("$ ")]
    inline = [code for code in re.findall(r"`([^`\n]+)`", prose(README)) if code.startswith(("streamllm ", "make "))]
    echoed = [line for code in blocks("console") for line in code.splitlines() if line.startswith(".venv/")]
    return [part.strip() for line in (*shown, *inline, *echoed) for part in line.split("|")]


def streamllm_commands() -> list[list[str]]:
    found = [shlex.split(line) for line in command_lines()]
    return [words[1:] for words in found if words[0].rsplit("/", 1)[-1] == "streamllm"]


# ---- two languages


def test_both_languages_show_the_same_code() -> None:
    """Byte for byte, in the same order, and each block is closed."""
    assert BLOCK.findall(README) == BLOCK.findall(CHINESE)
    assert len(BLOCK.findall(README)) == README.count("\n```") / 2 == CHINESE.count("\n```") / 2


def test_both_languages_have_the_same_parts_links_and_table_rows() -> None:
    def parts(text: str) -> tuple[list[str], list[str], list[str]]:
        links = re.findall(r"\]\(([^)]+)\)", text)
        return re.findall(r"^#+", text, re.M), [link for link in links if "README" not in link], figures(text)

    def figures(text: str) -> list[str]:
        return [row.split("|")[2].strip() for row in re.findall(r"^\|.*\|$", text, re.M)[2:]]

    assert parts(prose(README)) == parts(prose(CHINESE))


# ---- commands


@pytest.mark.parametrize("words", streamllm_commands(), ids=" ".join)
def test_every_command_in_the_readme_parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The real parser takes it, and ``--help`` of that command shows each flag."""
    for name in [name for name in os.environ if name.startswith("STREAMLLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("STREAMLLM_CONFIG", "")
    if words[0].startswith("-"):
        pytest.fail(f"streamllm {words[0]}: the README shows only commands")
    group: Any = typer.main.get_command(app)
    path, arguments = [], list(words)
    while hasattr(group, "commands"):  # eval has commands of its own
        path.append(arguments.pop(0))
        assert path[-1] in group.commands
        group = group.commands[path[-1]]
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    flags = [word for word in arguments if re.match(r"--?[a-z]", word)]
    assert set(flags) <= set(re.findall(r"--?[a-z][a-z-]*", shown.output))
    if "--help" not in flags:
        group.make_context(path[-1], list(arguments)).close()


def test_the_readme_has_commands_to_check() -> None:
    assert {"run", "doctor", "config"} <= {words[0] for words in streamllm_commands()}


def test_flags_within_the_text_exist() -> None:
    known = "".join(
        CliRunner().invoke(app, [name, "--help"]).output
        for name in ("run", "chat", "pipe", "serve", "train", "bench", "doctor", "config")
    )
    named = {code.split()[0] for code in re.findall(r"`(--[^`\n]+)`", prose(README))}
    assert named
    assert named <= set(re.findall(r"--[a-z][a-z-]*", known))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"(?:`|^\$ )make ([a-z]+)", text, re.M)) <= targets


def test_the_demo_in_the_readme_is_the_demo_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^demo:.*\n\t(.*)$", makefile, re.M)
    assert recipe
    assert recipe[1].replace("$(BIN)", ".venv/bin") in README


# ---- what the commands and the Python print


@pytest.fixture(scope="module")
def python_run() -> tuple[str, str]:
    """(what the README says, what its Python prints) in a process of its own, that it must leave by itself."""
    codes, texts = blocks("python"), blocks("text")
    code, said = "".join(codes), texts[0] + "".join(texts[2:4])  # between them stands a drawing
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=RUN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return said, done.stdout


def test_the_python_of_the_readme_prints_what_it_says(python_run: tuple[str, str]) -> None:
    """Greedy text, and counts; nothing in it is left to chance. Ends of lines may hold spaces."""
    said, printed = python_run
    assert [line.rstrip() for line in printed.splitlines()] == said.splitlines()


def test_the_python_of_the_readme_is_ten_lines_long() -> None:
    code = blocks("python")[0]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10


def test_the_doctor_says_what_the_readme_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for versions, devices, threads and the last digits of the residual, which are the machine's own."""
    monkeypatch.setenv("STREAMLLM_CONFIG", "")
    code = next(code for code in blocks("console") if "streamllm doctor" in code)
    said = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in code.splitlines()[1:])
    done = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    found = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in done.output.splitlines())
    assert list(found) == list(said)
    for name in set(said) - {"versions", "devices", "threads", "positions"}:
        assert found[name] == said[name]
    assert found["positions"].split("(")[0] == said["positions"].split("(")[0]


def test_the_arithmetic_of_the_readme_is_right() -> None:
    """Reference: the formula itself, worked out on the embedded model's numbers."""
    text = next(code for code in blocks("text") if "capacity = " in code)
    capacity = 4 + 252 + 64 - 1
    assert f"4 + 252 + 64 - 1 = {capacity}" in text
    assert f"({capacity} + 4) x 7168 = {(capacity + 4) * 7168}" in text
    assert 7 * 2 * 1 * 128 * torch.float32.itemsize == 7168  # layers, keys and values, heads, size


# ---- links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    """To a file or folder of the repository, and to a heading where the link names one."""
    text = prose(page.read_text(encoding="utf-8"))
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        is_there = target.is_relative_to(ROOT) and target.exists()
        if not is_there or (heading and heading not in _headings(target)):
            missing.append(link)
    assert missing == []


def _headings(page: Path) -> set[str]:
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in found}
