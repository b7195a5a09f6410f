"""A run on disk: its recipe, its log and its checkpoint, so that it can go on after anything.

The checkpoint is one safetensors file with a JSON header, replaced whole; the log has one JSON object a line and is cut
back to the checkpoint when a run goes on. No pickle.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamllm.atomic import replacing, write_atomically
from streamllm.checkpoint import first_line
from streamllm.errors import StateError
from streamllm.train.recipe import Recipe
from streamllm.train.trainer import Trainer

FORMAT = 1
"""Version of the checkpoint; one of another version is refused."""


@dataclass(frozen=True)
class SavedRun:
    """The files of a run, in a folder of their own inside the model's."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """Weights and optimizer."""
        return self.folder / "checkpoint.safetensors"

    @property
    def log(self) -> Path:
        """One JSON object a line."""
        return self.folder / "log.jsonl"

    @property
    def plan(self) -> Path:
        """What the run does: recipe and texts."""
        return self.folder / "run.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer that the text was encoded with."""
        return self.folder / "tokenizer.json"

    def save_plan(self, plan: dict[str, Any]) -> None:
        """Write down what the run does.

        Raises:
            StateError: it cannot be written.
        """
        try:
            write_atomically(self.plan, (json.dumps(plan, indent=2) + "\n").encode())
        except OSError as error:
            raise StateError(
                f"{self.plan} cannot be written: {_why(error)}; make room, or choose another folder."
            ) from error

    def sweep(self) -> None:
        """Remove what a process that was killed while it wrote has left."""
        for file in self.folder.glob(".*.part"):
            with contextlib.suppress(OSError):
                file.unlink()

    def read_plan(self) -> dict[str, Any]:
        """What the run does.

        Raises:
            StateError: there is no run here, or its plan is damaged.
        """
        try:
            plan = json.loads(self.plan.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise StateError(f"There is no run in {self.folder.parent} to go on with; leave --resume out.") from error
        except (OSError, ValueError) as error:
            raise StateError(f"{self.plan} cannot be read ({_why(error)}); begin anew in another folder.") from error
        if not isinstance(plan, dict) or plan.get("format") != FORMAT:
            raise StateError(f"{self.plan} is no run of this version of streamllm; use the one that began it.")
        try:
            _check(plan)
        except (ValueError, KeyError, TypeError) as error:
            raise StateError(f"{self.plan} is damaged ({_why(error)}); begin anew in another folder.") from error
        return plan

    def save(self, trainer: Trainer) -> None:
        """Replace the checkpoint.

        Raises:
            StateError: it cannot be written; the old one is still whole.
        """
        values, tensors = trainer.state()
        header = {"format": FORMAT, "recipe": trainer.recipe.to_dict(), **values}
        try:
            with replacing(self.checkpoint) as temporary:
                save_file(
                    {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                    temporary,
                    metadata={"streamllm": json.dumps(header)},
                )
        except (OSError, SafetensorError) as error:
            kept = "the checkpoint before it is whole" if self.checkpoint.exists() else "there is none yet"
            raise StateError(
                f"The checkpoint of step {trainer.step} cannot be written to {self.checkpoint}: {_why(error)}; {kept}. "
                "Make room and go on with --resume."
            ) from error

    def load(self, trainer: Trainer) -> None:
        """Let ``trainer`` go on from the checkpoint, if there is one.

        Raises:
            StateError: it is damaged, or belongs to another recipe.
        """
        if not self.checkpoint.exists():
            return
        header, tensors = self._read()
        if header.get("format") != FORMAT:
            raise StateError(f"{self.checkpoint} is of another version of streamllm; use the one that began it.")
        recipe, theirs = trainer.recipe.to_dict(), header.get("recipe")
        if theirs != recipe:
            saved = theirs if isinstance(theirs, dict) else {}
            differ = [
                f"{name} {saved.get(name)} there, {value} here"
                for name, value in recipe.items()
                if saved.get(name) != value
            ]
            raise StateError(
                f"{self.checkpoint} is of another recipe ({', '.join(differ) or 'with more in it'}); go on with the "
                "same flags, or begin anew in another folder."
            )
        try:
            trainer.load(header, tensors)
        except (KeyError, ValueError, RuntimeError, IndexError, TypeError) as error:
            raise self._damaged(_why(error)) from error

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            with safe_open(self.checkpoint, framework="pt") as file:
                header = dict(json.loads((file.metadata() or {})["streamllm"]))
                return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise self._damaged(_why(error)) from error

    def _damaged(self, why: str) -> StateError:
        return StateError(
            f"{self.checkpoint} is damaged ({why}); begin anew in another folder, or delete it and let --resume begin "
            "with the first step."
        )

    def write(self, row: dict[str, Any]) -> None:
        """Add a line to the log.

        Raises:
            StateError: it cannot be written.
        """
        try:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise StateError(
                f"The log {self.log} cannot be written: {_why(error)}; make room and go on with --resume."
            ) from error

    def rows(self) -> Iterator[dict[str, Any]]:
        """The lines of the log; one that was broken off is left out.

        Raises:
            StateError: the log cannot be read, or a line of it is damaged.
        """
        if not self.log.exists():
            return
        number = 0
        try:
            with self.log.open(encoding="utf-8") as file:
                for line in file:
                    number += 1
                    if line.endswith("\n"):
                        yield dict(json.loads(line))
        except OSError as error:
            raise StateError(f"The log {self.log} cannot be read: {_why(error)}.") from error
        except (ValueError, TypeError) as error:
            raise StateError(
                f"Line {number} of the log {self.log} is damaged ({_why(error)}); delete it and go on with --resume."
            ) from error

    def cut_log(self, step: int) -> None:
        """Forget what the log says of later steps, which will be done again.

        Raises:
            StateError: the log cannot be read or written.
        """
        kept = "".join(json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step)
        try:
            write_atomically(self.log, kept.encode())
        except OSError as error:
            raise StateError(
                f"The log {self.log} cannot be written: {_why(error)}; make room and go on with --resume."
            ) from error


def _check(plan: dict[str, Any]) -> None:
    """Refuse a plan that does not say what to read, or how much.

    Raises:
        ValueError, KeyError, TypeError: it does not.
    """
    recipe = Recipe(**plan["recipe"])
    files = {name: [(Path(file), int(weight)) for file, weight in plan[name]] for name in ("data", "held_out")}
    if not files["data"] or (recipe.tokens is None and not plan["minutes"] > 0):
        raise ValueError("it does not say what to read, or how much")


def _why(error: Exception) -> str:
    """The reason, without the number and the path that Python puts around it."""
    return getattr(error, "strerror", None) or first_line(error)
