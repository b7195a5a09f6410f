"""``streamllm pipe``: turns flags into a job; every rule stands elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from streamllm.config import ANSWER_TOKENS, CacheConfig, SamplingConfig
from streamllm.errors import ConfigError
from streamllm.flags import (
    Block,
    Compile,
    Debug,
    Device,
    Dtype,
    Json,
    KvDtype,
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
    options,
    setting,
    source,
)
from streamllm.form import PRESETS, TO, Form, preset
from streamllm.pipe_job import ON_ERROR, PipeJob
from streamllm.records import SPLITS
from streamllm.settings import SETTINGS

_for_pipe = partial(one_off, command="pipe")


def pipe(
    ctx: typer.Context,
    model: Model = None,
    template: Annotated[
        str | None,
        _for_pipe("--template", help=r"What is said: {record}, or {field} of JSON; \n is a line end."),
    ] = None,
    preset_name: Annotated[
        str | None, _for_pipe("--preset", help=f"{', '.join(PRESETS)}: template, instructions and split.")
    ] = None,
    to: Annotated[str, _for_pipe("--to", help="Language of --preset translate.")] = TO,
    split: Annotated[str | None, _for_pipe("--split", help=f"What a record is: {', '.join(SPLITS)}.")] = None,
    every: Annotated[int, _for_pipe("--every", help="Answer each K-th record, and read those between.")] = 1,
    on_error: Annotated[
        str, _for_pipe("--on-error", help=f"{' or '.join(ON_ERROR)}, at a record that cannot be used.")
    ] = ON_ERROR[0],
    system: Annotated[
        str | None, _for_pipe("-s", "--system", help="Instructions, which never leave the window.")
    ] = None,
    template_option: Annotated[
        list[str] | None,
        _for_pipe("--template-option", help="name=value for the chat template of the model; several times."),
    ] = None,
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
    max_tokens: Annotated[int, setting("max_tokens", help="Cut an answer after so many tokens.")] = ANSWER_TOKENS,
    stop: Stop = None,
    save: Annotated[Path | None, _for_pipe("--save", help="Save the stream to this file at the end.")] = None,
    resume: Annotated[Path | None, _for_pipe("--resume", help="Go on from a saved stream.")] = None,
    stats: ShowStats = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Answer every record of standard input, one line each, for as long as there are any.

    Earlier records and answers stay in the window. Line breaks within an answer become spaces, unless --json is given.
    """
    begin(ctx)
    if source(ctx, "to") != "default" and preset_name != "translate":
        raise ConfigError(f"--to {to} is for --preset translate; leave it out, or name the language in the template.")
    kind: Any = split  # checked by the form
    chosen = preset(preset_name, to) if preset_name is not None else None
    if template is not None:
        form = Form(template, kind or (chosen.split if chosen else Form.split))
    else:
        form = chosen.form(kind) if chosen else Form(split=kind or Form.split)
    job = PipeJob(
        form=form,
        system=chosen.system if system is None and chosen else system,
        every=every,
        on_error=cast(Any, on_error),
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
        template_options=options("template-option", template_option or ()),
        save=save,
        resume=resume,
        stats=stats,
        json=json,
        quiet=quiet,
        verbose=verbose,
    )
    raise typer.Exit(job.run())
