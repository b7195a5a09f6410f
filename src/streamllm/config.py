"""Frozen settings, checked on construction. Every default of streamllm stands here and only here.

Nothing here knows about a model: what a model cannot bear is checked where the model is known (``cache``).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from streamllm.errors import ConfigError

OnEnd = Literal["stop", "pass", "ban"]
"""What an end token does: end the stream, be kept while the stream goes on, or never be sampled."""

ON_END: tuple[OnEnd, ...] = ("stop", "pass", "ban")

KV_DTYPES = ("auto", "int8")
"""How keys and values can be kept."""

DEFAULT_WINDOW = 1020
"""Window in tokens where the trained length allows it (paper, section 4: 4 + 1020)."""

UNKNOWN_TRAINED_LENGTH = 2048
"""Bound on positions, in tokens, for a model whose config names no trained length."""

MAX_TURNS = 32
"""Times that a key may be rotated back in half precision while it is cached. Measured on bf16: the logits of 32 turns
are as far from exact ones as those of none, those of 500 are garbage, since small turns round to nothing each time."""

MAX_TURNS_INT8 = 8
"""The same for keys in eight bits. Measured on two models: the logits of 8 turns are up to 1.15 times as far from exact
ones as those of none, those of 16 up to 1.4 times, those of 32 three times."""

PREFILL_CHUNK = 256
"""Tokens read in one forward while a prompt crosses evictions; 64, one block, would leave half the machine idle."""

WAITING = {"GOMP_SPINCOUNT": "3000", "OMP_WAIT_POLICY": "active", "KMP_BLOCKTIME": "200"}
"""How threads of torch wait for work in a process of ours on Linux, where torch comes with GNU OpenMP. They look for it
3000 times before they sleep: the library's own millions stall everything as soon as another process wants a core, 70
against 165 tokens/s on two cores, and make no difference on quiet ones. "active" is about the threads of a second
thread that computes, such as the engine's: without it they look 100 times only, and a step of eight streams takes 6.7
ms instead of 4.3 (measured on stories7M). The last is for builds of torch with LLVM's or Intel's OpenMP: their own
default, which "active" would make endless."""

ANSWER_TOKENS = 256
"""Tokens of one answer of a pipe at most, because a pipe must go on."""

MOST_LOGPROBS = 20
"""Most likely tokens whose log probabilities come with each token at most."""

LARGEST_SHIFT = 10**9
"""A penalty or a bias moves a logit by no more than this, so that no sum of them overflows float32."""


RESIDENT_SHARE = 4
"""Conversations that a server keeps in memory take one of so many parts of what is free, with all their snapshots."""

MOST_RESIDENT = 128
"""Conversations that a server keeps in memory at most; each holds four files open."""

STALLED = 600.0
"""Seconds that a client of a server may take for what is sent at once; then it is as good as gone."""

MOST_SYSTEM = 256
"""Tokens of instructions that a server has room for, unless it is told otherwise; each costs a little in every step."""


class _Shown:
    """A repr that shows only what differs from the defaults."""

    def __repr__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def replace(self, **changes: Any) -> Any:
        """Return a copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


@dataclass(frozen=True, repr=False)
class CacheConfig(_Shown):
    """What the cache holds (paper, section 3.2).

    Args:
        sinks: tokens at the head of the stream that are never evicted, >= 0.
        window: every token attends to at least its ``window`` most recent tokens (itself included) besides the
            pinned head. ``None``: the smaller of 1020 and half the trained length less the sinks.
        block: tokens that leave together when the cache is full, >= 1. 1 is the paper's schedule.
        reread: rebuild the cache by re-reading the kept tokens at each eviction instead of moving keys. Needed by
            models whose positions are part of their hidden states; with ``block=1`` on any model it is the paper's
            "sliding window with re-computation". ``None``: only where the model needs it.
        kv_dtype: how keys and values are kept: "auto", in the model's dtype, or "int8", in a quarter to a half of that.

    Raises:
        ConfigError: a value is out of range.
    """

    sinks: int = 4
    window: int | None = None
    block: int = 64
    reread: bool | None = None
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        check_count("sinks", self.sinks, 0)
        if self.kv_dtype not in KV_DTYPES:
            raise ConfigError(f"kv_dtype must be one of {', '.join(KV_DTYPES)}, you gave {self.kv_dtype!r}.")
        if self.reread not in (None, True, False):
            raise ConfigError(f"reread must be True, False or None, you gave {self.reread!r}.")
        if self.window is not None:
            check_count("window", self.window, 1)
        check_count("block", self.block, 1)


@dataclass(frozen=True, repr=False)
class SamplingConfig(_Shown):
    """How the next token is drawn from the logits.

    Args:
        temperature: 0 takes the most likely token; otherwise the logits are divided by it.
        top_k: keep the ``top_k`` most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probabilities add up to ``top_p``, in (0, 1].
        min_p: drop tokens less likely than ``min_p`` times the most likely one, in [0, 1).
        repetition_penalty: divides (or multiplies, if negative) the logits of recent tokens; 1 is off.
        repetition_window: how many of the newest tokens the penalty looks at, >= 1. It bounds the memory of the
            sampler: nothing here grows with the stream.
        presence_penalty: taken from the logit of each token that was drawn in this reply (``Sampler.begin``); a
            negative one is added. 0 is off.
        frequency_penalty: the same, once for each time that the token was drawn. Both look at the newest
            ``repetition_window`` tokens that were drawn, not at the prompt.
        logit_bias: pairs of an id and what is added to its logit; ``-math.inf`` forbids the id. Ids beyond the
            vocabulary do no harm. A list of pairs becomes a tuple.
        seed: same seed, same text. ``None`` draws a new seed for each stream.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 256
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", _pairs("logit_bias", self.logit_bias))
        _at_least("temperature", self.temperature, 0)
        check_count("top_k", self.top_k, 0)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, you gave {self.top_p}; 1 keeps every token.")
        if not 0 <= self.min_p < 1:
            raise ConfigError(f"min_p must be at least 0 and below 1, you gave {self.min_p}; 0 keeps every token.")
        if not self.repetition_penalty > 0:
            raise ConfigError(
                f"repetition_penalty must be above 0, you gave {self.repetition_penalty}; 1 turns it off."
            )
        check_count("repetition_window", self.repetition_window, 1)
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise ConfigError(f"seed must be a whole number between 0 and 2**63 - 1, you gave {self.seed}.")
        for name in ("presence_penalty", "frequency_penalty"):
            if not _is_shift(value := getattr(self, name)):
                raise ConfigError(
                    f"{name} must be a number from -{LARGEST_SHIFT:,} to {LARGEST_SHIFT:,}, you gave {value!r}; "
                    "0 turns it off."
                )


@dataclass(frozen=True, repr=False)
class ServeConfig(_Shown):
    """What a server allows, and to whom.

    Args:
        host, port: where it listens; port 0 takes a free one.
        slots: replies that are generated at the same time.
        waiting: requests that may wait beyond them, before others are refused.
        max_system: tokens of instructions that there is room for in every slot; ``None``: half the window, at most 256.
        resident: conversations in memory at most; ``None``: as many as slots and waiting requests.
        max_stream_tokens: tokens of one reply at most; ``None``: no limit.
        max_per_key: requests of one API key that run at the same time; ``None``: no limit.
        max_body: bytes of a request at most.
        keep: sessions without a name that are kept for each key; the least recently used ones go.
        idle: seconds after which a conversation goes to disk.
        drain_seconds: how long replies may go on when the server is asked to leave.

    Raises:
        ConfigError: a value is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 8
    waiting: int = 64
    max_system: int | None = None
    resident: int | None = None
    max_stream_tokens: int | None = None
    max_per_key: int | None = None
    max_body: int = 32 << 20
    keep: int = 1000
    idle: float = 600.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        check_count("port", self.port, 0)
        if self.port > 65535:
            raise ConfigError(f"port must be at most 65535, you gave {self.port}.")
        for name, least in (("slots", 1), ("waiting", 0), ("max_body", 1), ("keep", 1)):
            check_count(name, getattr(self, name), least)
        for name, least in (("max_system", 0), ("resident", 2), ("max_stream_tokens", 1), ("max_per_key", 1)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least)
        _at_least("idle", self.idle, 0)
        _at_least("drain_seconds", self.drain_seconds, 0)

    def columns(self, capacity: int, sinks: int, window: int) -> int:
        """Tokens that a slot must hold.

        Args:
            capacity: what a stream without instructions caches.
            sinks, window: of its cache.
        """
        room = min(MOST_SYSTEM, window // 2) if self.max_system is None else self.max_system
        return capacity + max(0, room - sinks)


def check_count(name: str, value: int, least: int) -> None:
    """Refuse what is no whole number of at least ``least``.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, you gave {value!r}.")


def _at_least(name: str, value: float, least: int) -> None:
    """Check one number; ``nan`` fails too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
        raise ConfigError(f"{name} must be a number of at least {least}, you gave {value!r}.")


def _is_shift(value: Any) -> bool:
    """Whether a logit can be moved by it; ``nan`` cannot be."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST_SHIFT <= value <= LARGEST_SHIFT


def _pairs(name: str, given: Any) -> tuple[tuple[int, float], ...]:
    """Pairs of an id and a bias, checked; as they come from JSON, too."""
    if not isinstance(given, (tuple, list)):
        raise ConfigError(f"{name} must be pairs of an id and a bias, you gave {given!r}.")
    found: dict[int, float] = {}
    for pair in given:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ConfigError(f"{name} must be pairs of an id and a bias, one of those you gave is {pair!r}.")
        token, bias = pair
        check_count(f"each id of {name}", token, 0)
        if not (_is_shift(bias) or bias == -math.inf):
            raise ConfigError(
                f"the bias of id {token} in {name} must be a number from -{LARGEST_SHIFT:,} to {LARGEST_SHIFT:,}, or "
                f"-math.inf to forbid the id, you gave {bias!r}."
            )
        if token in found:
            raise ConfigError(f"{name} names id {token} twice, with {found[token]} and {bias}: give each id once.")
        found[token] = float(bias)
    return tuple(found.items())
