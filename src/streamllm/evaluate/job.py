"""One run of ``streamllm eval``: load, measure, write down, show, and leave in order.

Knows the terminal and the files, but no flags (``cli_eval``) and no evaluation in particular. Ctrl-C is only noted:
what was measured is kept, and the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from streamllm.console import Answer, Screen, Signals
from streamllm.errors import ConfigError, InputError, StateError
from streamllm.evaluate.evaluation import MISFITS, Evaluation
from streamllm.evaluate.record import begin_record, load_record, show_command

OUT = Path("streamllm-results")
"""Where records and figures go."""

PATIENCE = "keeping what was measured; the same command will go on from there"


@dataclass(frozen=True)
class EvalJob:
    """What one run shall do; see the flags of ``streamllm eval``.

    Args:
        evaluation: with its options.
        explicit: names of what stands on the command line itself; a quick trial changes only the rest.
        settled: flags that stand elsewhere, in the environment or the settings file.
        files: of text.
    """

    evaluation: Evaluation
    explicit: frozenset[str]
    settled: tuple[str, ...]
    model: str | None
    device: str
    dtype: str
    quantize: str
    files: tuple[str, ...]
    out: Path
    quick: bool
    json: bool
    quiet: bool

    def run(self) -> int:
        """Carry it out; return the exit status.

        Raises:
            StreamLLMError: something expected went wrong; what was measured is kept.
        """
        evaluation = self._evaluation()
        with Signals() as signals, Screen(quiet=self.quiet) as screen:
            answer = Answer()
            # 1. what can be refused before the model is loaded
            self._check(evaluation)

            # 2. the model
            from streamllm import models
            from streamllm.checkpoint import digest, shown

            folder = models.locate(self.model)
            name = shown(folder)
            screen.spin(f"loading {name}")
            model, tokenizer = models.load(folder, device=self.device, dtype=self.dtype, quantize=self.quantize)
            screen.settle()

            # 3. the measurement
            import torch

            from streamllm.evaluate.desk import Desk, Interrupted
            from streamllm.quantize import numbers_of

            dtype = numbers_of(model)
            command, device = show_command(["streamllm"], [*sys.argv[1:], *self.settled]), str(model.device)
            record = begin_record(evaluation.name, command, base_name(name), dtype, device)
            plan = {
                "name": evaluation.name,
                "options": evaluation.options(),
                "model": [str(folder.resolve()), _files(folder)],
                "dtype": dtype,
                "device": device,
                "version": record.machine["streamllm"],
            }
            weights = digest(folder, self.quantize)
            called = name if self.quantize == "none" else f"{base_name(name)}-{self.quantize}"
            target = target_of(self.out, evaluation.name, called, weights, quick=self.quick)
            desk = Desk(model, tokenizer, self.files, self.out, evaluation.name, json_able(plan), screen, signals)
            signals.defer(None if self.quiet else PATIENCE)
            try:
                with self._alone(target):
                    record.figures.update(
                        json_able({"options": evaluation.options(), "quick": self.quick, "weights": weights})
                        | json_able(evaluation.run(desk))
                    )
                    self._write(record, evaluation, target)
                    desk.finish()
            except Interrupted:
                return 128 + (signals.received or 0)
            except torch.OutOfMemoryError as error:
                raise ConfigError(
                    "The device has not enough memory for this evaluation: take a smaller --window or --dense-limit, "
                    "or another --device. What was measured is kept."
                ) from error
            except OSError as error:
                raise StateError(
                    f"The results cannot be written to {self.out}: {error.strerror or error}. Make room, and give the "
                    "same command again: what was measured is kept."
                ) from error

            # 4. what a person or a program sees
            if self.json:
                answer.write(json.dumps(record.to_dict(), indent=2) + "\n")
            else:
                answer.table(evaluation.rows(record.figures))
                answer.write("\n" + evaluation.verdict(record.figures) + "\n")
            screen.note(f"written to {target}.json, .png and .svg")
        if answer.error:
            raise answer.error
        return 0

    def _check(self, evaluation: Evaluation) -> None:
        """Refuse what can be refused at once."""
        from streamllm.evaluate.figure import make_figure

        make_figure("")
        evaluation.check_files(self.files)
        try:
            is_other = self.out.exists() and not self.out.is_dir()
        except OSError as error:  # a name that is too long, a folder that is closed
            raise ConfigError(
                f"The results cannot go to {self.out}: {error.strerror}; name another folder with --out."
            ) from error
        if is_other:
            raise ConfigError(f"{self.out} is no folder; name another one with --out.")

    @contextlib.contextmanager
    def _alone(self, target: Path) -> Iterator[None]:
        """Keep other processes from writing the same results."""
        self.out.mkdir(parents=True, exist_ok=True)
        file = target.with_name(f".{target.name}.lock")
        try:
            with FileLock(file, blocking=False):
                try:
                    yield
                finally:
                    file.unlink(missing_ok=True)
        except Timeout as error:
            raise StateError(
                f"Another process is writing {target}.json; wait for it, or name another folder with --out."
            ) from error

    def _evaluation(self) -> Evaluation:
        """The evaluation, in the small if that is wanted."""
        if not self.quick:
            return self.evaluation
        small = {name: value for name, value in self.evaluation.quick.items() if name not in self.explicit}
        return dataclasses.replace(self.evaluation, **small)  # type: ignore[type-var]

    def _write(self, record: Any, evaluation: Evaluation, target: Path) -> None:
        from streamllm.evaluate.figure import save_figure

        save_figure(evaluation.draw(record.figures), target)
        record.save(target.with_name(f"{target.name}.json"))


def json_able(value: Any) -> Any:
    """``value`` as it comes back from JSON, so that figures are the same whether measured now or before."""
    return json.loads(json.dumps(value))


def base_name(model: str) -> str:
    """A model's name without the folders of this machine; a Hub id stays whole."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def _files(folder: Path) -> list[Any]:
    """Names, sizes and times of change of what decides a model."""
    kinds = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")
    files = sorted(file for file in folder.iterdir() if file.suffix in kinds and file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def target_of(out: Path, evaluation: str, model: str, weights: str, *, quick: bool = False) -> Path:
    """Where record and figures of an evaluation of a model go, without their endings; trials go beside them.

    ``weights``: the model's digest, which parts models that have the same name.
    """
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", base_name(model)).strip("-.")[:100] or "model"
    target = out / f"{evaluation}-{slug}{'-quick' if quick else ''}"
    try:
        known = load_record(target.with_name(f"{target.name}.json")).figures.get("weights", weights)
    except InputError:  # there is none
        known = weights
    return target if known == weights else target.with_name(f"{target.name}-{weights[:6]}")


def verdict_of(kind: type[Evaluation], out: Path, folder: Path) -> str | None:
    """What an evaluation found about the model in ``folder`` before; ``None``: there is no record that can be read."""
    from streamllm.checkpoint import digest, shown

    weights = digest(folder)
    target = target_of(out, kind.name, shown(folder), weights)
    try:
        record = load_record(target.with_name(f"{target.name}.json"))
        return kind.verdict(record.figures) if record.figures["weights"] == weights else None
    except (InputError, *MISFITS):
        return None
