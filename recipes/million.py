"""A million tokens through a small window: is the last part as fluent as a fresh stream, and is memory flat?

    python recipes/million.py --text FILES...

One stream reads the text with a bounded cache. The perplexity of its last tokens is compared with that of a fresh
stream that begins shortly before them, on the same tokens, because texts differ in difficulty. Dense attention on the
beginning of the same text, past the trained length, is shown beside it, and what the model loses with fewer tokens
pinned. Writes docs/results/million.json, .png and .svg.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import streamllm
from streamllm import SinkCache
from streamllm.corpus import END_OF_TEXT, Source, read_documents
from streamllm.evaluate.figure import save_figure
from streamllm.evaluate.scores import perplexity, read_losses, score_stream
from streamllm.reading import read_ids

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from place import RESULTS, begin

from streamllm.evaluate.memory import rss_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINT = 10_000
"""Tokens that a point of the curve averages over."""

PINNED_TOKENS = 50_000
"""Of the text, to compare caches with fewer and more initial tokens."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write down."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="a folder (default: the embedded model)")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="held-out text, also compressed")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--last", type=int, default=20_000, help="tokens compared (default: %(default)s)")
    parser.add_argument(
        "--before", type=int, default=2_000, help="where the fresh stream begins (default: %(default)s)"
    )
    parser.add_argument("--sinks", type=int, default=1)
    parser.add_argument("--window", type=int, default=252)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--dense", type=int, default=8, help="trained lengths that dense attention reads")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own)")
    parser.add_argument("--out", type=Path, default=RESULTS / "million")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = streamllm.load(options.model, device="cpu")
    record = begin(
        "million",
        argv,
        options.model or "the embedded model",
        str(model.dtype).removeprefix("torch."),
        folder="recipes",
    )
    ids = first_ids(tokenizer, options.text, options.tokens)
    record.figures.update(measure(model, ids, options))
    record.save(options.out.with_suffix(".json"))
    save_figure(draw(record.figures), options.out)
    for name in ("last", "pinned", "dense", "memory"):
        print(name, record.figures[name])


def first_ids(tokenizer: PreTrainedTokenizerBase, files: Sequence[Path], count: int) -> torch.Tensor:
    """[1, count] the first ids of the text, as a stream reads them."""
    found: list[int] = []
    pieces = read_documents([Source(file) for file in files])
    texts = (piece.text + END_OF_TEXT * piece.ends for piece in pieces)
    for ids in read_ids(tokenizer, texts, add_special_tokens=True):
        found += ids
        if len(found) >= count:
            return torch.tensor(found[:count])[None]
    raise SystemExit(f"The text has only {len(found)} tokens, {count} are needed.")


def measure(model: PreTrainedModel, ids: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    cache = {"window": options.window, "block": options.block}
    begin = ids[:, : int(ids[0, 0] == model.config.bos_token_id)]  # the sink token, if the model has one
    stream = np.empty(ids.shape[1] - 1)
    memory: list[int] = []
    began = time.perf_counter()
    done = 0
    for scores in score_stream(model, ids, SinkCache(model, options.sinks, **cache)):
        part = scores.losses
        stream[done : done + part.shape[1]] = part[0]
        done += part.shape[1]
        if done // POINT > len(memory):
            memory.append(rss_bytes())
            if len(memory) % 10 == 0:
                print(f"{done:,} tokens, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began

    last = options.last
    fresh_ids = torch.cat([begin, ids[:, -(last + options.before) :]], dim=1)
    fresh = read_losses(model, fresh_ids, SinkCache(model, options.sinks, **cache))[0].double().numpy()
    pinned = {}
    trained = model.config.max_position_embeddings
    size = trained // 2
    for sinks in (0, 1, 2, 4):
        part = ids[:, :PINNED_TOKENS]
        found = read_losses(model, part, SinkCache(model, sinks, size - sinks, 1))
        pinned[f"{sinks}+{size - sinks}"] = perplexity(found)
    beginning = ids[:, : options.dense * trained + 1]
    dense = read_losses(model, beginning, DynamicCache(config=model.config))[0].double().numpy()
    compared = stream[: len(dense)]
    return {
        "tokens": len(stream),
        "seconds": round(seconds, 1),
        "cache": {"sinks": options.sinks, **cache},
        "perplexity": math.exp(stream.mean()),
        "curve": [math.exp(stream[i : i + POINT].mean()) for i in range(0, len(stream) - POINT + 1, POINT)],
        "last": {
            "tokens": last,
            "stream": math.exp(stream[-last:].mean()),
            "fresh": math.exp(fresh[-last:].mean()),
            "ratio": math.exp(stream[-last:].mean() - fresh[-last:].mean()),
        },
        "pinned": pinned,
        "trained_length": trained,
        "dense": [math.exp(dense[i : i + trained].mean()) for i in range(0, len(dense), trained)],
        "stream_beside_dense": [math.exp(compared[i : i + trained].mean()) for i in range(0, len(dense), trained)],
        "memory": {"early": memory[1], "late": memory[-1], "grown": memory[-1] - memory[1]},
        "rss_bytes": memory,
    }


def draw(figures: dict[str, Any]) -> Figure:
    """The curve, its beginning beside dense attention, and memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    curve, dense, memory = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    places = [(i + 1) * POINT / 1e6 for i in range(len(figures["curve"]))]
    curve.plot(places, figures["curve"], color="C0", lw=1)
    sizes = figures["cache"]
    curve.set(
        title=f"a stream with {sizes['sinks']} + {sizes['window']} tokens", xlabel="M tokens", ylabel="perplexity"
    )
    curve.set_ylim(0, 1.3 * max(figures["curve"]))
    steps = [(i + 1) * figures["trained_length"] for i in range(len(figures["dense"]))]
    dense.plot(steps, figures["dense"], marker=".", color="C3", label="dense")
    dense.plot(steps, figures["stream_beside_dense"], marker=".", color="C0", label="streaming")
    dense.axvline(figures["trained_length"], color="0.7", lw=0.8)
    dense.set(title="past the trained length", xlabel="tokens", ylabel="perplexity", yscale="log")
    dense.legend(fontsize="small")
    memory.plot(places[: len(figures["rss_bytes"])], [rss / 1e6 for rss in figures["rss_bytes"]], color="C2")
    memory.set(title="memory of the process", xlabel="M tokens", ylabel="MB", ylim=(0, None))
    for axes in (curve, dense, memory):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
