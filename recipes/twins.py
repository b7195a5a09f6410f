"""Three twins that differ in their sink (paper, table 3), and how sinks emerge while they are trained.

    python recipes/twins.py --data FILES... --heldout FILE --work FOLDER

Trains them with ``streamllm train`` on the same text in the same order from the same weights (runs that were broken off
go on), then reads the same held-out text with each, at 0 + W, 1 + (W - 1), 2 + (W - 2) and 4 + (W - 4), with the
paper's schedule (one token leaves at a time). Confidence intervals are paired: they are of the ratio to 4 + (W - 4) on
the same tokens, by bootstrap over stretches of text. Writes docs/results/twins.json, .md, .png and .svg.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import streamllm
from streamllm import SinkCache
from streamllm.corpus import Source
from streamllm.evaluate.figure import save_figure
from streamllm.evaluate.scores import read_losses
from streamllm.train.encoded import encode_corpus
from streamllm.train.recipe import SINKS
from streamllm.train.saved_run import SavedRun
from streamllm.train.vocabulary import read_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from place import RESULTS, begin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT = (0, 1, 2, 4)
"""Initial tokens that the cache keeps."""

STREAMS = 8
"""Read side by side, from as many places of the held-out text."""

STRETCH = 500
"""Tokens that are drawn together in the bootstrap: losses close to each other are alike."""

FLAGS = (
    "--size tiny --heads 2 --kv-heads 1 --optimizer adamw --learning-rate 1e-2 --warmup 0.005 --batch-tokens 2048 "
    "--measures 30"
)
"""Few heads, because attention on a processor costs by the head; AdamW at a rate that is too high, after hardly any
warm-up, under which sinks emerge within minutes: gentler recipes reach lower losses, and hardly a sink
(docs/training.md)."""

NAMES = {"none": "nothing", "zero": "zero sink", "token": "one sink token"}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, write down."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", nargs="+", required=True, help="text to train on, as for streamllm train")
    parser.add_argument("--heldout", type=Path, required=True, help="text to evaluate on")
    parser.add_argument("--work", type=Path, required=True, help="folder of the three runs")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="of each run (default: %(default)s)")
    parser.add_argument("--eval-tokens", type=int, default=204_800, help="held-out tokens (default: %(default)s)")
    parser.add_argument("--flags", default=FLAGS, help="further flags of streamllm train (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "twins")
    options = parser.parse_args(argv)
    record = begin("twins", argv, "three Llamas that differ in their sink", "float32", folder="recipes")
    train(options)
    record.figures.update(measure(options))
    record.save(options.out.with_suffix(".json"))
    options.out.with_suffix(".md").write_text(table(record.to_dict()), encoding="utf-8")
    save_figure(draw(record.figures), options.out)


def train(options: argparse.Namespace) -> None:
    """All three runs, each to its end; the tokenizer of the first serves all."""
    for sink in SINKS:
        folder = options.work / sink
        # A run that goes on is given the same flags, so that one of another recipe is refused.
        command = [sys.executable, "-m", "streamllm", "train", "--out", str(folder), "--sink", sink]
        command += ["--tokens", str(options.tokens), "--heldout", str(options.heldout), *options.flags.split()]
        if (folder / "training" / "run.json").exists():
            command += ["--resume"]
        elif sink != SINKS[0]:
            command += ["--tokenizer", str(options.work / SINKS[0] / "training" / "tokenizer.json")]
        call([*command, "--data", *options.data])


def call(command: Sequence[str]) -> None:
    """Run a command to its end; Ctrl-C, which it gets too, is its own affair."""
    with subprocess.Popen(command) as process:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGINT, before)
    if code:
        raise SystemExit(code)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Perplexities of all twins with all caches, and the curves of their training."""
    found: dict[str, Any] = {}
    for sink in SINKS:
        folder = options.work / sink
        saved = SavedRun(folder / "training")
        model, _ = streamllm.load(folder, device="cpu")
        text = encode_corpus([Source(options.heldout)], read_tokenizer(saved.tokenizer), options.work / "eval")
        length = options.eval_tokens // STREAMS
        starts = [round(i * (len(text.ids) - length) / (STREAMS - 1)) for i in range(STREAMS)]
        ids = torch.from_numpy(np.stack([text.ids[s : s + length] for s in starts]).astype(np.int64))
        if sink == "token":
            ids = torch.cat([torch.full((STREAMS, 1), model.config.bos_token_id), ids], dim=1)
        size = model.config.max_position_embeddings // 2
        losses = {}
        for kept in KEPT:
            began = time.perf_counter()
            read = read_losses(model, ids, SinkCache(model, kept, size - kept, 1, batch_size=STREAMS))
            losses[kept] = read[:, -(length - 1) :].double().numpy()  # the same tokens for all
            print(f"{sink} {kept}+{size - kept}: {math.exp(losses[kept].mean()):.3f}", end="", flush=True)
            print(f"  ({time.perf_counter() - began:.0f} s)", flush=True)
        rows = list(saved.rows())
        found[sink] = {
            "cache": size,
            "tokens_evaluated": int(losses[0].size),
            "perplexity": {str(kept): math.exp(values.mean()) for kept, values in losses.items()},
            "ratio_to_4": {str(kept): ratio(values, losses[4]) for kept, values in losses.items() if kept != 4},
            "recipe": saved.read_plan()["recipe"],
            "seconds": max(row["seconds"] for row in rows if "seconds" in row),
            "emergence": [
                {name: row[name] for name in ("tokens", "sink_mass", "nothing_mass", "ratio", "held_out")}
                for row in rows
                if "ratio" in row
            ],
        }
    return {"twins": found}


def ratio(above: np.ndarray[Any, Any], below: np.ndarray[Any, Any], draws: int = 4000) -> list[float]:
    """Ratio of perplexities on the same tokens [B, N], and its 95 % interval."""
    difference = above - below
    whole = difference[:, : difference.shape[1] // STRETCH * STRETCH].reshape(-1, STRETCH).mean(1)
    draw = np.random.default_rng(0)
    means = whole[draw.integers(0, len(whole), (draws, len(whole)))].mean(1)
    return [float(np.exp(value)) for value in (difference.mean(), *np.quantile(means, (0.025, 0.975)))]


def table(record: dict[str, Any]) -> str:
    """The table as Markdown."""
    twins = record["figures"]["twins"]
    any_twin = next(iter(twins.values()))
    size, recipe = any_twin["cache"], any_twin["recipe"]
    lines = [
        "# Twins that differ in their sink",
        "",
        f"Perplexity over {any_twin['tokens_evaluated']:,} held-out tokens, by initial tokens kept + window. In "
        "brackets: the ratio to the last column on the same tokens, with its 95 % interval.",
        "",
        f"| trained with | {' | '.join(f'{kept}+{size - kept}' for kept in KEPT)} |",
        "|" + "---|" * (len(KEPT) + 1),
    ]
    for sink in ("none", "zero", "token"):
        twin = twins[sink]
        cells = []
        for kept in map(str, KEPT):
            value = f"{twin['perplexity'][kept]:.3f}"
            if kept in twin["ratio_to_4"]:
                value += " ({:.4f}: {:.4f} to {:.4f})".format(*twin["ratio_to_4"][kept])
            cells.append(value)
        lines.append(f"| {NAMES[sink]} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Each twin: {recipe['tokens']:,} tokens, seed {recipe['seed']}; trained on {record['machine']['cpu']}, "
        f"{record['machine']['cores']} cores. Made by `{record['command']}`, commit {record['commit']}.",
        "",
        "Recipe: `" + json.dumps(recipe) + "`",
        "",
    ]
    return "\n".join(lines)


def draw(figures: dict[str, Any]) -> Figure:
    """Perplexity by cache, and the emergence of the sink, twin by twin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    caches, ratios, masses, losses = figure.subplots(1, 4)
    for number, (sink, twin) in enumerate(figures["twins"].items()):
        color, label, rows = f"C{number}", NAMES[sink], twin["emergence"]
        tokens = [row["tokens"] / 1e6 for row in rows]
        caches.plot(list(twin["perplexity"]), list(twin["perplexity"].values()), marker="o", color=color, label=label)
        ratios.plot(tokens, [row["ratio"] for row in rows], color=color, label=label)
        masses.plot(tokens, [max(row["sink_mass"]) for row in rows], color=color, label=f"{label}, first token")
        if sink == "zero":
            masses.plot(
                tokens, [max(row["nothing_mass"]) for row in rows], color=color, ls=":", label=f"{label}, nothing"
            )
        losses.plot(tokens, [next(iter(row["held_out"].values()))["loss"] for row in rows], color=color, label=label)
    caches.set(title="perplexity, streaming", xlabel="initial tokens kept", ylabel="perplexity")
    ratios.set(title="without sinks / with four", xlabel="M tokens trained", ylabel="ratio of perplexities")
    masses.set(title="attention, strongest layer", xlabel="M tokens trained", ylabel="share", ylim=(0, None))
    losses.set(title="held-out loss", xlabel="M tokens trained", ylabel="nats a token")
    for axes in (caches, ratios, masses, losses):
        axes.legend(fontsize="x-small")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
