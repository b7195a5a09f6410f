"""The commands: ``run``, ``train``, ``doctor``, ``config``; the others have files of their own (``cli_eval``, ...).

They turn flags into calls and results into lines; every rule stands elsewhere. Heavy modules are imported inside the
commands, so that ``--help`` and ``--version`` answer at once. Errors leave as exceptions: ``__main__`` has the one
table that turns them into sentences and exit codes.
"""

from __future__ import annotations

import json as jsonlib
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import streamllm
from streamllm import cli_bench, cli_chat, cli_eval, cli_pipe, cli_serve, cli_sessions
from streamllm.config import CacheConfig, SamplingConfig
from streamllm.console import Answer, Screen
from streamllm.corpus import Source
from streamllm.errors import ConfigError, InputError
from streamllm.evaluate.catalogue import EVALUATIONS
from streamllm.evaluate.job import OUT, verdict_of
from streamllm.flags import (
    Block,
    Compile,
    Debug,
    Device,
    Dtype,
    Endless,
    Json,
    KvDtype,
    MaxTokens,
    MinP,
    Model,
    Quantize,
    Quiet,
    RepetitionPenalty,
    Seed,
    ShowStats,
    Sinks,
    Stop,
    Temperature,
    TopK,
    TopP,
    Verbose,
    Window,
    begin,
    one_off,
    setting,
    source,
)
from streamllm.run import Job
from streamllm.settings import SETTINGS, read_settings, settings_file
from streamllm.train.job import TrainJob
from streamllm.train.recipe import MEASURES, SAVE_DTYPES, Recipe

app = typer.Typer(
    name="streamllm",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"streamllm {streamllm.__version__}\n")
        raise typer.Exit


@app.callback()
def top(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run any open language model without end, in constant memory.

    The model keeps the first few tokens and the most recent ones; what has left the window is forgotten.
    """
    try:
        values = read_settings()
    except ConfigError as error:
        ctx.obj = error  # raised by the command itself, so that --help works beside a broken file
    else:
        ctx.default_map = dict.fromkeys(("run", "chat", "pipe", "serve", "train", "bench", "doctor"), values)
        ctx.default_map["eval"] = dict.fromkeys(EVALUATIONS, values)
        ctx.default_map["sessions"] = dict.fromkeys(cli_sessions.COMMANDS, values)


@app.command()
def run(
    ctx: typer.Context,
    text: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to go on from; piped text comes first.")
    ] = None,
    model: Model = None,
    prompt: Annotated[str | None, one_off("-p", "--prompt", help="The same, as a flag.", command="run")] = None,
    device: Device = SETTINGS["device"].default,
    dtype: Dtype = SETTINGS["dtype"].default,
    quantize: Quantize = SETTINGS["quantize"].default,
    sinks: Sinks = CacheConfig.sinks,
    window: Window = CacheConfig.window,
    block: Block = CacheConfig.block,
    kv_dtype: KvDtype = CacheConfig.kv_dtype,
    compile: Compile = SETTINGS["compile"].default,
    temperature: Temperature = SamplingConfig.temperature,
    top_k: TopK = SamplingConfig.top_k,
    top_p: TopP = SamplingConfig.top_p,
    min_p: MinP = SamplingConfig.min_p,
    repetition_penalty: RepetitionPenalty = SamplingConfig.repetition_penalty,
    seed: Seed = SamplingConfig.seed,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    endless: Endless = False,
    save: Annotated[
        Path | None,
        one_off("--save", help="Save the stream to this file at the end.", command="run"),
    ] = None,
    resume: Annotated[
        Path | None,
        one_off("--resume", help="Go on from a saved stream.", command="run"),
    ] = None,
    stats: ShowStats = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write on from a prompt, for as long as you like."""
    begin(ctx)
    job = Job(
        prompt=_only_one(text, prompt, is_flag=source(ctx, "prompt") == "flag"),
        model=model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        cache=CacheConfig(sinks, window, block, kv_dtype=kv_dtype),
        compile=compile,
        sampling=SamplingConfig(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        ),
        explicit=frozenset(name for name in ctx.params if source(ctx, name) == "flag"),
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        endless=endless,
        save=save,
        resume=resume,
        stats=stats,
        json=json,
        quiet=quiet,
        verbose=verbose,
    )
    raise typer.Exit(job.run())


_for_train = partial(one_off, command="train")


@app.command()
def train(
    ctx: typer.Context,
    files: Annotated[list[str] | None, typer.Argument(metavar="FILES", help="More text, as with --data.")] = None,
    data: Annotated[
        list[str] | None,
        _for_train("--data", help="Text: .txt or .jsonl, also .xz .gz .bz2 .zst; FILE:3 counts it three times."),
    ] = None,
    out: Annotated[Path | None, _for_train("--out", help="Folder of the model; must not exist.")] = None,
    size: Annotated[str, _for_train("--size", help="toy, tiny, small, medium or base.")] = Recipe.size,
    sink: Annotated[str, _for_train("--sink", help="token, zero or none: what idle heads attend to.")] = Recipe.sink,
    minutes: Annotated[float | None, _for_train("--minutes", help="How long to train, about.")] = None,
    tokens: Annotated[int | None, _for_train("--tokens", help="How much to train on, instead.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    heldout: Annotated[
        list[str] | None, _for_train("--heldout", help="Text to measure on; the ends of the files if left out.")
    ] = None,
    tokenizer: Annotated[Path | None, _for_train("--tokenizer", help="tokenizer.json to use, not a new one.")] = None,
    hidden: Annotated[int | None, _for_train("--hidden", help="Width, if not that of the size.")] = None,
    layers: Annotated[int | None, _for_train("--layers", help="Depth, if not that of the size.")] = None,
    heads: Annotated[int | None, _for_train("--heads", help="Heads, if not those of the size.")] = None,
    kv_heads: Annotated[int | None, _for_train("--kv-heads", help="Heads of keys and values.")] = None,
    intermediate: Annotated[int | None, _for_train("--intermediate", help="Width of the feed-forward.")] = None,
    vocabulary: Annotated[int | None, _for_train("--vocabulary", help="Ids of a new tokenizer.")] = None,
    context: Annotated[int | None, _for_train("--context", help="Tokens of a sequence.")] = None,
    optimizer: Annotated[str, _for_train("--optimizer", help="muon or adamw.")] = Recipe.optimizer,
    learning_rate: Annotated[
        float, _for_train("--learning-rate", help="At its highest, after the warm-up.")
    ] = Recipe.learning_rate,
    weight_decay: Annotated[float, _for_train("--weight-decay", help="Of matrices.")] = Recipe.weight_decay,
    batch_tokens: Annotated[int, _for_train("--batch-tokens", help="Tokens of one step.")] = Recipe.batch_tokens,
    warmup: Annotated[float, _for_train("--warmup", help="Share of the run.")] = Recipe.warmup,
    final: Annotated[float, _for_train("--final", help="Learning rate at the end, as a share.")] = Recipe.final,
    clip: Annotated[float, _for_train("--clip", help="Largest norm of the gradient.")] = Recipe.clip,
    seed: Annotated[int, setting("seed")] = Recipe.seed,
    train_dtype: Annotated[str, _for_train("--train-dtype", help="auto, float32 or bfloat16.")] = Recipe.dtype,
    save_dtype: Annotated[str, _for_train("--save-dtype", help="float32, bfloat16 or float16.")] = SAVE_DTYPES[0],
    compiles: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the model, if there is a C++ compiler.")
    ] = True,
    measures: Annotated[int, _for_train("--measures", help="How often to measure on held-out text.")] = MEASURES,
    device: Device = SETTINGS["device"].default,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a small model from scratch on plain text.

    Its sequences begin with a sink token, so that it can stream with that one token pinned.
    """
    begin(ctx)
    if out is None:
        raise ConfigError("Name the folder of the model with --out.")
    # Not called dtype, which in a settings file is the type to run a model in.
    values = {**ctx.params, "dtype": train_dtype}
    job = TrainJob(
        values={name: value for name, value in values.items() if name in Recipe.__dataclass_fields__},
        explicit=frozenset(name.removeprefix("train_") for name in ctx.params if source(ctx, name) == "flag"),
        data=tuple(Source.parse(text) for text in (*(data or ()), *(files or ()))),
        held_out=tuple(Source.parse(text) for text in heldout or ()),
        out=out,
        minutes=minutes,
        tokenizer=tokenizer,
        device=device,
        save_dtype=save_dtype,
        compiles=compiles,
        resume=resume,
        measures=measures,
        json=json,
        quiet=quiet,
    )
    raise typer.Exit(job.run())


app.add_typer(cli_eval.app, name="eval")
app.command()(cli_bench.bench)
app.command()(cli_chat.chat)
app.command()(cli_pipe.pipe)
app.command()(cli_serve.serve)
app.add_typer(cli_sessions.app, name="sessions")


@app.command()
def doctor(
    ctx: typer.Context,
    model: Model = None,
    device: Device = SETTINGS["device"].default,
    dtype: Dtype = SETTINGS["dtype"].default,
    quantize: Quantize = SETTINGS["quantize"].default,
    sinks: Sinks = CacheConfig.sinks,
    window: Window = CacheConfig.window,
    block: Block = CacheConfig.block,
    kv_dtype: KvDtype = CacheConfig.kv_dtype,
    results: Annotated[
        Path, one_off("--results", help="Folder of streamllm eval, to show what is known.", command="doctor")
    ] = OUT,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say whether and how a model can stream here."""
    begin(ctx)
    config = CacheConfig(sinks, window, block, kv_dtype=kv_dtype)
    with Screen(quiet=quiet) as screen:
        answer = Answer()
        screen.spin("examining")
        from streamllm.doctor import examine
        from streamllm.models import locate

        report = examine(model, config=config, device=device, dtype=dtype, quantize=quantize)
        screen.settle()
        measured = verdict_of(EVALUATIONS["sinks"], results, locate(model)) if report.is_fit else None
        if json:
            answer.write(jsonlib.dumps({**report.to_dict(), "sinks_measured": measured}, indent=2) + "\n")
        else:
            unknown = "not yet: streamllm eval sinks finds out whether it needs sinks"
            answer.table([*report.rows(), *([("sinks", measured or unknown)] if report.is_fit else [])])
    raise typer.Exit(0 if report.is_fit else 1)


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def config(
    ctx: typer.Context,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print the settings in force and their sources.

    Takes the flags of run, to try them out.
    """
    begin(ctx)
    assert ctx.parent is not None
    command: Any = ctx.parent.command
    with (
        command.commands["run"].make_context("run", list(ctx.args), parent=ctx.parent) as run_ctx,
        command.commands["chat"].make_context("chat", [], parent=ctx.parent) as chat_ctx,
    ):
        of_chat = set(SETTINGS) - set(run_ctx.params)
        contexts = {name: chat_ctx if name in of_chat else run_ctx for name in SETTINGS}
        found = {name: (place.params[name], source(place, name)) for name, place in contexts.items()}
    file = settings_file()
    answer = Answer()
    if json:
        values = {name: {"value": value, "source": source} for name, (value, source) in found.items()}
        answer.write(jsonlib.dumps({"file": file and str(file), "settings": values}, indent=2) + "\n")
        return
    rows = [(name, _shown(value), source) for name, (value, source) in found.items()]
    answer.table([*rows, ("settings file", str(file or "none"), "")])


def _shown(value: Any) -> str:
    """A setting as a person would write it."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(repr, value))
    return "" if value is None else str(value)


def _only_one(text: str | None, prompt: str | None, *, is_flag: bool) -> str:
    """Return the prompt: the argument, or else the flag or its environment variable."""
    if text is not None and is_flag:
        raise ConfigError("The prompt is given twice, as an argument and with --prompt; give it once.")
    given = text if text is not None else prompt or ""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise InputError("The prompt is not UTF-8 text; convert it, for example with iconv.") from error
    return given
