"""What others do, on plain transformers: dense attention, re-computation, truncation, and the paper's own scheme.

Each reads the subject's plain model, which has no hooks. Shapes: ``B`` rows, ``T`` tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from streamllm.bench.bandwidth import wait
from streamllm.bench.method import Method, Misfit, Steady, forward
from streamllm.bench.raw_cache import RawCache
from streamllm.bench.subject import Subject, one_by_one, twin
from streamllm.config import PREFILL_CHUNK


def check_positions(subject: Subject, window: int) -> None:
    """Refuse a context that the model has no positions for.

    Raises:
        Misfit: it is too long.
    """
    trained = subject.spec.trained_length
    if trained is not None and window > trained:
        raise Misfit(f"the model was trained on {trained} positions")


def stored_bytes(cache: Cache) -> int:
    """Bytes of the keys and values of a cache."""
    tensors = (t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None)))
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class Dense(Steady):
    """Plain transformers, put back to just below the window before each stretch, so that the window is the mean."""

    name = "dense"
    length = 32
    stretches = 2

    def __init__(self, subject: Subject, window: int, rows: int = 1) -> None:
        super().__init__(subject, window, rows)
        check_positions(subject, window + self.length // 2)
        self.model = subject.plain
        self.begin = window - self.length // 2
        self.cache = DynamicCache(config=self.model.config)

    def fill(self) -> None:
        """Read what stands before a stretch."""
        self.read(self.subject.ids(self.rows, self.begin))

    def read(self, ids: Tensor) -> Tensor:
        """Read ids [B, T]; see ``Method``."""
        return forward(self.model, ids, self.cache)

    def step(self, ids: Tensor) -> Tensor:
        """Read ids [B, 1]; see ``Steady``."""
        return forward(self.model, ids, self.cache)

    def rewind(self) -> None:
        """Drop the tokens of the stretch before."""
        crop(self.cache, self.begin)

    def attended(self) -> int:
        """Tokens cached."""
        return self.cache.get_seq_length()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return stored_bytes(self.cache)


def crop(cache: DynamicCache, length: int) -> None:
    """Keep the first ``length`` tokens."""
    if cache.get_seq_length() > length:
        cache.crop(length - cache.get_seq_length())


class Recompute(Steady):
    """The whole window read anew for every token: the paper's "sliding window with re-computation"."""

    name = "recompute"
    warm_up = 0  # a whole window is no cold start

    def __init__(self, subject: Subject, window: int, rows: int = 1) -> None:
        super().__init__(subject, window, rows)
        check_positions(subject, window)
        self.length = max(1, min(4, 1024 // window))
        self.seen = torch.empty((rows, 0), dtype=torch.long, device=subject.device)

    def fill(self) -> None:
        """Know a window's ids."""
        self.seen = self.subject.ids(self.rows, self.window)

    def read(self, ids: Tensor) -> Tensor:
        """Read ids [B, T] and what stands before them; see ``Method``."""
        self.seen = torch.cat([self.seen, ids], dim=1)[:, -self.window :]
        return forward(self.subject.plain, self.seen, None)

    def step(self, ids: Tensor) -> Tensor:
        """Read ids [B, 1] and the window before them; see ``Steady``."""
        return self.read(ids)

    def attended(self) -> int:
        """Tokens of the window."""
        return self.seen.shape[1]

    @property
    def cache_bytes(self) -> int:
        """It keeps ids only."""
        return 0

    @property
    def step_bytes(self) -> None:
        """It reads a window for every token, so a step's floor says nothing about it."""
        return


class Reread(Method):
    """When the context is full, forget half of it and read the rest again, as chat programs do.

    A whole cycle would be half a window of tokens; a turn takes one re-reading, and steps at the mean context, three
    quarters of the window, and adds up what a token costs.
    """

    name = "reread"

    def __init__(self, subject: Subject, window: int, rows: int = 1) -> None:
        super().__init__(subject, window, rows)
        check_positions(subject, window)
        self.model = subject.plain
        self.half = window // 2
        self.steps = min(16, window // 8)
        self.begin = window * 3 // 4 - self.steps // 2
        self.cache = DynamicCache(config=self.model.config)

    def fill(self) -> None:
        """Read three quarters of a window."""
        self.read(self.subject.ids(self.rows, self.begin))

    def read(self, ids: Tensor) -> Tensor:
        """Read ids [B, T]; see ``Method``."""
        return forward(self.model, ids, self.cache)

    @property
    def tokens(self) -> int:
        """Steps at the mean context."""
        return self.steps

    @torch.no_grad()
    def turn(self) -> float:
        """One re-reading and some steps; milliseconds of a token, each with its part of the re-reading."""
        device = self.subject.device
        kept = self.subject.ids(self.rows, self.window - self.half)
        wait(device)
        began = time.perf_counter()
        forward(self.model, kept, DynamicCache(config=self.model.config))
        wait(device)
        read = time.perf_counter()
        crop(self.cache, self.begin)
        steps = one_by_one(self.ids[:, : self.steps])
        wait(device)
        middle = time.perf_counter()
        for ids in steps:
            self.read(ids)
            wait(device)
        ended = time.perf_counter()
        self.context = self.begin + (self.steps + 1) / 2
        return 1000 * ((ended - middle) / self.steps + (read - began) / self.half)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache when it is full."""
        return stored_bytes(self.cache) * self.window // self.cache.get_seq_length()


class Paper(Steady):
    """The paper's own scheme; see ``raw_cache``. As published, attention is by plain matrix products."""

    name = "paper"
    kernel = "eager"
    length = 16

    def __init__(self, subject: Subject, window: int, rows: int = 1) -> None:
        super().__init__(subject, window, rows)
        if not subject.is_llama:
            raise Misfit("it is written for Llama")
        check_positions(subject, window)
        self.model: PreTrainedModel = twin(subject.plain, self.kernel)
        self.cache = RawCache(self.model.get_decoder(), subject.sinks, window - subject.sinks)

    def fill(self) -> None:
        """Read a window, in parts: plain attention holds a number for each pair of tokens."""
        ids = self.subject.ids(self.rows, self.window)
        for first in range(0, self.window, PREFILL_CHUNK):
            self.read(ids[:, first : first + PREFILL_CHUNK])

    def read(self, ids: Tensor) -> Tensor:
        """Read ids [B, T]; see ``Method``."""
        self.cache.make_room(ids.shape[1])
        begin = self.cache.get_seq_length()
        positions = torch.arange(begin, begin + ids.shape[1], device=ids.device)[None]
        return forward(self.model, ids, self.cache, position_ids=positions)

    def step(self, ids: Tensor) -> Tensor:
        """Evict one token and read ids [B, 1], at their index in the cache; see ``Steady``."""
        return self.read(ids)

    def attended(self) -> int:
        """Tokens cached."""
        return self.cache.get_seq_length()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return stored_bytes(self.cache)


class PaperSdpa(Paper):
    """The same scheme at its best, with a fused kernel of attention."""

    name = "paper-sdpa"
    kernel = "sdpa"
