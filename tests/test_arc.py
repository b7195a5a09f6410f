"""Questions: how they are read, put to a model and scored, and what the evaluation says about them."""

from __future__ import annotations

import json
import lzma
import math
import signal
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import PreTrainedTokenizerBase

import streamllm
import tokenizers_for_tests as toy
from stories import STORIES
from streamllm.config import PREFILL_CHUNK
from streamllm.console import Screen, Signals
from streamllm.errors import ConfigError, InputError, UnsupportedModelError
from streamllm.evaluate.arc import Arc
from streamllm.evaluate.desk import Desk, Interrupted
from streamllm.evaluate.methods import cache_maker
from streamllm.evaluate.questions import Question, check_sources, read_questions
from streamllm.evaluate.quiz import INSTRUCTION, Quiz, compare

RAW = [
    {
        "question": "What is wet?",
        "choices": {"text": ["water", "sand", "air"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    {"question": "What is 你?", "choices": {"text": ["x\u2028y", "z"], "label": ["1", "2"]}, "answerKey": "2"},
]
WANT = [
    Question("What is wet?", (("A", "water"), ("B", "sand"), ("C", "air")), "A"),
    Question("What is 你?", (("1", "x\u2028y"), ("2", "z")), "2"),
]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return streamllm.load(STORIES)


@pytest.fixture(scope="module")
def packaged() -> list[Question]:
    return read_questions([])


def make_desk(loaded: tuple[Any, Any], out: Path, *files: str) -> Desk:
    return Desk(*loaded, files, out, "arc", {}, Screen(quiet=True), Signals())


# ---- reading


def test_a_file_is_a_list_or_lines_and_may_be_compressed(tmp_path: Path) -> None:
    """Reference: the questions written out; a line separator inside a text is no line end."""
    (tmp_path / "a.json").write_text(json.dumps(RAW, ensure_ascii=False), encoding="utf-8")
    lines = "\n\n".join(json.dumps(each, ensure_ascii=False) for each in RAW)
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "c.json.xz").write_bytes(lzma.compress(json.dumps(RAW, indent=1).encode()))
    for name in ("a.json", "b.jsonl", "c.json.xz"):
        check_sources([str(tmp_path / name)])
        assert read_questions([str(tmp_path / name)]) == WANT
    assert read_questions([str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")]) == WANT * 2
    check_sources(["-"])
    assert read_questions(["-"], iter([lines[:50], lines[50:]])) == WANT


def _broken(**changes: Any) -> bytes:
    return json.dumps([RAW[1], {**RAW[0], **changes}]).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"no question in bad\.json"),
        (b"[]", r"no question in bad\.json"),
        (b"\x89PNG\r\n\x1a\n\x00\xff", "not UTF-8"),
        (b"Once upon a time", r"Line 1 of bad\.json is not JSON .* in the format of ARC"),
        (b'[{"question": ', r"bad\.json is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'"text"', r"Question 1 of bad\.json is not in the format of ARC"),
        (_broken(question=None), r"Question 2 of bad\.json is not in the format of ARC"),
        (_broken(choices={"text": ["x"], "label": ["A", "B"]}), "as many of"),
        (_broken(answerKey="D"), r"cannot be answered: its choices are \['A', 'B', 'C'\], its answer is 'D'"),
        (_broken(choices={"text": ["x"], "label": ["A"]}), "two or more"),
        (_broken(question="\ud800"), "half a character"),
    ],
)
def test_what_holds_no_questions_is_refused_in_one_sentence(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "bad.json").write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_questions([str(tmp_path / "bad.json")])


def test_a_file_that_is_too_long_or_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no file nowhere\.json"):
        Arc().check_files(["nowhere.json"])
    with pytest.raises(InputError, match="no file"):
        Arc().check_files([str(tmp_path)])
    (tmp_path / "long.json").write_text(json.dumps(RAW * 9))
    monkeypatch.setattr("streamllm.evaluate.questions.MOST_CHARS", 500)
    with pytest.raises(InputError, match="longer than 500 characters"):
        read_questions([str(tmp_path / "long.json")])


# ---- the Hub


def test_the_tests_of_arc_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the repository's file; a reader of JSON stands in for the one of parquet."""
    (tmp_path / "test.parquet").write_text(json.dumps(RAW))
    asked = []

    def download(repository: str, file: str, *, repo_type: str) -> str:
        asked.append((repository, file, repo_type))
        return str(tmp_path / "test.parquet")

    parquet = ModuleType("pyarrow.parquet")
    parquet.read_table = lambda file: SimpleNamespace(to_pylist=lambda: json.loads(Path(file).read_text()))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    check_sources(["hub:ARC-Challenge"])
    assert read_questions(["hub:ARC-Challenge"]) == WANT
    assert asked == [("allenai/ai2_arc", "ARC-Challenge/test-00000-of-00001.parquet", "dataset")]
    (tmp_path / "test.parquet").write_text("no table")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        read_questions(["hub:ARC-Easy"])


def test_without_a_network_a_test_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: what huggingface_hub does offline, with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("streamllm.evaluate.questions._parquet", lambda _: None)
    with pytest.raises(InputError, match=r"^hub:ARC-Easy cannot be fetched, .* give it with --data\.$"):
        read_questions(["hub:ARC-Easy"])


def test_a_test_needs_a_name_and_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="called hub:ARC: give hub:ARC-Easy or hub:ARC-Challenge"):
        check_sources(["hub:ARC"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match="hub:ARC-Easy needs the package pyarrow: pip install pyarrow"):
        check_sources(["hub:ARC-Easy"])


def test_the_packaged_questions_are_sound(packaged: list[Question]) -> None:
    """Reference: no question twice, no label preferred."""
    assert len({question.text for question in packaged}) == 40
    assert all([label for label, _ in question.choices] == list("ABCD") for question in packaged)
    assert all(len({text for _, text in question.choices}) == 4 for question in packaged)
    assert Counter(question.answer for question in packaged) == dict.fromkeys("ABCD", 10)


# ---- as ids


@pytest.mark.parametrize(
    "tokenizer",
    [toy.byte_level(), toy.byte_level("llama3"), toy.metaspace(), toy.metaspace("legacy"), toy.stories(), toy.slow()],
    ids=["gpt2", "llama3", "metaspace", "legacy", "stories", "slow"],
)
def test_an_answer_owns_its_tokens_and_no_others(tokenizer: PreTrainedTokenizerBase, packaged: list[Question]) -> None:
    """Reference: the text of the answers' tokens, and of the whole stream; the ids of a question by itself."""
    quiz = Quiz(tokenizer, packaged[:6])
    ids = quiz.ids[0]
    for number, question in enumerate(packaged[:6]):
        own = np.flatnonzero(quiz.owner == number)
        assert tokenizer.decode(ids[own]).strip() == question.answer
        assert quiz.ends[number] == own[-1] + 1
        alone = tokenizer(f"{question.prompt} {question.answer}")["input_ids"]
        end = [tokenizer.eos_token_id] if alone[-1] == tokenizer.eos_token_id else []
        assert [*quiz.alone[number][0], *end] == alone
    text = "".join(f"{question.prompt} {question.answer}\n\n" for question in packaged[:6])
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(decoded.split()) == "".join(text.split())
    assert (quiz.owner >= 0).sum() == sum(len(a[0]) for a in quiz.alone) - sum(
        len(tokenizer(q.prompt)["input_ids"]) - bool(tokenizer(q.prompt)["input_ids"][-1] == tokenizer.eos_token_id)
        for q in packaged[:6]
    )


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
SCRATCH = (
    "{% for m in messages %}({{ m.role }}) {% if m.role == 'assistant' %}[plan] {% endif %}{{ m.content }}.\n"
    "{% endfor %}{% if add_generation_prompt %}(assistant) {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "before", "answer", "rest"),
    [
        (LLAMA2, "<s>[INST] {} [/INST]", " A", " </s>"),
        (SCRATCH, "(user) {}.\n(assistant) [plan] ", "A", ".\n"),
        # The rendered turn of a model that thinks does not begin as its generation prompt does.
        (
            CHATML,
            "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "A",
            "<|endoftext|>",
        ),
    ],
    ids=["llama2", "scratch", "chatml"],
)
def test_a_chat_model_gets_each_question_as_a_turn(template: str, before: str, answer: str, rest: str) -> None:
    """Reference: the turns written out."""
    tokenizer = toy.byte_level()
    tokenizer.chat_template = template
    try:
        quiz = Quiz(tokenizer, WANT[:1] * 2)
    finally:
        tokenizer.chat_template = None
    prompt = before.format(WANT[0].prompt + INSTRUCTION)
    assert tokenizer.decode(quiz.ids[0]) == (prompt + answer + rest) * 2
    assert tokenizer.decode(quiz.ids[0][quiz.owner == 1]) == answer
    assert tokenizer.decode(quiz.alone[1][0]) == prompt + answer


def test_a_template_that_refuses_a_question_is_an_error_in_one_sentence() -> None:
    tokenizer = toy.byte_level()
    tokenizer.chat_template = "{{ raise_exception('only tools may speak') }}"
    try:
        with pytest.raises(UnsupportedModelError, match="only tools may speak; take another model"):
            Quiz(tokenizer, WANT)
    finally:
        tokenizer.chat_template = None


# ---- scores


def test_a_right_answer_is_what_greedy_decoding_would_write(
    loaded: tuple[Any, Any], packaged: list[Question], tmp_path: Path
) -> None:
    """Reference: ``generate()`` of transformers after each question alone; for one half its words are the answers."""
    model, tokenizer = loaded

    def write(ids: np.ndarray, count: int) -> list[int]:
        prompt = torch.from_numpy(ids[:, :-count])
        found: list[int] = model.generate(prompt, max_new_tokens=count, do_sample=False)[0, -count:].tolist()
        return found

    questions = packaged[:12]
    for number, ids in enumerate(Quiz(tokenizer, questions[:6]).alone):
        words = tokenizer.decode(write(ids, 1))
        questions[number] = Question(questions[number].text, questions[number].choices, words.strip())
    quiz = Quiz(tokenizer, questions)
    make = cache_maker("dense", model, 4, 60, 16)
    found = quiz.ask_alone(make_desk(loaded, tmp_path), "one-shot", make, 512)
    for number, ids in enumerate(quiz.alone):
        count = int((quiz.owner == number).sum())
        assert found["hits"][number] == (write(ids, count) == ids[0, -count:].tolist())
    assert set(found["hits"]) == {0, 1}


@pytest.mark.parametrize("method", ["dense", "streaming"])
def test_losses_and_hits_are_those_of_reading_token_by_token(
    loaded: tuple[Any, Any], tmp_path: Path, method: str
) -> None:
    """Reference: a loop over single tokens; answers of several tokens, so that some lie across the steps."""
    model, tokenizer = loaded
    answers = ["A zebra", "the red ball", "Lily and Tom", "one day there was a cat", "no"] * 2
    questions = [Question("Who?", ((answer, "x"), ("B", "y")), answer) for answer in answers]
    quiz, make = Quiz(tokenizer, questions), cache_maker(method, model, 4, 60, 16)
    total = quiz.ids.shape[1]
    assert total > PREFILL_CHUNK  # longer than a step, and than the cache
    found = quiz.ask(make_desk(loaded, tmp_path), method, make, total)
    losses, hits, cache = np.zeros(10), np.ones(10, bool), make()
    with torch.no_grad():
        for at in range(total - 1):
            logits = model(torch.tensor(quiz.ids[:, at : at + 1]), past_key_values=cache).logits[0, 0].float()
            owner, token = quiz.owner[at + 1], int(quiz.ids[0, at + 1])
            if owner >= 0:
                losses[owner] -= float(log_softmax(logits, -1)[token])
                hits[owner] &= bool(logits.argmax() == token)
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-3, atol=1e-3)
    assert found["hits"] == hits.astype(int).tolist()


def test_what_was_not_read_wholly_has_no_score(
    loaded: tuple[Any, Any], packaged: list[Question], tmp_path: Path
) -> None:
    """Reference: where the answers end."""
    quiz, desk = Quiz(loaded[1], packaged), make_desk(loaded, tmp_path)
    make = cache_maker("dense", loaded[0], 4, 60, 16)
    for tokens in (quiz.ends[2] - 1, quiz.ends[2]):
        found = quiz.ask(desk, "dense", make, int(tokens))
        read = [end <= tokens for end in quiz.ends]
        assert [hit is not None for hit in found["hits"]] == read == [loss is not None for loss in found["losses"]]
    longest = sorted(ids.shape[1] for ids in quiz.alone)[20]
    alone = quiz.ask_alone(desk, "one-shot", make, longest)
    assert [hit is not None for hit in alone["hits"]] == [ids.shape[1] <= longest for ids in quiz.alone]


def test_methods_are_compared_on_what_all_have_read() -> None:
    """Reference: shares and means taken by hand."""
    found = compare(
        {
            "streaming": {"hits": [1, 0, 1, 1], "losses": [1.0, 2.0, 3.0, 6.0]},
            "dense": {"hits": [0, 0, None, None], "losses": [2.0, 4.0, None, None]},
        }
    )
    assert found["common"] == 2
    stream, dense = found["methods"]["streaming"], found["methods"]["dense"]
    assert [part["questions"] for part in (stream["all"], stream["common"], dense["all"])] == [4, 2, 2]
    assert [part["accuracy"][0] for part in (stream["all"], stream["common"], dense["common"])] == [0.75, 0.5, 0]
    assert [part["loss"][0] for part in (stream["all"], stream["common"], dense["all"])] == [3, 1.5, 3]
    half = 1.96 * math.sqrt((4 + 1 + 0 + 9) / 3 / 4)
    assert stream["all"]["loss"][1:] == pytest.approx([3 - half, 3 + half])
    none = compare({"dense": {"hits": [None], "losses": [None]}})["methods"]["dense"]["all"]
    assert none == {"questions": 0, "accuracy": None, "loss": None}


# ---- the evaluation


def test_a_run_measures_every_method_and_can_be_gone_on_with(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Reference: the run in one go; a method that was finished is not asked again."""
    arc = Arc(questions=12, window=60, block=16, dense_limit=300)
    whole = json.loads(json.dumps(arc.run(make_desk(loaded, tmp_path / "whole"))))
    assert {name: found["all"]["questions"] for name, found in whole["methods"].items()} == {
        "one-shot": 12,
        "streaming": 12,
        "window": 12,
        "dense": sum(end <= 300 for end in whole["ends"]),
    }
    assert whole["chance"] == pytest.approx({"accuracy": 0.25, "loss": math.log(4)})
    assert (whole["files"], whole["chat"], whole["trained_length"]) == (["packaged"], False, 512)
    first = make_desk(loaded, tmp_path / "parts")
    said: list[str] = []

    def interrupt(count: int, words: str) -> None:
        said.append(words)
        if words.startswith("window"):
            first.signals.received = signal.SIGINT
        Desk.advance(first, count, words)

    first.advance = interrupt  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        arc.run(first)
    second = make_desk(loaded, tmp_path / "parts")
    more: list[str] = []
    second.advance = lambda count, words: more.append(words)  # type: ignore[method-assign]
    assert json.loads(json.dumps(arc.run(second))) == whole
    assert more[:2] == ["one-shot", "streaming"]
    assert more[2].startswith("window · ")
    assert said[-1].startswith("window · ")


def test_an_order_is_drawn_with_a_seed(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Reference: the losses of the same questions asked alone, which do not depend on the order."""
    losses = {}
    for name, options in {
        "file": {},
        "0": {"shuffle": True},
        "again": {"shuffle": True},
        "1": {"shuffle": True, "seed": 1},
    }.items():
        figures = Arc(methods=("one-shot",), **options).run(make_desk(loaded, tmp_path / name))
        losses[name] = figures["methods"]["one-shot"]["losses"]
    assert losses["0"] == losses["again"]
    assert len({tuple(each) for each in losses.values()}) == 3
    assert len({tuple(sorted(each)) for each in losses.values()}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("recompute",)}, "no method 'recompute': choose from one-shot, streaming, window, dense"),
        ({"methods": ()}, "at least one method"),
        ({"questions": 0}, "questions must be"),
        ({"dense_limit": 1}, "dense_limit must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Arc(**options)


def made_figures(**hits: list[int | None]) -> dict[str, Any]:
    marks = {
        name: {"hits": found, "losses": [None if hit is None else 2.0 - hit for hit in found]}
        for name, found in hits.items()
    }
    count = len(next(iter(hits.values())))
    return json.loads(  # type: ignore[no-any-return]
        json.dumps(
            {
                "questions": count,
                "tokens": 50 * count,
                "cache": {"sinks": 4, "window": 96, "block": 16},
                "trained_length": 256,
                "chance": {"accuracy": 0.25, "loss": 1.386},
                "ends": [50 * number for number in range(1, count + 1)],
                **compare(marks),
            }
        )
    )


def test_table_and_verdict_say_what_was_found() -> None:
    """Reference: shares by hand; Wilson's interval of 80 in 100 is 71.1 to 86.7."""
    good, bad, few = [1, 1, 1, 1, 0] * 20, [0, 0, 0, 1, 0] * 20, [1] * 5 + [None] * 95
    figures = made_figures(**{"one-shot": good, "streaming": good, "window": bad, "dense": few})
    rows = Arc.rows(figures)
    assert rows[0][-2:] == ("right, the 5 that all read", "loss, likewise")
    assert rows[2][:3] == ("streaming", "100", "80.0 % (71.1-86.7)")
    assert rows[4][1] == "5"
    verdict = Arc.verdict(figures)
    assert "streaming 80.0 % (71.1-86.7), window 20.0 % (13.3-28.9)" in verdict
    assert "a guess among the labels is right in 25.0 %" in verdict
    assert "Streaming cannot be told from one-shot: streaming alone is right on 0 and one-shot alone on 0 of" in verdict
    assert "Streaming does better than window: streaming alone is right on 60 and window alone on 0 of 100." in verdict
    assert "Streaming cannot be told from dense: streaming alone is right on 0 and dense alone on 1 of 5." in verdict
    assert "No method" not in verdict
    worse = Arc.verdict(made_figures(**{"one-shot": good, "streaming": bad}))
    assert "Streaming does worse than one-shot: streaming alone is right on 0 and one-shot alone on 60 of 100." in worse
    near = Arc.verdict(made_figures(streaming=[1, 0, 1, 0, 1, 0], window=[0, 1, 0, 1, 1, None]))
    assert "Streaming cannot be told from window: streaming alone is right on 2 and window alone on 2 of 5." in near
    guesses = made_figures(streaming=[1, 0, 0, 0, 0] * 20, window=[0] * 100)
    assert "Streaming differs from window, but neither knows the answers: streaming alone" in Arc.verdict(guesses)
    lost = Arc.verdict(made_figures(streaming=bad, window=bad))
    assert "No method is surely better than a guess" in lost
    assert "streaming 1.80, window 1.80 nats, a guess 1.39" in lost
    assert [len(row) for row in Arc.rows(made_figures(streaming=bad))] == [4, 4]


def test_the_figure_follows_each_method_as_far_as_it_read() -> None:
    """Reference: means over stretches of 20 questions; the questions at which the cache and the training end."""
    hits = [1] * 40 + [0] * 40
    figures = made_figures(streaming=hits, dense=[1, 0] * 12 + [None] * 56)
    _, rights, losses = Arc.draw(figures).get_axes()
    lines = {line.get_label(): line for line in rights.get_lines()}
    assert lines["streaming"].get_ydata().tolist() == [100, 100, 0, 0]
    assert lines["streaming"].get_xdata().tolist() == [10.5, 30.5, 50.5, 70.5]
    assert lines["dense"].get_ydata().tolist() == [50]
    assert {text.get_text().strip() for text in losses.texts} == {"a guess", "cache full", "trained length"}
    assert [line.get_xdata()[0] for line in rights.get_lines()[-2:]] == [3, 6]  # 116 and 256 tokens, 50 a question


def test_a_method_that_read_nothing_is_no_reason_to_fail() -> None:
    figures = made_figures(streaming=[1, 0], dense=[None, None])
    assert Arc.rows(figures)[2][:4] == ("dense", "0", "", "")
    assert "dense none read" in Arc.verdict(figures)
    assert len(Arc.draw(figures).get_axes()) == 3
