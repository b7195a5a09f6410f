"""The flags that commands share, each with its environment variable; where a value comes from, and what it means."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer

from streamllm.errors import ConfigError
from streamllm.settings import SETTINGS

_MANNERS = ("json", "quiet", "debug")
"""Flags that change nothing but what is shown."""

_SOURCES = {"COMMANDLINE": "flag", "ENVIRONMENT": "environment", "DEFAULT_MAP": "file", "DEFAULT": "default"}


def setting(name: str, *, help: str | None = None) -> Any:
    """The flag of a setting, with its environment variable and help, if it is not another one here."""
    known = SETTINGS[name]
    flags = [known.flag] if known.short is None else [known.short, known.flag]
    metavar = "TEXT" if known.kind is list else None
    return typer.Option(*flags, envvar=known.env, help=help or known.help, metavar=metavar)


def one_off(*flags: str, help: str, command: str) -> Any:
    """A flag that is no setting; its environment variable bears its command's name (STREAMLLM_TRAIN_OUT)."""
    name = f"STREAMLLM_{command}_{flags[-1][2:]}".upper()
    return typer.Option(*flags, envvar=re.sub(r"\W", "_", name), help=help)


Model = Annotated[str | None, setting("model")]
Device = Annotated[str, setting("device")]
Dtype = Annotated[str, setting("dtype")]
Quantize = Annotated[str, setting("quantize")]
Sinks = Annotated[int, setting("sinks")]
Window = Annotated[int | None, setting("window")]
Block = Annotated[int, setting("block")]
KvDtype = Annotated[str, setting("kv_dtype")]
Compile = Annotated[bool, setting("compile")]
Temperature = Annotated[float, setting("temperature")]
TopK = Annotated[int, setting("top_k")]
TopP = Annotated[float, setting("top_p")]
MinP = Annotated[float, setting("min_p")]
RepetitionPenalty = Annotated[float, setting("repetition_penalty")]
Seed = Annotated[int | None, setting("seed")]
MaxTokens = Annotated[int | None, setting("max_tokens")]
Stop = Annotated[list[str] | None, setting("stop")]
Endless = Annotated[bool, setting("endless")]
ShowStats = Annotated[bool, setting("stats")]
Json = Annotated[bool, setting("json")]
Quiet = Annotated[bool, setting("quiet")]
Verbose = Annotated[bool, setting("verbose")]
Debug = Annotated[bool, typer.Option("--debug", envvar="STREAMLLM_DEBUG", help="Show the traceback of an error.")]


def begin(ctx: typer.Context) -> None:
    """Raise what is wrong with the settings file."""
    if isinstance(ctx.obj, ConfigError):
        raise ctx.obj


def source(ctx: typer.Context, name: str) -> str:
    """Return where a setting comes from: flag, environment, file or default."""
    found = ctx.get_parameter_source(name)
    return _SOURCES[found.name] if found is not None else "default"


def settled(ctx: typer.Context, values: dict[str, Any]) -> Iterator[str]:
    """What the environment or the settings file gave, as flags."""
    for name, value in values.items():
        if name not in _MANNERS and source(ctx, name) in ("environment", "file"):
            flag = "--" + name.replace("_", "-")
            for each in value if isinstance(value, list) else [value]:
                if each is True:
                    yield flag
                elif each is not False:
                    yield from (flag, str(each))


def options(name: str, pairs: Iterable[str]) -> dict[str, Any]:
    """Values by name, from texts such as ``name=value``; what is JSON, such as true or 3, is taken so.

    Raises:
        ConfigError: there is no ``=``.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, is_there, value = pair.partition("=")
        if not key or not is_there:
            raise ConfigError(f"--{name} takes name=value, you gave {pair!r}.")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def split(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """The parts of a text with commas.

    Raises:
        ConfigError: a part is of the wrong kind.
    """
    try:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"--{name.replace('_', '-')} takes whole numbers with commas, you gave {text!r}.") from error
