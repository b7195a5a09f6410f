"""One run of ``streamllm bench``: make or load the model, let the methods take turns, show and write what was found.

Knows the terminal and the files, but no flags (``cli_bench``) and no method in particular. Nothing is kept of a run
that is broken off: times from before and after would not belong together.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamllm.bench.plan import BANDWIDTH_BYTES, Plan
from streamllm.bench.shape import DTYPES, find_shape
from streamllm.config import WAITING
from streamllm.console import Answer, Screen, Signals
from streamllm.errors import ConfigError, StateError
from streamllm.evaluate.job import base_name, json_able, target_of
from streamllm.evaluate.record import Record, begin_record, show_command

if TYPE_CHECKING:
    import torch

    from streamllm.bench.subject import Subject
    from streamllm.bench.verdict import Figures


@dataclass(frozen=True)
class BenchJob:
    """What one run shall do; see the flags of ``streamllm bench``.

    Args:
        plan: what is measured.
        model: a folder or a Hub id, if the plan names no shape.
        settled: flags that stand elsewhere, in the environment or the settings file.
        out: folder of the record and the figure; ``None``: they are not written.
    """

    plan: Plan
    model: str | None
    device: str
    dtype: str
    settled: tuple[str, ...]
    out: Path | None
    json: bool
    quiet: bool

    def run(self) -> int:
        """Carry it out; return the exit status.

        Raises:
            StreamLLMError: something expected went wrong.
        """
        with Signals(), Screen(quiet=self.quiet) as screen, tempfile.TemporaryDirectory() as folder:
            answer = Answer()
            # 1. what can be refused before anything is loaded
            self._check()

            # 2. the model
            import torch

            before = torch.get_num_threads()
            torch.set_num_threads(self.plan.threads or before)
            try:
                screen.spin("making or loading the model")
                subject, name, words, weights = self._subject(Path(folder))
                screen.settle()

                # 3. the measurement
                dtype, device = str(subject.model.dtype).removeprefix("torch."), str(subject.device)
                command = show_command(["streamllm"], [*sys.argv[1:], *self.settled])
                record = begin_record("bench", command, words, dtype, device)
                if record.is_busy and not self.quiet:
                    screen.line(
                        f"Others use this machine (load {record.machine['load_before']}): the times will be noisy."
                    )
                record.figures.update({"weights": weights, "quick": self.plan.is_trial, "device": device})
                record.figures.update(json_able(self._measure(subject, screen, device)))
            finally:
                torch.set_num_threads(before)

            # 4. what a person and a program see
            self._show(record, answer)
            if self.out is not None:
                target = target_of(self.out, "bench", name, weights, quick=self.plan.is_trial)
                self._write(record, target)
                screen.note(f"written to {target}.json, .png and .svg")
            answer.write(json.dumps(record.to_dict()) + "\n")
        if answer.error:
            raise answer.error
        return 0

    def _check(self) -> None:
        """Refuse what can be refused at once."""
        if self.plan.shape is not None and self.dtype not in DTYPES:
            raise ConfigError(f"There is no dtype {self.dtype!r} here; choose one of {', '.join(DTYPES)}.")
        if self.out is not None:
            from streamllm.evaluate.figure import make_figure

            make_figure("")
            if self.out.exists() and not self.out.is_dir():
                raise ConfigError(f"{self.out} is no folder; name another one with --out.")

    def _subject(self, folder: Path) -> tuple[Subject, str, str, str]:
        """What is measured, its name, the same in words, and what tells its weights from others."""
        import torch

        from streamllm import models
        from streamllm.bench.shape import make_model
        from streamllm.bench.subject import Subject
        from streamllm.checkpoint import digest, shown

        sinks, block = self.plan.sinks, self.plan.block
        if self.plan.shape is None:
            found = models.locate(self.model)
            model, _ = models.load(found, device=self.device, dtype=self.dtype)
            name = shown(found)
            return Subject(model, None, folder, sinks, block), name, base_name(name), digest(found)
        shape = find_shape(self.plan.shape)
        device = models.find_device(self.device)
        dtype = _dtype(self.dtype, device)
        subject = Subject(make_model(shape, dtype, device), shape, folder, sinks, block)
        name = self.plan.shape + ("" if dtype == torch.float32 else f"-{dtype}".replace("torch.", ""))
        return subject, name, f"{shape.describe()} ({self.plan.shape})", "random"

    def _measure(self, subject: Subject, screen: Screen, device: str) -> Figures:
        """Everything, ready for JSON."""
        from streamllm.bench.bandwidth import measure_bandwidth
        from streamllm.bench.decode import measure_decode
        from streamllm.bench.delay import measure_engine
        from streamllm.bench.loop_cost import measure_loop
        from streamllm.bench.prefill import measure_prefill
        from streamllm.bench.upkeep import measure_upkeep
        from streamllm.bench.verdict import ratios, targets
        from streamllm.bench.window_alone import measure_window

        plan = self.plan.within(subject.spec.limit)
        left_out: list[dict[str, str]] = []
        turns = _turns(plan)

        def leave(what: str, why: str) -> None:
            left_out.append({"what": what, "why": why})

        with screen.bar(turns) as report:
            tell = _counter(report, turns)
            for window in sorted(set(self.plan.windows) - set(plan.windows)):
                leave(f"window {window}", f"the model was trained on {subject.spec.limit} positions")
            bandwidth = measure_bandwidth(subject.device, BANDWIDTH_BYTES if plan.is_trial else None)
            own = next((name for name in ("compiled", "eager") if name in plan.methods), None)
            upkeep = own and measure_upkeep(
                subject, plan.at, 3 * plan.rounds, leave, _prefixed(tell, "upkeep"), compiles=own == "compiled"
            )
            alone = measure_window(
                plan.methods, subject, max(plan.windows), plan.rounds, leave, _prefixed(tell, "window alone")
            )
            prefill = measure_prefill(plan.methods, subject, plan.at, plan.rounds, leave, _prefixed(tell, "prompt"))
            tell("first token")
            delay = own and measure_engine(subject, plan.at, plan.rounds, leave, compiles=own == "compiled")
            loop = own and measure_loop(
                subject, plan.at, plan.rounds, leave, _prefixed(tell, "loop"), compiles=own == "compiled"
            )
            decode = []
            several = [name for name in plan.methods if _takes_rows(name)]
            for window, rows in _settings(plan):
                names = plan.methods if rows == 1 else several
                words = f"window {window}" + (f" · {rows} rows" if rows > 1 else "")
                decode += measure_decode(
                    names, subject, window, rows, plan.rounds, bandwidth, leave, _prefixed(tell, words)
                )
        figures: Figures = {
            "plan": {**plan.to_dict(), "at": plan.at},
            "device": device,
            "waiting": {name: os.environ[name] for name in WAITING if name in os.environ},
            "bandwidth": bandwidth.to_dict(),
            "decode": decode,
            "prefill": prefill,
            "window_alone": alone,
            "upkeep": upkeep,
            "delay": delay,
            "loop": loop,
            "left_out": left_out,
        }
        figures["ratios"] = ratios(figures)
        figures["published"] = self._published(figures)
        figures["targets"] = [target.to_dict() for target in targets(figures)]
        return figures

    def _published(self, figures: Figures) -> dict[str, Any] | None:
        """Our times beside the paper's, where the shape and the kind of machine are alike."""
        from streamllm.bench.published import SIZES
        from streamllm.bench.verdict import entry_of

        if self.plan.shape != "7B" or self.plan.is_trial or not figures["device"].startswith("cuda"):
            return None
        found = {}
        for name, method in (("recompute", "recompute"), ("streaming", "compiled")):
            entries = [entry_of(figures, method, window) for window in SIZES]
            found[name] = [entry and entry["ms_per_step"]["median"] for entry in entries]
        return found

    def _show(self, record: Record, answer: Answer) -> None:
        """The tables, unless only JSON is wanted."""
        from streamllm.bench.table import tables
        from streamllm.bench.verdict import targets

        if self.json:
            return
        for title, rows in tables(record.figures, targets(record.figures)):
            answer.write(f"{title}\n")
            answer.table(rows)
            answer.write("\n")

    def _write(self, record: Record, target: Path) -> None:
        """The record, and the figure that it alone decides.

        Raises:
            StateError: they cannot be written.
        """
        from streamllm.bench.figure import draw
        from streamllm.evaluate.figure import save_figure

        machine = record.machine
        count = machine["threads"]
        on = machine.get("device") or f"{machine['cpu']}, {count} thread{'s' if count > 1 else ''}"
        what = record.model if self.plan.shape is None else f"random Llama of shape {self.plan.shape}"
        title = f"{what}, {record.dtype}, {on}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_figure(draw(record.figures, title), target)
            record.save(target.with_name(f"{target.name}.json"))
        except OSError as error:
            raise StateError(f"The results cannot be written to {self.out}: {error.strerror or error}.") from error


def _settings(plan: Plan) -> list[tuple[int, int]]:
    """Windows and rows that decoding is measured with."""
    return [*((window, 1) for window in plan.windows), *((plan.at, rows) for rows in plan.batches if rows > 1)]


def _turns(plan: Plan) -> int:
    """How many turns there will be, about."""
    count = len(plan.windows) * len(plan.methods)
    count += sum(rows > 1 for rows in plan.batches) * sum(map(_takes_rows, plan.methods))
    return (count + len(plan.methods) + 6) * (plan.rounds + 1) + 6 * plan.rounds


def _takes_rows(name: str) -> bool:
    from streamllm.bench.catalogue import METHODS

    return METHODS[name].batches


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on the CPU and bfloat16 elsewhere."""
    import torch

    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    found: torch.dtype = getattr(torch, name)
    return found


def _counter(report: Callable[[int, str], None], total: int) -> Callable[[str], None]:
    """Counts turns for a bar that must not run over."""
    done = 0

    def tell(words: str) -> None:
        nonlocal done
        done = min(done + 1, total - 1)
        report(done, words)

    return tell


def _prefixed(tell: Callable[[str], None], words: str) -> Callable[[str], None]:
    return lambda name: tell(f"{words} · {name}")
