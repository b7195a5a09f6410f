"""Reading in pieces, against encoding the whole text at once."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from streamllm import reading
from streamllm.errors import ConfigError, InputError
from streamllm.reading import HOLD_BACK, LONGEST_WAIT, READ_BATCH, decode_utf8, read_ids
from tokenizers_for_tests import byte_level, metaspace, slow, stories, unknown_runs

Make = Callable[[], PreTrainedTokenizerBase]
KINDS: dict[str, Make] = {
    "gpt2": byte_level,
    "llama3": lambda: byte_level("llama3"),
    "prefix": lambda: byte_level("prefix"),
    "first": metaspace,
    "always": lambda: metaspace("always"),
    "legacy": lambda: metaspace("legacy"),
    "stories": stories,
    "slow": slow,
}
each_tokenizer = pytest.mark.parametrize("kind", KINDS)

# Whole and half special tokens, characters of several bytes and several code points, runs of all kinds.
PARTS = [*"ab1 ,)\n\t你é😀\ufffd\x00", "e\u0301", "\u0301", "ﬁ", "한글", "\r\n", "'s", "'re", "Once", " upon", " there"]
PARTS += ["<s>", "</s>", "<|endoftext|>", "<|", "<", "s>", "|>", "aaaa", "12", "  "]
RUNS = st.tuples(st.sampled_from(PARTS), st.sampled_from([1, 1, 1, 2, 7, 60, 400])).map(lambda run: run[0] * run[1])


def rambling(seed: int) -> str:
    """A few thousand characters; every other text is of few different parts, so that tokens lean on each other."""
    rng = random.Random(seed)
    parts = rng.sample(PARTS, 3) if seed % 2 else PARTS
    return "".join(rng.choice(parts) * rng.choice([1, 1, 1, 2, 7, 60]) for _ in range(rng.randrange(400)))


TEXTS = st.lists(RUNS, max_size=20).map("".join) | st.integers(0, 10**6).map(rambling)


def whole(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of the whole text at once, without those that the tokenizer appends."""
    if not tokenizer.is_fast:  # puts nothing in front, and appends its end only if there is none
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids
    ids = tokenizer(text, verbose=False).input_ids
    return ids[:-1] if tokenizer("a").input_ids[-1] == tokenizer.eos_token_id else ids


def joined(batches: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


@each_tokenizer
@settings(max_examples=60, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.floats(0, 1), max_size=30), batch_chars=st.sampled_from([1, 7, 300, READ_BATCH]))
def test_any_text_in_any_pieces_gives_the_ids_of_the_whole(
    kind: str, text: str, cuts: list[float], batch_chars: int
) -> None:
    """Reference: ``tokenizer(text).input_ids``; the hold-back is made small, so that there are many stretches."""
    tokenizer = KINDS[kind]()
    places = sorted(int(cut * len(text)) for cut in cuts)
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "HOLD_BACK", 48)
        assert joined(read_ids(tokenizer, iter(pieces), batch_chars=batch_chars)) == whole(tokenizer, text)


@each_tokenizer
def test_a_long_text_with_the_real_sizes_gives_the_ids_of_the_whole(kind: str) -> None:
    """Reference: ``tokenizer(text).input_ids`` of 60 000 characters."""
    tokenizer = KINDS[kind]()
    text = "".join(f"Once upon a time {i * i}: 你好 é😀, they're <s> <|endoftext|> here.\n\n" for i in range(1000))
    batches = list(read_ids(tokenizer, text))
    assert joined(batches) == whole(tokenizer, text)
    assert len(batches) > 5


RUN_TEXTS = {
    "a": "a" * 100_003,
    "ba": "b" + "a" * 100_002,
    "ab": "ab" * 50_000,
    "digits": "1" * 100_001,
    "spaces": " " * 100_001 + "x",
    "lines": "\n" * 100_001,
    "han": "你" * 30_001,
    "marks": "e\u0301" * 30_001,
}


@pytest.mark.parametrize("run", RUN_TEXTS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "slow"])
def test_a_run_without_any_natural_border_gives_the_ids_of_the_whole(kind: str, run: str) -> None:
    """Reference: ``tokenizer(text).input_ids`` of a text of one letter, digit, space or pair over and over."""
    tokenizer = KINDS[kind]()
    assert joined(read_ids(tokenizer, RUN_TEXTS[run])) == whole(tokenizer, RUN_TEXTS[run])


def in_threes(unit: str, pair: str, front: str) -> PreTrainedTokenizerBase:
    """Cuts a text in threes, merges ``pair`` in them; ``front``, put before every text, may shift the threes."""
    tokens = ["<unk>", *sorted(set(unit)), pair]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [(pair[0], pair[1])], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend(front) if front else None
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"[{unit}]{{1,3}}"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    ("unit", "pair", "front"),
    [
        ("1", "11", ""),
        ("1", "11", "1"),
        ("1", "11", "\n"),
        ("\n", "\n\n", ""),
        ("\n", "\n\n", "\n"),
        ("123", "31", ""),
        ("123", "31", "1"),
    ],
)
def test_a_stretch_that_begins_out_of_step_is_put_in_step(unit: str, pair: str, front: str) -> None:
    """Reference: ``tokenizer(text).input_ids``; most of the places to begin at are inside a three."""
    tokenizer = in_threes(unit, pair, front)
    for length in range(20_000, 20_003):
        text = (unit * length)[:length]
        assert joined(read_ids(tokenizer, text, batch_chars=601)) == tokenizer(text, verbose=False).input_ids


def paired_from_the_end(letter: str) -> PreTrainedTokenizerBase:
    """Cuts a run of letters in pairs counted from its end; exact reading would need the end first."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, letter: 1, letter * 2: 2, "-": 3}, unk_token="<unk>"))
    pairs = f"{letter}(?=(?:{letter * 2})*(?!{letter}))|{letter * 2}"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pairs), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("letter", ["a", "\n"])
def test_a_stretch_that_is_never_in_step_loses_and_repeats_no_text(letter: str) -> None:
    """Reference: the number of letters; their grouping depends on the far end, which cannot be known in time."""
    tokenizer = paired_from_the_end(letter)
    for length in (1001, 5000, 5001):
        ids = joined(read_ids(tokenizer, letter * length, batch_chars=101))
        assert ids.count(1) + 2 * ids.count(2) == length
        assert set(ids) == {1, 2}


def test_one_token_for_a_run_of_any_length_is_cut_so_that_memory_and_work_stay_bounded() -> None:
    """Reference: one unknown token for the whole; here one for each LONGEST_WAIT, after a handful of attempts."""
    tokenizer, n_waits = unknown_runs(), 5
    text = "aaa" + "x" * (n_waits * LONGEST_WAIT) + "aaa"
    assert tokenizer(text, verbose=False).input_ids == [1, 1, 1, 0, 1, 1, 1]
    with pytest.MonkeyPatch.context() as patch:
        encoded: list[int] = []
        encode = reading._Reader._encode
        patch.setattr(reading._Reader, "_encode", lambda *args, **kw: (encoded.append(1), encode(*args, **kw))[1])
        ids = joined(read_ids(tokenizer, text, batch_chars=100))
    assert [*ids[:3], *ids[-3:]] == [1] * 6
    assert set(ids[3:-3]) == {0}
    assert 1 < len(ids[3:-3]) <= n_waits + 1
    assert len(encoded) < 100 * n_waits


def test_context_stays_small_however_long_its_tokens_are() -> None:
    """Reference: 3 MB, half of what the last 256 tokens cover."""
    pieces = itertools.repeat("x" * 60_000 + "a", 100)
    tracemalloc.start()
    try:
        for _ in read_ids(unknown_runs(), pieces):
            assert tracemalloc.get_traced_memory()[0] < 3_000_000
    finally:
        tracemalloc.stop()


def test_an_added_token_longer_than_the_hold_back_is_found_wherever_the_text_is_cut() -> None:
    """Reference: ``tokenizer(text).input_ids``."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(stories().backend_tokenizer.to_str()))
    long = f"<{'x ' * HOLD_BACK * 2}>"
    tokenizer.add_tokens([long])
    text = f"Once{long}upon {long} a time. " * 20
    wanted = tokenizer(text, verbose=False).input_ids
    assert wanted.count(len(tokenizer) - 1) == 40
    for size in (100, 130, 170):
        assert joined(read_ids(tokenizer, (text[i : i + size] for i in range(0, len(text), size)))) == wanted


@each_tokenizer
@pytest.mark.parametrize("text", [" ", "  a", "a  ", "\n\nx", " \n ", "   \n"])
def test_whitespace_at_either_end_is_read(kind: str, text: str) -> None:
    """Reference: ``tokenizer(text).input_ids``; trimmed offsets give such tokens an empty span."""
    tokenizer = KINDS[kind]()
    assert joined(read_ids(tokenizer, text)) == whole(tokenizer, text)


def test_a_slow_tokenizer_without_whitespace_is_cut_anyway() -> None:
    """Reference: ``tokenizer(text)``, one id a byte, so that a cut anywhere is exact."""
    text = "x" * (2 * LONGEST_WAIT)
    batches = list(read_ids(slow(), text))
    assert joined(batches) == whole(slow(), text)
    assert len(batches) > 1


class Restless(type(slow())):  # type: ignore[misc]
    """A slow tokenizer whose first id tells the length of the text, so that no two texts share a head."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [1000 + len(text), *(ord(letter) for letter in text)] if text else []}


def test_a_slow_tokenizer_that_is_never_in_step_encodes_each_stretch_alone() -> None:
    """Reference: the letters of the text; each stretch has its own first id."""
    text = "word " * 2000
    ids = joined(read_ids(Restless(), text, add_special_tokens=False, batch_chars=500))
    assert "".join(chr(id) for id in ids if id < 1000) == text
    assert sum(id >= 1000 for id in ids) > 5


@each_tokenizer
def test_no_text_gives_the_leading_ids_only(kind: str) -> None:
    """Reference: ``tokenizer("")`` less what it appends."""
    tokenizer = KINDS[kind]()
    for pieces in ("", [], ["", "", ""]):
        assert joined(read_ids(tokenizer, pieces)) == whole(tokenizer, "")
        assert list(read_ids(tokenizer, pieces, add_special_tokens=False)) == []


@each_tokenizer
def test_without_special_tokens_nothing_is_put_in_front(kind: str) -> None:
    """Reference: ``tokenizer(text, add_special_tokens=False)``; empty pieces are fine."""
    tokenizer = KINDS[kind]()
    ids = joined(read_ids(tokenizer, ["Once", "", " up", "on"], add_special_tokens=False))
    assert ids == tokenizer("Once upon", add_special_tokens=False).input_ids


def test_ids_come_before_the_text_has_ended() -> None:
    """Reference: by hand; after each piece no more than twice the hold-back is kept waiting."""
    tokenizer, given = stories(), 0

    def lines() -> Iterator[str]:
        for i in range(100):
            line = f"Lily saw {i} birds. "
            taken.append(len(line))
            yield line

    taken: list[int] = []
    longest = max(map(len, tokenizer.get_added_vocab()))
    for ids in read_ids(tokenizer, lines()):
        given += len(tokenizer.decode(ids, skip_special_tokens=True))
        assert sum(taken) - given < 3 * (HOLD_BACK + longest)


@pytest.mark.parametrize(
    ("kind", "n_chars"),
    [("gpt2", 1_000_000), ("stories", 1_000_000), pytest.param("stories", 20_000_000, marks=pytest.mark.slow)],
)
def test_a_text_of_any_length_needs_the_memory_of_a_few_batches(kind: str, n_chars: int) -> None:
    """Reference: 3 MB; the ids of a million characters alone would be more."""
    tokenizer = KINDS[kind]()
    line = "Once upon a time there was a girl named Lily, and she went home.\n" * 100

    def peak(n_chars: int) -> int:
        for ids in read_ids(tokenizer, itertools.repeat(line, n_chars // len(line))):
            assert len(ids) < READ_BATCH
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        assert peak(n_chars) < 3_000_000
    finally:
        tracemalloc.stop()


def test_a_batch_of_no_characters_is_refused() -> None:
    """Reference: the words of the message, before any text is asked for."""
    with pytest.raises(ConfigError, match="batch_chars must be at least 1, you gave 0"):
        read_ids(stories(), iter(()), batch_chars=0)


@pytest.mark.parametrize("kind", ["gpt2", "stories", "slow"])
def test_half_a_character_is_a_clear_error_that_says_where(kind: str) -> None:
    """Reference: by hand, the place of the lone surrogate in the whole text."""
    pieces = ["word " * 2000, "abc\ud83d", "def"]
    with pytest.raises(InputError, match=r"lone surrogate '\\ud83d' at character 10003.*errors='replace'"):
        joined(read_ids(KINDS[kind](), pieces, batch_chars=700))


class Failing(PreTrainedTokenizerFast):
    """Encodes nothing but the letter that reading tries first."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        if text != "a":
            raise RuntimeError("no model")
        return {"input_ids": [1]}


def test_whatever_else_the_tokenizer_cannot_encode_is_an_input_error() -> None:
    """Reference: the words of the message."""
    tokenizer = Failing(tokenizer_object=stories().backend_tokenizer)
    with pytest.raises(InputError, match=r"cannot encode the text after character 0 \(RuntimeError: no model\)"):
        joined(read_ids(tokenizer, "b"))


# ---- bytes


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text("a€😀\ufeff"), cuts=st.lists(st.floats(0, 1), max_size=20), mark=st.booleans())
def test_bytes_cut_anywhere_give_the_text(text: str, cuts: list[float], mark: bool) -> None:
    """Reference: the text that was encoded; one byte order mark in front is left out, others stay."""
    data = (b"\xef\xbb\xbf" if mark else b"") + text.encode()
    wanted = text if mark else text.removeprefix("\ufeff")
    places = sorted(int(cut * len(data)) for cut in cuts)
    chunks = [data[a:b] for a, b in itertools.pairwise([0, *places, len(data)])]
    pieces = list(decode_utf8(chunks))
    assert "".join(pieces) == wanted


@settings(max_examples=200, deadline=None)
@given(
    head=st.text(max_size=20),
    bad=st.sampled_from([b"\xff", b"\xe4\xbd", b"\x80", b"\xf0\x9f\x98", b"\xc3"]),
    size=st.integers(1, 9),
)
@pytest.mark.parametrize("tail", [b"", b" and more"])
def test_bytes_that_are_not_utf8_are_an_error_with_their_offset(head: str, bad: bytes, size: int, tail: bytes) -> None:
    """Reference: the offset and the byte in ``bytes.decode`` of the whole."""
    data = head.encode() + bad + tail
    with pytest.raises(UnicodeDecodeError) as one_shot:
        data.decode()
    start = one_shot.value.start
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    with pytest.raises(InputError, match=f"byte 0x{data[start]:02x} at offset {start} .*iconv"):
        list(decode_utf8(chunks))
