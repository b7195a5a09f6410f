"""One run, where it meets signals, full disks and chat models; ``test_command`` has the command as a user meets it."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import streamllm
from stories import STORIES
from streamllm import models
from streamllm.checkpoint import EMBEDDED
from streamllm.cli import app
from streamllm.config import CacheConfig, SamplingConfig
from streamllm.console import PIECE_CHARS, Screen
from streamllm.errors import ConfigError, InputError, StateError, StreamLLMError
from streamllm.loop import end_ids
from streamllm.run import Job

resource = pytest.importorskip("resource")


def job(**changes: Any) -> Job:
    """A quiet run of a few greedy tokens."""
    return Job(
        **{
            "prompt": "",
            "model": str(STORIES),
            "device": "cpu",
            "dtype": "auto",
            "quantize": "none",
            "cache": CacheConfig(),
            "compile": False,
            "sampling": SamplingConfig(temperature=0),
            "explicit": frozenset(),
            "max_tokens": 5,
            "stop": (),
            "endless": False,
            "save": None,
            "resume": None,
            "stats": False,
            "json": False,
            "quiet": True,
            "verbose": False,
            **changes,
        }
    )


class Pipe:
    """A stdin that gives ``pieces``; a number among them is a signal that comes while the next one is read."""

    def __init__(self, *pieces: bytes | int) -> None:
        self.pieces = list(pieces)
        self.buffer = self

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise io.UnsupportedOperation

    def read(self, _size: int) -> bytes:
        piece = self.pieces.pop(0) if self.pieces else b""
        if isinstance(piece, int):
            signal.raise_signal(piece)
            return self.read(_size)
        return piece


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing on stdin, and Ctrl-C not ignored, as it would be in a background job."""
    monkeypatch.setattr(sys, "stdin", Pipe())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_prompt_is_read_stops_reading_and_saves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the tokens of what came before the signal, and of the piece that came with it at most."""
    pieces = [b"The cat sat. " * 300, int(signal.SIGINT), b"The dog ran. " * 300, b"The end. " * 30_000]
    monkeypatch.setattr(sys, "stdin", pipe := Pipe(*pieces))
    path = tmp_path / "a.stream"
    assert job(max_tokens=0, save=path).run() == 130
    assert len(pipe.pieces) == 1
    model, tokenizer = streamllm.load(STORIES)
    seen = streamllm.load_state(path, model).cache.tokens_seen
    first, both = (len(tokenizer("".join(map(bytes.decode, p)))["input_ids"]) for p in (pieces[:1], pieces[:3:2]))
    assert first - 2 * PIECE_CHARS <= seen <= both
    assert seen > 0
    assert capsys.readouterr().out == ""


def test_an_interrupted_run_says_so_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the last line of a run that a signal stopped while it read."""
    monkeypatch.setattr(sys, "stdin", Pipe(b"Once upon a time ", int(signal.SIGTERM), b"there was"))
    assert job(json=True, max_tokens=50).run() == 143
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["type"], last["finish"]) == ("stats", "interrupted")


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """Reference: the bytes of the file before; a limit on the size of files plays the full disk."""
    path = tmp_path / "a.stream"
    job(prompt="Once", save=path).run()
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(StateError, match=r"Cannot save the stream to .*a\.stream"):
            job(prompt="Once", save=path).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_stdout_that_fails_is_an_error_only_after_the_stream_is_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Reference: the saved stream, which goes on with the token that could not be written."""

    class Full(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    path = tmp_path / "a.stream"
    with pytest.raises(StreamLLMError, match="No space left"):
        job(prompt="Once upon a time", save=path).run()
    model, _ = models.load(STORIES)
    assert len(streamllm.load_state(path, model).cache.unread) == 1


def test_endless_never_draws_the_end_of_a_chat_models_reply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the same weights without a chat template, which pass the end of a story with the same seed."""
    folder = Path(shutil.copytree(STORIES, tmp_path / "chat"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    ends = end_ids(*models.load(STORIES))
    drawn = {}
    for name in (str(STORIES), str(folder)):
        options = {"model": name, "sampling": SamplingConfig(seed=11), "max_tokens": 600, "endless": True, "json": True}
        job(prompt="Once upon a time", **options).run()
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        drawn[name] = {line["id"] for line in lines if "id" in line}
    assert drawn[str(STORIES)] & ends
    assert not drawn[str(folder)] & ends


def test_a_person_sees_what_runs_and_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the sum that the banner must show; on a terminal the answer ends with a line feed."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    path = tmp_path / "a.stream"
    job(model=None, prompt="Once upon a time", quiet=False, verbose=True, stats=True, save=path).run()
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    lines = err.splitlines()
    assert lines[0].startswith(f"{EMBEDDED} · 4 sinks + 252 window + 63 block slack = 319 tokens, ")
    assert lines[0].endswith(" · float32 on cpu")
    assert "forgotten" in lines[1]
    assert lines[2] == f"saved to {path}; go on with --resume {path}"
    assert lines[3].startswith("seen 9 · cached 9 · evicted 0")


def test_an_argument_that_is_not_utf8_is_refused() -> None:
    """Reference: what Python makes of such bytes on a command line, a lone surrogate."""
    result = CliRunner().invoke(app, ["run", os.fsdecode(b"caf\xe9")])
    assert isinstance(result.exception, InputError)
    assert "not UTF-8" in str(result.exception)


def test_the_version_is_the_packages() -> None:
    """Reference: ``streamllm.__version__``."""
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"streamllm {streamllm.__version__}\n")


def test_waiting_for_a_pipe_is_not_explained_to_whoever_wants_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the same without --quiet."""
    for quiet in (True, False):
        job(quiet=quiet)._waits(Screen(quiet=quiet))
    assert capsys.readouterr().err.count("waiting for standard input") == 1


def test_a_step_that_cannot_be_compiled_is_said_in_one_line_and_changes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Reference: the same run without ``--compile``; here the compiler is missing."""

    def no_compiler(*_: Any) -> None:
        raise FileNotFoundError("no g++ here")

    monkeypatch.setattr("streamllm.compiled._compile", no_compiler)
    monkeypatch.setenv("STREAMLLM_COMPILED", str(tmp_path))
    assert job(prompt="Once upon a time").run() == 0
    want = capsys.readouterr()
    assert job(prompt="Once upon a time", compile=True, quiet=False).run() == 0
    found = capsys.readouterr()
    assert found.out == want.out
    lines = [line for line in found.err.splitlines() if "compile" in line]
    assert lines == [
        "Decoding is not compiled, which is slower: FileNotFoundError, no g++ here; is a C++ compiler there?"
    ]


def test_a_stream_in_eight_bits_is_saved_and_resumed_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: a run that was never stopped; and the other kind of cache is refused."""
    small = {"cache": CacheConfig(window=40, block=8, kv_dtype="int8")}
    file = tmp_path / "x.stream"
    assert job(prompt="Once upon a time", max_tokens=80, **small).run() == 0
    want = capsys.readouterr().out
    assert job(prompt="Once upon a time", max_tokens=50, save=file, **small).run() == 0
    assert job(prompt="", max_tokens=30, resume=file, **small).run() == 0
    assert capsys.readouterr().out == want
    with pytest.raises(ConfigError, match=r"--kv-dtype auto contradicts .* was saved with int8 and keeps it"):
        job(resume=file, explicit=frozenset({"kv_dtype"})).run()
