"""Compare recipes for the embedded model by held-out loss after equal time.

    python recipes/candidates.py --stories FILES... --books FILES... --heldout FILES... --minutes 5

How fast each one reads is measured first, by itself; then each is trained on as many tokens as it reads in the given
time, so that what else the machine does later changes nothing but the waiting. Losses are in bits per byte of text,
which tokenizers of different size can be compared by. The record goes to docs/results/candidates.json as it grows.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from streamllm.corpus import END_OF_TEXT, Source, read_documents
from streamllm.train.encoded import Encoded, encode_corpus
from streamllm.train.recipe import Recipe
from streamllm.train.sequences import Sequences
from streamllm.train.trainer import Trainer, make_model
from streamllm.train.vocabulary import SINK_TOKEN, token_id, train_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from place import begin

BASE: dict[str, Any] = {
    "size": "small",
    "hidden": 256,
    "layers": 6,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 1024,
    "vocabulary": 4096,
    "optimizer": "muon",
    "learning_rate": 6e-3,
    "share": 8,
}
CANDIDATES: dict[str, dict[str, Any]] = {
    "base": {},
    "AdamW": {"optimizer": "adamw", "learning_rate": 3e-3},
    "rate 2e-2": {"learning_rate": 2e-2},
    "vocabulary 2048": {"vocabulary": 2048},
    "vocabulary 8192": {"vocabulary": 8192, "intermediate": 768},
    "deep: 192 x 12": {"hidden": 192, "layers": 12, "heads": 3, "kv_heads": 1, "intermediate": 640},
    "wide: 320 x 5": {"hidden": 320, "layers": 5, "heads": 5, "kv_heads": 1, "intermediate": 960},
    "2 heads of 128": {"heads": 2, "kv_heads": 1},
    "stories x 24": {"share": 24},
    "batch 8192": {"batch_tokens": 8192},
}
"""What differs from the base; ``share``: how often an epoch reads the stories."""

TIMED_STEPS = 8


def main(argv: Sequence[str] | None = None) -> None:
    """Train all candidates."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stories", type=Path, nargs="+", required=True)
    parser.add_argument("--books", type=Path, nargs="+", required=True)
    parser.add_argument("--heldout", type=Path, nargs="+", required=True)
    parser.add_argument("--minutes", type=float, default=5.0, help="of each candidate (default: %(default)g)")
    parser.add_argument("--work", type=Path, required=True, help="folder for the encoded text")
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--out", type=Path, default=Path("docs/results/candidates.json"))
    options = parser.parse_args(argv)
    options.work.mkdir(exist_ok=True)
    record = begin(
        "candidates", argv, "Llama of up to 8 M parameters, from scratch", "bfloat16 products", folder="recipes"
    )
    found: dict[str, dict[str, Any]] = {}
    record.figures.update(base=BASE, minutes=options.minutes, candidates=found)

    runs: dict[str, Run] = {}
    speeds: dict[Any, int] = {}
    for name in options.only:
        runs[name] = Run({**BASE, **CANDIDATES[name]}, options)
        found[name] = {"changes": CANDIDATES[name], **runs[name].time(speeds)}
        print(name, found[name], flush=True)
    for name, run in runs.items():
        found[name].update(run.train(options.minutes, found[name]["tokens_per_s"]))
        print(name, found[name], flush=True)
        record.save(options.out)


@functools.lru_cache
def make_tokenizer(files: tuple[Path, ...], size: int) -> Tokenizer:
    """A tokenizer of all files."""
    return train_tokenizer(read_documents([Source(file) for file in files]), size)


class Run:
    """One candidate."""

    def __init__(self, values: dict[str, Any], options: argparse.Namespace) -> None:
        values = dict(values)
        weight = values.pop("share")
        self.recipe = Recipe(**values, tokens=10**9)
        stories, books = [Source(file, weight) for file in options.stories], [Source(file) for file in options.books]
        folder = options.work / f"{self.recipe.shape.vocabulary}-{weight}"
        folder.mkdir(exist_ok=True)
        self.tokenizer = make_tokenizer((*options.stories, *options.books), self.recipe.shape.vocabulary)
        corpus = encode_corpus([*stories, *books], self.tokenizer, folder / "train")
        self.sequences = Sequences(corpus.ids, corpus.stretches, self.recipe.span, self.recipe.seed)
        self.held_out = {
            file.name: encode_corpus([Source(file)], self.tokenizer, folder / file.name.replace(".", "-"))
            for file in options.heldout
        }

    def make(self) -> Trainer:
        """A new trainer."""
        torch._dynamo.reset()
        sink, end = (token_id(self.tokenizer, text) for text in (SINK_TOKEN, END_OF_TEXT))
        model = make_model(self.recipe, sink_id=sink, end_id=end)
        return Trainer(self.recipe, model, self.sequences, sink_id=sink, compiles=True, note=print)

    def time(self, known: dict[Any, int]) -> dict[str, Any]:
        """How fast it reads; what reads as fast is timed once."""
        key = (self.recipe.shape, self.recipe.optimizer, self.recipe.batch)
        if key not in known:
            trainer = self.make()
            seconds = [trainer.advance().seconds for _ in range(TIMED_STEPS)][2:]
            known[key] = round(self.recipe.step_tokens / min(seconds))  # the least disturbed one
        return {"parameters": self.recipe.shape.parameters(), "tokens_per_s": known[key]}

    def train(self, minutes: float, tokens_per_s: float) -> dict[str, Any]:
        """Losses after so many tokens as are read in the time."""
        self.recipe = dataclasses.replace(self.recipe, tokens=round(tokens_per_s * 60 * minutes))
        trainer = self.make()
        began, losses = time.perf_counter(), []
        while trainer.step < self.recipe.steps:
            losses.append(trainer.advance().loss)
        found: dict[str, Any] = {"tokens": trainer.tokens, "seconds": round(time.perf_counter() - began, 1)}
        found["training_loss"] = round(statistics.mean(losses[-20:]), 4)
        for name, encoded in self.held_out.items():
            found[f"bits_per_byte {name}"] = round(bits_per_byte(trainer, encoded), 4)
        return found


def bits_per_byte(trainer: Trainer, encoded: Encoded, most: int = 256) -> float:
    """Held-out loss, over sequences spread evenly."""
    span = trainer.recipe.span
    count = min(most, len(encoded.ids) // span)
    starts = [round(i * (len(encoded.ids) - span) / max(1, count - 1)) for i in range(count)]
    batch = torch.tensor([encoded.ids[start : start + span].astype("int64").tolist() for start in starts])
    return trainer.held_out(batch) / math.log(2) * len(encoded.ids) / encoded.utf8_bytes


if __name__ == "__main__":
    main()
