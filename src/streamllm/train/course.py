"""The course of a run: step after step, with its log, its measurements and its checkpoints."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from streamllm.errors import StreamLLMError

if TYPE_CHECKING:
    from streamllm.console import Answer, Screen, Signals
    from streamllm.train.heldout import HeldOut
    from streamllm.train.saved_run import SavedRun
    from streamllm.train.trainer import Step, Trainer

LOG_STEPS = 10
"""Steps that a line of the log averages over."""

CHECKPOINT_SECONDS = 300.0


class Course:
    """A run between its first step and its last.

    Args:
        trainer: at the step where the run begins or goes on.
        held_out: takes the figures.
        saved: where log and checkpoints go.
        measures: how often figures are taken along the way, besides at the beginning and at the end.
        answer: gets the lines of the log, too; ``None``: nobody wants them.
    """

    def __init__(
        self, trainer: Trainer, held_out: HeldOut, saved: SavedRun, *, measures: int, answer: Answer | None
    ) -> None:
        self.trainer, self.held_out, self.saved, self.answer = trainer, held_out, saved, answer
        rows = list(saved.rows())
        self.seconds = max((row.get("seconds", 0.0) for row in rows), default=0.0)
        self.is_measured = any("held_out" in row for row in rows)
        # Denser at the beginning, where most happens.
        steps = trainer.recipe.steps
        self.marks = {steps, *(round(steps * (i / measures) ** 1.5) for i in range(1, measures))}

    def follow(self, screen: Screen, signals: Signals) -> StreamLLMError | None:
        """Train until the last step, or a signal, or the loss is no number any more; then save.

        Returns what ended the training, if it was an error; the weights are those before it.

        Raises:
            StateError: log or checkpoint cannot be written.
        """
        trainer, steps = self.trainer, self.trainer.recipe.steps
        failed: StreamLLMError | None = None
        last_saved = time.monotonic()
        with screen.bar(steps, done=trainer.step) as advance:
            if not self.is_measured:
                self.measure()
            while trainer.step < steps and signals.received is None:
                try:
                    self.seconds += trainer.advance().seconds
                except StreamLLMError as error:
                    failed = error
                    break
                if trainer.step % LOG_STEPS == 0 or trainer.step == steps:
                    advance(trainer.step, self.log(trainer.take_steps()))
                if trainer.step in self.marks:
                    self.measure()
                if time.monotonic() - last_saved > CHECKPOINT_SECONDS:
                    self.saved.save(trainer)
                    last_saved = time.monotonic()
            self.saved.save(trainer)
        return failed

    def log(self, recent: list[Step]) -> str:
        """Write a line of the log; return what a person sees of it."""
        loss = sum(step.loss for step in recent) / len(recent)
        speed = len(recent) * self.trainer.recipe.step_tokens / sum(step.seconds for step in recent)
        self.write(
            loss=loss,
            rate=recent[-1].rate,
            norm=recent[-1].norm,
            tokens_per_s=round(speed),
            seconds=round(self.seconds, 1),
        )
        return f"loss {loss:.3f} · {speed:,.0f} tokens/s".replace(",", " ")

    def measure(self) -> None:
        """Take the held-out figures."""
        self.write(held_out=self.held_out.losses(), **self.held_out.sinks())

    def write(self, **values: Any) -> None:
        """A line of the log."""
        row = {"step": self.trainer.step, "tokens": self.trainer.tokens, **values}
        self.saved.write(row)
        if self.answer is not None:
            self.answer.write(json.dumps(row) + "\n")
