"""The draw itself, for many rows at once and without sorting: who wins the exponential race.

``torch.multinomial`` draws one id by a race: every id gets a number of an exponential distribution, its noise, and the
largest chance / noise wins. Ids that are left out change nothing among the others. So nobody has to know all the ids
that top-p keeps, for which transformers sorts the vocabulary: it is enough to look whether the winner is one of them,
which the chances before it tell. If it is not, neither is any id that is no likelier; they leave, and the others run
another lap. What rounding or equal chances could decide otherwise goes to the processors of transformers, so the
draws are those of ``generate()``.

Nothing here knows about streams, penalties or text. Shapes: ``B`` rows, ``R`` of them still racing, ``V`` vocabulary,
at most 2**24 because ids travel as float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from streamllm.config import SamplingConfig

GREEDY_BELOW = 1e-5
"""A temperature below this takes the most likely token: dividing by it would overflow float32."""

DOUBT = 3e-4
"""What is as near as this to a border goes to the processors. Their own sums are off by 7e-5 at 262 144 ids; and only
about one token in a thousand has to wait for a sort."""

CPU_SCORES = 2**17
"""So many scores go together on a CPU: the numbers made of them stay in its cache, which makes them twice as fast."""

COLUMNS_KEPT = 64
"""Columns of settings that stay on their device, so that they are not sent again for every token."""


class _Lap(NamedTuple):
    """What the host must know of a row after a lap."""

    token: float
    """The id in the lead."""
    lead: float
    """Its chance / noise, or its score if the row is greedy."""
    rivals: float
    """How many ids are as fast, as far as rounding can tell; itself is one."""
    chance: float
    ahead: float
    """The chances of all ids that are at least as likely, without its own."""
    racing: float
    """The chances of all ids in this lap; infinite in the first."""
    limit: float
    """top_p keeps an id if the chances ahead of it are below this; infinite if it keeps all."""
    floor: float
    """min_p keeps an id if its chance is at least this."""

    def is_doubtful(self) -> bool:
        """Whether the processors might decide otherwise, by their rounding or by their order of equal chances."""
        return self.rivals > 1 or self.racing < self.limit + DOUBT or self.chance < self.floor * (1 + DOUBT)

    def is_won(self) -> bool:
        """Whether top_p surely keeps the id in the lead; it always keeps the most likely one."""
        return self.ahead == 0 or self.ahead < self.limit - DOUBT


def race(scores: Tensor, configs: Sequence[SamplingConfig], generators: Sequence[torch.Generator]) -> list[int | None]:
    """Draw one id from each row of float32 ``scores`` [B, V], by its own settings and random numbers.

    ``None`` stands for a row that holds nan or infinity, or nothing but -inf. Greedy rows take no random numbers. If
    the memory does not suffice, nobody's are spent: whoever draws again draws the same.
    """
    together = len(configs)
    if scores.device.type == "cpu":
        together = max(1, CPU_SCORES // scores.shape[-1])
    drawn: list[int | None] = []
    drawing = [generator for config, generator in zip(configs, generators, strict=True) if not _is_greedy(config)]
    before = [generator.get_state() for generator in drawing]
    try:
        for begin in range(0, len(configs), together):
            part = slice(begin, begin + together)
            noise = make_noise(scores[part], configs[part], generators[part])
            drawn += winners(scores[part], configs[part], noise)
    except BaseException:
        for generator, state in zip(drawing, before, strict=True):
            generator.set_state(state)
        raise
    return drawn


def make_noise(
    scores: Tensor, configs: Sequence[SamplingConfig], generators: Sequence[torch.Generator]
) -> Tensor | None:
    """Return [B, V] what ``exponential_()`` makes of each row's generator; a greedy row holds no meaning.

    ``None``: all rows are greedy.
    """
    if all(_is_greedy(config) for config in configs):
        return None
    noise = torch.empty_like(scores)
    fill = _fill_fast if scores.device.type == "cpu" and _is_fast_the_same() else _fill
    for row, config, generator in zip(noise, configs, generators, strict=True):
        if not _is_greedy(config):
            fill(row, generator)
    return noise


def winners(scores: Tensor, configs: Sequence[SamplingConfig], noise: Tensor | None) -> list[int | None]:
    """Return the id that wins in each row, as in ``race()``, with ``noise`` [B, V] of ``make_noise()``.

    There is one transfer to the host for each lap; a row runs ``1 - log(top_p)`` of them on average.
    """
    if noise is None:
        best = torch.stack([x.float() for x in scores.max(dim=-1)], dim=-1).tolist()  # [B, 2]
        return [int(token) if math.isfinite(peak) else None for peak, token in best]
    drawn: list[int | None] = [None] * len(configs)
    chances, limit, floor = _line_up(scores, configs)
    rows, run = list(range(len(configs))), noise
    racing = _column((math.inf,) * len(configs), scores.device)
    greedy = {i for i in rows if _is_greedy(configs[i])}
    while rows:
        # 1. run
        pace = chances / run  # [R, V]
        for i in greedy.intersection(rows):  # only in the first lap, where row i stands at place i
            pace[i] = scores[i]
        lead, token = pace.max(dim=-1, keepdim=True)
        # 2. measure who leads; comparing into floats is several times faster than into booleans
        chance = chances.gather(-1, token)
        rivals = pace.ge_(lead * (1 - DOUBT)).sum(-1, keepdim=True)
        ahead = torch.ge(chances, chance, out=pace).mul_(chances).sum(-1, keepdim=True) - chance
        laps = torch.cat((token, lead, rivals, chance, ahead, racing, limit, floor), dim=-1).tolist()  # [R, 8]
        # 3. judge
        again = []
        for place, (i, numbers) in enumerate(zip(rows, laps, strict=True)):
            lap = _Lap(*numbers)
            if i in greedy:
                drawn[i] = int(lap.token) if math.isfinite(lap.lead) else None
            elif math.isnan(lap.lead):
                drawn[i] = None
            elif lap.is_doubtful():
                drawn[i] = _by_processors(scores[i], noise[i], configs[i])
            elif lap.is_won():
                drawn[i] = int(lap.token)
            else:
                again.append(place)
        # 4. whoever is likelier than a leader that may not win runs again
        if again:
            stay = torch.tensor(again, device=scores.device)
            chances, chance, run, limit, floor = (x[stay] for x in (chances, chance, run, limit, floor))
            chances *= torch.gt(chances, chance, out=torch.empty_like(chances))
            racing = chances.sum(-1, keepdim=True)
        rows = [rows[place] for place in again]
    return drawn


def _is_greedy(config: SamplingConfig) -> bool:
    """Whether the most likely token is taken."""
    return config.temperature < GREEDY_BELOW


def _line_up(scores: Tensor, configs: Sequence[SamplingConfig]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the chances [B, V], 0 where top-k or min-p surely leave an id out, and limit and floor [B, 1] of a lap."""
    device = scores.device
    temperatures = tuple(1.0 if _is_greedy(config) else config.temperature for config in configs)
    if any(temperature != 1 for temperature in temperatures):
        scores = scores / _column(temperatures, device)
    chances = torch.softmax(scores, dim=-1)
    limit = _column(tuple(config.top_p if config.top_p < 1 else math.inf for config in configs), device)
    floor = _column(tuple(config.min_p for config in configs), device)
    if most := max(config.top_k for config in configs):
        best = scores.topk(min(most, scores.shape[-1])).values  # [B, K]
        last = _column(tuple(min(config.top_k, scores.shape[-1]) - 1 for config in configs), device).long()
        least = best.gather(-1, last.clamp_min(0)).masked_fill_(last < 0, -math.inf)  # [B, 1]
        chances *= torch.ge(scores, least, out=torch.empty_like(chances))
    limit = limit * chances.sum(-1, keepdim=True)  # not 1, for the same reason as DOUBT
    if any(config.min_p for config in configs):
        floor = floor * chances.amax(-1, keepdim=True)
        chances *= torch.ge(chances, floor * (1 - DOUBT), out=torch.empty_like(chances))
    return chances, limit, floor


def _by_processors(scores: Tensor, noise: Tensor, config: SamplingConfig) -> int:
    """Return the winner among the ids of one row [V] that the processors of ``generate(do_sample=True)`` keep."""
    processors = LogitsProcessorList()
    if config.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(config.temperature)))
    if config.top_k > 0:
        processors.append(TopKLogitsWarper(top_k=int(config.top_k)))
    if config.top_p < 1:
        processors.append(TopPLogitsWarper(top_p=float(config.top_p)))
    if config.min_p > 0:
        processors.append(MinPLogitsWarper(min_p=float(config.min_p)))
    unread = cast(torch.LongTensor, torch.empty(1, 0, dtype=torch.long))  # they look at no ids
    kept = processors(unread, scores[None])[0]
    return int((torch.softmax(kept, dim=-1) / noise).argmax())


@lru_cache(maxsize=COLUMNS_KEPT)
def _column(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """[B, 1] float32 on the device; to be read only."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)[:, None]


def _fill(row: Tensor, generator: torch.Generator) -> None:
    """Fill float32 [V] with exponential numbers."""
    row.exponential_(generator=generator)


def _fill_fast(row: Tensor, generator: torch.Generator) -> None:
    """Fill float32 [V] with what ``exponential_()`` makes of the same generator, in a third of the time.

    It takes a logarithm of each number alone; here they are taken of many at once.
    """
    uniform = torch.empty_like(row, dtype=torch.float64).uniform_(generator=generator)
    row.copy_(uniform.neg_().log1p_()).neg_()


@cache
def _is_fast_the_same() -> bool:
    """Whether this build of torch makes its exponential numbers from uniform ones in float64."""
    rows, generators = torch.empty(2, 4099, device="cpu"), [torch.Generator().manual_seed(1) for _ in range(2)]
    for fill, row, generator in zip((_fill, _fill_fast), rows, generators, strict=True):
        fill(row, generator)
    return torch.equal(*rows) and torch.equal(*(generator.get_state() for generator in generators))
