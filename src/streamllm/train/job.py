"""One run of ``streamllm train``: prepare, train, save, and leave in order.

Knows the terminal and the files, but no flags (``cli``) and no algorithm (``trainer``, ``course``). From the moment on
that the training begins, Ctrl-C is only noted: the step is finished, a checkpoint is written, and then the process
leaves. The folder that is written is an ordinary model folder; what only the run itself needs lies in ``training/``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from streamllm.atomic import write_atomically
from streamllm.config import check_count
from streamllm.console import Answer, Screen, Signals
from streamllm.corpus import Source, read_documents
from streamllm.errors import ConfigError, InputError, StateError, StreamLLMError
from streamllm.train.recipe import SAVE_DTYPES, Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from streamllm.train.encoded import Encoded
    from streamllm.train.saved_run import SavedRun
    from streamllm.train.trainer import Trainer

RUN_FOLDER = "training"

KEPT = ("compiles", "device", "measures", "save_dtype")
"""What a run that goes on keeps besides its recipe, unless a flag says otherwise."""

HELD_OUT_SHARE, HELD_OUT_TOKENS = 0.01, 200_000
"""Where no other text is given, the end of each stretch of files of one weight is held out: so much of it, and so many
tokens at most."""

TIMED_STEPS = 8
"""Steps that are timed, and thrown away, to turn minutes into tokens."""

PATIENCE = "finishing the step, then saving; Ctrl-C again loses what was trained since the last checkpoint"


@dataclass(frozen=True)
class TrainJob:
    """What one run shall do; see the flags of ``streamllm train``.

    Args:
        values: fields of the recipe.
        explicit: names of what stands on the command line itself; only that can contradict a run that goes on.
        data, held_out: files of text.
        minutes: of training, instead of tokens.
        measures: how often the held-out figures are taken.
    """

    values: dict[str, Any]
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
        from streamllm.train.saved_run import SavedRun

        if self.save_dtype not in SAVE_DTYPES:
            raise ConfigError(f"There is no dtype {self.save_dtype!r} to save in; choose {', '.join(SAVE_DTYPES)}.")
        check_count("measures", self.measures, 1)
        with Signals() as signals, Screen(quiet=self.quiet) as screen:
            answer = Answer()
            saved = SavedRun(self.out / RUN_FOLDER)
            if self.resume:
                return self._go_on(saved, answer, screen, signals)
            is_new = not self.out.exists()
            plan = self._plan()
            try:
                self._begin(saved, plan)
                return self._carry_out(plan, saved, answer, screen, signals)
            except StreamLLMError:
                if not saved.log.exists():  # nothing was trained: leave the place as it was
                    shutil.rmtree(self.out if is_new else saved.folder, ignore_errors=True)
                raise

    # ---- beginnings

    def _plan(self) -> dict[str, Any]:
        """What a new run does, refused if it cannot be."""
        from streamllm.train.saved_run import FORMAT

        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ConfigError(
                f"{self.out} exists already: go on with the run in it with --resume, or name a folder that does not."
            )
        if not self.data:
            raise ConfigError("There is nothing to train on: name text files with --data.")
        recipe = Recipe(**self.values)
        if (recipe.tokens is None) == (self.minutes is None):
            raise ConfigError("Say how long to train: either --minutes, or --tokens.")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConfigError(f"--minutes must be a number above 0, you gave {self.minutes:g}.")
        return {
            "format": FORMAT,
            "recipe": recipe.to_dict(),
            "data": [[str(source.file.resolve()), source.weight] for source in self.data],
            "held_out": [[str(source.file.resolve()), source.weight] for source in self.held_out],
            "minutes": self.minutes,
            "text": None,
            **{name: getattr(self, name) for name in KEPT},
        }

    def _begin(self, saved: SavedRun, plan: dict[str, Any]) -> None:
        """Make the folder, and write down at once what the run does, so that it can go on whenever it is broken off."""
        from streamllm.train.vocabulary import read_tokenizer

        tokenizer = None if self.tokenizer is None else read_tokenizer(self.tokenizer)
        asked = self.values["vocabulary"]
        if tokenizer is not None and asked not in (None, tokenizer.get_vocab_size()):
            raise ConfigError(
                f"--vocabulary {asked} contradicts the tokenizer {self.tokenizer}, which has "
                f"{tokenizer.get_vocab_size()} ids; leave one of the flags out."
            )
        try:
            saved.folder.mkdir(parents=True, exist_ok=True)
            if tokenizer is not None:
                write_atomically(saved.tokenizer, tokenizer.to_str().encode())
        except OSError as error:
            raise StateError(f"The folder {self.out} cannot be made: {error.strerror}; name another.") from error
        saved.save_plan(plan)

    def _go_on(self, saved: SavedRun, answer: Answer, screen: Screen, signals: Signals) -> int:
        """A run to go on with; flags may repeat what it does, and not change it."""
        plan = saved.read_plan()
        if self.tokenizer is not None:
            raise ConfigError(f"The run in {self.out} has its tokenizer already; leave --tokenizer out.")
        known, given = {**plan["recipe"], "minutes": plan["minutes"]}, {**self.values, "minutes": self.minutes}
        for name in sorted(self.explicit & known.keys()):
            if given[name] != known[name] and (name, given[name]) != ("dtype", "auto"):
                raise ConfigError(
                    f"--{name.replace('_', '-')} {given[name]} contradicts the run in {self.out}, which has "
                    f"{known[name]}: leave the flag out, or begin a new run in another folder."
                )
        for name, files in (("data", self.data), ("held_out", self.held_out)):
            if files and [[str(source.file.resolve()), source.weight] for source in files] != plan[name]:
                raise ConfigError(f"The run in {self.out} has other files of {name.replace('_', '-')}; leave them out.")
        for file, _ in (*plan["data"], *plan["held_out"]):
            if not Path(file).is_file():
                raise InputError(f"{file}, which the run in {self.out} reads, is gone; put it back to go on.")
        job = dataclasses.replace(self, **{name: plan[name] for name in KEPT if name not in self.explicit})
        return job._carry_out(plan, saved, answer, screen, signals)

    # ---- the run

    def _carry_out(
        self, plan: dict[str, Any], saved: SavedRun, answer: Answer, screen: Screen, signals: Signals
    ) -> int:
        """Do what the plan says, alone in the folder."""
        try:
            with FileLock(saved.folder / ".lock", blocking=False):
                saved.sweep()
                return self._train(plan, saved, answer, screen, signals)
        except Timeout as error:
            raise StateError(f"Another process is training in {self.out}; wait for it, or stop it.") from error

    def _train(self, plan: dict[str, Any], saved: SavedRun, answer: Answer, screen: Screen, signals: Signals) -> int:
        """Text to ids, minutes to tokens, steps, and the end."""
        # 1. text -> ids
        screen.spin("reading the text")
        sources = [Source(Path(file), weight) for file, weight in plan["data"]]
        recipe = Recipe(**plan["recipe"])
        tokenizer = self._tokenizer(saved, sources, recipe)
        recipe = dataclasses.replace(recipe, vocabulary=tokenizer.get_vocab_size())
        corpus, held_out = self._texts(saved, sources, plan, tokenizer, screen)
        read = hashlib.sha256(corpus.ids.data).hexdigest()
        if plan["text"] not in (None, read):
            raise InputError(f"The text of the run in {self.out} has changed; put it back as it was to go on.")
        trainer = self._trainer(recipe, corpus, tokenizer, screen)

        # 2. what depends on the machine and the hour, once and for all
        if plan["text"] is None:
            recipe = dataclasses.replace(recipe, dtype=str(trainer.dtype).removeprefix("torch."))
            if recipe.tokens is None:
                screen.spin("measuring the speed")
                recipe = dataclasses.replace(recipe, tokens=_tokens_in(trainer, plan["minutes"] * 60))
            saved.save_plan({**plan, "recipe": recipe.to_dict(), "text": read})
            trainer = self._trainer(recipe, corpus, tokenizer, screen)
        saved.load(trainer)

        # 3. train
        from streamllm.train.course import Course
        from streamllm.train.heldout import HeldOut

        measuring = HeldOut(held_out, trainer)
        saved.cut_log(trainer.step)
        course = Course(trainer, measuring, saved, measures=self.measures, answer=answer if self.json else None)
        signals.defer(None if self.quiet else PATIENCE)
        screen.settle()
        failed = course.follow(screen, signals)

        # 4. leave in order
        from streamllm.train.export import export

        corpus_tokens = sum(stretch.end - stretch.begin for stretch in corpus.stretches)
        export(
            trainer,
            tokenizer,
            saved,
            self.out,
            sources=sources,
            corpus_tokens=corpus_tokens,
            dtype=self.save_dtype,
        )
        if failed is not None:
            raise StreamLLMError(f"{failed} The model of step {trainer.step}, before it, is kept in {self.out}.")
        if signals.received is not None:
            screen.line(f"stopped at step {trainer.step} of {recipe.steps}; go on with --resume")
            return 128 + signals.received
        screen.note(f"done; try it: streamllm run -m {self.out} --endless")
        if answer.error is not None:
            raise answer.error
        return 0

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
                span = Recipe(**plan["recipe"]).span
                return corpus.part(HELD_OUT_SHARE, least=span, most=HELD_OUT_TOKENS, spell=tokenizer.decode)
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
        from streamllm.corpus import END_OF_TEXT
        from streamllm.models import find_device
        from streamllm.train.sequences import Sequences
        from streamllm.train.trainer import Trainer, make_model
        from streamllm.train.vocabulary import SINK_TOKEN, token_id

        stretches = [stretch for stretch in corpus.stretches if stretch.end - stretch.begin >= recipe.span]
        if not stretches:
            tokens = sum(stretch.end - stretch.begin for stretch in corpus.stretches)
            raise InputError(
                f"The text to train on has {tokens} tokens, a sequence has {recipe.span}: give more text, or a smaller "
                "--context."
            )
        sink = token_id(tokenizer, SINK_TOKEN)
        model = make_model(recipe, sink_id=sink, end_id=token_id(tokenizer, END_OF_TEXT))
        model.to(find_device(self.device))  # type: ignore[arg-type]
        sequences = Sequences(corpus.ids, stretches, recipe.span, recipe.seed)
        return Trainer(recipe, model, sequences, sink_id=sink, compiles=self.compiles, note=screen.line)


def _tokens_in(trainer: Trainer, seconds: float) -> int:
    """Tokens that ``trainer``, which is thrown away, would read in so many seconds."""
    trainer.recipe = dataclasses.replace(trainer.recipe, tokens=TIMED_STEPS * trainer.recipe.step_tokens)
    times = sorted(trainer.advance().seconds for _ in range(TIMED_STEPS))
    return max(1, round(seconds / times[len(times) // 2])) * trainer.recipe.step_tokens
