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
        window = min(DEFAULT_WINDOW, limit // 2 - config.sinks, limit - config.sinks - config.block + 1)
        if window < 1 and config.sinks < limit:
            raise ConfigError(
                f"{config.sinks} sinks and a block of {config.block} leave no room for a window: this model was "
                f"trained on {limit} positions; use fewer sinks, or block={max(1, limit // 8)}."
            )
        config = config.replace(window=max(1, window))
    check_capacity(config.sinks, config, spec)
    return config


def check_capacity(pinned: int, config: CacheConfig, spec: ModelSpec) -> None:
    """Refuse a cache that is longer than the model was trained for.

    Raises:
        ConfigError: it is.
    """
    assert config.window is not None
    limit, capacity = spec.limit, pinned + config.window + config.block - 1
    if config.window > limit or pinned >= limit:
        name, value = ("window", config.window) if config.window > limit else ("pinned head", pinned)
        raise ConfigError(
            f"StreamingLLM does not lengthen the context: this model was trained on {limit} positions, you asked for "
            f"a {name} of {value}; use at most {max(1, limit - pinned - config.block + 1)}."
        )
    if capacity > limit:
        raise ConfigError(
            f"{pinned} pinned + window {config.window} + block {config.block} - 1 = {capacity} tokens, but this model "
            f"was trained on {limit} positions and StreamingLLM does not lengthen the context; use a window of at "
            f"most {max(1, limit - pinned - config.block + 1)}, or a smaller block."
        )
