"""``streamllm eval``: what it measures, against plain loops; what it keeps when it is broken off; what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import streamllm
from families import FAMILIES
from stories import STORIES
from streamllm.console import Screen, Signals
from streamllm.errors import ConfigError
from streamllm.evaluate import desk as desk_module
from streamllm.evaluate.catalogue import EVALUATIONS
from streamllm.evaluate.curve import Curve
from streamllm.evaluate.desk import Desk, Interrupted
from streamllm.evaluate.evaluation import Evaluation
from streamllm.evaluate.methods import METHODS, cache_maker
from streamllm.evaluate.perplexity import Perplexity, _fresh_parts
from streamllm.evaluate.record import load_record
from streamllm.evaluate.text import Text, packaged_text
from test_command import finish, run, spawn

pytestmark = pytest.mark.usefixtures("no_settings")

SMALL = ("--tokens", "900", "--window", "60", "--block", "16")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return streamllm.load(STORIES)


@pytest.fixture(scope="module")
def ids(loaded: tuple[Any, Any]) -> torch.Tensor:
    """The first ids of the packaged text, by the tokenizer alone."""
    _, tokenizer = loaded
    text = packaged_text().read_text(encoding="utf-8").replace("\n<|endoftext|>\n", tokenizer.eos_token)
    return torch.tensor([tokenizer(text)["input_ids"][:3000]])


def evaluate(name: str, out: Path, *flags: str) -> dict[str, Any]:
    """Run an evaluation; the figures of its record."""
    code, shown, err = run("eval", name, "--quiet", "--out", str(out), *flags)
    assert (code, err) == (0, "")
    assert shown
    trial = "-quick" if "--quick" in flags else ""
    record = load_record(out / f"{name}-stories260K{trial}.json")
    assert record.figures["options"].keys() == EVALUATIONS[name]().options().keys()
    return record.figures


def losses_of(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Losses of a plain loop over single tokens."""
    with torch.no_grad():
        logits = [model(token[None, None], past_key_values=cache).logits[0, 0] for token in ids[0, :-1]]
    return cross_entropy(torch.stack(logits), ids[0, 1:], reduction="none")


# ---- what is measured


def test_perplexity_of_every_method_is_that_of_a_plain_loop(
    tmp_path: Path, loaded: tuple[Any, Any], ids: torch.Tensor
) -> None:
    """Reference: single tokens through the cache of each method; re-computation by reading windows from scratch."""
    model, _ = loaded
    figures = evaluate("perplexity", tmp_path, *SMALL, "--dense-limit", "700", "--recompute-limit", "150")
    head, stream = figures["head"], figures["stream"]
    assert (figures["tokens"], head["tokens"], stream["tokens"]) == (900, 700, 900)
    assert list(head["methods"]) == list(METHODS)
    assert list(stream["methods"]) == ["window", "recompute-block", "streaming"]
    for name in ("dense", "window", "streaming"):
        want = losses_of(model, ids[:, :700], cache_maker(name, model, 4, 60, 16)())
        assert head["methods"][name]["perplexity"][0] == pytest.approx(math.exp(want.mean()), rel=1e-4)
    with torch.no_grad():
        windows = [ids[:, max(0, end - 64) : end] for end in range(1, 150)]
        want = torch.stack([cross_entropy(model(w).logits[0, -1], ids[0, i]) for i, w in enumerate(windows, start=1)])
    assert head["methods"]["recompute"]["perplexity"][0] == pytest.approx(math.exp(want.mean()), rel=1e-4)
    want = losses_of(model, ids[:, :900], cache_maker("streaming", model, 4, 60, 16)())
    curve = Curve.from_dict(stream["methods"]["streaming"]["curve"])
    np.testing.assert_allclose(curve.means, [part.mean() for part in want.split(100)], rtol=1e-4)
    assert len(set(curve.cache_bytes)) == 1


def test_fresh_streams_are_in_the_phase_of_the_long_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the long stream itself: with one layer, keys and values tell nothing of what stood before a token.

    So what is foreseen depends on which tokens are in the cache and where, and in the same phase that is the same.
    """
    model = FAMILIES["llama"].make(dtype=torch.float32, layers=1, trained=512)
    ids = np.random.default_rng(1).integers(0, 97, (1, 5001))
    desk = make_desk((model, None), tmp_path)
    monkeypatch.setattr(desk, "text", lambda *_, **__: Text(ids, ["made up"]))
    options = {"methods": ("streaming",), "window": 40, "block": 8, "dense_limit": 300}
    figures = Perplexity(tokens=5001, **options).run(desk)  # type: ignore[arg-type]
    assert figures["stream"]["last_tenth"][0] == pytest.approx(1, abs=1e-6)
    cache = streamllm.SinkCache(model, 4, 40, 8)
    parts = _fresh_parts(5000, cache)
    assert [(first, end) for _, first, end in parts] == [(n, n + 100) for n in range(4500, 5000, 100)]
    assert all(first - begin >= cache.capacity + 4 for begin, first, _ in parts)
    assert {(begin - 4) % 464 for begin, *_ in parts} == {0}  # ((512 - 51) // 8 + 1) * 8 tokens from restart to restart
    long = streamllm.SinkCache(FAMILIES["llama"].make(trained=2048), 4, 1000, 100)
    assert _fresh_parts(1100, long) == []  # nothing fits before the last tenth


def test_steps_and_blocks_may_be_those_of_the_paper(tmp_path: Path) -> None:
    """Reference: the same schedule read in long steps: the same figures."""
    flags = ("--methods", "streaming", "--tokens", "400", "--window", "60", "--block", "1")
    slow = evaluate("perplexity", tmp_path / "slow", *flags, "--step", "1")["head"]["methods"]["streaming"]
    fast = evaluate("perplexity", tmp_path / "fast", *flags)["head"]["methods"]["streaming"]
    np.testing.assert_allclose(slow["curve"]["losses"], fast["curve"]["losses"], rtol=1e-4)


def test_sinks_are_counted_from_where_the_cache_is_full(
    tmp_path: Path, loaded: tuple[Any, Any], ids: torch.Tensor
) -> None:
    """Reference: single tokens through a cache of each kind, the first ones left out; line breaks put in by hand."""
    model, tokenizer = loaded
    figures = evaluate("sinks", tmp_path, "--tokens", "900", "--size", "64", "--block", "16", "--kept", "0,4")
    breaks = ids[:, :900].clone()
    breaks[:, :4] = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    for name, read, kept in (("0", ids[:, :900], 0), ("4", ids[:, :900], 4), ("line breaks", breaks, 4)):
        want = losses_of(model, read, streamllm.SinkCache(model, kept, 64 - kept, 16))[80:]
        assert figures["perplexity"][name][0] == pytest.approx(math.exp(want.mean()), rel=1e-4)
    ratio = figures["perplexity"]["0"][0] / figures["perplexity"]["4"][0]
    assert figures["ratio"]["0"][0] == pytest.approx(ratio, rel=0.01)  # but for the last, broken stretch the same


def test_sizes_of_caches_are_what_they_say(tmp_path: Path, loaded: tuple[Any, Any], ids: torch.Tensor) -> None:
    """Reference: single tokens through caches of these sizes; the default ones are parts of the trained length."""
    model, _ = loaded
    figures = evaluate("cache-size", tmp_path, "--tokens", "500", "--sizes", "32,64", "--block", "8", "--sinks", "2")
    for size in (32, 64):
        want = losses_of(model, ids[:, :500], streamllm.SinkCache(model, 2, size - 2, 8))
        assert figures["perplexity"][str(size)][0] == pytest.approx(math.exp(want.mean()), rel=1e-4)
    assert evaluate("cache-size", tmp_path, "--tokens", "700")["sizes"] == [32, 64, 128, 256, 449]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_evaluation_has_a_trial_of_seconds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: what a user is promised: a record, two figures, a table, a verdict, and nothing left over.

    The embedded model, as without ``-m``.
    """
    monkeypatch.delenv("STREAMLLM_MODEL")
    out = tmp_path / "results"
    code, shown, err = run("eval", name, "--quick", "--quiet", "--out", str(out))
    assert (code, err) == (0, "")
    record = load_record(out / f"{name}-stories7M-quick.json")
    kind = EVALUATIONS[name]
    assert (record.name, record.model, record.dtype) == (name, "stories7M", "float32")
    assert shown.splitlines()[-1] == kind.verdict(record.figures)
    assert len(kind.rows(record.figures)) > 1
    made = {f"{name}-stories7M-quick.{end}" for end in ("json", "png", "svg")}
    assert {path.name for path in out.iterdir()} == made
    assert (out / f"{name}-stories7M-quick.png").stat().st_size > 10_000


def test_json_on_stdout_is_the_record(tmp_path: Path) -> None:
    """Reference: the file."""
    code, shown, _ = run("eval", "cache-size", "--quick", "--json", "--out", str(tmp_path))
    assert code == 0
    assert json.loads(shown) == json.loads((tmp_path / "cache-size-stories260K-quick.json").read_text())


def test_what_is_given_is_not_made_small(tmp_path: Path) -> None:
    """Reference: the flags; the rest is as in a trial."""
    figures = evaluate("cache-size", tmp_path, "--quick", "--tokens", "800")
    assert figures["tokens"] == 800
    assert figures["sizes"] == list(EVALUATIONS["cache-size"].quick["sizes"])


def test_verdicts_say_what_was_found() -> None:
    """Reference: by hand, for figures that are made up."""
    verdict = EVALUATIONS["sinks"].verdict
    ratio: dict[str, Any] = {
        "0": [350, 300, 400],
        "1": [1.2, 1.1, 1.3],
        "2": [1.005, 1, 1.01],
        "line breaks": [9, 8, 10],
    }
    figures = {"most": 8, "ratio": ratio, "breaks": [1.002, 1, 1.01]}
    assert verdict(figures).startswith("This model needs its first 2 tokens: with 0 kept its perplexity is 350.000 ")
    assert verdict(figures).endswith(" 4 line breaks in place of the first 4 do as well.")
    figures["breaks"] = [1.5, 1.4, 1.6]
    assert verdict(figures).endswith(" 4 line breaks in place of the first 4 cost 1.500 (1.400-1.600) times as much.")
    figures["breaks"] = [1.02, 0.9, 1.1]  # nobody knows
    assert verdict(figures).endswith("times that with 8.")
    most = {"most": 8, "ratio": {"0": [3, 2, 4], "4": [1.2, 1.1, 1.3]}, "breaks": None}
    assert verdict(most).startswith("This model needs its first 8 tokens or more: with 0 kept")
    some = {"most": 8, "ratio": {"1": [1.001, 1, 1.002], "4": [1.0, 1, 1.001]}, "breaks": None}
    assert verdict(some).startswith("1 initial tokens are enough, fewer were not tried")
    ratio["0"] = [1.001, 0.99, 1.01]
    assert verdict(figures).startswith("This model does not need sinks: with 0 kept")
    for unknown in ([1.015, 0.95, 1.08], [1.005, 0.8, 1.4], [1.2, None, None]):
        ratio["0"] = unknown
        assert verdict(figures).startswith("Whether this model needs sinks cannot be told on this text: with 0 kept")


def test_the_verdict_on_a_stream_compares_what_read_the_same_tokens() -> None:
    """Reference: by hand; the head and the stream have ratios of their own."""
    figures: dict[str, Any] = {
        "head": {
            "methods": {
                "dense": {"tokens": 400, "ratio": [5, 4, 6]},
                "window": {"tokens": 500, "ratio": [1.5, 1.4, 1.6]},
                "streaming": {"tokens": 500, "perplexity": [7, 6, 8], "ratio": None, "cache_bytes": 1e6},
            }
        },
        "stream": {
            "methods": {
                "window": {"tokens": 9000, "ratio": [1.1, 1.05, 1.2]},
                "streaming": {"tokens": 9000, "perplexity": [30, 20, 40], "ratio": None, "cache_bytes": 2e6},
            },
            "last_tenth": [1.001, 0.999, 1.003],
        },
    }
    verdict = EVALUATIONS["perplexity"].verdict
    said = verdict(figures)
    assert said.startswith("The stream of 9,000 tokens has perplexity 30.000 (20.000-40.000) in 2.00 MB of cache. ")
    assert "Its last tenth has 1.0010 (0.9990-1.0030) times" in said
    assert "fresh streams with the same sinks: it does not wear out." in said
    assert "Over the same 400 tokens dense has 5.000 (4.000-6.000) times" in said
    assert "Over the same 9,000 tokens window has 1.100 (1.050-1.200) times" in said
    for fresh, end in (([1.2, 1.1, 1.3], "sinks: it wears out."), ([1.0, 0.9, 1.1], "same sinks."), (None, "")):
        figures["stream"]["last_tenth"] = fresh
        assert end in verdict(figures)
    figures["stream"] = None
    assert verdict(figures).startswith("The stream of 500 tokens has perplexity 7.000")


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (
            {"64": [0.98, 0.97, 0.99], "96": [1, 0.9, 1.1]},
            "larger is not better: 64 tokens have 0.9800 (0.9700-0.9900)",
        ),
        ({"64": [1.2, 1.1, 1.3], "96": [1.01, 0.99, 1.03]}, "; 96 cannot be told from it on this text."),
        ({"64": [1.2, 1.1, 1.3], "96": [1.05, 1.02, 1.1]}, ", the lowest: the next best, 96 tokens, has 1.0500"),
    ],
)
def test_sizes_are_compared_on_the_same_tokens(ratio: dict[str, list[float]], words: str) -> None:
    """Reference: by hand; an interval that contains 1 tells nothing."""
    figures = {"sizes": [64, 96, 128], "perplexity": {"128": [9.5, 9, 10]}, "ratio": ratio}
    verdict = EVALUATIONS["cache-size"].verdict(figures)
    assert verdict.startswith("With 128 tokens cached the perplexity is 9.500 (9.000-10.000)")
    assert words in verdict


# ---- what is kept


def make_desk(loaded: tuple[Any, Any], out: Path, **plan: Any) -> Desk:
    model, tokenizer = loaded
    return Desk(model, tokenizer, (), out, "x", plan, Screen(quiet=True), Signals())


def test_a_stream_that_is_broken_off_goes_on(loaded: tuple[Any, Any], tmp_path: Path, ids: torch.Tensor) -> None:
    """Reference: the stream in one go; the second desk reads only what the first has not."""
    make = cache_maker("streaming", loaded[0], 4, 60, 16)
    whole = make_desk(loaded, tmp_path / "whole").stream("s", ids, make, skip=100)
    first = make_desk(loaded, tmp_path / "parts")
    advanced = []

    def interrupt(done: int, words: str) -> None:
        advanced.append(done)
        if done >= 1000:
            first.signals.received = signal.SIGINT

    first._report = interrupt
    with pytest.raises(Interrupted):
        first.stream("s", ids, make, skip=100)
    second = make_desk(loaded, tmp_path / "parts")
    second._report = lambda done, words: advanced.append(-done)
    curve = second.stream("s", ids, make, skip=100)
    resumed = [-done for done in advanced if done < 0]
    assert resumed[0] >= 1000  # what was read before
    np.testing.assert_allclose(curve.losses, whole.losses, rtol=1e-5)
    assert curve.done == whole.done
    assert second.part("s", lambda: pytest.fail("measured again"), steps=1) == curve.to_dict()
    second.finish()
    assert not list((tmp_path / "parts").iterdir())


@pytest.mark.parametrize("damage", [b"", b"no stream"])
def test_a_damaged_checkpoint_is_read_over(
    loaded: tuple[Any, Any], tmp_path: Path, ids: torch.Tensor, damage: bytes
) -> None:
    """Reference: the stream in one go."""
    make = cache_maker("window", loaded[0], 4, 60, 16)
    short = ids[:, :300]
    whole = make_desk(loaded, tmp_path / "whole").stream("s", short, make)
    desk = make_desk(loaded, tmp_path / "parts")
    (desk.folder / "s.stream").write_bytes(damage)
    (desk.folder / "parts.json").write_bytes(damage)
    np.testing.assert_allclose(desk.stream("s", short, make).losses, whole.losses, rtol=1e-6)


def test_another_plan_or_text_begins_anew(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Reference: the folders, which are named after all that decides the figures."""
    file = tmp_path / "a.txt"
    folders = set()
    for plan, text in ((1, "one two three"), (2, "one two three"), (1, "one two four")):
        file.write_text(text)
        desk = make_desk(loaded, tmp_path / "out", options=plan)
        desk.files = (str(file),)
        desk.text(None)
        folders.add(desk.folder)
    assert len(folders) == 3


def test_unfinished_work_that_nobody_went_on_with_is_thrown_away(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """Reference: by hand; the second one is too young, and the third is no work of ours, whatever its name."""
    folders = [tmp_path / f".x-{letter * 12}" for letter in "abc"]
    for days, mark, folder in zip((30, 1, 30), ("unfinished", "unfinished", "else"), folders, strict=True):
        folder.mkdir()
        (folder / mark).touch()
        os.utime(folder, (0, time.time() - 24 * 3600 * days))
    mine = make_desk(loaded, tmp_path).folder
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == {mine, *folders[1:]}


def test_a_long_stream_is_saved_now_and_then(
    loaded: tuple[Any, Any], tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: a process that dies without a word (here: an error) leaves what was read up to the last save."""
    monkeypatch.setattr(desk_module, "SAVE_SECONDS", 0.0)
    desk = make_desk(loaded, tmp_path)

    def die(done: int, words: str) -> None:
        if done >= 1000:
            raise KeyboardInterrupt

    desk._report = die
    with pytest.raises(KeyboardInterrupt):
        desk.stream("s", ids, cache_maker("streaming", loaded[0], 4, 60, 16))
    resumed = desk._resume(desk.folder / "s.stream")
    assert resumed is not None
    assert resumed[2] >= 1000


def test_ctrl_c_keeps_what_was_measured_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Reference: the uninterrupted command; the second one says by its bar that it begins later."""
    flags = ["eval", "sinks", "--tokens", "4000", "--block", "1", "--kept", "0,1", "--size", "64"]
    process = spawn(*flags, "--out", str(tmp_path), stdin=subprocess.DEVNULL)
    kept = tmp_path / "none"
    while not kept.exists() and process.poll() is None:
        kept = next(iter(tmp_path.glob(".sinks-*/parts.json")), kept)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out) == (130, b"")
    assert b"the same command will go on" in err
    assert b"Traceback" not in err
    assert not list(tmp_path.glob("*.json"))
    assert run(*flags, "--out", str(tmp_path))[0] == 0
    assert run(*flags, "--out", str(tmp_path / "whole"))[0] == 0
    found, whole = (load_record(next(folder.glob("*.json"))) for folder in (tmp_path, tmp_path / "whole"))
    assert found.figures["perplexity"] == whole.figures["perplexity"]
    assert not list(tmp_path.glob(".*"))


def test_ctrl_c_ends_a_pipe_that_never_ends(tmp_path: Path) -> None:
    """Reference: by hand; nothing comes through the pipe, and one signal is enough."""
    process = spawn("eval", "sinks", "--quick", "--data", "-", "--out", str(tmp_path), stdin=subprocess.PIPE)
    assert process.stderr is not None
    assert any(b"waiting for standard input" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    process.communicate()
    assert not list(tmp_path.glob("*.json"))


# ---- what is refused


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (("perplxity",), 2, "Did you mean 'perplexity'?"),
        (("perplexity", "--methods", "streming"), 2, "There is no method 'streming': did you mean streaming?"),
        (("perplexity", "--methods", ""), 2, "Name at least one method: dense, window"),
        (("perplexity", "--step", "0"), 2, "step must be a whole number of at least 1, you gave 0."),
        (("perplexity", "--tokens", "100"), 1, "100 tokens are too few: this evaluation needs 321 of them."),
        (("perplexity", "--window", "9999"), 2, "you asked for a window of 9999"),
        (("sinks", "--kept", "4"), 2, "Give at least two rising numbers of initial tokens, you gave [4]."),
        (("sinks", "--kept", "0,x"), 2, "--kept takes whole numbers with commas, you gave '0,x'."),
        (("sinks", "--size", "8"), 2, "size must be a whole number of at least 9, you gave 8."),
        (("cache-size", "--sizes", "64,32"), 2, "Give rising sizes above the 4 sinks"),
        (("cache-size", "--sizes", "64,600"), 2, "596"),
        (("sinks", "--data", "nowhere.txt"), 1, "The text nowhere.txt does not exist"),
        (("sinks", "-m", "nowhere/here"), 1, "nowhere/here"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    flags: tuple[str, ...], code: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: by hand; nothing is left behind."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found, out, err = run("eval", *flags, "--out", str(tmp_path / "out")) if flags[1:] else run("eval", *flags)
    assert (found, out) == (code, "")
    assert sentence in " ".join(err.split())
    assert not list(tmp_path.glob("out/*"))


def test_an_empty_file_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    """Reference: by hand."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    for name, sentence in (("empty.txt", "There is no text in"), ("binary.txt", "is not UTF-8 text")):
        code, _, err = run("eval", "sinks", "--data", str(tmp_path / name), "--out", str(tmp_path / "out"))
        assert code == 1
        assert sentence in err


def test_results_that_cannot_be_written_are_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: a disk that is full when the record is written; what was measured is there when there is room."""
    flags = ("eval", "cache-size", "--quick", "--out", str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("streamllm.evaluate.record.write_atomically", full)
        code, _, err = run(*flags)
    assert code == 1
    assert "No space left on device. Make room, and give the same command again" in err
    kept = json.loads(next(tmp_path.glob(".cache-size-*/parts.json")).read_text())
    assert len(kept) == 3
    assert run(*flags)[0] == 0


def test_a_folder_of_results_must_be_one(tmp_path: Path) -> None:
    """Reference: by hand."""
    code, _, err = run("eval", "sinks", "--quick", "--out", str(tmp_path / ("n" * 300)))
    assert (code, err.count("\n")) == (2, 0)
    assert "File name too long; name another folder with --out." in err
    (tmp_path / "file").write_text("")
    code, _, err = run("eval", "sinks", "--quick", "--out", str(tmp_path / "file"))
    assert (code, err) == (2, f"streamllm: {tmp_path / 'file'} is no folder; name another one with --out.")


def test_two_processes_do_not_write_the_same_results(tmp_path: Path) -> None:
    """Reference: a lock that someone else holds."""
    from filelock import FileLock

    with FileLock(tmp_path / ".sinks-stories260K-quick.lock"):
        code, _, err = run("eval", "sinks", "--quick", "--out", str(tmp_path))
    assert code == 1
    assert "Another process is writing" in err


def test_options_are_checked_when_they_are_made() -> None:
    """Reference: by hand."""
    for kind in EVALUATIONS.values():
        assert issubclass(kind, Evaluation)
        kind(**kind.quick)
    with pytest.raises(ConfigError):
        EVALUATIONS["perplexity"](recompute_limit=1)


def test_naming_the_evaluations_loads_neither_torch_nor_matplotlib() -> None:
    """Reference: a fresh process."""
    code = (
        "import sys, streamllm.cli_eval; sys.exit(' '.join({'torch', 'matplotlib', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
