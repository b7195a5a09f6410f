"""API keys: who may come in, and whose sessions are whose.

A key is compared in constant time with all keys, so that neither the time nor the order tells anything of one. Owners
are known by a digest, which names their folder; no key is kept on disk.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from streamllm.errors import ConfigError

LOCAL = "local"
"""The owner where no key is asked for."""

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Keys:
    """The keys of a server.

    Args:
        keys: the keys; none: everybody may come in.

    Raises:
        ConfigError: a key is empty or cannot be sent in a header.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests: dict[bytes, str] = {}
        for key in keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("An API key must be printable ASCII without spaces, or no client can send it.")
            self._digests[_digest(key.encode())] = hashlib.sha256(b"owner:" + key.encode()).hexdigest()[:32]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, authorization: bytes) -> str | None:
        """The owner by the ``Authorization`` header; ``None``: nobody we know."""
        if not self._digests:
            return LOCAL
        scheme, _, key = authorization.partition(b" ")
        given, found = _digest(key.strip()), None
        for digest, owner in self._digests.items():  # all of them, whatever is found
            if hmac.compare_digest(given, digest):
                found = owner
        return found if scheme.lower() == b"bearer" else None


def check_exposure(host: str, keys: Keys) -> None:
    """Demand a key where others than this machine can come in.

    Raises:
        ConfigError: there is none.
    """
    if not keys and not is_loopback(host):
        raise ConfigError(
            f"Whoever reaches {host} could use this server, so it needs a key: give one with --api-key or "
            "STREAMLLM_API_KEY, or listen on 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    return host in LOOPBACK or host.startswith("127.")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
