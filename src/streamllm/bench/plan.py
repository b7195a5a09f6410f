"""What one run of the benchmark shall measure, frozen and checked: every default of it stands here and only here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from streamllm.bench.catalogue import METHODS
from streamllm.bench.shape import SHAPES, find_shape
from streamllm.config import CacheConfig, check_count
from streamllm.errors import ConfigError

AT = 1024
"""Window of what is measured at one window only: rows side by side, prompts, evictions."""

BANDWIDTH_BYTES = 64 << 20
"""Of the tensors that a trial reads to measure the bandwidth; too few to tell it."""


@dataclass(frozen=True)
class Plan:
    """See the module.

    Args:
        shape: of random weights; ``None``: a model that is loaded.
        windows: tokens of the full cache, sinks included (the paper's "cache size").
        batches: rows side by side; one row is always measured.
        methods: by name; see ``catalogue``.
        rounds: in which each method has a turn, besides one that does not count.
        threads: of torch and of llama.cpp; ``None``: torch's own number.
        sinks, block: of every sink cache.
        is_trial: it takes seconds and proves nothing.

    Raises:
        ConfigError: a value cannot be.
    """

    shape: str | None = None
    windows: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    methods: tuple[str, ...] = tuple(METHODS)
    rounds: int = 5
    threads: int | None = None
    sinks: int = CacheConfig.sinks
    block: int = CacheConfig.block
    is_trial: bool = False

    def __post_init__(self) -> None:
        if self.shape is not None:
            find_shape(self.shape)
        least = max(2 * (self.sinks + 1), 16)
        for name, values, low in (("windows", self.windows, least), ("batches", self.batches, 1)):
            if not values:
                raise ConfigError(f"--{name} is empty: give numbers with commas, such as {low},{2 * low}.")
            for value in values:
                check_count(f"each of --{name}", value, low)
        for name in self.methods:
            if name not in METHODS:
                raise ConfigError(f"There is no method {name!r}; choose of {', '.join(METHODS)}.")
        if not self.methods:
            raise ConfigError(f"--methods is empty: choose of {', '.join(METHODS)}.")
        check_count("rounds", self.rounds, 1)
        if self.threads is not None:
            check_count("threads", self.threads, 1)

    @property
    def at(self) -> int:
        """The window of what is measured at one window only: ``AT``, else the largest below it, else the smallest."""
        return max((window for window in self.windows if window <= AT), default=min(self.windows))

    def within(self, positions: int) -> Plan:
        """The plan without windows that a model with so many positions cannot have.

        Raises:
            ConfigError: none is left.
        """
        windows = tuple(window for window in self.windows if window <= positions)
        if not windows:
            raise ConfigError(
                f"No window of {', '.join(map(str, self.windows))} fits this model, which was trained on {positions} "
                f"positions: give --windows of at most {positions - self.block + 1}."
            )
        return dataclasses.replace(self, windows=windows)

    def quick(self, explicit: frozenset[str]) -> Plan:
        """A trial of seconds, on a toy; what was given by hand stays."""
        small: dict[str, Any] = {"windows": (64, 256), "batches": (1, 2), "rounds": 1}
        if not {"model", "shape"} & explicit:
            small["shape"] = "toy"
        changes = {name: value for name, value in small.items() if name not in explicit}
        return dataclasses.replace(self, **changes, is_trial=True)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)


KNOWN_SHAPES = ", ".join(SHAPES)
"""For the help of ``--shape``."""
