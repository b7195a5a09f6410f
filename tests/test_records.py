"""Cutting an input into records, and filling them into forms: against ``str`` itself, in pieces of every size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

import pytest

from streamllm import records
from streamllm.errors import ConfigError, InputError
from streamllm.form import PRESETS, Form, preset
from streamllm.records import SPLITS, Record, Split, split_records

TEXT = "  one\r\n\n two é\n\t\n\n\nthree\nfour 😀\n \nfive"


def pieces(text: str | bytes, size: int) -> Iterator[bytes]:
    data = text.encode() if isinstance(text, str) else text
    return (data[start : start + size] for start in range(0, len(data), size))


def texts(input: Iterable[bytes], split: Split) -> list[str]:
    return [record.text() for record in split_records(input, split)]


# ---- records


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
def test_lines_are_those_of_the_text_without_the_blank_ones(size: int, end: str) -> None:
    """Reference: ``str.split``, and where each line stands in it."""
    lines = [line.removesuffix("\r") for line in TEXT.split("\n")]
    found = list(split_records(pieces(TEXT + end, size), "line"))
    assert [record.text() for record in found] == [line for line in lines if line.strip()]
    assert [record.number for record in found] == [1, 2, 3, 4, 5]
    assert [lines[record.line - 1] for record in found] == [record.text() for record in found]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
def test_paragraphs_end_at_blank_lines(size: int, end: str) -> None:
    """Reference: a regular expression over the whole text."""
    found = list(split_records(pieces(TEXT + end, size), "paragraph"))
    assert [record.text() for record in found] == re.split(r"\n(?:\s*\n)+", TEXT.replace("\r", ""))
    assert [record.line for record in found] == [1, 3, 7, 10]


@pytest.mark.parametrize("split", SPLITS)
def test_an_input_without_records_gives_none(split: Split) -> None:
    """Reference: nothing."""
    assert texts([], split) == texts([b""], split) == texts([b"\n \n", b"\r\n\t"], split) == []


def test_no_piece_is_read_before_it_is_needed() -> None:
    """Reference: how many pieces were taken when a record comes out."""
    taken = 0

    def lines() -> Iterator[bytes]:
        nonlocal taken
        for number in range(9):
            taken += 1
            yield b"line %d\n" % number

    for count, _ in enumerate(split_records(lines(), "line"), 1):
        assert taken == count


@pytest.mark.parametrize("split", SPLITS)
def test_a_record_that_is_too_long_is_refused_without_being_held(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: a bound of 100 bytes, to the byte; the record after it is whole."""
    monkeypatch.setattr(records, "LONGEST", 100)
    found = list(split_records(pieces(b"a" * 100 + b"\n\n" + b"b" * 5000 + b"\n\nc", 64), split))
    assert [len(record.data) for record in found] == [100, 101, 1]
    assert found[0].text() == "a" * 100
    with pytest.raises(InputError, match="Line 3 begins a record of more than 100 bytes"):
        found[1].text()
    assert found[2].text() == "c"


def test_lines_of_a_paragraph_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: twenty lines of ten bytes, which are more than a hundred."""
    monkeypatch.setattr(records, "LONGEST", 100)
    (record,) = split_records(pieces("123456789\n" * 20, 7), "paragraph")
    assert len(record.data) == 101


def test_bytes_that_are_no_text_are_named_with_their_line_and_place() -> None:
    """Reference: by hand; the lines beside it are text."""
    one, two, three = split_records([b"caf\xc3\xa9\n", b"caf\xe9!\n", b"ok"], "line")
    assert (one.text(), three.text()) == ("café", "ok")
    with pytest.raises(InputError, match="Line 2: The input is not UTF-8: byte 0xe9 at offset 3"):
        two.text()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"a": 1', "Line 7 is not JSON (Expecting ',' delimiter, column 8); give one object a line."),
        (b"hello", "Line 7 is not JSON (Expecting value, column 1)"),
        (b"[1, 2]", 'Line 7 is JSON, but no object such as {"text": "..."}'),
        (b'"text"', "Line 7 is JSON, but no object"),
        (b'{"a": ' * 100_000, "Line 7 is not JSON (maximum recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Line 7 is not JSON (Exceeds the limit"),
        (b'{"a": "\xff"}', "Line 7: The input is not UTF-8"),
    ],
    ids=["cut", "text", "list", "string", "deep", "long number", "bytes"],
)
def test_what_is_no_json_object_is_refused_with_its_line(line: bytes, says: str) -> None:
    """Reference: the sentences, which name the line and what is wrong there."""
    with pytest.raises(InputError) as caught:
        Record(1, 7, line).fields()
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# ---- forms


def test_a_form_is_filled_with_the_record() -> None:
    """Reference: ``str.format`` for what it knows, and the escapes by hand."""
    record = Record(1, 1, b"a {b} \\n c")
    for text in ("Say: {record}", "{record}{record}", "{{{record}}} {{x}}"):
        assert Form(text).fill(record) == text.format(record=record.text())
    assert Form(r"{record}\n\t\\n\d").fill(record) == "a {b} \\n c\n\t\\n\\d"


def test_a_form_is_filled_with_fields() -> None:
    """Reference: by hand; what is no text is put in as JSON, and an optional field may be missing or null."""
    fields = {"text": "hi {x}", "n": 3, "list": ["é"], "none": None, "record": "not this"}
    record = Record(1, 1, json.dumps(fields).encode())

    def filled(text: str) -> str:
        return Form(text, "json").fill(record)

    assert filled("{text}|{n}|{list}") == 'hi {x}|3|["é"]'
    assert filled("{text}{none?}{other?}{n?}") == "hi {x}3"
    assert filled("{record}") == json.dumps(fields)


@pytest.mark.parametrize("name", ["other", "none"])
def test_a_missing_field_is_named_with_its_line_and_what_is_there(name: str) -> None:
    """Reference: the sentence; null is missing too."""
    record = Record(3, 12, b'{"text": "a", "none": null, "id": 4}')
    says = f"Line 12 has no field '{name}', which the template wants; it has id, none, text."
    with pytest.raises(InputError, match=re.escape(says)):
        Form(f"{{{name}}}", "json").fill(record)


@pytest.mark.parametrize(
    ("text", "split", "says"),
    [
        ("{recrd}", "line", "has {recrd}, which no record fills: known is {record}"),
        ("{record?}", "line", "has {record?}"),
        ("{text}", "paragraph", "fields need split json"),
        ("{} {record}", "line", "has {}"),
        ("{} {record}", "json", "has {}"),
        ("{?}", "json", "has {?}"),
        ("{0}", "line", "has {0}"),
        ("{record", "line", "cannot be read (expected '}' before end of string); write {{ and }} for braces."),
        ("record}", "line", "cannot be read (Single '}' encountered in format string)"),
        ('{"a": 1}', "json", 'has {"a": 1}; a blank is only a name'),
        ("{record!r}", "line", "has {record!r}; a blank is only a name"),
        ("hello {{record}}", "line", "has no {record}, so nothing of a record would be read"),
        ("", "line", "has no {record}"),
        ("{record}", "word", "split must be one of line, paragraph, json, you gave 'word'"),
    ],
)
def test_a_form_that_no_record_can_fill_is_refused(text: str, split: Split, says: str) -> None:
    """Reference: the sentence, with the form as it was given."""
    with pytest.raises(ConfigError) as caught:
        Form(text, split)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_every_kind_of_record(name: str) -> None:
    """Reference: what the record holds, which must be in the text, alone or in fields."""
    chosen = preset(name)
    assert chosen.system
    for split in ("line", "paragraph"):
        assert "the record" in chosen.form(split).fill(Record(1, 1, b"the record"))
    fields = dict.fromkeys(("text", "question", "task"), "the field")
    form = chosen.form("json")
    assert "the field" in form.fill(Record(1, 1, json.dumps(fields).encode()))
    everything = fields | dict.fromkeys(("context", "code"), "more of it")
    filled = form.fill(Record(1, 1, json.dumps(everything).encode()))
    assert ("more of it" in filled) == (name in ("qa", "code"))


def test_the_language_may_be_any_text() -> None:
    """Reference: the same text in what is said; braces and backslashes of it are no blanks."""
    chosen = preset("translate", r"{x}\n")
    assert chosen.form().fill(Record(1, 1, b"hi")) == "Translate to {x}\\n: hi\n"
    assert r"{x}\n" in chosen.system


def test_an_unknown_preset_is_refused() -> None:
    """Reference: the names that there are."""
    with pytest.raises(ConfigError, match="no preset 'translat'; choose one of translate, qa, code, summarise"):
        preset("translat")
