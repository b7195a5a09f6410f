"""``streamllm chat``: turns flags into a job; every rule stands elsewhere."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from streamllm.chat_job import ChatJob, read_system
from streamllm.chat_settings import RECALL
from streamllm.config import CacheConfig, SamplingConfig
from streamllm.errors import ConfigError
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
from streamllm.settings import SETTINGS

_for_chat = partial(one_off, command="chat")


def chat(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The first message.")] = None,
    model: Model = None,
    system: Annotated[
        str | None, _for_chat("-s", "--system", help="The system prompt, which never leaves; @FILE reads it.")
    ] = None,
    session: Annotated[
        str | None, _for_chat("--session", help="Go on with the session of this name, or begin it.")
    ] = None,
    recall: Annotated[str, setting("recall")] = SETTINGS["recall"].default,
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
    snapshots: Annotated[
        int | None,
        _for_chat("--snapshots", help="Turns that /undo can take back exactly; each is a copy of the cache."),
    ] = None,
    template_option: Annotated[
        list[str] | None,
        _for_chat("--template-option", help="name=value for the chat template of the model; several times."),
    ] = None,
    stats: Annotated[
        bool | None,
        typer.Option(
            "--stats/--no-stats",
            envvar=SETTINGS["stats"].env,
            help="One line of statistics after each reply; on a terminal if left out.",
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Talk with a model for as long as you like.

    In a pipe each line is a message.
    """
    begin(ctx)
    if recall not in RECALL:
        raise ConfigError(f"--recall must be auto or off, you gave {recall!r}.")
    config = CacheConfig(sinks, window, block, kv_dtype=kv_dtype)
    job = ChatJob(
        prompt=prompt,
        model=model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        cache={name: getattr(config, name) for name in ("sinks", "window", "block", "kv_dtype")},
        sampling=SamplingConfig(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        ),
        given=frozenset(name for name in ctx.params if source(ctx, name) in ("flag", "environment")),
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        endless=endless,
        system=read_system(system),
        session=session,
        recall="off" if recall == "off" else "auto",
        snapshots=snapshots,
        template_options=options("template-option", template_option or ()) or None,
        stats=stats,
        json=json,
        quiet=quiet,
        verbose=verbose,
    )
    raise typer.Exit(job.run())
