"""The chat prompt: reads messages, carries out commands, and goes on after whatever went wrong.

Knows messages and commands, not models. Ctrl-C stops a reply and at an empty prompt says how to leave; a pipe has no
prompt, so there it leaves. Whoever made the conversation closes it.
"""

from __future__ import annotations

from collections.abc import Callable

from streamllm.errors import StreamLLMError
from streamllm.messages import is_quoted, unquoted
from streamllm.slash import carry_out
from streamllm.talk import Talk

LEAVING = "Ctrl-D or /bye leaves"


class Repl:
    """Reads messages and answers them, until there are no more.

    Args:
        talk: the conversation.
        read: gives the next message, or ``None`` when there will be no more; raises ``KeyboardInterrupt`` for Ctrl-C
            at a prompt.
        is_interactive: somebody types, so that Ctrl-C is for the reply and not for the process.
    """

    def __init__(self, talk: Talk, read: Callable[[], str | None], *, is_interactive: bool) -> None:
        self._talk, self._read, self._is_interactive = talk, read, is_interactive

    def run(self, first: str | None = None) -> None:
        """Go on until the messages end, somebody leaves, a signal ends the process, or nobody listens.

        Args:
            first: a message before all others.

        Raises:
            StreamLLMError: messages cannot be read, or replies cannot be written.
        """
        if first is not None:
            self.take(first)
        while self._goes_on():
            try:
                message = self._read()
            except KeyboardInterrupt:
                self._talk.note(LEAVING)
                continue
            if message is None:
                break
            self.take(message)
        if self._talk.answer.error is not None and self._talk.signals.received is None:  # a terminal that goes away
            raise self._talk.answer.error

    def take(self, message: str) -> None:
        """Answer one message, or carry out its command; what goes wrong is said in one line."""
        text = message.strip()
        try:
            if is_quoted(message):
                self._say(unquoted(message))
            elif text.startswith("//"):
                self._say(text[1:])
            elif text.startswith("/"):
                carry_out(self._talk, text)
            else:
                self._say(message)
        except StreamLLMError as error:
            self._talk.fail(str(error))
        self._talk.tell_notes()

    def _say(self, text: str) -> None:
        if text.strip():  # an empty line is no message
            self._talk.send(text)

    def _goes_on(self) -> bool:
        talk = self._talk
        if self._is_interactive:
            talk.signals.forget()
        is_heard = not talk.answer.is_closed and talk.answer.error is None
        return is_heard and not talk.is_leaving and talk.signals.received is None
