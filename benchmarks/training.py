"""How fast does the embedded model's shape train, and what share of the machine's matrix-multiply rate is that?

The rate is measured by the model's own matrix products (a forward's, by their shapes), in the type of the training,
taking turns with the training steps. Tokens are random: the time of a step does not depend on what they say.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from place import begin, finish
from target import Target, print_targets
from transformers import AutoConfig

from streamllm import models
from streamllm.checkpoint import EMBEDDED
from streamllm.train.recipe import Recipe, Shape
from streamllm.train.sequences import Sequences, Stretch
from streamllm.train.trainer import Trainer, compute_dtype, make_model


def embedded_shape() -> Shape:
    """The shape of the embedded model."""
    config = AutoConfig.from_pretrained(models.locate())
    return Shape(
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
        config.max_position_embeddings,
    )


def make_trainer(recipe: Recipe, *, compiles: bool) -> Trainer:
    """A trainer on random tokens."""
    tokens = np.random.default_rng(0).integers(2, recipe.shape.vocabulary, 200_000).astype(np.uint16)
    sequences = Sequences(tokens, [Stretch(0, len(tokens))], recipe.span, recipe.seed)
    torch._dynamo.reset()
    model = make_model(recipe, sink_id=1, end_id=0)
    return Trainer(recipe, model, sequences, sink_id=1, compiles=compiles, note=_tell)


def products(shape: Shape) -> list[tuple[int, int, int]]:
    """Weight matrices of a forward: how often, and from how many numbers to how many."""
    keys = shape.hidden // shape.heads * shape.kv_heads
    layers = shape.layers
    return [
        (2 * layers, shape.hidden, shape.hidden),
        (2 * layers, shape.hidden, keys),
        (2 * layers, shape.hidden, shape.intermediate),
        (layers, shape.intermediate, shape.hidden),
        (1, shape.hidden, shape.vocabulary),
    ]


def matmul_rate(shape: Shape, rows: int, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a forward's matrix products over ``rows`` tokens."""
    operations = seconds = 0.0
    for count, wide, out in products(shape):
        x, weight = torch.randn(rows, wide, dtype=dtype), torch.randn(wide, out, dtype=dtype)
        x @ weight
        began = time.perf_counter()
        for _ in range(count):
            x @ weight
        seconds += time.perf_counter() - began
        operations += 2.0 * count * rows * wide * out
    return operations / seconds


def measure(recipe: Recipe, steps: int, *, compiles: bool) -> dict[str, Any]:
    """Steps and matrix products in turns."""
    trainer = make_trainer(recipe, compiles=compiles)
    dtype = compute_dtype(recipe, torch.device("cpu"))
    for _ in range(2):
        trainer.advance()
    times, rates = [], []
    for _ in range(steps):
        times.append(trainer.advance().seconds)
        rates.append(matmul_rate(recipe.shape, recipe.batch * recipe.shape.context, dtype))
    positions = recipe.batch * recipe.shape.context
    done = positions * recipe.shape.flops_per_token() / median(times)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": trainer._compiled is not None,
        "tokens_per_s": round(recipe.step_tokens / median(times)),
        "gflops": round(done / 1e9, 1),
        "matmul_gflops": round(median(rates) / 1e9, 1),
        "share": round(done / median(rates), 4),
    }


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="of each kind (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a toy, to try the script; writes only to --out")
    parser.add_argument("--out", type=Path, help="where the record goes (default: docs/results/training.json)")
    options = parser.parse_args(argv)
    shape = embedded_shape()
    changes: dict[str, Any] = {"size": "toy"} if options.quick else {"size": "small", **vars(shape)}
    steps = 2 if options.quick else options.steps
    batch = Recipe(**changes).shape.context * (2 if options.quick else 16)
    record = begin("training", argv, f"shape of {EMBEDDED}", "float32")
    found = {}
    for dtype in ("auto", "float32"):
        recipe = Recipe(**changes, tokens=10**8, batch_tokens=batch, dtype=dtype)
        for compiles in (False,) if options.quick else (True, False):
            name = f"{dtype}, {'compiled' if compiles else 'eager'}"
            _tell(name)
            found[name] = measure(recipe, steps, compiles=compiles)
            _tell(str(found[name]))
    targets = [
        Target(f"share of the matrix-multiply rate, {name}", found[name]["share"], 0.5, at_least=True)
        for name in (next(iter(found)), next(name for name in found if name.startswith("float32")))
    ]
    record.figures.update(runs=found, targets=[target.to_dict() for target in targets])
    print_targets(targets)
    finish(record, options.out, quick=options.quick)


if __name__ == "__main__":
    main()
