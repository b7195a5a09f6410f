"""One chat from the command line: the session and the model it begins with, what is said first, and leaving in order.

Knows the library and the terminal, but no flags (``cli_chat``) and no commands (``slash``). From the moment on that the
model is there, signals are only noted, so that what was said is saved whatever ends the process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamllm.chat_settings import endless
from streamllm.checkpoint import EMBEDDED, shown
from streamllm.config import SamplingConfig
from streamllm.console import Answer, Screen, Signals, read_stdin
from streamllm.errors import InputError
from streamllm.messages import piped
from streamllm.repl import Repl
from streamllm.run import told
from streamllm.slash import completions
from streamllm.talk import Talk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from streamllm.session import Chat, Recall
    from streamllm.sessions import Session

PRESSES = 3
"""So many times Ctrl-C during one reply end the process; one stops the reply, which may take a token."""

PLACEHOLDER = "a message, or /help"


@dataclass(frozen=True)
class ChatJob:
    """What one chat shall be; see the flags of ``streamllm chat``.

    Args:
        cache: sinks, window, block and kv_dtype, by name.
        sampling: how to draw.
        given: names of the settings that stand on the command line or in the environment. Only they may contradict
            what a session keeps.
        stats: show a line of statistics after each reply; ``None``: on a terminal.
    """

    prompt: str | None
    model: str | None
    device: str
    dtype: str
    quantize: str
    compile: bool
    cache: dict[str, Any]
    sampling: SamplingConfig
    given: frozenset[str]
    max_tokens: int | None
    stop: tuple[str, ...]
    endless: bool
    system: str | None
    session: str | None
    recall: Recall
    snapshots: int | None
    template_options: dict[str, Any] | None
    stats: bool | None
    json: bool
    quiet: bool
    verbose: bool

    def run(self) -> int:
        """Carry it out; return the exit status.

        Raises:
            StreamLLMError: it cannot begin, or replies cannot be written; what was said is saved.
        """
        with Signals() as signals, Screen(quiet=self.quiet, verbose=self.verbose) as screen, ExitStack() as stack:
            # 1. what can be refused before the model is loaded
            answer = Answer()
            session = self._kept_session()
            if session is not None:
                stack.enter_context(session)
            name = self._model_of(session)

            # 2. the model
            from streamllm import models

            folder = models.locate(name)
            screen.spin(f"loading {shown(folder)}")
            model, tokenizer = models.load(folder, device=self.device, dtype=self.dtype, quantize=self.quantize)

            # 3. the conversation
            signals.defer("stopping after this step; Ctrl-C once more leaves at once", presses=PRESSES)
            talk = Talk(
                self._begin(model, tokenizer, session, name),
                screen,
                answer,
                signals,
                model=shown(folder),
                open_chat=partial(self._go_on, model, tokenizer, name),
                list_names=_session_names,
                shows_stats=(screen.is_terminal if self.stats is None else self.stats) and not self.quiet,
                is_json=self.json,
            )
            stack.push(lambda *_: talk.chat.close())  # the one that is there then
            read, is_interactive = self._source(talk)
            self._greet(talk, model, is_interactive=is_interactive)
            with told(screen):
                Repl(talk, read, is_interactive=is_interactive).run(self.prompt)

            # 4. leave in order
            stack.close()
            talk.tell_notes()  # of saving
            if talk.chat.session is not None:
                screen.note(f"saved; go on with --session {talk.chat.session.name}")
            return 0 if signals.received is None else 128 + signals.received

    # ---- the conversation

    def _kept_session(self) -> Session | None:
        """The session, if it is there already; so it is known before anything is loaded that another process has it."""
        from streamllm.sessions import Session, check_name, sessions_folder

        if self.session is None:
            return None
        check_name(self.session)
        is_there = (sessions_folder() / self.session).is_dir()
        return Session(self.session) if is_there else None

    def _model_of(self, session: Session | None) -> str | None:
        """The model as it is named: by a flag, by the session, or else by the settings file."""
        kept = session.transcript.get("model") if session is not None and "model" not in self.given else None
        name = kept or self.model
        if name == EMBEDDED:
            return None
        return str(Path(name).resolve()) if name and Path(name).is_dir() else name

    def _begin(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, session: Session | None, name: str | None
    ) -> Chat:
        """Begin the conversation, or go on with the one of a session."""
        from streamllm.session import Chat

        is_kept = session is not None and not session.is_new
        cache = {key: value for key, value in self.cache.items() if not is_kept or key in self.given}
        chat = Chat(
            model,
            tokenizer,
            session=session or self.session,
            system=self.system,
            sampling=None if is_kept else self.sampling,
            template_options=self.template_options,
            **cache,
            **self._manner(),
        )
        self._go_past_ends(chat)
        changed = {key: getattr(self.sampling, key) for key in vars(self.sampling) if key in self.given}
        if is_kept and changed:
            chat.sampling = chat.sampling.replace(**changed)
        chat.transcript.put("model", name or EMBEDDED)
        return chat

    def _go_on(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model_name: str | None, name: str
    ) -> Chat:
        """Go on with another session, as it was but for the model; ``/load``."""
        from streamllm.session import Chat
        from streamllm.sessions import Session

        chat = Chat(model, tokenizer, session=Session(name, create=False), **self._manner())
        self._go_past_ends(chat)
        chat.notes = [note for note in chat.notes if note not in chat.template.notes]  # said when the model was loaded
        chat.transcript.put("model", model_name or EMBEDDED)
        return chat

    def _manner(self) -> dict[str, Any]:
        """What a session does not keep."""
        options = {"max_tokens": self.max_tokens, "stop": self.stop, "recall": self.recall, "compile": self.compile}
        return options if self.snapshots is None else {**options, "snapshots": self.snapshots}

    def _go_past_ends(self, chat: Chat) -> None:
        """Let replies have no end, if they shall have none; how depends on the chat's template."""
        if self.endless:
            chat.on_end = endless(chat.is_plain)

    # ---- the terminal

    def _source(self, talk: Talk) -> tuple[Callable[[], str | None], bool]:
        """Where messages come from, and whether somebody types them."""
        stdin = sys.stdin
        if stdin is not None and stdin.isatty() and (talk.screen.is_terminal or talk.answer.is_terminal):
            from streamllm.typed import Typed

            return Typed(talk.signals, partial(completions, talk), PLACEHOLDER), True
        lines: Iterator[str] = iter(()) if stdin is None else piped(read_stdin(talk.signals, lambda: None))
        return partial(next, lines, None), False

    def _greet(self, talk: Talk, model: PreTrainedModel, *, is_interactive: bool) -> None:
        """Say what talks, in how much room, where it is kept, and what not to expect."""
        from streamllm.doctor import sizes
        from streamllm.quantize import numbers_of

        screen, chat = talk.screen, talk.chat
        screen.settle()
        screen.note(f"{talk.model} · {sizes(chat.cache)} · {numbers_of(model)} on {model.device}")
        found = "" if chat.recall == "off" else ", but for what recall finds"
        screen.note(f"What has left the window is forgotten{found}: fluent for ever is not remembering for ever.")
        screen.note(talk.place() + ("" if chat.session else "; /save NAME keeps it"))
        if self.compile:
            screen.note("The first reply waits for the decode step to be compiled, up to a minute the first time.")
        if is_interactive:
            screen.note("Ctrl-C stops a reply, Ctrl-D leaves, /help shows the rest.")
        talk.tell_notes()


def _session_names() -> list[str]:
    from streamllm.sessions import list_sessions

    return [info.name for info in list_sessions()]


def read_system(text: str | None) -> str | None:
    """The system prompt: the text itself, or what a file holds whose name follows an ``@``.

    Raises:
        InputError: the file cannot be read.
    """
    if text is None or not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"The system prompt cannot be read from {text[1:]}: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(
            f"The system prompt in {text[1:]} is not UTF-8 text; convert it, for example with iconv."
        ) from error
