"""Forms: what is said to a model about each record, as a text with blanks; and those that come along.

Knows records, but neither models nor where records come from.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from string import Formatter

from streamllm.errors import ConfigError, InputError
from streamllm.records import SPLITS, Record, Split

RECORD = "record"
"""The blank that takes the record as it is."""

ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
"""What a form may say for characters that are hard to type in a shell."""

_ESCAPE = re.compile("|".join(map(re.escape, ESCAPES)))


@dataclass(frozen=True)
class Form:
    r"""A text with blanks.

    Args:
        text: ``{record}`` stands for the record; for JSON ``{name}`` for a field, and ``{name?}`` for one that may be
            missing. ``{{`` and ``}}`` are braces; ``\n``, ``\t`` and ``\\`` what they are in most languages.
        split: what a record is.

    Raises:
        ConfigError: there is no such ``split``, or a blank that no record can fill, or none at all.
    """

    text: str = "{record}\n"
    split: Split = "line"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"split must be one of {', '.join(SPLITS)}, you gave {self.split!r}.")
        names = [name for _, name in self._parts() if name is not None]
        strange = [name for name in names if name != RECORD and (self.split != "json" or not name.strip("?"))]
        if strange:
            known = "{record} and the names of fields" if self.split == "json" else "{record}; fields need split json"
            raise ConfigError(
                f"The template {self.text!r} has {{{strange[0]}}}, which no record fills: known is {known}; write "
                "{{ and }} for braces."
            )
        if not names:
            raise ConfigError(f"The template {self.text!r} has no {{record}}, so nothing of a record would be read.")

    def fill(self, record: Record) -> str:
        """Return the text for a record. What a field holds besides text is put in as JSON.

        Raises:
            InputError: the record cannot be used, or a field is missing; the message names the line.
        """
        values = record.fields() if self.split == "json" else {}
        values[RECORD] = record.text()
        filled = ""
        for literal, name in self._parts():
            filled += literal
            if name is None:
                continue
            value = values.get(name.removesuffix("?"))
            if value is None and name.endswith("?"):
                continue
            if value is None:
                there = ", ".join(sorted(values.keys() - {RECORD})) or "none"
                raise InputError(f"Line {record.line} has no field {name!r}, which the template wants; it has {there}.")
            filled += value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return filled

    def _parts(self) -> list[tuple[str, str | None]]:
        """Return the literal pieces, each with the name of the blank after it."""
        try:
            parsed = list(Formatter().parse(self.text))
        except ValueError as error:
            raise ConfigError(
                f"The template {self.text!r} cannot be read ({error}); write {{{{ and }}}} for braces."
            ) from error
        for _, name, spec, conversion in parsed:
            if spec or conversion:
                shown = f"{{{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}"
                raise ConfigError(
                    f"The template {self.text!r} has {shown}; a blank is only a name, and {{{{ and }}}} are braces."
                )
        return [(_ESCAPE.sub(lambda found: ESCAPES[found[0]], literal), name) for literal, name, _, _ in parsed]


@dataclass(frozen=True)
class Preset:
    """A form with its instructions, written for instruct models.

    Args:
        system: instructions.
        text: the form for lines and paragraphs.
        fields: the form for JSON.
        split: what a record is, unless it is said.
    """

    system: str
    text: str
    fields: str
    split: Split = "line"

    def form(self, split: Split | None = None) -> Form:
        """Return the form for records of this kind."""
        split = split or self.split
        return Form(self.fields if split == "json" else self.text, split)


TO = "English"
"""The language that is translated to."""

PRESETS = ("translate", "qa", "code", "summarise")


def preset(name: str, to: str = TO) -> Preset:
    """Return a preset.

    Args:
        name: one of ``PRESETS``.
        to: for "translate", the language.

    Raises:
        ConfigError: there is no such preset.
    """
    blank = to.replace("{", "{{").replace("}", "}}").replace("\\", r"\\")
    known = {
        "translate": Preset(
            f"You are a translator. Translate every message to {to}. Answer with the translation alone, on one line, "
            "and write names as in the messages before.",
            f"Translate to {blank}: {{record}}\n",
            f"Translate to {blank}: {{text}}\n",
        ),
        "qa": Preset(
            "You answer questions in one sentence each, from what was said with them or before. If you do not know, "
            "say so.",
            "Question: {record}\n",
            "{context?}\nQuestion: {question}\n",
        ),
        "code": Preset(
            "You are a careful programmer. Every message is a task, a piece of code or a change. Do the task, or say "
            "what is wrong and how to mend it. Be brief.",
            "{record}\n",
            "{task}\n{code?}\n",
            "paragraph",
        ),
        "summarise": Preset(
            "Every message is the next part of a long text. Sum each part up in one sentence that can be understood "
            "alone.",
            "{record}\nIn one sentence:\n",
            "{text}\nIn one sentence:\n",
            "paragraph",
        ),
    }
    if name not in known:
        raise ConfigError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}, or give a template.")
    return known[name]
