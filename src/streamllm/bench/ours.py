"""Our own ways to decode: the cache in a plain loop, the compiled step, the compiled step on weights in int8, a shift.

``Stepper`` is the one place that knows how the compiled step is called. Shapes: ``B`` rows, ``T`` tokens, ``V``
vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import PreTrainedModel

from streamllm.bench.bandwidth import wait, weight_bytes
from streamllm.bench.method import Method, Misfit, Steady, forward
from streamllm.bench.subject import Subject, one_by_one, twin
from streamllm.cache import SinkCache
from streamllm.errors import ConfigError, StreamLLMError
from streamllm.slots import Slots, why_not
from streamllm.spec import ModelSpec


class Stepper:
    """Streams side by side and the compiled step that reads them.

    Args:
        model: that reads.
        make: gives an empty cache of so many rows.
        rows: streams.
        compiles: whether to compile; a plain step of the same shapes otherwise.

    Raises:
        Misfit: this model cannot decode in slots.
    """

    def __init__(
        self, model: PreTrainedModel, make: Callable[[int], SinkCache], rows: int = 1, *, compiles: bool = True
    ) -> None:
        self.model, self.rows = model, rows
        self.caches = [make(1) for _ in range(rows)]
        if reason := why_not(self.caches[0]):
            raise Misfit(f"a model of this type cannot decode in slots: {reason}")
        self._slots = Slots(model, rows, self.capacity, compiles=compiles, note=refuse)

    def read(self, ids: Tensor) -> Tensor:
        """Read ids [B, T] by the model itself; the logits [B, V] after the last of them."""
        return torch.cat([forward(self.model, row[None], cache) for row, cache in zip(ids, self.caches, strict=True)])

    def step(self, ids: Tensor) -> Tensor:
        """Read ids [B, 1], after something was read; the logits [B, V] after them.

        Raises:
            Misfit: the step cannot be compiled here.
        """
        for cache in self.caches if self._slots.free else ():
            self._slots.take(cache)
        return self._slots.step(self.caches, ids[:, 0].tolist())

    @property
    def cached(self) -> int:
        """Tokens that a stream has in its cache."""
        return self.caches[0].tokens_cached

    @property
    def capacity(self) -> int:
        """Most tokens that a stream can have there."""
        return self.caches[0].capacity

    @property
    def bytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.bytes for cache in self.caches)


def refuse(text: str) -> None:
    """No measurement of a step that is not compiled."""
    raise Misfit(text)


def make_cache(
    subject: Subject, window: int, rows: int = 1, block: int | None = None, known: ModelSpec | None = None
) -> SinkCache:
    """A cache of ``window`` tokens, its sinks among them, and a block's slack.

    Args:
        block: another one than the subject's.
        known: the model's spec, if another one is to be believed.

    Raises:
        Misfit: the model is too short for it.
    """
    inside = window - subject.sinks
    try:
        attached = SinkCache(subject.model, subject.sinks, inside, block or subject.block, rows)
        return attached if known is None else SinkCache(known, subject.sinks, inside, block or subject.block, rows)
    except ConfigError as error:
        raise Misfit(str(error)) from error


class Eager(Steady):
    """The cache in a plain ``model(...)`` loop; a turn is one cycle of evictions."""

    name = "eager"

    def __init__(self, subject: Subject, window: int, rows: int = 1) -> None:
        super().__init__(subject, window, rows)
        self.length = subject.block
        self.model = subject.model
        self.cache = make_cache(subject, window, rows)

    def fill(self) -> None:
        """Read one token more than fits."""
        self.read(self.subject.ids(self.rows, self.cache.capacity + 1))

    def read(self, ids: Tensor) -> Tensor:
        """Read ids [B, T]; see ``Method``."""
        return forward(self.model, ids, self.cache)

    def step(self, ids: Tensor) -> Tensor:
        """Read ids [B, 1]; see ``Steady``."""
        return forward(self.model, ids, self.cache)

    def attended(self) -> int:
        """Tokens cached by a row."""
        return self.cache.tokens_cached // self.rows

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return self.cache.bytes


class Compiled(Steady):
    """Caches of the same kind, read by the compiled step; a turn is one cycle of evictions."""

    name = "compiled"

    def __init__(self, subject: Subject, window: int, rows: int = 1) -> None:
        super().__init__(subject, window, rows)
        self.length = subject.block
        self.stepper = Stepper(subject.model, lambda count: make_cache(subject, window, count), rows)

    def fill(self) -> None:
        """Read one token more than fits, and compile."""
        self.read(self.subject.ids(self.rows, self.stepper.capacity + 1))
        for ids in one_by_one(self.ids[:, :3]):
            self.step(ids)

    def read(self, ids: Tensor) -> Tensor:
        """Read ids [B, T]; see ``Method``."""
        return self.stepper.read(ids)

    def step(self, ids: Tensor) -> Tensor:
        """Read ids [B, 1]; see ``Steady``."""
        return self.stepper.step(ids)

    def attended(self) -> int:
        """Tokens cached by a row."""
        return self.stepper.cached

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches."""
        return self.stepper.bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that a step reads."""
        return weight_bytes(self.stepper.model)


class Int8(Compiled):
    """The compiled step on weights in int8; a model of its own, made for the measurement."""

    name = "int8"

    def __init__(self, subject: Subject, window: int, rows: int = 1) -> None:
        super().__init__(subject, window, rows)  # which says whether the window fits
        model = _quantized(subject)
        inside = window - subject.sinks
        self.stepper = Stepper(model, lambda count: SinkCache(model, subject.sinks, inside, subject.block, count), rows)


def _quantized(subject: Subject) -> PreTrainedModel:
    """The subject's model with weights in int8; made once."""
    known: PreTrainedModel | None = subject.made.get("int8")
    if known is None:
        if find_spec("streamllm.quantize") is None:
            raise Misfit("this version has no streamllm.quantize")
        known = twin(subject.plain)
        try:
            import_module("streamllm.quantize").quantize(known, "int8")
        except (StreamLLMError, ImportError) as error:
            raise Misfit(f"the weights cannot be quantised: {error}") from error
        subject.made["int8"] = known
    return known


class Shift(Method):
    """Forget half when full, and move the keys of all the rest: what llama.cpp calls a context shift.

    A cache whose block is half of it, on a model whose positions end where the cache ends: so every eviction turns all
    the keys that stay. A whole cycle would be half a window of tokens; a turn takes one shift, and steps at the mean
    context, three quarters of the window, and adds up what a token costs.
    """

    name = "shift"

    def __init__(self, subject: Subject, window: int, rows: int = 1) -> None:
        super().__init__(subject, window, rows)
        if window < 4 * subject.sinks:
            raise Misfit("half of so small a window holds the sinks and little else")
        self.model = subject.model
        self.steps = min(16, window // 8)
        self.half = window // 2
        self.cache = make_cache(subject, window - self.half + 1, rows, self.half, subject.limited(window))

    def fill(self) -> None:
        """Read what fits."""
        self.read(self.subject.ids(self.rows, self.cache.capacity))

    def read(self, ids: Tensor) -> Tensor:
        """Read ids [B, T]; see ``Method``."""
        return forward(self.model, ids, self.cache)

    @property
    def tokens(self) -> int:
        """Steps at the mean context, and the one with the shift."""
        return self.steps + 1

    @torch.no_grad()
    def turn(self) -> float:
        """One shift and some steps; milliseconds of a token, each with its part of the shift."""
        if self.cache.tokens_cached // self.rows < self.cache.capacity:
            self.read(self.subject.ids(self.rows, self.cache.room))
        # 1. the step with the shift, and some after it, at half a window
        shift = self._time(1)
        after = self._time(self.steps // 2)
        # 2. at three quarters of the window
        cached = self.cache.tokens_cached // self.rows
        self.read(self.subject.ids(self.rows, self.window * 3 // 4 - self.steps // 2 - cached))
        middle = self._time(self.steps)
        self.context = self.window * 3 / 4
        return middle + max(0.0, shift - after) / self.half

    def _time(self, count: int) -> float:
        """Milliseconds of a step."""
        wait(self.subject.device)
        began = time.perf_counter()
        for ids in one_by_one(self.ids[:, :count]):
            forward(self.model, ids, self.cache)
            wait(self.subject.device)
        return (time.perf_counter() - began) * 1000 / count

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return int(self.cache.bytes)
