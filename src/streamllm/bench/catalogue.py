"""The methods that a benchmark compares, by name, and which of them a trial leaves out. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One method.

    Args:
        words: what it does, in a line.
        place: its class, as ``module:class`` in this package.
        batches: whether it is also measured with several rows.
    """

    words: str
    place: str
    batches: bool = False


METHODS: dict[str, Entry] = {
    "compiled": Entry("SinkCache, compiled step", "ours:Compiled", batches=True),
    "eager": Entry("SinkCache in a plain model(...) loop", "ours:Eager", batches=True),
    "int8": Entry("SinkCache, compiled step, weights in int8", "ours:Int8", batches=True),
    "dense": Entry("plain transformers, kept at the same context", "rivals:Dense", batches=True),
    "recompute": Entry("the window read anew for every token (the paper's baseline)", "rivals:Recompute"),
    "reread": Entry("forget half when full, read the rest again (chat programs)", "rivals:Reread"),
    "shift": Entry("forget half when full, move the keys of the rest (llama.cpp's context shift)", "ours:Shift"),
    "paper": Entry("the paper's scheme: raw keys joined and turned at every step, plain attention", "rivals:Paper"),
    "paper-sdpa": Entry("the same with SDPA, at its best", "rivals:PaperSdpa"),
    "llamacpp-f32": Entry("llama.cpp on the same weights, F32", "llamacpp:F32", batches=True),
    "llamacpp-f16": Entry("llama.cpp, F16", "llamacpp:F16", batches=True),
    "llamacpp-q8_0": Entry("llama.cpp, Q8_0", "llamacpp:Q8", batches=True),
}

OURS = ("compiled", "int8", "eager")
"""The methods that are the product; the first is what targets are about."""
