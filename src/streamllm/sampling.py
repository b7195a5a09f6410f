"""Logits to the next token: penalty, ban, temperature, top-k, top-p, min-p, draw.

The steps and their order are those of transformers' ``generate()``, done by its own public processors. Nothing here
knows about models, caches or text. Shapes: ``V`` vocabulary, ``W`` recent tokens; the processors want a batch, so
``[V]`` becomes ``[1, V]``. The memory is bounded by ``SamplingConfig.repetition_window``.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from streamllm.config import SamplingConfig
from streamllm.errors import ConfigError, StateError, StreamLLMError

GREEDY_BELOW = 1e-5
"""A temperature below this takes the most likely token: dividing by it would overflow float32."""


class Sampler:
    """Draws the tokens of one stream.

    Args:
        config: how to draw.
        device: where the logits are; the random numbers are made there.
        banned: ids that are never drawn. Ids beyond the vocabulary do no harm.

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
        self.seed = secrets.randbits(63) if config.seed is None else config.seed
        self._generator = torch.Generator(device=device).manual_seed(self.seed)
        self._greedy = config.temperature < GREEDY_BELOW
        self._penalty = (
            RepetitionPenaltyLogitsProcessor(float(config.repetition_penalty))
            if config.repetition_penalty != 1
            else None
        )
        self._warpers = _make_warpers(config)
        self._ban: Tensor | None = None

    def __call__(self, logits: Tensor) -> int:
        """Draw the next id from logits ``[V]`` and record it.

        Raises:
            StreamLLMError: the logits hold nan or infinity, or nothing is left to draw from.
        """
        if self._penalty is not None or self.banned:
            logits = self._reweigh(logits.float())
        # The largest logit tells everything: nan wins over every number, and -inf means that nothing is left.
        peak, best = torch.max(logits, dim=-1)
        if not math.isfinite(peak.item()):
            raise StreamLLMError(self._why_nothing(peak.item()))
        token = int(best) if self._greedy else self._draw(logits.float())
        self.recent.append(token)
        return token

    def observe(self, ids: Iterable[int]) -> None:
        """Record tokens that were read, so that the repetition penalty sees the prompt too."""
        self.recent.extend(ids)

    def state(self) -> dict[str, Any]:
        """Return all that is needed to go on with the same draws, ready for JSON."""
        return {
            "config": dataclasses.asdict(self.config),
            "banned": list(self.banned),
            "recent": list(self.recent),
            "seed": self.seed,
            "device": self._generator.device.type,
            "generator": base64.b64encode(self._generator.get_state().numpy().tobytes()).decode("ascii"),
        }

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
            raw = bytearray(base64.b64decode(state["generator"], validate=True))
            sampler._generator.set_state(torch.frombuffer(raw, dtype=torch.uint8))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StateError(
                f"The saved sampler cannot be used ({type(error).__name__}: {error}); it is damaged or was written by "
                "another version, so start the stream with a new sampler."
            ) from error
        return sampler

    def _reweigh(self, logits: Tensor) -> Tensor:
        """Apply the penalty and the ban to logits ``[V]``; the caller's tensor stays as it is."""
        if self._penalty is not None and self.recent:
            seen = torch.tensor([list(self.recent)], device=logits.device)  # [1, W]
            logits = self._penalty(seen, logits[None])[0]
        if self.banned:
            if self._ban is None:
                inside = [token for token in self.banned if token < logits.shape[-1]]
                self._ban = torch.tensor(inside, dtype=torch.long, device=logits.device)
            logits = logits.index_fill(-1, self._ban, -math.inf)
        return logits

    def _draw(self, logits: Tensor) -> int:
        """Draw one id from finite float32 logits ``[V]``."""
        unread = cast(torch.LongTensor, torch.empty(1, 0, dtype=torch.long))  # the warpers look at no ids
        scores = self._warpers(unread, logits[None])  # [1, V]
        return int(torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=self._generator))

    def _why_nothing(self, peak: float) -> str:
        """Return the message for logits that cannot be drawn from."""
        if peak == -math.inf:
            return (
                f"No token is left to draw from: every logit is -inf after banning {len(self.banned)} ids; ban fewer "
                "tokens, or check that the model's weights are whole."
            )
        return (
            f"The model's logits are not finite (the largest is {peak}), so no token can be drawn; half precision "
            "often overflows like this, so load the model with dtype float32 or bfloat16, or check its weights."
        )


def _make_warpers(config: SamplingConfig) -> LogitsProcessorList:
    """Return the processors that ``generate(do_sample=True)`` would use, in its order."""
    warpers = LogitsProcessorList()
    if config.temperature != 1 and config.temperature >= GREEDY_BELOW:
        warpers.append(TemperatureLogitsWarper(float(config.temperature)))
    if config.top_k > 0:
        warpers.append(TopKLogitsWarper(top_k=int(config.top_k)))
    if config.top_p < 1:
        warpers.append(TopPLogitsWarper(top_p=float(config.top_p)))
    if config.min_p > 0:
        warpers.append(MinPLogitsWarper(min_p=float(config.min_p)))
    return warpers
