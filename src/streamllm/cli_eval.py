"""``streamllm eval NAME``: one command for each evaluation, whose flags are the fields of its options.

A field says its flag's help and default, so a default stands in one place; a tuple is given as text with commas.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from streamllm.console import Answer
from streamllm.evaluate.catalogue import EVALUATIONS
from streamllm.evaluate.evaluation import Evaluation
from streamllm.evaluate.job import OUT, EvalJob
from streamllm.flags import (
    Debug,
    Device,
    Dtype,
    Json,
    Model,
    Quantize,
    Quiet,
    begin,
    one_off,
    setting,
    settled,
    source,
    split,
)
from streamllm.settings import SETTINGS

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The paper's evaluations, on any model.")

_for_eval = partial(one_off, command="eval")

Files = Annotated[list[str] | None, typer.Argument(metavar="FILES", help="More files, as with --data.")]
Data = Annotated[
    list[str] | None,
    _for_eval(
        "--data", help="Text: .txt or .jsonl, also .xz .gz .bz2 .zst; - is stdin. For arc: questions, or hub:ARC-Easy."
    ),
]
Out = Annotated[Path, _for_eval("--out", help="Folder of records and figures.")]
Quick = Annotated[bool, _for_eval("--quick", help="A trial that takes seconds and proves nothing.")]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _command(kind: type[Evaluation]) -> Callable[..., None]:
    """A function with the flags of an evaluation."""
    hints = get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # kinds are dataclasses
    tuples = {field.name for field in fields if get_origin(hints[field.name]) is tuple}

    def command(ctx: typer.Context, **values: Any) -> None:
        begin(ctx)
        options = {field.name: values[field.name] for field in fields}
        for name in tuples:
            options[name] = split(name, options[name], get_args(hints[name])[0])
        job = EvalJob(
            evaluation=kind(**options),
            explicit=frozenset(name for name in options if source(ctx, name) == "flag"),
            model=values["model"],
            device=values["device"],
            dtype=values["dtype"],
            quantize=values["quantize"],
            settled=tuple(settled(ctx, values)),
            files=(*(values["data"] or ()), *(values["files"] or ())),
            out=values["out"],
            quick=values["quick"],
            json=values["json"],
            quiet=values["quiet"],
        )
        raise typer.Exit(job.run())

    parameters = [
        inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        _parameter("files", Files, None),
        _parameter("model", Model, None),
        _parameter("data", Data, None),
    ]
    for field in fields:
        flag = "--" + field.name.replace("_", "-")
        hint: Any = hints[field.name]
        default: Any = field.default
        if field.name in tuples:
            hint, default = str, ",".join(map(str, default))
        elif len(get_args(hint)) == 2 and NoneType in get_args(hint):
            hint = next(kind for kind in get_args(hint) if kind is not NoneType) | None
        known = field.name in SETTINGS and "help" not in field.metadata
        words = field.metadata.get("help", "")
        info = setting(field.name) if known else one_off(flag, help=words, command=f"eval_{kind.name}")
        parameters.append(_parameter(field.name, Annotated[hint, info], default))
    parameters += [
        _parameter("out", Out, OUT),
        _parameter("quick", Quick, False),
        _parameter("device", Device, SETTINGS["device"].default),
        _parameter("dtype", Dtype, SETTINGS["dtype"].default),
        _parameter("quantize", Quantize, SETTINGS["quantize"].default),
        _parameter("json", Json, False),
        _parameter("quiet", Quiet, False),
        _parameter("debug", Debug, False),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = kind.title.rstrip("?.") + ("?" if kind.title.endswith("?") else ".")
    return command


@app.command()
def report(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of records.")] = OUT,
    out: Annotated[
        Path | None, one_off("--out", help="The page; FOLDER/report.html if left out.", command="eval_report")
    ] = None,
    debug: Debug = False,
) -> None:
    """One page of all records in a folder, to read or to send."""
    begin(ctx)
    from streamllm.evaluate.report import write_report

    answer = Answer()
    page = folder / "report.html" if out is None else out
    count = write_report(folder, page)
    answer.write(f"{page}: {count} record{'s' if count != 1 else ''}\n")
    if answer.error:
        raise answer.error


for _kind in EVALUATIONS.values():
    app.command(_kind.name)(_command(_kind))
