"""A message; a stand-in until the real one comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Message:
    """One message."""

    role: Literal["system", "user", "assistant"]
    content: str
