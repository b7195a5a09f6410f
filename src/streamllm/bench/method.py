"""What every method is: something that reads one more token for each of its rows, turn by turn.

A method holds its own cache, full from the start. A *turn* is a stretch of steps that is timed as a whole, long enough
to hold what recurs (a whole cycle of evictions), so that one turn tells the cost of a token. Shapes: ``B`` rows,
``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from statistics import mean
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from streamllm.bench.bandwidth import wait, weight_bytes
from streamllm.bench.subject import Subject, one_by_one

WARM_UP = 2
"""Steps before each turn that are not timed: the method before has left its own data in the processor's caches."""


class Misfit(Exception):  # noqa: N818 -- nothing is wrong
    """Why a method is left out on this model, window or machine; one sentence."""


class Method(ABC):
    """One way to decode.

    Args:
        subject: what is measured.
        window: tokens of the full cache, the sinks among them (the paper's "cache size"). A cache that evicts in
            blocks holds at least so many, and up to a block less one more.
        rows: streams side by side.

    Attributes:
        name: as in the catalogue.
        context: tokens that a step attends to, itself included; the mean over the last turn.

    Raises:
        Misfit: it cannot be measured so.
    """

    name: ClassVar[str]
    context: float = 0.0

    def __init__(self, subject: Subject, window: int, rows: int = 1) -> None:
        self.subject, self.window, self.rows = subject, window, rows
        self.ids = subject.ids(rows, max(64, subject.block) + WARM_UP)

    @property
    def name_in_full(self) -> str:
        """The name with what it was measured at."""
        return f"{self.name} {self.window}" + (f" x{self.rows}" if self.rows > 1 else "")

    @abstractmethod
    def fill(self) -> None:
        """Read random tokens until the steady state is reached; compile what is compiled."""

    @abstractmethod
    def read(self, ids: Tensor) -> Tensor:
        """Read ids [B, T] into the cache at once; the logits [B, V] after the last one."""

    @abstractmethod
    def turn(self) -> float:
        """Decode; milliseconds of a step, which is one token for each row."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Steps of one turn that are timed."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes that the cache holds."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that a step reads."""
        return weight_bytes(self.subject.model)

    @property
    def step_bytes(self) -> float | None:
        """Bytes that a step cannot do without: weights, and keys and values; ``None``: it does more than a step."""
        return self.weight_bytes + self.rows * self.context * self.subject.token_bytes

    def close(self) -> None:  # noqa: B027 -- most methods have nothing of the kind
        """Give back what Python does not give back by itself."""


class Steady(Method):
    """A method whose every step is alike, or whose turn is a whole cycle of unlike ones.

    Attributes:
        warm_up: steps before each turn that are not timed.
        length: steps of one stretch.
        stretches: of one turn, with a ``rewind`` before each.
    """

    warm_up: int = WARM_UP
    length: int = 64
    stretches: int = 1

    @abstractmethod
    def step(self, ids: Tensor) -> Tensor:
        """Read ids [B, 1]; the logits [B, V] after them."""

    @abstractmethod
    def attended(self) -> int:
        """Tokens that the step before attended to, itself included."""

    def rewind(self) -> None:
        """Get ready for a stretch; not timed."""

    @property
    def tokens(self) -> int:
        """Steps of one turn."""
        return self.length * self.stretches

    @torch.no_grad()
    def turn(self) -> float:
        """Decode one turn, every step waited for, as whoever shows the text must; milliseconds of a step."""
        steps = one_by_one(self.ids)
        device = self.subject.device
        self.rewind()
        for ids in steps[: self.warm_up]:
            self.step(ids)
        seconds, contexts = 0.0, []
        for _ in range(self.stretches):
            self.rewind()
            wait(device)
            began = time.perf_counter()
            for ids in steps[self.warm_up : self.warm_up + self.length]:
                self.step(ids)
                wait(device)
                contexts.append(self.attended())
            seconds += time.perf_counter() - began
        self.context = mean(contexts)
        return seconds * 1000 / self.tokens


@torch.no_grad()
def forward(model: PreTrainedModel, ids: Tensor, cache: Cache | None, **options: Any) -> Tensor:
    """One forward over ids [B, T]; the logits [B, V] after the last of them."""
    found = model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1, **options)
    logits: Tensor = found.logits[:, -1]
    return logits
