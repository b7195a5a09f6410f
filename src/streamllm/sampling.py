"""Logits to the next token: what one stream has seen and forbids, its settings, and its random numbers.

The steps and their order are those of transformers' ``generate()``: penalty, ban, then temperature, top-k, top-p, min-p
and the draw, which are the work of ``race``. Nothing here knows about models, caches or text. Shapes: ``B`` streams,
``V`` vocabulary, ``W`` recent tokens. The memory is bounded by ``SamplingConfig.repetition_window``.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import secrets
from collections import deque
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
        self._ban: Tensor | None = None

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

    def begin_anew(self) -> None:
        """Begin the random numbers of the seed anew."""
        self._generator.manual_seed(self.seed)

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

    def changed(self, config: SamplingConfig, banned: Sequence[int] = ()) -> Sampler:
        """A sampler with other settings that has seen the same; the draws go on unless the seed is another."""
        device = self._generator.device
        if config.seed == self.config.seed:
            state = {**self.state(), "config": dataclasses.asdict(config), "banned": sorted(banned)}
            return Sampler.from_state(state, device=device)
        other = Sampler(config, device=device, banned=banned)
        other.observe(self.recent)
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
            raw = bytearray(base64.b64decode(state["generator"], validate=True))
            sampler._generator.set_state(torch.frombuffer(raw, dtype=torch.uint8))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StateError(
                f"The saved sampler cannot be used ({type(error).__name__}: {error}); it is damaged or was written by "
                "another version, so start the stream with a new sampler."
            ) from error
        return sampler

    @property
    def _reweighs(self) -> bool:
        """Whether some logits are changed before the draw."""
        return bool(self.banned) or self.config.repetition_penalty != 1

    def _reweigh(self, logits: Tensor) -> None:
        """Apply the penalty and the ban to float32 logits ``[V]``, in place."""
        size = logits.shape[-1]
        penalty = self.config.repetition_penalty
        if penalty != 1:
            inside = [token for token in self.recent if token < size]
            seen = torch.tensor(inside, dtype=torch.long, device=logits.device)  # [W]
            old = logits[seen]
            logits[seen] = torch.where(old < 0, old * penalty, old / penalty)  # an id seen twice counts once
        if self.banned:
            if self._ban is None:
                inside = [token for token in self.banned if token < size]
                self._ban = torch.tensor(inside, dtype=torch.long, device=logits.device)
            logits.index_fill_(-1, self._ban, -math.inf)

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
            sampler.recent.append(token)
            drawn.append(token)
    return drawn
