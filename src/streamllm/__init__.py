"""streamllm: run any open language model without end, in constant memory.

The public names are resolved on first use, so that importing streamllm (and printing help) does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamllm.cache import SinkCache
    from streamllm.config import CacheConfig, SamplingConfig
    from streamllm.errors import StreamLLMError
    from streamllm.loop import Chunk, generate, stream
    from streamllm.models import load
    from streamllm.session import Chat
    from streamllm.state import load_state, save_state
    from streamllm.stats import Stats

__version__ = "0.1.0"

_HOMES = {
    "load": "models",
    "stream": "loop",
    "generate": "loop",
    "Chat": "session",
    "SinkCache": "cache",
    "CacheConfig": "config",
    "SamplingConfig": "config",
    "Chunk": "loop",
    "Stats": "stats",
    "save_state": "state",
    "load_state": "state",
    "StreamLLMError": "errors",
}

__all__ = [
    "CacheConfig",
    "Chat",
    "Chunk",
    "SamplingConfig",
    "SinkCache",
    "Stats",
    "StreamLLMError",
    "generate",
    "load",
    "load_state",
    "save_state",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'streamllm' has no attribute {name!r}")
    return getattr(import_module(f"streamllm.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
