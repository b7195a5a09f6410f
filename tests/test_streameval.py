"""StreamEval: its text against the paper's words, its spans against decoding, its counts against plain decoding."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import itertools
import random
import re
import signal
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import streamllm
import tokenizers_for_tests as kinds
from streamllm.console import Screen, Signals
from streamllm.corpus import END_OF_TEXT
from streamllm.errors import ConfigError
from streamllm.evaluate import registers, streameval
from streamllm.evaluate.desk import Desk, Interrupted
from streamllm.evaluate.methods import cache_maker
from streamllm.evaluate.registers import (
    Answer,
    Piece,
    encode_pieces,
    make_draw,
    make_line,
    make_query,
    stream_blocks,
    stream_pieces,
)
from streamllm.evaluate.scores import score_stream
from streamllm.evaluate.streameval import StreamEval
from streamllm.evaluate.tally import Tally, summarise

ROOT = Path(__file__).parents[1]
ANY_LINE = re.compile(r"(Query: )?The REGISTER_CONTENT in line (\d+) is <(\d+)>\n")


def first(pieces: Iterator[Piece], answers: int) -> list[Piece]:
    """The pieces up to the end of a query."""
    found: list[Piece] = []
    while sum(piece.is_answer for piece in found) < answers or found[-1].text != ">\n":
        found.append(next(pieces))
    return found


# ---- the text


def test_the_text_is_that_of_the_paper() -> None:
    """Reference: the issue's words; a query after every 10 lines about the line 20 lines before, rightly answered."""
    pieces = first(stream_pieces(make_draw(0, 0), distance=20, every=10, digits=5), 4)
    text = "".join(piece.text for piece in pieces)
    found = list(ANY_LINE.finditer(text))
    assert text == "Below is a record of lines I want you to remember.\n" + "".join(match[0] for match in found)
    contents = {int(match[2]): match[3] for match in found if not match[1]}
    assert list(contents) == list(range(51))
    assert all(re.fullmatch(r"\d{5}", content) for content in contents.values())
    newest, asked = -1, []
    for match in found:
        newest = newest if match[1] else int(match[2])
        if match[1]:
            asked.append((newest, int(match[2])))
            assert match[3] == contents[int(match[2])]
    assert asked == [(20, 0), (30, 10), (40, 20), (50, 30)]


def test_the_same_seed_gives_the_same_lines_whatever_is_asked() -> None:
    """Reference: other options; other samples and seeds have other lines."""

    def lines(seed: int, sample: int, distance: int) -> list[str]:
        pieces = stream_pieces(make_draw(seed, sample), distance=distance, every=2, digits=3)
        contents = (piece.text for piece in pieces if piece.line is not None and not piece.is_answer)
        return list(itertools.islice(contents, 50))

    assert lines(0, 0, 5) == lines(0, 0, 9)
    assert len({tuple(lines(seed, sample, 5)) for seed in (0, 1) for sample in (0, 1)}) == 4


def merging() -> PreTrainedTokenizerBase:
    """A tokenizer that likes to merge what stands on both sides of a border."""
    merges = [(" ", "<"), ("<", "1"), ("<", "2"), ("3", ">"), ("4", ">"), (">", "\n"), ("1", "2"), ("s", " <")]
    letters = sorted({*"Below is a record of lines I want you to remember.\nThe REGISTER_CONTENT Query: <>0123456789"})
    vocabulary = {text: number for number, text in enumerate([*letters, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.decoder = decoders.Fuse()
    assert any("<1" in token for token in tokenizer.encode("e<12>\n").tokens)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "make",
    [
        merging,
        kinds.byte_level,
        lambda: kinds.byte_level("llama3"),
        lambda: kinds.byte_level("prefix"),
        kinds.metaspace,
        lambda: kinds.metaspace("legacy"),
        kinds.slow,
    ],
    ids=["merging", "gpt2", "llama3", "prefix", "metaspace", "legacy", "slow"],
)
def test_spans_are_exact_for_any_tokenizer(make: Any) -> None:
    """Reference: what the spans decode to; the text itself; the ids of a number in its line."""
    tokenizer = make()
    pieces = first(stream_pieces(make_draw(0, 0), distance=3, every=2, digits=4), 30)
    blocks = list(stream_blocks(encode_pieces(tokenizer, pieces), 100))
    ids = [token for block, _ in blocks for token in block]
    answers = [answer for _, found in blocks for answer in found]
    want = [piece for piece in pieces if piece.is_answer]
    assert len(answers) == len(want) == 30
    for answer, piece in zip(answers, want, strict=True):
        assert tokenizer.decode(ids[answer.begin : answer.end]).strip() == piece.text
        assert ids[answer.content_begin : answer.content_end] == ids[answer.begin : answer.end]
        line = tokenizer.decode(ids[answer.line : answer.content_end])
        assert line.strip() == f"The REGISTER_CONTENT in line {piece.line} is <{piece.text}"
    front = tokenizer("a")["input_ids"]
    begins = front[:1] if front[:1] != tokenizer("a", add_special_tokens=False)["input_ids"][:1] else []
    assert ids[: len(begins)] == begins
    whole = tokenizer.decode(ids[len(begins) :])
    assert whole.split() == "".join(piece.text for piece in pieces).split()


def test_blocks_are_the_stream_and_no_answer_lies_in_two() -> None:
    """Reference: the same stream in one block."""
    tokenizer = kinds.byte_level()
    pieces = first(stream_pieces(make_draw(1, 0), distance=2, every=1, digits=5), 40)
    (whole, answers), *rest = stream_blocks(encode_pieces(tokenizer, pieces), 10**9)
    assert not rest
    for size in (1, 37, 500):
        place, joined = 0, []
        for ids, found in stream_blocks(encode_pieces(tokenizer, pieces), size):
            assert all(place <= answer.begin < answer.end <= place + len(ids) for answer in found)
            assert ids == whole[place : place + len(ids)]
            place += len(ids)
            joined += found
        assert (place, joined) == (len(whole), answers)


def test_memory_does_not_grow_with_the_stream() -> None:
    """Reference: the peak of 1,000 lines, and of 20,000."""
    peaks = []
    for lines in (1_000, 20_000):
        pieces = stream_pieces(make_draw(0, 0), distance=20, every=10, digits=5)
        encoded = (([7] * len(piece.text), piece) for piece in itertools.islice(pieces, 3 * lines))
        tracemalloc.start()
        assert sum(len(found) for _, found in stream_blocks(encoded, 2000)) == pytest.approx(lines / 11, rel=0.05)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


# ---- the measurement


@pytest.fixture(scope="module")
def recipe() -> Any:
    """The script of the recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes")
        return importlib.import_module("streameval")


def make_toy(layers: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A random model that answers 0 or 1 to everything, depending on what it sees; a token a digit and a phrase."""
    phrases = [registers.PREFACE, registers.LINE, registers.ASK, registers.OPEN, registers.CLOSE]
    names = [*"0123456789", *phrases, "<unk>"]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("|".join((*map(re.escape, phrases), r"\d"))), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        row = model.lm_head.weight[0].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[0] = row
        model.lm_head.weight[1] = -row
    return model, tokenizer


@pytest.fixture(scope="module")
def toy() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """See ``make_toy``."""
    return make_toy(layers=2)


def make_desk(toy: tuple[Any, Any], out: Path) -> Desk:
    return Desk(*toy, (), out, "streameval", {}, Screen(quiet=True), Signals())


def two_bits(draw: random.Random, digits: int) -> str:
    """Contents that the toy has a chance with."""
    return "".join(draw.choice("01") for _ in range(digits))


def decode(model: Any, cache: Any, ids: list[int], answers: list[Answer]) -> list[list[int]]:
    """What greedy decoding writes in the place of each answer; the stream is read token by token."""
    places = {answer.begin: answer.end - answer.begin for answer in answers}
    written = []
    with torch.no_grad():
        for place, token in enumerate(ids, start=1):
            before = copy.deepcopy(cache) if place in places else None
            model(input_ids=torch.tensor([[token]]), past_key_values=cache)
            new = token
            for step in range(places.get(place, 0)):
                if step == 0:
                    written.append([])
                new = int(model(input_ids=torch.tensor([[new]]), past_key_values=before).logits[0, -1].argmax())
                written[-1].append(new)
    return written


@pytest.mark.parametrize("method", ["streaming", "window", "recompute-block", "dense"])
def test_an_answer_is_right_if_greedy_decoding_would_have_written_it(
    toy: tuple[Any, Any], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: a copy of the cache at each query, from which the model writes its own answer, token by token."""
    monkeypatch.setattr(registers, "draw_content", two_bits)
    monkeypatch.setattr(streameval, "BLOCK_TOKENS", 150)
    model, tokenizer = toy
    evaluation = StreamEval((3,), every=1, samples=2, queries=20, digits=2, methods=(method,), window=40, block=8)
    figures = evaluation.run(make_desk(toy, tmp_path))
    found = figures["methods"][method]["3"]
    hits, counts, places = [0] * 10, [0] * 10, [0] * 10
    for sample in range(2):
        pieces = first(stream_pieces(make_draw(0, sample), distance=3, every=1, digits=2), 20)
        ((ids, answers),) = stream_blocks(encode_pieces(tokenizer, pieces), 10**9)
        limit = 4 * 128 if method == "dense" else len(ids)
        written = decode(model, cache_maker(method, model, 4, 40, 8)(), ids, answers)
        for number, (answer, wrote) in enumerate(zip(answers, written, strict=True)):
            if answer.end <= limit:
                hits[number // 2] += wrote == ids[answer.begin : answer.end]
                counts[number // 2] += 1
                places[number // 2] += answer.begin
    assert 0 < sum(hits) < sum(counts)
    assert (found["hits"], found["counts"], found["places"]) == (hits, counts, places)
    assert found["accuracy"][0] == sum(hits) / sum(counts)


def test_what_is_said_to_be_in_the_cache_is_what_the_model_can_see(tmp_path: Path) -> None:
    """Reference: a model of one layer reads the stream once more with the line changed: its losses change, or not."""
    model, tokenizer = make_toy(layers=1)
    sizes: dict[str, Any] = {"window": 52, "block": 8}
    distances = (1, 2, 3, 4, 5, 6, 9)
    evaluation = StreamEval(distances, every=1, samples=1, queries=30, methods=("streaming", "window"), **sizes)
    figures = evaluation.run(make_desk((model, tokenizer), tmp_path))
    for method, distance in itertools.product(("streaming", "window"), distances):
        held = figures["methods"][method][str(distance)]["held"]
        pieces = first(stream_pieces(make_draw(0, 0), distance=distance, every=1, digits=5), 30)
        ((ids, answers),) = stream_blocks(encode_pieces(tokenizer, pieces), 10**9)
        read = functools.partial(losses, model, cache_maker(method, model, 4, 52, 8))
        before = read(ids)
        for answer in answers[1::9]:
            places = {"yes": [answer.line], "no": range(answer.content_begin, answer.content_end)}.get(held, [])
            for place in places:
                after = read([*ids[:place], ids[place] ^ 1, *ids[place + 1 :]])
                changed = (after != before)[answer.begin - 1 : answer.end - 1]
                assert changed.all() if held == "yes" else not changed.any()
    said = [each["held"] for each in figures["methods"]["streaming"].values()]
    assert said == sorted(said, key=["yes", "partly", "no"].index)
    assert set(said) == {"yes", "partly", "no"}


def losses(model: Any, make_cache: Any, ids: list[int]) -> torch.Tensor:
    return torch.cat([scores.losses[0] for scores in score_stream(model, torch.tensor([ids]), make_cache())])


def test_dense_attention_stops_at_its_limit(toy: tuple[Any, Any], tmp_path: Path) -> None:
    """Reference: the places of the answers; what lies beyond is not asked, and a distance may not be reached at all."""
    flags: dict[str, Any] = {"every": 1, "samples": 1, "queries": 20, "methods": ("dense",), "window": 40, "block": 8}
    figures = StreamEval((2, 30), dense_limit=200, **flags).run(make_desk(toy, tmp_path))
    pieces = first(stream_pieces(make_draw(0, 0), distance=2, every=1, digits=5), 20)
    ((_, answers),) = stream_blocks(encode_pieces(toy[1], pieces), 10**9)
    reached = sum(answer.end <= 200 for answer in answers)
    assert 0 < sum(figures["methods"]["dense"]["2"]["counts"]) == reached < 20
    assert figures["methods"]["dense"]["30"]["accuracy"] is None
    rows = StreamEval.rows(figures)
    assert [row[5] for row in rows[2:]] == ["not reached"]
    assert len(StreamEval.draw(figures).axes) == 2


def test_a_number_among_the_sinks_is_not_asked(toy: tuple[Any, Any], tmp_path: Path) -> None:
    """Reference: the first line's number begins at token 4 of this stream, behind the preface and its own words."""
    for sinks, asked in ((4, 10), (5, 9)):
        evaluation = StreamEval((2,), every=1, samples=1, queries=10, methods=("streaming",), sinks=sinks, window=40)
        figures = evaluation.run(make_desk(toy, tmp_path / str(sinks)))
        assert sum(figures["methods"]["streaming"]["2"]["counts"]) == asked


def test_what_was_measured_before_is_not_measured_again(toy: tuple[Any, Any], tmp_path: Path) -> None:
    """Reference: the evaluation in one go; a signal comes while the third stream is read."""
    evaluation = StreamEval((2, 6), every=1, samples=2, queries=10, methods=("streaming",), window=40, block=8)
    whole = evaluation.run(make_desk(toy, tmp_path / "whole"))
    desk = make_desk(toy, tmp_path / "parts")
    counted: list[int] = []

    def interrupt(done: int, words: str) -> None:
        if words.startswith("streaming, 6 lines, 1"):
            desk.signals.received = signal.SIGINT

    desk._report = interrupt
    with pytest.raises(Interrupted):
        run_with(desk, evaluation)
    again = make_desk(toy, tmp_path / "parts")
    again._report = lambda done, words: counted.append(done)
    assert run_with(again, evaluation) == whole
    assert counted[:2] == [10, 20]
    assert counted[-1] == 40


def run_with(desk: Desk, evaluation: StreamEval) -> dict[str, Any]:
    """The figures, with the desk's own report instead of a bar."""
    desk.work = lambda total: contextlib.nullcontext()  # type: ignore[method-assign]
    return evaluation.run(desk)


# ---- what is said


def summary(right: int, asked: int, reach: int) -> dict[str, Any]:
    tally = Tally()
    for number in range(asked):
        tally.add(number / asked, Answer(1000 + number, 1005 + number, 1004 + number - reach, 0, 1), number < right)
    found = summarise([tally.to_dict()], 100, 150)
    assert found["accuracy"][0] == right / asked
    return {**found, "held": "yes" if reach <= 100 else "no"}


def figures_of(**methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "cache": {"sinks": 4, "window": 100, "block": 8, "capacity": 111},
        "trained_length": 256,
        "chance": 1e-5,
        "methods": methods,
    }


def test_the_verdict_says_what_the_model_can_do() -> None:
    """Reference: by hand, for counts that are made up."""
    near, far = summary(97, 100, 60), summary(0, 100, 300)

    def say(**methods: Any) -> str:
        return StreamEval.verdict(figures_of(**methods))

    said = say(streaming={"5": near, "20": far})
    assert said.startswith("With streaming, the model answers 97.0% (91.5-99.0) of the queries about lines inside the ")
    assert "and 0.0% (0.0-3.7) of those about lines beyond the cache (chance is 0.001%)" in said
    assert said.endswith("what has left the cache is forgotten.")
    assert say(streaming={"5": near, "20": summary(9, 99, 300)}).endswith("which is more than chance.")
    assert "window of 100 tokens (90% to 97% by distance), and" in say(
        streaming={"5": near, "9": summary(90, 100, 80), "20": far}
    )
    few = say(streaming={"5": near, "20": summary(0, 9, 300)})
    assert few.endswith("too few queries to tell whether it is forgotten.")
    assert say(streaming={"5": summary(2, 2, 60), "20": far}).startswith("This model does not surely do the task: ")
    assert say(streaming={"5": summary(0, 99, 60), "20": far}).startswith("This model cannot do the task: ")
    assert say(streaming={"5": summary(20, 99, 60), "20": far}).startswith("This model does not surely do the task: ")
    assert say(window={"5": near}).endswith("no line that was asked for lies beyond the cache.")
    assert say(streaming={"20": far}).startswith("No line that was asked for lies inside the window of 100 tokens")


def test_rows_hold_the_first_and_the_last_tenth() -> None:
    """Reference: by hand; the first 95 of 100 are right."""
    (row,) = StreamEval.rows(figures_of(streaming={"5": summary(95, 100, 60)}))[1:]
    assert row == ("streaming", "5", "60", "yes", "100", "95.0% (88.8-97.8)", "100%", "50%")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"distances": ()}, "Give rising distances of at least one line, you gave []."),
        ({"distances": (20, 20)}, "Give rising distances of at least one line, you gave [20, 20]."),
        ({"distances": (0,)}, "you gave [0]."),
        ({"every": 0}, "every must be a whole number of at least 1, you gave 0."),
        ({"queries": 0}, "queries must be"),
        ({"samples": 0}, "samples must be"),
        ({"digits": 0}, "digits must be"),
        ({"seed": -1}, "seed must be"),
        ({"dense_limit": 1}, "dense_limit must be"),
        ({"block": 0}, "block must be"),
        ({"methods": ("recompute",)}, "There is no method 'recompute': did you mean recompute-block?"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], sentence: str) -> None:
    """Reference: by hand."""
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        StreamEval(**options)


def test_files_are_refused() -> None:
    """Reference: by hand."""
    with pytest.raises(ConfigError, match="StreamEval makes its own text and does not read books"):
        StreamEval().check_files(["books.txt"])


# ---- the recipe


def test_the_recipes_documents_ask_for_lines_that_are_there(recipe: Any) -> None:
    """Reference: every answer, looked up in the lines before it; none too far back."""
    tokenizer = recipe.make_tokenizer()
    reaches = []
    for seed in range(40):
        text = "".join(recipe.document(random.Random(seed)))
        assert text.startswith("Below is a record")
        lines: dict[str, tuple[str, int]] = {}
        for match in ANY_LINE.finditer(text):
            if match[1]:
                content, begin = lines[match[2]]
                assert content == match[3]
                reaches.append(len(tokenizer.encode(text[begin : match.end()]).ids))
            else:
                lines[match[2]] = (match[3], match.start())
    assert max(reaches) <= 256
    assert sum(reach > 100 for reach in reaches) > 10
    assert sum(reach < 40 for reach in reaches) > 200


def test_one_token_names_a_line(recipe: Any) -> None:
    """Reference: by hand, for line numbers of every length; any other text comes back from its ids, too."""
    tokenizer = recipe.make_tokenizer()
    for number, want in (("7", ["7"]), ("37", ["37"]), ("837", ["8", "37"]), ("1837", ["18", "37"])):
        found = [tokenizer.decode([token]) for token in tokenizer.encode(make_line(int(number), "0421")[0].text).ids]
        assert found == ["The REGISTER_CONTENT in line ", *want[:-1], f"{want[-1]} is <"]
    pieces = [Piece(registers.PREFACE), *make_line(837, "0421"), *make_query(837, "0421")]
    text = "".join(piece.text for piece in pieces)
    found = tokenizer.encode(text).ids
    assert len(found) == 1 + recipe.LINE_TOKENS + recipe.LINE_TOKENS + 1
    encoded = encode_pieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer), pieces)
    assert [token for ids, _ in encoded for token in ids] == found  # as in training
    for any_text in (text, "Größe 1,234 is <5\n>x"):
        assert tokenizer.decode(tokenizer.encode(any_text).ids) == any_text


@pytest.mark.usefixtures("no_settings")
def test_the_recipe_trains_a_model_that_the_evaluation_reads(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the model's folder is loaded, and the evaluation says that a toy cannot do the task."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    flags = "--size toy --context 64 --batch-tokens 256 --train-dtype float32 --no-compile --measures 2 --quiet"
    arguments = ["--work", str(tmp_path), "--documents", "20", "--tokens", "2000", "--flags", flags]
    recipe.main(arguments)
    assert (tmp_path / "lines.txt").read_text().count(END_OF_TEXT) == 20
    model, tokenizer = streamllm.load(tmp_path / "copier")
    assert model.config.vocab_size == 472
    evaluation = StreamEval((1, 9), every=1, samples=1, queries=10, window=40, block=8)
    figures = evaluation.run(make_desk((model, tokenizer), tmp_path))
    assert StreamEval.verdict(figures).startswith("This model cannot do the task")
    called: list[list[str]] = []
    monkeypatch.setattr(recipe.subprocess, "run", lambda command, check: called.append(command))
    recipe.main(arguments)  # goes on with what is there
    assert "--resume" in called[0]
    assert "--tokenizer" not in called[0]
