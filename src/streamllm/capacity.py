"""How much a model bears: filling in what the model decides, and refusing what it cannot do."""

from __future__ import annotations

from streamllm.config import DEFAULT_WINDOW, CacheConfig
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
    promise = f"StreamingLLM does not lengthen the context: this model was trained on {limit} positions, you asked for"
    if config.window > limit:
        raise ConfigError(
            f"{promise} a window of {config.window}; use at most {max(1, limit - pinned - config.block + 1)}."
        )
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
