"""Do keys drift? The cache after many evictions and restarts of positions, against keys that were turned once.

StreamingLLM counts positions inside the cache (paper, section 3.2), so stored keys must be moved: the pinned ones at
each eviction, always from pristine copies, and those of the window whenever positions begin anew. Each move rounds. The
reference turns every key once, in float64 (``witness``); what a single rounding to the dtype costs is the floor, and
drift would show as a distance from it that grows with the stream. What the text says does not matter, so one that is
too short is read again and again.

A stream that is broken off goes on from its last checkpoint (``Witness.save``), each dtype by itself.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from streamllm.config import PREFILL_CHUNK, CacheConfig, check_count
from streamllm.errors import ConfigError, UnsupportedModelError
from streamllm.evaluate.evaluation import Evaluation, Figures, option

if TYPE_CHECKING:
    import numpy as np
    import torch
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel

    from streamllm.evaluate.desk import Desk
    from streamllm.evaluate.witness import Witness

DTYPES = {"float32": "#0b6e4f", "bfloat16": "#d1495b", "float16": "#3d5a99"}
"""That can be measured, with their colours; float64 is the reference itself."""

PROBE = 32
"""Tokens that are read to compare logits, at most."""

LOGITS = 5.0
"""Logits that are so many times as far off as single roundings of the keys make them have drifted."""

GROWTH = 1.5
"""Keys that are so many times as far off at the end as at the start have drifted."""


@dataclass(frozen=True)
class Drift(Evaluation):
    """See the module.

    Args:
        dtypes: of ``DTYPES``; the model is copied into each that it was not loaded in, one at a time.
        tokens: of the stream.
        sinks, window, block: of the cache (``CacheConfig``).

    Raises:
        ConfigError: a value is out of range.
    """

    dtypes: tuple[str, ...] = option(tuple(DTYPES), "Of weights and cache, one after the other.")
    tokens: int = option(100_000, "Of the stream; a shorter text is repeated.")
    sinks: int = CacheConfig.sinks
    window: int | None = CacheConfig.window
    block: int = CacheConfig.block

    name: ClassVar[str] = "drift"
    title: ClassVar[str] = "Do keys drift? The cache against exact keys, along a stream"
    quick: ClassVar[dict[str, Any]] = {"tokens": 5000, "window": 124}

    def __post_init__(self) -> None:
        CacheConfig(self.sinks, self.window, self.block)
        check_count("tokens", self.tokens, 2)
        if not self.dtypes or len(set(self.dtypes)) < len(self.dtypes):
            raise ConfigError(f"Name at least one dtype, and none twice: {', '.join(DTYPES)}.")
        for name in self.dtypes:
            if name not in DTYPES:
                raise ConfigError(f"Drift cannot be measured in {name!r}; choose from {', '.join(DTYPES)}.")

    def run(self, desk: Desk) -> Figures:
        """Read the text once in each dtype, and look at the cache on the way."""
        text = desk.text(self.tokens + PROBE, least=self.sinks + (self.window or 1) + self.block)
        given = text.ids.shape[1]
        with desk.work(len(self.dtypes) * self.tokens):
            found = {
                name: desk.part(name, partial(self._measure, desk, name, text.ids), steps=self.tokens)
                for name in self.dtypes
            }
        measured = [one for one in found.values() if "reason" not in one]
        if not measured:
            raise ConfigError(found[self.dtypes[0]]["reason"])
        return {
            "tokens": max(one["checkpoints"][-1]["tokens"] for one in measured),
            "text_tokens": given,
            "is_repeated": given < self.tokens,
            "files": text.files,
            "cache": measured[0]["cache"],
            "dtypes": {name: {k: v for k, v in one.items() if k != "cache"} for name, one in found.items()},
        }

    def _measure(self, desk: Desk, name: str, ids: np.ndarray[Any, Any]) -> dict[str, Any]:
        """The checkpoints of one dtype; or the reason why it cannot be measured here."""
        import torch

        try:
            model = in_dtype(desk.model, getattr(torch, name))
            fresh = self._witness(model)
            places = checkpoints(self.tokens, fresh.capacity, self.block, fresh.spec.limit)
            found = self._watch(desk, name, model, fresh, ids, places)
        except (ConfigError, UnsupportedModelError) as error:
            return {"reason": str(error)}
        except FloatingPointError as error:
            return {"reason": f"This model cannot be run in {name}: {error}."}
        except RuntimeError as error:
            if "not implemented for" not in str(error):
                raise
            return {"reason": f"This device cannot compute in {name}: {error}."}
        desk.advance(self.tokens - places[-1], name)
        cache = {"sinks": self.sinks, "window": fresh.config.window, "block": self.block}
        return {"cache": {**cache, "capacity": fresh.capacity, "limit": fresh.spec.limit}, "checkpoints": found}

    def _witness(self, model: PreTrainedModel) -> Witness:
        """A fresh stream of ``model``, whose keys turn."""
        from streamllm.evaluate.witness import Witness

        fresh = Witness(model, self.sinks, self.window, self.block)
        if fresh.spec.positions != "rotary":
            raise UnsupportedModelError(
                f"Nothing can drift: the keys of a model of type {fresh.spec.model_type!r} are never turned "
                f"(positions: {fresh.spec.positions})."
            )
        return fresh

    def _watch(
        self,
        desk: Desk,
        name: str,
        model: PreTrainedModel,
        witness: Witness,
        ids: np.ndarray[Any, Any],
        places: Sequence[int],
    ) -> list[dict[str, Any]]:
        """Read up to the last of ``places``, comparing at each."""
        import torch

        from streamllm.evaluate.desk import SAVE_SECONDS
        from streamllm.evaluate.exact import compare
        from streamllm.evaluate.witness import Witness

        def take(first: int, count: int) -> torch.Tensor:
            part = ids[0].take(range(first, first + count), mode="wrap").astype("int64")
            return torch.from_numpy(part)[None].to(model.device)

        file = desk.folder / f"{name}.witness"
        witness, found = Witness.load(file, model) or (witness, [])
        read, saved = witness.tokens_seen, time.monotonic()
        desk.advance(read, name)
        while read < places[-1]:
            # 1. up to the next eviction or place
            place = next(place for place in places if place > read)
            width = witness.columns(None, min(PREFILL_CHUNK, place - read))
            with torch.no_grad():
                model.get_decoder()(input_ids=take(read, width), past_key_values=witness, use_cache=True)
            read += width
            # 2. compare
            if read == place:
                compared = compare(witness, model, take(read, PROBE))
                evictions = witness.tokens_evicted // self.block
                found.append({"tokens": read, "evictions": evictions, "restarts": witness.restarts, **compared})
            # 3. keep, now and then
            if desk.signals.received is not None or time.monotonic() - saved > SAVE_SECONDS:
                witness.save(file, found)
                saved = time.monotonic()
            words = f" · keys off by {found[-1]['keys']['mean']:.1e}" if found else ""
            desk.advance(width, name + words)
        file.unlink(missing_ok=True)
        return found

    @staticmethod
    def rows(figures: Figures) -> Sequence[tuple[str, ...]]:
        """The first and the last checkpoint of each dtype; errors also in those of a single rounding."""
        rows: list[tuple[str, ...]] = [
            (
                "dtype",
                "tokens",
                "evictions",
                "restarts",
                "per key",
                "keys off by",
                "pinned ones by",
                "logits by",
                "KL",
                "top token",
            )
        ]
        for name, one in figures["dtypes"].items():
            for point in _ends(one):
                keys, pinned, logits = point["keys"], point["pinned"], point["logits"]
                rows.append(
                    (
                        name,
                        f"{point['tokens']:,}",
                        f"{point['evictions']:,}",
                        f"{point['restarts']:,}",
                        f"<= {point['turns']}",
                        f"{keys['mean']:.1e} ({_times(keys['mean'], keys['floor_mean']):.2f}x)",
                        f"{pinned['mean']:.1e} ({_times(pinned['mean'], pinned['floor_mean']):.2f}x)",
                        f"{logits['max']:.1e} ({_times(logits['max'], logits['floor']):.2f}x)",
                        f"{logits['kl']:.0e}",
                        f"{100 * logits['agree']:.0f} % same",
                    )
                )
        return rows

    @staticmethod
    def verdict(figures: Figures) -> str:
        """Whether anything accumulates, and what a key has to bear."""
        measured = {name: one for name, one in figures["dtypes"].items() if "reason" not in one}
        points = {name: one["checkpoints"] for name, one in measured.items()}
        last = next(iter(points.values()))[-1]
        off = {name: _times(p[-1]["keys"]["mean"], p[-1]["keys"]["floor_mean"]) for name, p in points.items()}
        growth = {name: _times(p[-1]["keys"]["mean"], p[0]["keys"]["mean"]) for name, p in points.items()}
        drifting = [
            f"{words} in {name}"
            for name, p in points.items()
            for words, times in (
                ("keys", growth[name]),
                ("pinned keys", _times(p[-1]["pinned"]["mean"], p[0]["pinned"]["mean"])),
                ("logits", max(_times(q["logits"]["max"], q["logits"]["floor"]) for q in p) / LOGITS * GROWTH),
            )
            if times > GROWTH
        ]
        turns = max(point["turns"] for found in points.values() for point in found)
        pinned = {name: _times(p[-1]["pinned"]["mean"], p[-1]["pinned"]["floor_mean"]) for name, p in points.items()}
        is_told = last["restarts"] and all(len(found) > 1 for found in points.values())
        outcome = "nothing drifts" if is_told else "too few tokens to tell whether anything drifts"
        outcome = f"there is drift: {', '.join(drifting)}" if drifting else outcome
        if not all(point["intact"] for found in points.values() for point in found):
            outcome = "but that does not count"
        sentences = [
            f"After {last['tokens']:,} tokens, {last['evictions']:,} evictions and {last['restarts']:,} restarts of "
            f"positions (at most {turns} in the life of a key) keys are off by {_spell(off)} single roundings, "
            f"{_spell(growth)} times the error at the start: {outcome}. Pinned keys, which are turned at every "
            f"eviction, are off by {_spell(pinned)}.",
        ]
        sentences += [
            f"Logits in {name} are off by {max(p['logits']['max'] for p in found):.1e} at most, and at least "
            f"{100 * min(p['logits']['agree'] for p in found):.0f} % of the {PROBE} tokens read at a checkpoint have "
            "the same top token."
            for name, found in points.items()
        ]
        sentences += [
            f"In {name} values, or keys that never move, have changed: the cache is broken."
            for name, found in points.items()
            if not all(point["intact"] for point in found)
        ]
        missing = {name: one["reason"] for name, one in figures["dtypes"].items() if "reason" in one}
        sentences += [f"{name} was not measured: {reason}" for name, reason in missing.items()]
        return " ".join(sentences)

    @staticmethod
    def draw(figures: Figures) -> Figure:
        """Key error and logits along the stream, with their floors dotted."""
        from streamllm.evaluate.figure import make_figure

        cache = figures["cache"]
        title = f"{cache['sinks']} + {cache['window']} tokens cached, blocks of {cache['block']}"
        figure, (keys, logits) = make_figure(f"{title} (dotted: what a single rounding costs)", 2)
        for axes in (keys, logits):
            axes.set(xscale="log", yscale="log", xlabel="tokens read (hollow: no error at all)")
            axes.margins(y=0.15)
        for row, (name, one) in enumerate(figures["dtypes"].items()):
            if "reason" in one:
                continue
            points, color = one["checkpoints"], DTYPES[name]
            at = [point["tokens"] for point in points]
            for axes, part, value, floor in ((keys, "keys", "mean", "floor_mean"), (logits, "logits", "max", "floor")):
                off = [point[part][value] or math.nan for point in points]
                axes.plot(at, off, marker="o", ms=4, label=name, color=color)
                axes.plot(at, [point[part][floor] or math.nan for point in points], ls=":", color=color)
                # Zeros have no place on a logarithmic axis: they stand at its foot.
                none = [place for place, value in zip(at, off, strict=True) if math.isnan(value)]
                foot, across = [0.02 + 0.03 * row] * len(none), axes.get_xaxis_transform()
                axes.plot(none, foot, "o", ms=5, mfc="none", color=color, transform=across, in_layout=False)
        keys.set(title="keys: mean relative error")
        logits.set(title="logits: largest difference")
        keys.legend(fontsize="small")
        return figure


def checkpoints(tokens: int, capacity: int, block: int, limit: int) -> list[int]:
    """Tokens after which the cache is compared, rising: about 1, 2, 5, 10, ... times a power of ten, and the last.

    They lie where positions are to begin anew, when the most keys have just been turned; the first one where the keys
    have seen as many restarts in their lives as all later ones. If positions never begin anew within ``tokens``, only
    pinned keys are turned, and any place will do.

    Raises:
        ConfigError: nothing is evicted within ``tokens``.
    """
    if tokens < capacity:
        raise ConfigError(
            f"Nothing is evicted within {tokens:,} tokens, because the cache holds {capacity:,}: read more with "
            "--tokens, or choose a smaller --window."
        )
    series = [m * 10**power for power in range(len(str(tokens))) for m in (1, 2, 5)]
    period = ((limit - capacity) // block + 1) * block
    first = capacity + period - block
    if first > tokens:
        return sorted({capacity, *(place for place in series if capacity < place <= tokens), tokens})
    last = first + (tokens - first) // period * period
    steady = min(last, first + -(-capacity // period) * period)
    aligned = {first + -(-(place - first) // period) * period for place in series if place > 1.5 * steady}
    return sorted({steady, *(place for place in aligned if place < last), last})


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """``model`` itself, or a copy with its weights in ``dtype``; frequencies stay as exact as loading leaves them."""
    if model.dtype == dtype:
        return model
    other = copy.deepcopy(model)
    for weight in other.parameters():
        if weight.dtype == model.dtype:
            weight.data = weight.data.to(dtype)
    return other


def _ends(one: dict[str, Any]) -> list[dict[str, Any]]:
    """The first and the last checkpoint, which may be one."""
    found = one.get("checkpoints", [])
    return [found[0], found[-1]] if len(found) > 1 else found


def _times(value: float, floor: float) -> float:
    return value / floor if floor else 0.0


def _spell(values: dict[str, float]) -> str:
    """Values by dtype in words."""
    return ", ".join(f"{value:.2f} ({name})" for name, value in values.items())
