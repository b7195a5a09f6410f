"""A run on disk: what was saved comes back, and nothing that is damaged, foreign or half is taken for it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamllm.errors import StateError
from streamllm.train import saved_run as module
from streamllm.train.recipe import Recipe
from streamllm.train.saved_run import FORMAT, SavedRun
from streamllm.train.sequences import Sequences, Stretch
from streamllm.train.trainer import Trainer, make_model

RECIPE = Recipe(size="toy", vocabulary=260, context=32, tokens=3000, batch_tokens=64, dtype="float32", seed=3)
PLAN = {"format": FORMAT, "recipe": RECIPE.to_dict(), "data": [["a.txt", 1]], "held_out": [], "minutes": None}


def trainer(steps: int = 0, **changes: Any) -> Trainer:
    """A small run that has done so many steps."""
    recipe = dataclasses.replace(RECIPE, **changes)
    tokens = np.random.default_rng(0).integers(2, 260, 2000).astype(np.uint16)
    sequences = Sequences(tokens, [Stretch(0, len(tokens))], recipe.span, recipe.seed)
    run = Trainer(recipe, make_model(recipe, sink_id=1, end_id=0), sequences, sink_id=1)
    for _ in range(steps):
        run.advance()
    return run


@pytest.fixture
def saved(tmp_path: Path) -> SavedRun:
    """A folder with a plan."""
    run = SavedRun(tmp_path / "model" / "training")
    run.folder.mkdir(parents=True)
    run.save_plan(PLAN)
    return run


def names(saved: SavedRun) -> list[str]:
    return sorted(file.name for file in saved.folder.iterdir())


def tensors_of(run: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.state()[1].items()}


# ---- the checkpoint


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_goes_on_from_its_checkpoint(saved: SavedRun, steps: int, optimizer: str) -> None:
    """Reference: the run that was saved, in all that it remembers and in its next two steps, bit for bit."""
    first = trainer(steps, optimizer=optimizer)
    saved.save(first)
    second = trainer(optimizer=optimizer)
    saved.load(second)
    assert second.step == steps
    ours, theirs = tensors_of(second), tensors_of(first)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [second.advance().loss for _ in range(2)] == [first.advance().loss for _ in range(2)]
    assert names(saved) == ["checkpoint.safetensors", "run.json"]


def test_without_a_checkpoint_a_run_is_at_its_beginning(saved: SavedRun) -> None:
    """Reference: the weights before."""
    run = trainer()
    before = tensors_of(run)
    saved.load(run)
    assert run.step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.state()[1].items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.5}, r"\(learning_rate 0\.006 there, 0\.5 here\)"),
        ({"sink": "zero", "layers": 1}, r"\(sink token there, zero here, layers None there, 1 here\)"),
        ({"seed": 4}, r"\(seed 3 there, 4 here\)"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_recipe_is_refused(saved: SavedRun, changes: dict[str, Any], words: str) -> None:
    """Reference: the words of the message, and the weights of the run, which stay what they were."""
    saved.save(trainer(1))
    other = trainer(**changes)
    before = tensors_of(other)
    with pytest.raises(StateError, match=rf"checkpoint\.safetensors is of another recipe {words}; go on with the same"):
        saved.load(other)
    assert other.step == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state()[1].items())


def rewrite(saved: SavedRun, change: dict[str, Any], drop: str = "", add: str = "") -> None:
    """Change the checkpoint's header or its tensors."""
    with safe_open(saved.checkpoint, framework="pt") as file:
        header = json.loads(file.metadata()["streamllm"])
    tensors = {name: tensor for name, tensor in load_file(saved.checkpoint).items() if name != drop}
    if add:
        tensors[add] = torch.zeros(2)
    save_file(tensors, saved.checkpoint, metadata={"streamllm": json.dumps(header | change)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 99}, "is of another version of streamllm; use the one that began it"),
        ({"recipe": None}, "is of another recipe"),
        ({"recipe": "toy"}, "is of another recipe"),
        ({"recipe": {**RECIPE.to_dict(), "more": 1}}, r"is of another recipe \(with more in it\)"),
        ({"step": None}, "is damaged"),
        ({"step": "three"}, "is damaged"),
    ],
    ids=str,
)
def test_a_checkpoint_with_a_strange_header_is_refused(saved: SavedRun, change: dict[str, Any], words: str) -> None:
    """Reference: the same file rewritten without a change, which loads."""
    saved.save(trainer(1))
    rewrite(saved, {})
    saved.load(trainer())
    rewrite(saved, change)
    with pytest.raises(StateError, match=words):
        saved.load(trainer())


@pytest.mark.parametrize(
    ("drop", "add"),
    [
        ("model.model.norm.weight", ""),
        ("model.model.layers.0.self_attn.q_proj.weight", ""),
        ("", "optimizer.0.x.y"),
        ("", "optimizer.0.1"),
    ],
)
def test_a_checkpoint_with_other_tensors_is_refused(saved: SavedRun, drop: str, add: str) -> None:
    """Reference: the whole checkpoint, which loads."""
    saved.save(trainer(1))
    saved.load(trainer())
    rewrite(saved, {}, drop=drop, add=add)
    with pytest.raises(StateError, match=r"checkpoint\.safetensors is damaged \(.*\); begin anew in another folder"):
        saved.load(trainer())


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_checkpoint_that_is_cut_short_is_refused(saved: SavedRun, left: int) -> None:
    """Reference: the whole file, which loads."""
    saved.save(trainer(1))
    saved.load(trainer())
    saved.checkpoint.write_bytes(saved.checkpoint.read_bytes()[:left])
    with pytest.raises(StateError, match=r"checkpoint\.safetensors is damaged \(.*\); begin anew in another folder"):
        saved.load(trainer())


@pytest.mark.parametrize("metadata", [None, {"other": "x"}, {"streamllm": "{"}, {"streamllm": "[1]"}], ids=str)
def test_a_foreign_file_in_the_place_of_the_checkpoint_is_refused(
    saved: SavedRun, metadata: dict[str, str] | None
) -> None:
    """Reference: the words of the message."""
    save_file({"a": torch.zeros(2)}, saved.checkpoint, metadata=metadata)
    with pytest.raises(StateError, match=r"checkpoint\.safetensors is damaged"):
        saved.load(trainer())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
@pytest.mark.parametrize("before", [False, True])
def test_a_write_that_fails_keeps_the_checkpoint_before(
    saved: SavedRun, monkeypatch: pytest.MonkeyPatch, before: bool, error: Exception
) -> None:
    """Reference: the old file, byte for byte. The write fails half-way, as a full disk makes it."""
    run = trainer(1)
    if before:
        saved.save(run)
    found = {file.name: file.read_bytes() for file in saved.folder.iterdir()}
    run.advance()

    def full(tensors: dict[str, Tensor], filename: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, filename, metadata)
        Path(filename).write_bytes(Path(filename).read_bytes()[:1000])
        raise error

    kept = "the checkpoint before it is whole" if before else "there is none yet"
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(
            StateError, match=f"checkpoint of step 2 cannot be written.*: No space left on device; {kept}"
        ):
            saved.save(run)
    assert {file.name: file.read_bytes() for file in saved.folder.iterdir()} == found
    again = trainer()
    saved.load(again)
    assert again.step == before


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="needs root to mount a tiny disk")
def test_a_really_full_disk_is_one_sentence(tmp_path: Path) -> None:
    """Reference: a file system of 1 MiB, on which the checkpoint of a step fits once and not twice."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        saved, run = SavedRun(disk), trainer(1)
        saved.save(run)
        whole = saved.checkpoint.read_bytes()
        assert 600_000 < len(whole) < 1_000_000
        run.advance()
        with pytest.raises(StateError, match=r"cannot be written to .*; the checkpoint before it is whole\. Make room"):
            saved.save(run)
        assert (names(saved), saved.checkpoint.read_bytes()) == (["checkpoint.safetensors"], whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- the log


def test_the_log_has_the_rows_that_were_written(saved: SavedRun) -> None:
    """Reference: the rows; there are none before the first."""
    assert list(saved.rows()) == []
    rows = [{"step": 10, "loss": 1.5, "größe": [1, {"a": None}]}, {"step": 20, "loss": 1.25}]
    for row in rows:
        saved.write(row)
    assert list(saved.rows()) == rows
    assert len(saved.log.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize(
    ("step", "left"), [(0, [0]), (5, [0]), (10, [0, 10, 10]), (15, [0, 10, 10]), (99, [0, 10, 10, 20])]
)
def test_the_log_is_cut_back_to_the_step_of_the_checkpoint(saved: SavedRun, step: int, left: list[int]) -> None:
    """Reference: the steps of its rows; the last line was broken off and goes in any case, and new rows follow well."""
    for done in (0, 10, 10, 20):
        saved.write({"step": done})
    with saved.log.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in saved.rows()] == [0, 10, 10, 20]
    saved.cut_log(step)
    saved.write({"step": step + 1})
    assert [row["step"] for row in saved.rows()] == [*left, step + 1]
    assert names(saved) == ["log.jsonl", "run.json"]


@pytest.mark.parametrize("line", [b"\0\0\0\0", b'{"step": 1', b"[3]", b"7", b"\xff"])
def test_a_damaged_line_of_the_log_is_refused_by_its_number(saved: SavedRun, line: bytes) -> None:
    """Reference: the words of the message; without the line the log is read."""
    good = b'{"step": 0}\n'
    saved.log.write_bytes(good + line + b"\n" + good)
    for read in (lambda: list(saved.rows()), lambda: saved.cut_log(5)):
        with pytest.raises(
            StateError, match=r"Line \d of the log .*log\.jsonl is damaged \(.*delete it and go on with"
        ):
            read()
    saved.log.write_bytes(good + good)
    assert len(list(saved.rows())) == 2


def test_a_log_that_cannot_be_written_is_one_sentence(saved: SavedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the words of the messages, and the log, which stays what it was."""
    saved.write({"step": 3})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("streamllm.atomic.os.fsync", full)
        with pytest.raises(StateError, match=r"log .*log\.jsonl cannot be written: No space left on device; make room"):
            saved.cut_log(0)
    assert [row["step"] for row in saved.rows()] == [3]
    with pytest.raises(StateError, match=r"log .*log\.jsonl cannot be written: No such file or directory; make room"):
        SavedRun(saved.folder / "none").write({"step": 3})


# ---- the plan


def test_the_plan_comes_back_as_it_was(saved: SavedRun) -> None:
    """Reference: the plan."""
    assert saved.read_plan() == PLAN
    timed = {**PLAN, "recipe": {**RECIPE.to_dict(), "tokens": None}, "minutes": 2.5, "held_out": [["b.txt", 1]]}
    saved.save_plan(timed)
    assert saved.read_plan() == timed


def test_without_a_plan_there_is_no_run(tmp_path: Path) -> None:
    """Reference: the words of the message, with the folder that the user named."""
    with pytest.raises(StateError, match=r"no run in .*model to go on with; leave --resume out"):
        SavedRun(tmp_path / "model" / "training").read_plan()


@pytest.mark.parametrize("content", [b"", b'{"format": 1,', b"\xff\xfe"])
def test_a_plan_that_cannot_be_read_is_refused(saved: SavedRun, content: bytes) -> None:
    """Reference: the words of the message."""
    saved.plan.write_bytes(content)
    with pytest.raises(StateError, match=r"run\.json cannot be read \(.*\); begin anew in another folder"):
        saved.read_plan()


@pytest.mark.parametrize("plan", [[], 3, None, {}, {**PLAN, "format": FORMAT + 1}], ids=str)
def test_a_plan_of_another_version_is_refused(saved: SavedRun, plan: Any) -> None:
    """Reference: the words of the message."""
    saved.plan.write_text(json.dumps(plan))
    with pytest.raises(
        StateError, match=r"run\.json is no run of this version of streamllm; use the one that began it"
    ):
        saved.read_plan()


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": None},
        {"recipe": {"size": "toy", "speed": 3}},
        {"recipe": {**RECIPE.to_dict(), "learning_rate": "fast"}},
        {"recipe": {**RECIPE.to_dict(), "layers": -1}},
        {"recipe": {**RECIPE.to_dict(), "tokens": None}},
        {"recipe": {**RECIPE.to_dict(), "tokens": None}, "minutes": -1},
        {"data": None},
        {"data": []},
        {"data": [["a.txt"]]},
        {"held_out": [["a.txt", "often"]]},
    ],
    ids=str,
)
def test_a_damaged_plan_is_refused(saved: SavedRun, change: dict[str, Any]) -> None:
    """Reference: the plan before the damage, which is read."""
    saved.save_plan({**PLAN, **change})
    with pytest.raises(StateError, match=r"run\.json is damaged \(.*\); begin anew in another folder"):
        saved.read_plan()


@pytest.mark.parametrize("name", PLAN)
def test_a_plan_that_lacks_something_is_refused(saved: SavedRun, name: str) -> None:
    """Reference: the words of the message; the minutes may be missing only where the tokens are known."""
    plan = {**PLAN, "recipe": {**RECIPE.to_dict(), "tokens": None}, "minutes": 1}
    saved.save_plan({key: value for key, value in plan.items() if key != name})
    with pytest.raises(StateError, match=r"run\.json is (damaged|no run)"):
        saved.read_plan()


def test_a_plan_that_cannot_be_written_keeps_the_one_before(saved: SavedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the plan before, and the words of the message."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("streamllm.atomic.os.fsync", full)
        with pytest.raises(StateError, match=r"run\.json cannot be written: No space left on device; make room"):
            saved.save_plan({**PLAN, "minutes": 5})
    assert saved.read_plan() == PLAN
    assert names(saved) == ["run.json"]
