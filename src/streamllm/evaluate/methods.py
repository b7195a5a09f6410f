"""The methods that are compared: each is a cache, so that one loop reads with all of them (paper, figure 1).

``dense`` keeps everything; ``window`` the newest tokens; ``recompute`` reads the window anew for every token and
``recompute-block`` once a block; ``streaming`` keeps the first tokens and the newest. All but ``dense`` hold at least
``sinks + window`` tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streamllm.config import CacheConfig
from streamllm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from streamllm.spec import ModelSpec

DENSE_CONTEXTS = 8
"""Trained lengths that dense attention reads, where nobody says otherwise: far enough to see it fail."""

METHODS = ("dense", "window", "recompute", "recompute-block", "streaming")


def check_methods(names: Sequence[str], known: Sequence[str] = METHODS) -> None:
    """Refuse names that are no methods.

    Raises:
        ConfigError: there is one, or none at all.
    """
    if not names:
        raise ConfigError(f"Name at least one method: {', '.join(known)}.")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}."
            raise ConfigError(f"There is no method {name!r}: {hint}")


def dense_tokens(model: PreTrainedModel, spec: ModelSpec, asked: int | None) -> int:
    """How many tokens dense attention reads: ``asked``, or 8 trained lengths; fewer where positions or memory end."""
    from streamllm.models import free_bytes

    most = asked or DENSE_CONTEXTS * spec.limit
    if spec.positions == "absolute":
        return min(most, spec.limit)
    free, each = free_bytes(model.device), sum(layer.bytes_per_token for layer in spec.layers)
    return min(most, free // (4 * each)) if free and each else most  # keys and values grow by copying


def cache_maker(
    method: str, model: PreTrainedModel, sinks: int, window: int, block: int, kv_dtype: str = CacheConfig.kv_dtype
) -> Callable[[], Cache]:
    """What makes the cache of a method, of one row.

    Raises:
        ConfigError: when it is called: the cache would be longer than the model was trained for.
        UnsupportedModelError: when it is called: the model cannot stream.
    """
    from transformers.cache_utils import DynamicCache

    from streamllm.cache import SinkCache

    size = sinks + window
    makers: dict[str, Callable[[], Cache]] = {
        "dense": lambda: DynamicCache(config=model.config),
        "window": lambda: SinkCache(model, 0, size, block, kv_dtype=kv_dtype),
        "recompute": lambda: SinkCache(model, 0, size, 1, reread=True),
        "recompute-block": lambda: SinkCache(model, 0, size, block, reread=True),
        "streaming": lambda: SinkCache(model, sinks, window, block, kv_dtype=kv_dtype),
    }
    return makers[method]
