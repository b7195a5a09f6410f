"""One run of ``streamllm train``: prepare, train, measure, save, and leave in order.

Knows the terminal and the files, but no flags (``cli``) and no algorithm (``trainer``). From the moment on that the
training begins, Ctrl-C is only noted: the step is finished, a checkpoint is written, and then the process leaves.

The folder that is written is an ordinary model folder; what only the run itself needs lies in ``training/`` in it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamllm.atomic import write_atomically
from streamllm.config import SamplingConfig
from streamllm.console import Answer, Screen, Signals
from streamllm.errors import ConfigError, InputError, StateError, StreamLLMError
from streamllm.train.corpus import Source, read_documents
from streamllm.train.recipe import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from streamllm.train.encoded import Encoded
    from streamllm.train.heldout import HeldOut
    from streamllm.train.saved_run import SavedRun
    from streamllm.train.trainer import Step, Trainer

RUN_FOLDER = "training"

KEPT = ("compiles", "measures", "save_dtype")
"""What a run that goes on keeps besides its recipe, unless a flag says otherwise."""

SAVE_DTYPES = ("float32", "bfloat16", "float16")

HELD_OUT_SHARE, HELD_OUT_TOKENS = 0.01, 200_000
"""Where no other text is given, the end of each stretch of files of one weight is held out: so much of it, and so many
tokens at most."""

LOG_STEPS = 10
"""Steps that a line of the log averages over."""

CHECKPOINT_SECONDS = 300.0

TIMED_STEPS = 8
"""Steps that are timed, and thrown away, to turn minutes into tokens."""


@dataclass(frozen=True)
class TrainJob:
    """What one run shall do; see the flags of ``streamllm train``.

    Args:
        recipe: what is computed. ``tokens`` is ``None`` if ``minutes`` is given.
        explicit: names of what stands on the command line itself; only that may contradict a run that goes on.
        data, held_out: files of text.
        minutes: of training, instead of tokens.
        measures: how often the held-out figures are taken.
    """

    recipe: Recipe
    explicit: frozenset[str]
    data: tuple[Source, ...]
    held_out: tuple[Source, ...]
    out: Path
    minutes: float | None
    tokenizer: Path | None
    device: str
    save_dtype: str
    compiles: bool
    resume: bool
    measures: int
    json: bool
    quiet: bool

    def run(self) -> int:
        """Carry it out; return the exit status.

        Raises:
            StreamLLMError: something expected went wrong; the last good checkpoint is kept.
        """
        with Signals() as signals, Screen(quiet=self.quiet) as screen:
            # 1. what can be refused before anything heavy is loaded
            answer = Answer()
            if self.save_dtype not in SAVE_DTYPES:
                raise ConfigError(f"There is no dtype {self.save_dtype!r} to save in; choose {', '.join(SAVE_DTYPES)}.")
            from streamllm.train.saved_run import SavedRun

            saved = SavedRun(self.out / RUN_FOLDER)
            plan = self._resumed(saved) if self.resume else self._begun(saved)
            job = dataclasses.replace(self, **{name: plan[name] for name in KEPT if name not in self.explicit})
            try:
                return job._carry_out(plan, saved, answer, screen, signals)
            except StreamLLMError:
                if not self.resume and not saved.log.exists():  # nothing was trained: leave the place as it was
                    shutil.rmtree(self.out, ignore_errors=True)
                raise

    def _carry_out(
        self, plan: dict[str, Any], saved: SavedRun, answer: Answer, screen: Screen, signals: Signals
    ) -> int:
        """Do what the plan says."""
        recipe = Recipe(**plan["recipe"])
        sources = [Source(Path(file), weight) for file, weight in plan["data"]]

        # 2. text -> ids
        screen.spin("reading the text")
        tokenizer = self._tokenizer(saved, sources, recipe)
        recipe = dataclasses.replace(recipe, vocabulary=tokenizer.get_vocab_size())
        corpus, held_out = self._texts(saved, sources, plan, tokenizer, screen)
        trainer = self._trainer(recipe, corpus, tokenizer, screen)

        # 3. minutes -> tokens, once and for all
        if recipe.tokens is None:
            screen.spin("measuring the speed")
            tokens = _tokens_in(trainer, plan["minutes"] * 60)
            recipe = dataclasses.replace(recipe, tokens=tokens)
            trainer = self._trainer(recipe, corpus, tokenizer, screen)
        saved.save_plan({**plan, "recipe": recipe.to_dict()})
        saved.load(trainer)

        # 4. train
        from streamllm.train.heldout import HeldOut

        measuring = HeldOut(held_out, trainer)
        saved.cut_log(trainer.step)
        run = _Run(self, trainer, measuring, saved, answer, screen, signals)
        signals.defer()
        screen.settle()
        run.go()

        # 5. leave in order
        self._export(trainer, tokenizer, saved, sources, len(corpus.ids))
        if signals.received is not None:
            screen.line(f"stopped at step {trainer.step} of {recipe.steps}; go on with --resume")
            return 128 + signals.received
        screen.note(f"done; try it: streamllm run -m {self.out} --endless")
        if answer.error is not None:
            raise answer.error
        return 0

    # ---- beginnings

    def _begun(self, saved: SavedRun) -> dict[str, Any]:
        """A new run: its folder, and what is to be done."""
        from streamllm.train.saved_run import FORMAT
        from streamllm.train.vocabulary import read_tokenizer

        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ConfigError(
                f"{self.out} exists already: go on with the run in it with --resume, or name a folder that does not."
            )
        if not self.data:
            raise ConfigError("There is nothing to train on: name text files with --data.")
        if (self.recipe.tokens is None) == (self.minutes is None):
            raise ConfigError("Say how long to train: either --minutes, or --tokens.")
        tokenizer = None if self.tokenizer is None else read_tokenizer(self.tokenizer)
        try:
            saved.folder.mkdir(parents=True, exist_ok=True)
            if tokenizer is not None:
                write_atomically(saved.tokenizer, tokenizer.to_str().encode())
        except OSError as error:
            raise StateError(f"The folder {self.out} cannot be made: {error.strerror}; name another.") from error
        plan = {
            "format": FORMAT,
            "recipe": self.recipe.to_dict(),
            "data": [[str(source.file.resolve()), source.weight] for source in self.data],
            "held_out": [[str(source.file.resolve()), source.weight] for source in self.held_out],
            "minutes": self.minutes,
            "bytes": {str(s.file.resolve()): s.file.stat().st_size for s in (*self.data, *self.held_out)},
            **{name: getattr(self, name) for name in KEPT},
        }
        saved.save_plan(plan)  # now, so that a run broken off at any time can go on
        return plan

    def _resumed(self, saved: SavedRun) -> dict[str, Any]:
        """A run to go on with; flags may repeat what it does, and not change it."""
        plan = saved.read_plan()
        known = {**plan["recipe"], "minutes": plan["minutes"]}
        for name in sorted(self.explicit & known.keys()):
            here, there = getattr(self if name == "minutes" else self.recipe, name), known[name]
            if here != there:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {here} contradicts the run in {self.out}, which has {there}: leave "
                    "the flag out, or begin a new run in another folder."
                )
        for name, given in (("data", self.data), ("held_out", self.held_out)):
            if given and [[str(source.file.resolve()), source.weight] for source in given] != plan[name]:
                raise ConfigError(f"The run in {self.out} has other files of {name.replace('_', '-')}; leave them out.")
        if self.tokenizer is not None:
            raise ConfigError(f"The run in {self.out} has its tokenizer already; leave --tokenizer out.")
        for file, size in plan["bytes"].items():
            if not Path(file).is_file() or Path(file).stat().st_size != size:
                what = "has changed" if Path(file).is_file() else "is gone"
                raise InputError(f"{file}, which the run in {self.out} reads, {what}; put it back as it was to go on.")
        return plan

    def _tokenizer(self, saved: SavedRun, sources: list[Source], recipe: Recipe) -> Tokenizer:
        """The tokenizer of the run: the saved one, or a new one."""
        from streamllm.train.vocabulary import read_tokenizer, train_tokenizer

        if saved.tokenizer.exists():
            return read_tokenizer(saved.tokenizer)
        tokenizer = train_tokenizer(read_documents(sources), recipe.shape.vocabulary)
        try:
            write_atomically(saved.tokenizer, tokenizer.to_str().encode())
        except OSError as error:
            raise StateError(f"{saved.tokenizer} cannot be written: {error.strerror}; make room.") from error
        return tokenizer

    def _texts(
        self, saved: SavedRun, sources: list[Source], plan: dict[str, Any], tokenizer: Tokenizer, screen: Screen
    ) -> tuple[Encoded, dict[str, Encoded]]:
        """The text to train on, and the texts held out, by name."""
        from streamllm.train.encoded import encode_corpus

        def watch(done: int) -> None:
            screen.spin(f"reading the text · {done / 1e6:.1f} M tokens")

        try:
            corpus = encode_corpus(sources, tokenizer, saved.folder / "text", watch=watch)
            given = [Source(Path(file), weight) for file, weight in plan["held_out"]]
            if not given:
                return corpus.part(HELD_OUT_SHARE, HELD_OUT_TOKENS)
            names = [source.file.name for source in given]
            texts = {
                name if names.count(name) == 1 else str(source.file): encode_corpus(
                    [source], tokenizer, saved.folder / f"held-out-{number}", watch=watch
                )
                for number, (name, source) in enumerate(zip(names, given, strict=True))
            }
        except OSError as error:
            raise StateError(
                f"The text cannot be prepared in {saved.folder}: {error.strerror}; make room, or name another folder."
            ) from error
        return corpus, texts

    def _trainer(self, recipe: Recipe, corpus: Encoded, tokenizer: Tokenizer, screen: Screen) -> Trainer:
        """A trainer at its first step."""
        from streamllm.models import find_device
        from streamllm.train.corpus import END_OF_TEXT
        from streamllm.train.sequences import Sequences
        from streamllm.train.trainer import Trainer, make_model
        from streamllm.train.vocabulary import SINK_TOKEN, token_id

        longest = max((stretch.end - stretch.begin for stretch in corpus.stretches), default=0)
        if longest < recipe.span:
            raise InputError(
                f"The text has {len(corpus.ids)} tokens, a sequence has {recipe.span}: give more text, or a smaller "
                "--context."
            )
        stretches = [stretch for stretch in corpus.stretches if stretch.end - stretch.begin >= recipe.span]
        if short := len(corpus.stretches) - len(stretches):
            screen.line(f"left out, as shorter than a sequence: {short} of the weighted groups of files")
        sink = token_id(tokenizer, SINK_TOKEN)
        model = make_model(recipe, sink_id=sink, end_id=token_id(tokenizer, END_OF_TEXT))
        model.to(find_device(self.device))  # type: ignore[arg-type]
        sequences = Sequences(corpus.ids, stretches, recipe.span, recipe.seed)
        return Trainer(recipe, model, sequences, sink_id=sink, compiles=self.compiles, note=screen.line)

    # ---- the end

    def _export(
        self, trainer: Trainer, tokenizer: Tokenizer, saved: SavedRun, sources: list[Source], corpus_tokens: int
    ) -> None:
        """Write the model as an ordinary folder, with its card and its figure."""
        import torch
        from transformers import GenerationConfig

        from streamllm.models import quiet_libraries
        from streamllm.train.card import make_card
        from streamllm.train.vocabulary import dress

        recipe, rows = trainer.recipe, list(saved.rows())
        measured = next((row for row in reversed(rows) if "held_out" in row), None)
        config = trainer.model.config
        dressed = dress(tokenizer, context=recipe.shape.context, begins=recipe.sink == "token")
        copy = type(trainer.model)(config)
        copy.load_state_dict(trainer.model.state_dict())
        copy.to(getattr(torch, self.save_dtype))
        copy.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            do_sample=True,
            temperature=SamplingConfig.temperature,
            top_p=SamplingConfig.top_p,
        )
        seconds = max((row["seconds"] for row in rows if "seconds" in row), default=0.0)
        card = make_card(
            recipe,
            sources=[(source.file.name, source.weight) for source in sources],
            corpus_tokens=corpus_tokens,
            held_out=measured["held_out"] if measured else {},
            sinks=measured,
            seconds=seconds,
            machine=f"{os.cpu_count()} cores" if trainer.device.type == "cpu" else torch.cuda.get_device_name(),
            dtype=self.save_dtype,
            step=trainer.step,
        )
        part = self.out.with_name(f".{self.out.name}.part")
        try:
            shutil.rmtree(part, ignore_errors=True)
            with quiet_libraries():
                copy.save_pretrained(part)
                dressed.save_pretrained(part)
            (part / "README.md").write_text(card, encoding="utf-8")
            for file in sorted(part.iterdir()):
                file.replace(self.out / file.name)
            _draw(
                rows, saved, f"{self.out.name}: {recipe.shape.parameters() / 1e6:.1f} M parameters, sink: {recipe.sink}"
            )
        except OSError as error:
            raise StateError(
                f"The model cannot be written to {self.out}: {error.strerror or error}. The checkpoint is whole: make "
                "room and go on with --resume."
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _draw(rows: list[dict[str, Any]], saved: SavedRun, title: str) -> None:
    """The figure of the run, if matplotlib is there."""
    try:
        from streamllm.train.figure import draw_run, save_figure

        save_figure(draw_run(rows, title), saved.folder / "loss")
    except ImportError:
        return


def _tokens_in(trainer: Trainer, seconds: float) -> int:
    """Tokens that ``trainer``, which is thrown away, would read in so many seconds."""
    trainer.recipe = dataclasses.replace(trainer.recipe, tokens=TIMED_STEPS * trainer.recipe.step_tokens)
    times = sorted(trainer.advance().seconds for _ in range(TIMED_STEPS))
    return max(1, round(seconds / times[len(times) // 2])) * trainer.recipe.step_tokens


class _Run:
    """A run between its first step and its last."""

    def __init__(
        self,
        job: TrainJob,
        trainer: Trainer,
        held_out: HeldOut,
        saved: SavedRun,
        answer: Answer,
        screen: Screen,
        signals: Signals,
    ) -> None:
        self.job, self.trainer, self.held_out, self.saved = job, trainer, held_out, saved
        self.answer, self.screen, self.signals = answer, screen, signals
        self.seconds = max((row.get("seconds", 0.0) for row in saved.rows()), default=0.0)
        steps = trainer.recipe.steps
        # Denser at the beginning, where most happens.
        marks = {round(steps * (i / job.measures) ** 1.5) for i in range(1, job.measures + 1)}
        self.marks = {0, *marks} if job.measures else {steps}

    def go(self) -> None:
        """Train until the last step, or a signal."""
        trainer, recipe = self.trainer, self.trainer.recipe
        last_saved = time.monotonic()
        with self.screen.bar(recipe.steps, done=trainer.step) as advance:
            if not trainer.step:
                self.measure()
            while trainer.step < recipe.steps and self.signals.received is None:
                self.seconds += trainer.advance().seconds
                if trainer.step % LOG_STEPS == 0 or trainer.step == recipe.steps:
                    advance(trainer.step, self.log(trainer.take_steps()))
                if trainer.step in self.marks or trainer.step == recipe.steps:
                    self.measure()
                if time.monotonic() - last_saved > CHECKPOINT_SECONDS:
                    self.saved.save(trainer)
                    last_saved = time.monotonic()
            self.saved.save(trainer)

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
        """A line of the log, on disk and, with ``--json``, on standard output."""
        row = {"step": self.trainer.step, "tokens": self.trainer.tokens, **values}
        self.saved.write(row)
        if self.job.json:
            self.answer.write(json.dumps(row) + "\n")
