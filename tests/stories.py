"""The real small model of the tests: stories260K (MIT, see its LICENSE), pretrained on TinyStories."""

from __future__ import annotations

from pathlib import Path

STORIES = Path(__file__).resolve().parent / "models" / "stories260K"
