"""One run of a stream from the command line: read, write as it comes, save, and leave in order.

Knows the terminal and the library, but no flags (``cli``) and no algorithm (``loop``). From the moment on that the
stream begins, Ctrl-C is only noted: the loop ends between two tokens, what was read and written is saved, and then the
process leaves.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamllm.config import CacheConfig, OnEnd, SamplingConfig
from streamllm.console import Answer, Screen, Signals, join, read_stdin
from streamllm.errors import ConfigError, StateError, StreamLLMWarning
from streamllm.settings import SETTINGS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from streamllm.cache import SinkCache
    from streamllm.loop import Chunk
    from streamllm.sampling import Sampler
    from streamllm.state import SavedStream

CACHE_FLAGS = ("sinks", "window", "block", "kv_dtype")
SAMPLING_FLAGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@dataclass(frozen=True)
class Job:
    """What one run shall do; see the flags of ``streamllm run``.

    Args:
        explicit: names of the settings that stand on the command line itself. Only they may change a saved stream.
    """

    prompt: str
    model: str | None
    device: str
    dtype: str
    quantize: str
    cache: CacheConfig
    compile: bool
    sampling: SamplingConfig
    explicit: frozenset[str]
    max_tokens: int | None
    stop: tuple[str, ...]
    endless: bool
    save: Path | None
    resume: Path | None
    stats: bool
    json: bool
    quiet: bool
    verbose: bool

    def run(self) -> int:
        """Carry it out; return the exit status.

        Raises:
            StreamLLMError: something expected went wrong; what can be saved is saved before.
        """
        with Signals() as signals, Screen(quiet=self.quiet, verbose=self.verbose) as screen:
            # 1. what can be refused before the model is loaded
            answer = Answer()
            pieces = join(read_stdin(signals, lambda: self._waits(screen)), self.prompt)
            first = next(pieces, None)
            if first is None and self.resume is None:
                raise ConfigError(
                    'The prompt is empty. Give one, as in: streamllm run "Once upon a time", or pipe text in.'
                )
            if self.save is not None:
                check_target(self.save)

            # 2. the model, and the stream to go on with
            from streamllm import models
            from streamllm.checkpoint import shown
            from streamllm.detokenize import Decoder
            from streamllm.loop import end_ids, stream

            folder = models.locate(self.model)
            name = shown(folder)
            screen.spin(f"loading {name}")
            model, tokenizer = models.load(folder, device=self.device, dtype=self.dtype, quantize=self.quantize)
            saved = open_stream(model, tokenizer, self.cache, self.resume, self.explicit)
            on_end = self._on_end(tokenizer)
            banned = sorted(end_ids(model, tokenizer)) if on_end == "ban" else []
            sampler = go_on_drawing(model, saved.sampler, self.sampling, self.explicit, banned)
            decoder = saved.decoder or Decoder(tokenizer)
            show_banner(screen, name, saved.cache, model)

            # 3. the stream
            signals.defer()
            prompt = None
            if first is not None:
                all_pieces = itertools.chain([first], pieces)
                prompt = screen.watch(all_pieces, signals, lambda: reading(saved.cache))
            chunks = stream(
                model,
                tokenizer,
                prompt,
                max_tokens=self.max_tokens,
                sampling=sampler,
                stop=self.stop,
                cache=saved.cache,
                on_end=on_end,
                decoder=decoder,
                compile=self.compile,
            )
            if self.compile:
                screen.spin("compiling the decode step; once for this model")
            with told(screen):
                last = self._show(chunks, answer, screen, signals)

            # 4. leave in order
            if self.save is not None:
                from streamllm.state import save_state

                save_state(self.save, saved.cache, sampler=sampler, decoder=decoder)
                screen.note(f"saved to {self.save}; go on with --resume {self.save}")
            if last is not None and self.stats:
                screen.line(last.stats.line())
            if answer.error is not None:
                raise answer.error
            return 0 if signals.received is None else 128 + signals.received

    def _waits(self, screen: Screen) -> None:
        """Say why nothing happens when a pipe is open and nothing comes through it."""
        if not self.quiet:
            screen.line("waiting for standard input, which is read to its end first; nothing to pipe? add < /dev/null")

    def _on_end(self, tokenizer: PreTrainedTokenizerBase) -> OnEnd:
        """What an end token does: a base model may begin another text, a chat model would begin a user's turn."""
        if not self.endless:
            return "stop"
        return "ban" if getattr(tokenizer, "chat_template", None) else "pass"

    def _show(self, chunks: Iterator[Chunk], answer: Answer, screen: Screen, signals: Signals) -> Chunk | None:
        """Write the stream as it comes, until it ends, a signal comes or nobody listens; return its last chunk."""
        last: Chunk | None = None
        line = json_lines if self.json else TextLines()
        closing: Any = chunks  # a generator
        with contextlib.closing(closing):
            for last in chunks:
                screen.settle()
                if not answer.write(line(last)) or signals.received is not None:
                    break
        if self.json and last is not None:
            finish = last.finish or ("interrupted" if signals.received is not None else None)
            answer.write(json_line("stats", **last.stats.to_dict(), finish=finish))
        elif answer.is_terminal:
            answer.write("\n")
        return last


def open_stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: CacheConfig,
    resume: Path | None,
    explicit: frozenset[str],
) -> SavedStream:
    """Begin a stream, or read a saved one.

    Args:
        model, tokenizer: of the stream.
        config: of a new cache; a saved one keeps its own.
        resume: the file of the saved one.
        explicit: names of the settings that stand on the command line itself.

    Raises:
        StateError: the file cannot be used.
        ConfigError: the cache cannot be, or an explicit setting contradicts the saved one.
    """
    from streamllm.cache import SinkCache
    from streamllm.state import SavedStream, load_state

    if resume is None:
        return SavedStream(SinkCache(model, config.sinks, config.window, config.block, kv_dtype=config.kv_dtype))
    saved = load_state(resume, model, tokenizer)
    for name in CACHE_FLAGS:
        here, there = getattr(config, name), getattr(saved.cache.config, name)
        if name in explicit and here != there:
            raise ConfigError(
                f"{SETTINGS[name].flag} {here} contradicts {resume}, which was saved with {there} and keeps "
                "it: leave the flag out, or begin a new stream."
            )
    return saved


def go_on_drawing(
    model: PreTrainedModel,
    saved: Sampler | None,
    config: SamplingConfig,
    explicit: frozenset[str],
    banned: Sequence[int] = (),
) -> Sampler:
    """Return a sampler: the saved one, as far as no explicit setting says otherwise, or a new one."""
    from streamllm.sampling import Sampler

    if saved is None:
        return Sampler(config, device=model.device, banned=banned)
    state = saved.state()
    changed = {name: getattr(config, name) for name in SAMPLING_FLAGS if name in explicit}
    state["config"].update(changed)
    state["banned"] = list(banned)
    if "seed" not in changed:
        return Sampler.from_state(state, device=model.device)
    sampler = Sampler(SamplingConfig(**state["config"]), device=model.device, banned=banned)
    sampler.observe(state["recent"])
    sampler.begin(state["drawn"])
    return sampler


@contextlib.contextmanager
def told(screen: Screen) -> Iterator[None]:
    """Show our own warnings in one line each, and the same one once."""
    said = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", StreamLLMWarning)
        before = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, StreamLLMWarning):
                before(message, category, *place, **more)
            elif str(message) not in said:
                said.add(str(message))
                screen.line(str(message))

        warnings.showwarning = show
        yield


def check_target(path: Path) -> None:
    """Find out now, not after an hour, that a stream cannot be saved to ``path``.

    Raises:
        StateError: it cannot.
    """
    if path.is_dir():
        raise StateError(f"Cannot save the stream to {path}: it is a folder; name a file in it.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise StateError(
            f"Cannot save the stream to {path}: {error.strerror} ({path.parent}); choose another place with --save."
        ) from error


class TextLines:
    """A chunk as text; documents stand apart by a blank line."""

    def __init__(self) -> None:
        self._is_fresh = True  # nothing was written since the document began

    def __call__(self, chunk: Chunk) -> str:
        """What to write for the next chunk."""
        if chunk.text:
            self._is_fresh = False
        if not chunk.document_end or self._is_fresh:
            return chunk.text
        self._is_fresh = True
        return chunk.text + "\n\n"


def json_lines(chunk: Chunk) -> str:
    """A chunk as JSON, one object a line."""
    lines = ""
    if chunk.id is not None and (chunk.text or not chunk.document_end):
        lines += json_line("token", text=chunk.text, id=chunk.id)
    return lines + json_line("document_end", id=chunk.id) if chunk.document_end else lines


def json_line(kind: str, **fields: Any) -> str:
    """One object as a line."""
    return json.dumps({"type": kind, **fields}) + "\n"


def show_banner(screen: Screen, name: str, cache: SinkCache, model: PreTrainedModel) -> None:
    """Say what runs, in how much room, and what not to expect."""
    from streamllm.doctor import sizes
    from streamllm.quantize import numbers_of

    screen.settle()
    screen.note(f"{name} · {sizes(cache)} · {numbers_of(model)} on {model.device}")
    screen.note("What has left the window is forgotten: fluent for ever is not remembering for ever. Ctrl-C stops.")


def reading(cache: SinkCache) -> str:
    """Say how far a prompt was read."""
    return f"reading · {cache.tokens_seen:,} tokens".replace(",", " ")
