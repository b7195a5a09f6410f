"""``streamllm bench``: turns flags into a plan; every rule stands elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from streamllm.bench.job import BenchJob
from streamllm.bench.plan import KNOWN_SHAPES, Plan
from streamllm.config import CacheConfig
from streamllm.errors import ConfigError
from streamllm.flags import Block, Debug, Device, Dtype, Json, Model, Quiet, Sinks, begin, one_off, source, split
from streamllm.flags import settled as settled_flags
from streamllm.settings import SETTINGS

_for_bench = partial(one_off, command="bench")


def bench(
    ctx: typer.Context,
    model: Model = None,
    shape: Annotated[str | None, _for_bench("--shape", help=f"Random weights instead: {KNOWN_SHAPES}.")] = Plan.shape,
    windows: Annotated[str, _for_bench("--windows", help="Tokens in the cache, the sinks among them.")] = ",".join(
        map(str, Plan.windows)
    ),
    batches: Annotated[str, _for_bench("--batches", help="Streams side by side, at one window.")] = ",".join(
        map(str, Plan.batches)
    ),
    methods: Annotated[str, _for_bench("--methods", help="Which to compare.")] = ",".join(Plan.methods),
    rounds: Annotated[int, _for_bench("--rounds", help="Turns of each method that count.")] = Plan.rounds,
    threads: Annotated[int | None, _for_bench("--threads", help="On the CPU; torch's own number if left out.")] = None,
    sinks: Sinks = CacheConfig.sinks,
    block: Block = CacheConfig.block,
    out: Annotated[Path | None, _for_bench("--out", help="Folder of the record and the figure.")] = None,
    quick: Annotated[bool, _for_bench("--quick", help="A trial that takes seconds and proves nothing.")] = False,
    device: Device = SETTINGS["device"].default,
    dtype: Dtype = SETTINGS["dtype"].default,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure speed and memory beside other ways to do it, and the limit of the machine.

    The methods take turns in one run. Tables come first, and one line of JSON last.
    """
    begin(ctx)
    if shape is not None and model is not None:
        if source(ctx, "model") == source(ctx, "shape") == "flag":
            raise ConfigError("Both --model and --shape are given; a shape has random weights of its own.")
        model = None
    plan = Plan(
        shape=shape,
        windows=split("windows", windows, int),
        batches=split("batches", batches, int),
        methods=split("methods", methods, str),
        rounds=rounds,
        threads=threads,
        sinks=sinks,
        block=block,
    )
    explicit = frozenset(name for name in ctx.params if source(ctx, name) == "flag")
    plan = plan.quick(explicit) if quick else plan
    job = BenchJob(
        plan=plan,
        model=model,
        device=device,
        dtype=dtype,
        settled=tuple(settled_flags(ctx, ctx.params)),
        out=out,
        json=json,
        quiet=quiet,
    )
    raise typer.Exit(job.run())
