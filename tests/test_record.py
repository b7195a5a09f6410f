"""Records: written whole, read strictly, and honest about where they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streamllm.errors import InputError
from streamllm.evaluate import record
from streamllm.evaluate.record import FORMAT, Record, load_record, show_command

GOOD = Record("x", "python x", "now", "abc", {"load_before": 0.1}, "model", "float32", {"value": 1})


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    """Reference: the record itself; one without a format was written before there were any."""
    GOOD.save(tmp_path / "x.json")
    assert load_record(tmp_path / "x.json") == GOOD
    old = {name: value for name, value in GOOD.to_dict().items() if name != "format"}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert load_record(tmp_path / "old.json") == GOOD


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is no record: it is not JSON"),
        ("[]", "is no record of streamllm"),
        ('{"name": "x"}', "is no record of streamllm"),
        (json.dumps({**GOOD.to_dict(), "format": FORMAT + 1}), f"has format {FORMAT + 1}, this version reads {FORMAT}"),
        (None, "cannot be read: No such file"),
    ],
)
def test_what_is_no_record_of_this_version_is_refused(tmp_path: Path, text: str | None, sentence: str) -> None:
    """Reference: by hand."""
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=sentence):
        load_record(path)


def test_a_command_names_no_folders_of_this_machine() -> None:
    """Reference: by hand; relative paths mean the same elsewhere."""
    shown = show_command(["streamllm"], ["eval", "--data", "/somewhere/a b.txt", "--out=/else/y", "../data/z.txt"])
    assert shown == "streamllm eval --data 'a b.txt' --out=y ../data/z.txt"


def test_a_record_is_written_wholly_or_not_at_all(tmp_path: Path) -> None:
    """Reference: the record that stood there before."""
    good = Record("x", "python x", "now", "abc", {}, "model", "float32", {"value": 1})
    bad = Record("x", "python x", "now", "abc", {}, "model", "float32", {"value": object()})
    path = tmp_path / "new" / "x.json"
    good.save(path)
    with pytest.raises(TypeError):
        bad.save(path)
    assert json.loads(path.read_text()) == good.to_dict()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("changes", "shown"), [("", "0123456789ab"), (" M code.py", "0123456789ab-dirty")])
def test_the_commit_says_when_files_differ_from_it(monkeypatch: pytest.MonkeyPatch, changes: str, shown: str) -> None:
    """Reference: a git that is told what to say; it is not asked about results, which the run before has written."""

    def git(*arguments: str) -> str:
        if arguments[0] == "rev-parse":
            return "0123456789ab"
        assert arguments[-1] == ":(exclude)docs/results"
        return changes

    monkeypatch.setattr(record, "_git", git)
    assert record.find_commit() == shown


def test_the_commit_is_unknown_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: an empty folder."""
    monkeypatch.setattr(record, "SOURCES", tmp_path)
    assert record.find_commit() == "unknown"
