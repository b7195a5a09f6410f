"""The rules of the house that no other tool checks: names, versions, docstrings, layers, pins."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import streamllm

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "streamllm"
MODULES = sorted(PACKAGE.rglob("*.py"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

PUBLIC = {
    "CacheConfig",
    "Chat",
    "Chunk",
    "SamplingConfig",
    "SinkCache",
    "Stats",
    "StreamLLMError",
    "generate",
    "load",
    "load_state",
    "save_state",
    "stream",
}


# ---- the public names


def test_the_public_names_are_these_and_at_most_twelve() -> None:
    """Reference: the list above; a change of the public surface must be a change here."""
    assert set(streamllm.__all__) == PUBLIC
    assert len(streamllm.__all__) == len(PUBLIC) <= 12


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_public_name_resolves_to_something_of_ours_with_a_docstring(name: str) -> None:
    found = getattr(streamllm, name)
    assert found.__name__ == name
    assert found.__module__.split(".")[0] == "streamllm"
    assert found.__doc__


def test_dir_lists_the_public_names_and_nothing_else() -> None:
    assert set(dir(streamllm)) == PUBLIC | {"__version__"}


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="SinkCash"):
        streamllm.SinkCash  # noqa: B018 - the look-up is what is tested


@pytest.mark.parametrize(
    "name", ["streamllm", "streamllm.cli", "streamllm.stats", "streamllm.ledger", "streamllm.template"]
)
def test_importing_what_help_needs_loads_neither_torch_nor_transformers(name: str) -> None:
    """In a process of its own, because this one has loaded them."""
    code = f"import sys, {name}; sys.exit(' '.join({{'torch', 'transformers'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- the version


def test_the_version_stands_in_one_place() -> None:
    """The build takes it from ``__init__``, and no other file of ours says it again."""
    assert "version" not in PROJECT["project"]
    assert "version" in PROJECT["project"]["dynamic"]
    assert ROOT / PROJECT["tool"]["hatch"]["version"]["path"] == PACKAGE / "__init__.py"
    assert Version(streamllm.__version__)
    quoted = re.compile(rf"""["']{re.escape(streamllm.__version__)}["']""")
    assert [file for file in MODULES if quoted.search(file.read_text(encoding="utf-8"))] == [PACKAGE / "__init__.py"]


def test_the_installed_version_is_the_one_in_the_source() -> None:
    try:
        installed = importlib.metadata.version("streamllm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("streamllm runs from its source folder without being installed")
    assert installed == streamllm.__version__


def test_the_changelog_has_an_entry_for_the_current_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## \[(\S+)\] - (\S+)$", text, re.M)
    assert entries, "no heading of the form '## [1.2.3] - date'"
    assert entries[0][0] == streamllm.__version__
    assert all(re.fullmatch(r"unreleased|\d{4}-\d{2}-\d{2}", date) for _, date in entries)


# ---- the source


@pytest.mark.parametrize("file", [*MODULES, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda file: file.name)
def test_every_module_says_what_it_is(file: Path) -> None:
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert doc
    assert doc.splitlines()[0].endswith((".", ":", "?"))


LAYERS = [contract for contract in PROJECT["tool"]["importlinter"]["contracts"] if contract["type"] == "layers"]


@pytest.mark.parametrize("contract", LAYERS, ids=lambda contract: contract["containers"][0])
def test_every_module_has_its_place_in_the_layers(contract: dict[str, Any]) -> None:
    assert contract["exhaustive"] is True
    placed = [name.strip() for layer in contract["layers"] for name in layer.split("|")]
    folder = PACKAGE.parent.joinpath(*contract["containers"][0].split("."))
    modules = [file for file in MODULES if file.parent == folder and file.stem != "__init__"]
    packages = [file.parent for file in MODULES if file.parent.parent == folder]
    assert sorted(placed) == sorted({file.stem for file in [*modules, *packages]})


def test_every_package_has_its_layers() -> None:
    folders = {".".join(file.parent.relative_to(PACKAGE.parent).parts) for file in MODULES}
    assert sorted(contract["containers"][0] for contract in LAYERS) == sorted(folders)


def test_contributing_draws_the_layers_as_the_contract_has_them() -> None:
    contract = LAYERS[0]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn = next(block for block in re.findall(r"```text\n(.*?)```", text, re.S) if block.startswith("__main__"))
    assert [re.split(r"\s{2,}", line)[0] for line in drawn.splitlines()] == contract["layers"]


def test_no_file_names_a_folder_of_the_machine_it_was_written_on() -> None:
    """The patterns are put together here, so that this file does not match them itself."""
    folders = ["work/", "root/", "home/[a-z]", "Users/[A-Za-z]", "tmp/[A-Za-z0-9]", "opt/[a-z]"]
    pattern = re.compile(r"(?<![\w.:/*\\-])/(?:" + "|".join(folders) + ")")
    texts = [ROOT / name for name in ("Makefile", "pyproject.toml", "constraints.txt")]
    texts += [
        file
        for name in ("src", "tests", "benchmarks", "examples", "recipes", "docs")
        for file in (ROOT / name).rglob("*")
    ]
    texts += ROOT.glob("*.md")
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in texts
        if file.is_file()
        and file.suffix in ("", ".py", ".md", ".toml", ".txt", ".json")
        and not {"assets", "models"} & set(file.parts)
        for line in file.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    ]
    assert found == []


# ---- the dependencies

REQUIREMENTS = [
    requirement
    for group in (PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values())
    for requirement in group
    if Requirement(requirement).name != "streamllm"
]


def _pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if line and not line.startswith("#")]
    assert all(pins), "constraints.txt holds something else than exact pins"
    return {canonicalize_name(pin[1]): Version(pin[2]) for pin in pins if pin}


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_the_tested_set_pins_every_dependency_within_its_range(requirement: str) -> None:
    wanted = Requirement(requirement)
    pins = _pins()
    name = canonicalize_name(wanted.name)
    assert wanted.specifier, f"{wanted.name} has no range"
    assert name in pins, f"constraints.txt does not pin {wanted.name}"
    assert wanted.specifier.contains(pins[name])


def test_every_package_that_the_source_imports_is_a_dependency() -> None:
    """Imports under ``TYPE_CHECKING`` count too: a type checker needs the package as well."""
    extras = PROJECT["project"]["optional-dependencies"]
    groups = (PROJECT["project"]["dependencies"], *(extras[name] for name in extras if name != "dev"))
    declared = {canonicalize_name(Requirement(text).name) for group in groups for text in group}
    imported = set()
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                imported.add(node.module.split(".")[0])
    foreign = {canonicalize_name(name) for name in imported - sys.stdlib_module_names - {"streamllm"}}
    assert foreign <= declared
