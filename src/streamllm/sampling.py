"""Logits to the next token: what one stream has seen and forbids, its settings, and its random numbers.

The steps and their order are those of transformers' ``generate()``: repetition penalty, then what OpenAI adds to them
(penalties for what the reply has drawn, and a bias by id), ban, then temperature, top-k, top-p, min-p and the draw,
which are the work of ``race``. Nothing here knows about models, caches or text. Shapes: ``B`` streams, ``V``
vocabulary, ``W`` recent tokens. The memory is bounded by ``SamplingConfig.repetition_window``.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import secrets
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from streamllm.config import SamplingConfig
from streamllm.errors import ConfigError, StateError, StreamLLMError
from streamllm.race import race


class Sampler:
    """Draws the tokens of one stream.

    Args:
        config: how to draw.
        device: where the logits are; the random numbers are made there.
        banned: ids that are never drawn. Ids beyond the vocabulary do no harm.

    Attributes:
        recent: the newest tokens that were read or drawn, which the repetition penalty sees.
        drawn: the newest tokens that were drawn since the reply began, which the other two penalties count.

    Raises:
        ConfigError: a number is infinite, or a banned id is negative.
    """

    def __init__(
        self, config: SamplingConfig, *, device: torch.device | str = "cpu", banned: Sequence[int] = ()
    ) -> None:
        for name in ("temperature", "repetition_penalty"):
            if not math.isfinite(getattr(config, name)):
                raise ConfigError(f"{name} must be a finite number, you gave {getattr(config, name)}.")
        if any(token < 0 for token in banned):
            raise ConfigError(f"banned ids must be at least 0, you gave {min(banned)}.")
        self.config = config
        self.banned = tuple(sorted(set(banned)))
        self.recent: deque[int] = deque(maxlen=config.repetition_window)
        self.drawn: deque[int] = deque(maxlen=config.repetition_window)
        self.seed = secrets.randbits(63) if config.seed is None else config.seed
        self._generator = torch.Generator(device=device).manual_seed(self.seed)
        self._ban: Tensor | None = None
        self._bias: tuple[Tensor, Tensor] | None = None
        self._counts = bool(config.presence_penalty or config.frequency_penalty)
        self._reweighs = bool(self.banned or config.logit_bias or self._counts or config.repetition_penalty != 1)

    def __call__(self, logits: Tensor) -> int:
        """Draw the next id from logits ``[V]`` and record it.

        Raises:
            StreamLLMError: the logits hold nan or infinity, or nothing is left to draw from.
        """
        (drawn,) = draw(logits[None], [self])
        if isinstance(drawn, StreamLLMError):
            raise drawn
        return drawn

    def observe(self, ids: Iterable[int]) -> None:
        """Record tokens that were read, so that the repetition penalty sees the prompt too."""
        self.recent.extend(ids)

    def begin(self, drawn: Iterable[int] = ()) -> None:
        """A reply begins: what was drawn before counts no more for presence and frequency.

        ``drawn``: what the reply has drawn already, if it goes on.
        """
        self.drawn = deque(drawn, self.drawn.maxlen)

    def correct(self, token: int) -> None:
        """Remember ``token`` instead of the id that was drawn last."""
        self.recent[-1] = self.drawn[-1] = token

    def follow(self, other: Sampler, *, numbers: bool) -> None:
        """Remember what ``other`` has seen, and go on with its random ``numbers`` if they are wanted."""
        self.recent = deque(other.recent, self.recent.maxlen)
        if numbers:
            self._generator.set_state(other._generator.get_state())

    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on with the same draws, ready for JSON."""
        return {
            "config": dataclasses.asdict(self.config),
            "banned": list(self.banned),
            "recent": list(self.recent),
            "drawn": list(self.drawn),
            "seed": self.seed,
            "device": self._generator.device.type,
            "generator": base64.b64encode(self._generator.get_state().numpy().tobytes()).decode("ascii"),
        }

    def changed(self, config: SamplingConfig, banned: Sequence[int] = ()) -> Sampler:
        """A sampler with other settings that has seen the same; the draws go on unless the seed is another."""
        device = self._generator.device
        if config.seed == self.config.seed:
            state = {**self.state(), "config": dataclasses.asdict(config), "banned": sorted(banned)}
            return Sampler.from_state(state, device=device)
        other = Sampler(config, device=device, banned=banned)
        other.observe(self.recent)
        other.begin(self.drawn)
        return other

    @classmethod
    def from_state(cls, state: dict[str, Any], *, device: torch.device | str = "cpu") -> Sampler:
        """Return a sampler that goes on where ``state()`` was taken.

        Raises:
            StateError: the state is incomplete, damaged, or was taken on another kind of device.
        """
        kind = torch.device(device).type
        if state.get("device", kind) != kind:
            raise StateError(
                f"The sampler was saved on {state['device']!r} and cannot go on with the same draws on {kind!r}, "
                "because each kind of device makes its own random numbers; load it on the same kind, or start a new "
                "sampler."
            )
        try:
            sampler = cls(SamplingConfig(**state["config"]), device=device, banned=state["banned"])
            sampler.seed = int(state["seed"])
            sampler.observe(int(token) for token in state["recent"])
            sampler.begin(int(token) for token in state.get("drawn", ()))  # older versions kept none
            raw = bytearray(base64.b64decode(state["generator"], validate=True))
            sampler._generator.set_state(torch.frombuffer(raw, dtype=torch.uint8))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StateError(
                f"The saved sampler cannot be used ({type(error).__name__}: {error}); it is damaged or was written by "
                "another version, so start the stream with a new sampler."
            ) from error
        return sampler

    def _record(self, token: int) -> None:
        """Remember an id that was drawn."""
        self.recent.append(token)
        self.drawn.append(token)

    def _reweigh(self, logits: Tensor) -> None:
        """Apply penalties, bias and ban to float32 logits ``[V]``, in place."""
        size = logits.shape[-1]
        penalty = self.config.repetition_penalty
        if penalty != 1:
            inside = [token for token in self.recent if token < size]
            seen = torch.tensor(inside, dtype=torch.long, device=logits.device)  # [W]
            old = logits[seen]
            logits[seen] = torch.where(old < 0, old * penalty, old / penalty)  # an id seen twice counts once
        if self._counts and self.drawn:
            presence, frequency = self.config.presence_penalty, self.config.frequency_penalty
            _shift(logits, *_columns(((t, -n * frequency - presence) for t, n in Counter(self.drawn).items()), logits))
        if self.config.logit_bias:
            if self._bias is None:
                self._bias = _columns(self.config.logit_bias, logits)
            _shift(logits, *self._bias)
        if self.banned:
            if self._ban is None:
                inside = [token for token in self.banned if token < size]
                self._ban = torch.tensor(inside, dtype=torch.long, device=logits.device)
            logits.index_fill_(-1, self._ban, -math.inf)

    def _why_nothing(self, peak: float) -> str:
        """Return the message for logits that cannot be drawn from."""
        if peak == -math.inf:
            biased = f" and a bias for {len(self.config.logit_bias)}" if self.config.logit_bias else ""
            return (
                f"No token is left to draw from: every logit is -inf after banning {len(self.banned)} ids{biased}; ban "
                "fewer tokens, or check that the model's weights are whole."
            )
        return (
            f"The model's logits are not finite (the largest is {peak}), so no token can be drawn; half precision "
            "often overflows like this, so load the model with dtype float32 or bfloat16, or check its weights."
        )


def draw(logits: Tensor, samplers: Sequence[Sampler]) -> list[int | StreamLLMError]:
    """Draw one id from each row of logits ``[B, V]`` with the sampler of that row, and record it there.

    Place ``i`` holds the id that ``samplers[i](logits[i])`` would draw, or the error that it would raise: a stream that
    fails does no harm to the others. It records nothing then, but its random numbers are spent.
    """
    assert len(logits) == len(samplers), f"{len(logits)} rows of logits, {len(samplers)} samplers"
    reweighs = any(sampler._reweighs for sampler in samplers)
    scores = logits.detach().to(torch.float32, copy=reweighs)  # the caller's logits stay as they are
    if reweighs:
        for row, sampler in zip(scores, samplers, strict=True):
            sampler._reweigh(row)
    tokens = race(scores, [sampler.config for sampler in samplers], [sampler._generator for sampler in samplers])
    drawn: list[int | StreamLLMError] = []
    for i, (sampler, token) in enumerate(zip(samplers, tokens, strict=True)):
        if token is None:
            drawn.append(StreamLLMError(sampler._why_nothing(scores[i].max().item())))
        else:
            sampler._record(token)
            drawn.append(token)
    return drawn


def _columns(pairs: Iterable[tuple[int, float]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Ids ``[W]`` that the vocabulary has, and their float32 numbers ``[W]``, where the logits are."""
    inside = [(token, number) for token, number in pairs if token < logits.shape[-1]]
    tokens = torch.tensor([token for token, _ in inside], dtype=torch.long, device=logits.device)
    return tokens, torch.tensor([number for _, number in inside], dtype=torch.float32, device=logits.device)


def _shift(logits: Tensor, tokens: Tensor, numbers: Tensor) -> None:
    """Add a number to the logit of each token, in place; no token is there twice."""
    logits[tokens] = logits[tokens] + numbers
