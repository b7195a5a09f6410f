"""How much a model bears: filling in what the model decides, and refusing what it cannot do."""

from __future__ import annotations

from streamllm.config import DEFAULT_WINDOW, MAX_TURNS, MAX_TURNS_INT8, CacheConfig
from streamllm.errors import ConfigError
from streamllm.spec import ModelSpec


def fit_config(config: CacheConfig, spec: ModelSpec) -> CacheConfig:
    """Fill in what the model decides (window, reread) and check the rest against it.

    Raises:
        ConfigError: the cache would be longer than the model was trained for, or has no room for a window.
    """
    limit = spec.limit
    if config.reread is False and spec.reread:
        raise ConfigError(
            f"{spec.model_type!r} has learned positions and streams only by re-reading: leave reread out."
        )
    config = config.replace(reread=spec.reread if config.reread is None else config.reread)
    if config.window is None:
        half, rest = limit // 2 - config.sinks, limit - config.sinks - config.block + 1
        config = config.replace(window=max(1, min(DEFAULT_WINDOW, half if half > 0 else rest, rest)))
    check_capacity(config.sinks, config, spec)
    return config


def check_capacity(pinned: int, config: CacheConfig, spec: ModelSpec) -> None:
    """Refuse a cache that is longer than the model was trained for.

    Raises:
        ConfigError: it is.
    """
    assert config.window is not None
    limit, capacity = spec.limit, pinned + config.window + config.block - 1
    promise = f"StreamingLLM does not lengthen the context: {_bound(spec)}, you asked for"
    if config.window > limit:
        most = limit - pinned - config.block + 1
        advice = f"use at most {most}" if most > 0 else "choose a smaller window and a smaller block"
        raise ConfigError(f"{promise} a window of {config.window}; {advice} (block {config.block}).")
    if pinned + config.block > limit:
        raise ConfigError(
            f"{promise} {pinned} pinned tokens (sinks or a longer head) and a block of {config.block}; keep their sum "
            f"well below, so that a window fits beside them."
        )
    if capacity > limit:
        raise ConfigError(
            f"{promise} {pinned} pinned + window {config.window} + block {config.block} - 1 = {capacity} tokens; use a "
            f"window of at most {limit - pinned - config.block + 1}, or a smaller block."
        )
    _check_turns(pinned, config, spec)


def _check_turns(pinned: int, config: CacheConfig, spec: ModelSpec) -> None:
    """Refuse a cache that would turn coarse keys so often that rounding eats them."""
    block, dtype = config.block, spec.fingerprint.dtype.removeprefix("torch.")
    most = MAX_TURNS if dtype in ("bfloat16", "float16") else None
    if config.kv_dtype == "int8":
        most, dtype = MAX_TURNS_INT8, "int8"

    def turns(window: int) -> int:
        spare = spec.limit - (pinned + window + block - 1)
        return window // ((spare // block + 1) * block)

    assert config.window is not None
    if spec.positions == "rotary" and most is not None and turns(config.window) > most:
        good = next((w for w in range(config.window, 0, -1) if turns(w) <= most), 1)
        raise ConfigError(
            f"In {dtype} a key would be rotated back {turns(config.window)} times while it is cached, and rounded each "
            f"time (up to {most} do no harm): positions restart too often, because the cache nearly fills the "
            f"{spec.limit} positions; use a window of at most {good}, a larger block, or keys in float32."
        )


def _bound(spec: ModelSpec) -> str:
    """What bounds the cache of this model."""
    if spec.trained_length is None:
        return f"this model does not say on how many positions it was trained, so at most {spec.limit} are used"
    if spec.limit < spec.trained_length:
        return f"every layer of this model sees only {spec.limit} tokens back"
    return f"this model was trained on {spec.limit} positions"
