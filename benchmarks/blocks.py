"""Reading by blocks against reading token by token: the losses of one stream, with the same evictions.

The same text goes through two caches of the same sizes; one is fed a token at a time, as the paper's reference does,
the other in long steps over evictions. They take turns piece by piece, and the ratio is the median over pieces.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from place import STORIES, begin, finish
from target import Target, print_targets

from streamllm import models
from streamllm.cache import SinkCache
from streamllm.config import PREFILL_CHUNK
from streamllm.evaluate.job import base_name
from streamllm.evaluate.scores import read_losses
from streamllm.evaluate.text import packaged_text

SIZES = {"embedded": (None, (64, 128, 252)), "stories260K": (str(STORIES), (64, 128, 256))}
"""Models, and the blocks to evict by; the window is what is left of half the trained length."""


def compare(model: Any, ids: torch.Tensor, block: int, piece: int) -> dict[str, Any]:
    """Read ``ids`` [1, N] in pieces, by both ways."""
    caches = {step: SinkCache(model, block=block) for step in (1, PREFILL_CHUNK)}
    seconds: dict[int, list[float]] = {step: [] for step in caches}
    difference = 0.0
    for first in range(0, ids.shape[1] - 1, piece):
        part, losses = ids[:, first : first + piece + 1], {}
        turn = list(caches.items())
        for step, cache in turn if first % (2 * piece) else reversed(turn):
            began = time.perf_counter()
            losses[step] = read_losses(model, part, cache, step=step)
            seconds[step].append(time.perf_counter() - began)
        difference = max(difference, float((losses[1] - losses[PREFILL_CHUNK]).abs().max()))
    ratios = sorted(one / many for one, many in zip(seconds[1], seconds[PREFILL_CHUNK], strict=True))
    return {
        "window": caches[1].config.window,
        "tokens": ids.shape[1] - 1,
        "ms_per_token": {str(step): 1000 * median(found) / piece for step, found in seconds.items()},
        "ratio": {"median": median(ratios), "min": ratios[0], "max": ratios[-1]},
        "largest_difference": difference,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pieces", type=int, default=10, help="of the text (default: %(default)s)")
    parser.add_argument("--piece", type=int, default=1024, help="tokens of one (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a trial that proves nothing")
    parser.add_argument("--out", type=Path, help="record (default: docs/results/blocks.json)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    pieces, piece = (2, 300) if options.quick else (options.pieces, options.piece)
    record = begin("blocks", argv, " and ".join(SIZES), "float32")
    record.figures["runs"] = {}
    for name, (given, blocks) in SIZES.items():
        folder = models.locate(given)
        model, tokenizer = models.load(folder, device="cpu", dtype="float32")
        text = packaged_text().read_text(encoding="utf-8")
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, : pieces * piece + 1]
        for block in blocks:
            found = compare(model, ids, block, piece)
            record.figures["runs"][f"{base_name(str(folder))}, block {block}"] = found
            times = found["ms_per_token"]
            print(
                f"{name}, window {found['window']}, block {block}: {times['1']:.3f} ms a token one by one, "
                f"{times[str(PREFILL_CHUNK)]:.3f} by blocks, {found['ratio']['median']:.1f} times as fast; losses "
                f"differ by {found['largest_difference']:.1e} at most",
                flush=True,
            )
    runs = record.figures["runs"]
    targets = [
        *(Target(f"by blocks, {name}", found["ratio"]["median"], 20, at_least=True) for name, found in runs.items()),
        Target("largest difference", max(found["largest_difference"] for found in runs.values()), 1e-4, unit="nats"),
    ]
    record.figures["targets"] = [target.to_dict() for target in targets]
    print_targets(targets)
    finish(record, options.out, quick=options.quick)


if __name__ == "__main__":
    main()
