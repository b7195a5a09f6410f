"""What a server has once its model is there, and what a request makes of it: the model's name, draws and limits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from streamllm.config import OnEnd, SamplingConfig, ServeConfig
from streamllm.server.conversations import Conversations
from streamllm.server.limits import Limits
from streamllm.server.metrics import Metrics
from streamllm.server.refusal import Refusal
from streamllm.server.runs import Runs, Watched
from streamllm.server.schema import Drawn

REMEMBERED = 256
"""Responses that are kept as they were told; of older ones the text alone is known."""

_log = logging.getLogger("streamllm.server")
_DRAWS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass
class Service:
    """A model, ready to answer.

    Args:
        model: its name, as clients say it.
        aliases: other names of it.
        sampling, stop, max_tokens: what holds where a request says nothing.
        logs_messages: whether the journal has what is said.
        tell: told in one sentence what the operator should know.
    """

    engine: Watched
    conversations: Conversations
    metrics: Metrics
    model: str
    config: ServeConfig
    aliases: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    endless: bool = False
    logs_messages: bool = False
    tell: Callable[[str], None] = _log.warning
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        config = self.config
        self.runs = Runs(self.metrics)
        self.limits = Limits(config.slots + config.waiting, config.max_per_key, config.max_stream_tokens)
        self.vocabulary = len(self.engine.model.get_input_embeddings().weight)  # type: ignore[arg-type]
        self._responses: dict[tuple[str, str], dict[str, Any]] = {}
        self.metrics.watch(self._gauges)

    def check_model(self, name: str) -> None:
        """Refuse another model than the one that is loaded.

        Raises:
            Refusal: it is another.
        """
        if name != self.model and name not in self.aliases:
            raise Refusal(
                404,
                f"There is no model {name[:80]!r} here; the one that is loaded is {self.model!r}.",
                param="model",
                code="model_not_found",
            )

    def drawn(self, asked: Drawn, index: int = 0) -> SamplingConfig:
        """How the tokens of one choice are drawn.

        Raises:
            Refusal: an id is none of this model.
        """
        changes = {name: value for name in _DRAWS if (value := getattr(asked, name)) is not None}
        if asked.seed is not None:
            changes["seed"] = (asked.seed + index) % 2**63
        if asked.logit_bias:
            pairs = tuple(sorted((int(id), float(bias)) for id, bias in asked.logit_bias.items()))
            if pairs[-1][0] >= self.vocabulary:
                raise Refusal(
                    400,
                    f"{pairs[-1][0]} is no id of this model, whose ids run from 0 to {self.vocabulary - 1}.",
                    param="logit_bias",
                )
            changes["logit_bias"] = pairs
        found: SamplingConfig = self.sampling.replace(**changes)
        return found

    def most(self, asked: int | None) -> int | None:
        """Tokens that a reply may have."""
        return self.limits.cap(self.max_tokens if asked is None else asked)

    def stops(self, asked: Drawn) -> tuple[str, ...]:
        """The texts that end a reply."""
        given = asked.stops()
        return self.stop if given is None else given

    def on_end(self, asked: bool | None) -> OnEnd:
        """What an end token does: a plain text goes on behind it, a turn of a chat never draws it."""
        if not (self.endless if asked is None else asked):
            return "stop"
        return "ban" if getattr(self.engine.tokenizer, "chat_template", None) else "pass"

    # ---- responses as they were told, of which the conversations keep the text alone

    def remember(self, owner: str, id: str, response: dict[str, Any]) -> None:
        """Keep a response for a while."""
        self._responses[owner, id] = response
        while len(self._responses) > REMEMBERED:
            with suppress(KeyError, StopIteration, RuntimeError):  # another thread was here
                del self._responses[next(iter(self._responses))]

    def recollect(self, owner: str, id: str) -> dict[str, Any] | None:
        """A response that is still kept."""
        return self._responses.get((owner, id))

    def forget(self, owner: str, id: str) -> None:
        """Do not keep a response any more."""
        self._responses.pop((owner, id), None)

    # ---- the whole

    def sweep(self) -> None:
        """Forget replies that nobody comes back for, put idle conversations on disk, and tell what went wrong there."""
        self.runs.sweep()
        self.conversations.sweep()
        notes = self.conversations.notes
        while notes:
            self.tell(notes.popleft())

    def close(self) -> None:
        """End what runs, and save everything."""
        self.runs.interrupt()
        self.conversations.close()
        self.engine.close()

    def _gauges(self) -> Iterable[tuple[str, str, float]]:
        stats, kept = self.engine.stats(), self.conversations.stats()
        yield "num_requests_running", "Streams in slots.", stats.running
        yield "num_requests_waiting", "Streams that want a slot.", stats.waiting
        yield "slots", "Streams that can run at once.", stats.slots
        yield "sessions_resident", "Sessions in memory.", kept["resident"]
        yield "sessions_on_disk", "Sessions on disk.", kept["on_disk"]


async def service_of(request: Request) -> Service:
    """The service of a request; the door has seen to it that there is one. Asynchronous: it needs no thread."""
    service: Service = request.app.state.service
    return service
