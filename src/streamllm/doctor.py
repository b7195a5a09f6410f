"""The fitness report: this machine, one model, and whether it can stream.

Puts together what ``models``, ``spec`` and ``cache`` know; it decides nothing itself. The verdict is one of "fit",
"fit by re-reading" (positions are part of the hidden states, so kept tokens are read again at each eviction) and
"unfit", with the reason.
"""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import streamllm
from streamllm import models
from streamllm.cache import SinkCache
from streamllm.checkpoint import shown, size, weights_bytes
from streamllm.config import CacheConfig
from streamllm.errors import UnsupportedModelError
from streamllm.quantize import bytes_of, kind_of, numbers_of
from streamllm.stats import grouped

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub")


@dataclass(frozen=True)
class Report:
    """What the doctor found.

    Args:
        versions: of Python, streamllm and the libraries it stands on.
        devices: what torch can compute on here.
        threads: that torch uses on the CPU.
        model: its id or folder.
        verdict: "fit", "fit by re-reading" or "unfit".
        reason: why it is unfit.
        facts: about the model and its cache, by name; empty where it could not be loaded.
    """

    versions: dict[str, str]
    devices: list[str]
    threads: int
    model: str
    verdict: str
    reason: str | None
    facts: dict[str, Any]

    @property
    def is_fit(self) -> bool:
        """Whether the model can stream."""
        return self.verdict != "unfit"

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON; sizes in bytes, lengths in tokens."""
        found = asdict(self)
        facts = found.pop("facts")
        for name in ("cache", "numbers"):  # in words
            facts.pop(name, None)
        return {**found, **facts}

    def rows(self) -> list[tuple[str, str]]:
        """Return names and values as a person reads them."""
        facts = self.facts
        rows = [
            ("versions", ", ".join(f"{name} {number}" for name, number in self.versions.items())),
            ("devices", ", ".join(self.devices)),
            ("threads", str(self.threads)),
            ("model", self.model),
        ]
        if facts:
            kinds = ", ".join(f"{count} {kind}" for kind, count in facts["layers"].items())
            trained = facts["trained_length"]
            rows += [
                ("family", facts["family"]),
                ("weights", f"{size(facts['weights_bytes'])}, {facts['numbers']} on {facts['device']}"),
                ("positions", f"{facts['positions']} (residual {facts['residual']:.1e})"),
                ("trained length", f"{grouped(trained)} tokens" if trained else "unknown"),
                ("layers", kinds),
                ("bytes per token", grouped(facts["bytes_per_token"])),
                ("cache", facts["cache"]),
            ]
        return [*rows, ("verdict", f"{self.verdict}: {self.reason}" if self.reason else self.verdict)]


def examine(
    name: str | Path | None = None,
    *,
    config: CacheConfig | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "none",
) -> Report:
    """Load a model and say how it streams.

    Args:
        name: as ``models.load``.
        config: the cache to plan for.
        device: as ``models.load``.
        dtype: as ``models.load``.
        quantize: as ``models.load``.

    Raises:
        ConfigError: the cache does not suit this model, such as a window beyond its trained length.
        ModelNotFoundError, ModelFilesError: as ``models.load``.
    """
    folder = models.locate(name)
    facts: dict[str, Any] = {}
    reason: str | None = None
    try:
        model, _ = models.load(folder, device=device, dtype=dtype, quantize=quantize)
        wanted = config or CacheConfig()
        cache = SinkCache(model, wanted.sinks, wanted.window, wanted.block, kv_dtype=wanted.kv_dtype)
    except UnsupportedModelError as error:
        verdict, reason = "unfit", str(error)
    else:
        facts = _facts(model, cache, folder)
        verdict = "fit by re-reading" if cache.spec.reread else "fit"
    return Report(_versions(), _devices(), torch.get_num_threads(), shown(folder), verdict, reason, facts)


def sizes(cache: SinkCache) -> str:
    """Return the sum of what a cache holds, and its bytes, in words."""
    config = cache.config
    assert config.window is not None
    pinned = max(row.pinned for row in cache.rows)
    head = f"{pinned} pinned" if pinned > config.sinks else f"{config.sinks} sinks"
    return (
        f"{head} + {grouped(config.window)} window + {config.block - 1} block slack = "
        f"{grouped(cache.capacity)} tokens, {size(cache.bytes_when_full)}"
    )


def _facts(model: Any, cache: SinkCache, folder: Path) -> dict[str, Any]:
    spec, kind, dtype = cache.spec, kind_of(model), str(model.dtype).removeprefix("torch.")
    return {
        "family": spec.model_type,
        "device": str(model.device),
        "dtype": dtype,
        "quantize": kind,
        "numbers": numbers_of(model),
        "weights_bytes": weights_bytes(folder, dtype) if kind == "none" else bytes_of(model),
        "positions": spec.positions,
        "residual": spec.residual,
        "trained_length": spec.trained_length,
        "layers": dict(Counter(layer.kind for layer in spec.layers)),
        "bytes_per_token": sum(layer.bytes_per_token for layer in spec.layers),
        "sinks": cache.config.sinks,
        "window": cache.config.window,
        "block": cache.config.block,
        "capacity": cache.capacity,
        "cache_bytes": cache.bytes_when_full,
        "cache": sizes(cache),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "streamllm": streamllm.__version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _devices() -> list[str]:
    cuda = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *cuda, *mps]
