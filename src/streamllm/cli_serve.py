"""``streamllm serve``: turns flags into a job; every rule stands elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from streamllm.chat_settings import RECALL
from streamllm.config import CacheConfig, SamplingConfig, ServeConfig
from streamllm.errors import ConfigError
from streamllm.flags import (
    Block,
    Compile,
    Debug,
    Device,
    Dtype,
    Endless,
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
    Window,
    begin,
    one_off,
    options,
    setting,
)
from streamllm.server.serve_job import ServeJob, split_keys
from streamllm.settings import SETTINGS

_for_serve = partial(one_off, command="serve")


def serve(
    ctx: typer.Context,
    model: Model = None,
    host: Annotated[str, _for_serve("--host", help="Where to listen; elsewhere than here it needs a key.")] = (
        ServeConfig.host
    ),
    port: Annotated[int, _for_serve("--port", help="Which port; 0 takes a free one.")] = ServeConfig.port,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="STREAMLLM_API_KEY",
            help="Who may come in; several times, or with commas.",
            metavar="KEY",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None, _for_serve("--allow-host", help="Another name of this server; several times.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, _for_serve("--cors-origin", help="Another origin whose pages may use it; several times.")
    ] = None,
    ssl_certfile: Annotated[Path | None, _for_serve("--ssl-certfile", help="Certificate, for HTTPS.")] = None,
    ssl_keyfile: Annotated[Path | None, _for_serve("--ssl-keyfile", help="Its private key.")] = None,
    slots: Annotated[int, _for_serve("--slots", help="Replies that are generated at once.")] = ServeConfig.slots,
    waiting: Annotated[
        int, _for_serve("--waiting", help="Requests that may wait beyond them; more are refused (429).")
    ] = ServeConfig.waiting,
    max_system: Annotated[
        int | None, _for_serve("--max-system", help="Tokens of instructions that each slot has room for.")
    ] = ServeConfig.max_system,
    resident: Annotated[
        int | None, _for_serve("--resident", help="Conversations in memory at most; the others are on disk.")
    ] = ServeConfig.resident,
    max_stream_tokens: Annotated[
        int | None, _for_serve("--max-stream-tokens", help="Tokens of one reply at most.")
    ] = ServeConfig.max_stream_tokens,
    max_per_key: Annotated[
        int | None, _for_serve("--max-per-key", help="Replies of one key at once, at most.")
    ] = ServeConfig.max_per_key,
    max_body: Annotated[int, _for_serve("--max-body", help="Bytes of a request at most.")] = ServeConfig.max_body,
    keep: Annotated[
        int, _for_serve("--keep", help="Conversations of one key that are kept without a name.")
    ] = ServeConfig.keep,
    idle: Annotated[
        float, _for_serve("--idle", help="Seconds after which a conversation goes to disk.")
    ] = ServeConfig.idle,
    drain_seconds: Annotated[
        float, _for_serve("--drain-seconds", help="How long replies may go on after Ctrl-C or SIGTERM.")
    ] = ServeConfig.drain_seconds,
    state: Annotated[
        Path | None, _for_serve("--state", help="Folder of the conversations; among your state if left out.")
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
    template_option: Annotated[
        list[str] | None,
        _for_serve("--template-option", help="name=value for the chat template of the model; several times."),
    ] = None,
    log_messages: Annotated[
        bool, typer.Option("--log-messages", envvar="STREAMLLM_SERVE_LOG_MESSAGES", help="Log what is said, too.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve the model to OpenAI's clients, and a page to browsers.

    Conversations never end, on memory that stays the same.
    """
    begin(ctx)
    if recall not in RECALL:
        raise ConfigError(f"--recall must be auto or off, you gave {recall!r}.")
    job = ServeJob(
        model=model,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        cache=CacheConfig(sinks, window, block, kv_dtype=kv_dtype),
        sampling=SamplingConfig(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        ),
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        endless=endless,
        recall="off" if recall == "off" else "auto",
        template_options=options("template-option", template_option or ()) or None,
        serve=ServeConfig(
            host=host,
            port=port,
            slots=slots,
            waiting=waiting,
            max_system=max_system,
            resident=resident,
            max_stream_tokens=max_stream_tokens,
            max_per_key=max_per_key,
            max_body=max_body,
            keep=keep,
            idle=idle,
            drain_seconds=drain_seconds,
        ),
        keys=split_keys(api_key or ()),
        hosts=tuple(allow_host or ()),
        origins=tuple(cors_origin or ()),
        state=state,
        certificate=ssl_certfile,
        private_key=ssl_keyfile,
        logs_messages=log_messages,
        quiet=quiet,
    )
    raise typer.Exit(job.run())
