"""The command as a user meets it: what it prints where, how it ends, and what it keeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import streamllm
from stories import STORIES
from streamllm import __main__ as entry
from streamllm.cli import app
from streamllm.config import WAITING
from streamllm.errors import StreamLLMError

PROMPT = "Once upon a time"


pytestmark = pytest.mark.usefixtures("no_settings")


def run(*arguments: str, stdin: bytes | str = "") -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout, stderr; errors go through the one table."""
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    error = result.exception
    if isinstance(error, StreamLLMError):
        return error.exit_code, result.stdout, f"streamllm: {error}"
    if error is not None and not isinstance(error, SystemExit):
        raise error
    return result.exit_code, result.stdout, result.stderr


def spawn(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    """The command as a process of its own."""
    command = [sys.executable, "-m", "streamllm", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # A job in the background inherits an ignored Ctrl-C; the command is to be tested as from a terminal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, env=environment, **{**pipes, **options})  # type: ignore[call-overload]
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process: subprocess.Popen[bytes], stdin: bytes | None = None) -> tuple[int, bytes, bytes]:
    out, err = process.communicate(stdin, timeout=120)
    return process.returncode, out, err


# ---- in this process


def test_the_answer_is_on_stdout_and_equals_the_librarys() -> None:
    """Reference: ``streamllm.generate`` with the same options; stdout carries nothing else."""
    model, tokenizer = streamllm.load(STORIES)
    greedy = streamllm.SamplingConfig(temperature=0)
    want = streamllm.generate(model, tokenizer, PROMPT, sampling=greedy, max_tokens=60)
    assert run("run", "--temperature", "0", "-n", "60", PROMPT) == (0, want, "")


def test_piped_text_comes_first_and_then_the_argument() -> None:
    """Reference: the two on lines of their own, given as one argument."""
    options = ("run", "--temperature", "0", "-n", "20")
    assert run(*options, "One day", stdin="Lily had a ball.\n") == run(*options, "Lily had a ball.\nOne day")
    assert run(*options, stdin="Lily had a ball.") == run(*options, "-p", "Lily had a ball.")


def test_json_lines_hold_tokens_and_end_with_the_statistics() -> None:
    """Reference: the fields that the issue names; the texts joined are the plain answer."""
    _, plain, _ = run("run", "--temperature", "0", "-n", "40", PROMPT)
    code, out, _ = run("run", "--temperature", "0", "-n", "40", "--json", PROMPT)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert "".join(line["text"] for line in lines if line["type"] == "token") == plain
    stats = lines[-1]
    assert stats["type"] == "stats"
    assert {
        "tokens_seen",
        "tokens_generated",
        "tokens_cached",
        "tokens_evicted",
        "cache_bytes",
        "peak_rss_bytes",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "ttft_s",
    } <= set(stats)
    assert stats["tokens_generated"] == 40


def test_endless_goes_on_past_the_end_of_a_story() -> None:
    """Reference: without --endless the same seed ends at the story's end."""
    code, out, err = run("run", "--seed", "11", "-n", "600", "--endless", "--json", PROMPT)
    kinds = [json.loads(line)["type"] for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert "document_end" in kinds
    _, short, _ = run("run", "--seed", "11", "-n", "600", "--json", PROMPT)
    assert json.loads(short.splitlines()[-1])["finish"] == "end"
    _, text, _ = run("run", "--seed", "11", "-n", "600", "--endless", PROMPT)
    assert "\n\n" in text


def test_the_statistics_line_is_on_stderr() -> None:
    """Reference: the counters of a run of 30 tokens."""
    _, out, err = run("run", "-n", "30", "--stats", PROMPT)
    assert "cached" not in out
    assert err.startswith("seen 34 · cached 34 · evicted 0")


def test_saving_and_resuming_equals_one_run(tmp_path: Path) -> None:
    """Reference: one run of as many tokens."""
    path = str(tmp_path / "a.stream")
    options = ("--seed", "5", "--endless")
    _, whole, _ = run("run", *options, "-n", "400", PROMPT)
    _, first, _ = run("run", *options, "-n", "150", "--save", path, PROMPT)
    _, second, _ = run("run", "--endless", "-n", "250", "--resume", path)
    assert first + second == whole


def test_resuming_keeps_what_was_saved_unless_a_flag_says_otherwise(tmp_path: Path) -> None:
    """Reference: the cache's sizes in the file; a contradiction is refused, sampling may change."""
    path = str(tmp_path / "a.stream")
    run("run", "-n", "5", "--window", "100", "--save", path, PROMPT)
    code, _, err = run("run", "--resume", path, "--window", "50", "-n", "5")
    assert (code, "contradicts" in err) == (2, True)
    assert run("run", "--resume", path, "--window", "100", "-n", "5")[0] == 0
    greedy = [run("run", "--resume", path, "--temperature", "0", "-n", "30")[1] for _ in range(2)]
    assert greedy[0] == greedy[1]
    seeded = [run("run", "--resume", path, "--seed", seed, "-n", "60")[1] for seed in "112"]
    assert seeded[0] == seeded[1] != seeded[2]


def test_a_stop_string_ends_the_answer() -> None:
    """Reference: the answer without it."""
    _, whole, _ = run("run", "--temperature", "0", "-n", "60", PROMPT)
    _, cut, _ = run("run", "--temperature", "0", "-n", "60", "--stop", "Lily", PROMPT)
    assert cut == whole[: whole.index("Lily")]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["run"], 2, "prompt is empty"),
        (["run", "", "-n", "1"], 2, "prompt is empty"),
        (
            ["run", "--window", "4096", "hi"],
            2,
            "does not lengthen the context: this model was trained on 512 positions",
        ),
        (["run", "--window", "0", "hi"], 2, "window must be"),
        (["run", "--window", "-5", "hi"], 2, "window must be"),
        (["run", "--sinks", "600", "hi"], 2, "does not lengthen the context"),
        (["run", "--temperature", "-1", "hi"], 2, "temperature"),
        (["run", "-n", "-1", "hi"], 2, "max_tokens"),
        (["run", "-p", "a", "b"], 2, "given twice"),
        (["run", "-m", "no/such/folder", "hi"], 1, "no/such/folder"),
        (["run", "--resume", "nothing.stream"], 1, "nothing.stream"),
        (["run", "--save", "no-such-folder/x.stream", "hi"], 1, "Cannot save"),
        (["run", "--save", ".", "hi"], 1, "folder"),
        (["doctor", "--window", "4096"], 2, "does not lengthen"),
        (["run", "--quantize", "int3", "hi"], 2, "no quantisation 'int3'; choose one of none, int8, int4"),
    ],
)
def test_bad_input_is_one_sentence_and_the_right_exit_code(arguments: list[str], code: int, sentence: str) -> None:
    """Reference: the exit codes of the error tree; nothing on stdout."""
    got, out, err = run(*arguments)
    assert got == code
    assert sentence in err
    assert out == ""
    assert len(err.strip().splitlines()) == 1


def test_bytes_that_are_not_utf8_are_refused_with_their_place() -> None:
    """Reference: the offset of the bad byte."""
    code, _, err = run("run", stdin=b"Once \xff upon")
    assert code == 1
    assert "offset 5" in err


def test_doctor_says_whether_and_how_a_model_can_stream() -> None:
    """Reference: stories260K's config; JSON carries the same."""
    code, out, _ = run("doctor")
    assert code == 0
    for fact in ("llama", "rotary", "512", "verdict", "fit", "4 sinks + 252 window + 63 block slack = 319 tokens"):
        assert fact in out
    report = json.loads(run("doctor", "--json", "--window", "100")[1])
    assert (report["family"], report["trained_length"], report["window"], report["verdict"]) == (
        "llama",
        512,
        100,
        "fit",
    )


def test_config_shows_values_and_where_they_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Reference: one value from each source; flag before environment before file before default."""
    (tmp_path / "config.toml").write_text("window = 100\nblock = 8\nsinks = 2\n")
    monkeypatch.setenv("STREAMLLM_BLOCK", "16")
    monkeypatch.setenv("STREAMLLM_SINKS", "3")
    settings = json.loads(run("config", "--json", "--sinks", "6")[1])["settings"]
    assert settings["sinks"] == {"value": 6, "source": "flag"}
    assert settings["block"] == {"value": 16, "source": "environment"}
    assert settings["window"] == {"value": 100, "source": "file"}
    assert settings["temperature"]["source"] == "default"
    table = run("config")[1]
    assert "()" not in table
    assert "file" in table


def test_a_wrong_name_in_the_settings_file_is_refused(tmp_path: Path) -> None:
    """Reference: the nearest right name; --help works beside it."""
    (tmp_path / "config.toml").write_text("windw = 100\n")
    code, _, err = run("run", "hi")
    assert code == 2
    assert "windw" in err
    assert "window" in err
    assert run("run", "--help")[0] == 0


def test_every_flag_names_its_environment_variable() -> None:
    """Reference: the help itself."""
    text = run("run", "--help")[1]
    for name in (
        "MODEL",
        "WINDOW",
        "SINKS",
        "BLOCK",
        "TEMPERATURE",
        "SEED",
        "RUN_SAVE",
        "RUN_RESUME",
        "ENDLESS",
        "MAX_TOKENS",
    ):
        assert f"STREAMLLM_{name}" in text


def test_no_environment_variable_takes_the_place_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: by hand; images of containers set variables like these."""
    for name in ("VERSION", "HELP", "CONFIG_HELP"):
        monkeypatch.setenv(f"STREAMLLM_{name}", "1")
    code, out, _ = run("config")
    assert code == 0
    assert "window" in out


# ---- as a process of its own


@pytest.mark.parametrize(
    "line", ["--help", "--version", "run -h", "chat -h", "pipe -h", "eval -h", "eval sinks -h", "config -h"]
)
def test_help_and_version_do_not_load_torch(line: str) -> None:
    """Reference: ``sys.modules`` after the command has run."""
    script = (
        "import sys\n"
        "from streamllm.__main__ import main\n"
        "sys.argv = ['streamllm', *sys.argv[1:]]\n"
        "try:\n    main()\n"
        "except SystemExit as leaving:\n    assert leaving.code in (0, None), leaving.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", script, *line.split()], check=True, env=environment, stdout=subprocess.DEVNULL
    )


def test_a_closed_pipe_ends_quietly() -> None:
    """Reference: ``head -c 100``: exit without a word."""
    process = spawn("run", "--endless", PROMPT, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    assert len(process.stdout.read(100)) == 100
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_writing_saves_all_that_was_written(tmp_path: Path, number: int) -> None:
    """Reference: the uninterrupted stream of the same seed, which interrupted and resumed runs together give."""
    path = tmp_path / "c.stream"
    process = spawn("run", "--endless", "--seed", "5", "--save", str(path), PROMPT, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    head = process.stdout.read(300)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 128 + number
    assert b"Traceback" not in err
    first = (head + out).decode()
    _, second, _ = run("run", "--endless", "-n", "40", "--resume", str(path))
    _, whole, _ = run("run", "--endless", "--seed", "5", "-n", "2000", PROMPT)
    assert whole.startswith(first.rstrip("\n") + second)


@pytest.mark.parametrize("delay", [0.05, 0.4, 1.0, 1.8, 2.6])
def test_ctrl_c_at_any_moment_leaves_no_traceback(delay: float) -> None:
    """Reference: the exit code of an interrupt: while Python starts, libraries or the model load, text is written."""
    process = spawn("run", "--endless", PROMPT, stdin=subprocess.DEVNULL)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code in (130, -signal.SIGINT)  # before Python has installed any handler the system itself ends it
    if code == 130:
        assert b"Traceback" not in err
        assert b"KeyboardInterrupt" not in err


def test_ctrl_c_while_an_endless_pipe_is_read_saves_what_was_read(tmp_path: Path) -> None:
    """Reference: the saved stream, which has read a part of what was piped in."""
    path = tmp_path / "r.stream"
    process = spawn("run", "--save", str(path), "-n", "0")
    assert process.stdin is not None
    for _ in range(40):
        process.stdin.write(b"The cat sat on the mat. " * 200)
        process.stdin.flush()
    time.sleep(8)
    process.send_signal(signal.SIGINT)
    code = process.wait(timeout=60)
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()
    assert code == 130
    model, _ = streamllm.load(STORIES)
    assert streamllm.load_state(path, model).cache.tokens_seen > 0


def test_a_prompt_beside_an_open_pipe_is_explained() -> None:
    """Reference: the note that tells why nothing happens; it ends when the pipe is closed."""
    process = spawn("run", "-n", "3", PROMPT)
    assert process.stderr is not None
    assert b"< /dev/null" in process.stderr.readline()
    assert finish(process, b"")[0] == 0


def test_a_full_standard_output_is_one_sentence() -> None:
    """Reference: ``/dev/full``, which takes nothing."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("wb") as full:
        process = spawn("run", "-n", "50", PROMPT, stdin=subprocess.DEVNULL, stdout=full)
        process.wait(timeout=60)
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    assert process.returncode == 1
    assert b"No space left" in err
    assert b"Traceback" not in err


# ---- the entry point


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_errors_become_a_sentence_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the error tree; --debug shows where it came from instead."""
    monkeypatch.setattr(sys, "argv", ["streamllm", "run", "--window", "0", "hi"])
    with pytest.raises(SystemExit) as leaving:
        entry.main()
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith("streamllm: window must be")
    monkeypatch.setattr(sys, "argv", ["streamllm", "run", "--debug", "--window", "0", "hi"])
    with pytest.raises(StreamLLMError):
        entry.main()


@pytest.mark.usefixtures("handlers")
def test_no_memory_left_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: a MemoryError from anywhere."""

    def fail() -> None:
        raise MemoryError

    monkeypatch.setattr("streamllm.cli.app", fail)
    with pytest.raises(SystemExit) as leaving:
        entry.main()
    assert leaving.value.code == 1
    assert "--window" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="torch comes with another OpenMP there")
@pytest.mark.parametrize("said", [None, *WAITING])
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(said: str | None) -> None:
    """Reference: the environment of a process that has run the command's entry."""
    code = "import json, os, sys; sys.argv = ['streamllm', '--version']\n"
    code += "from streamllm.__main__ import main\nfrom streamllm.config import WAITING\n"
    code += "try: main()\nexcept SystemExit: "
    code += "print(json.dumps([{name: os.environ.get(name) for name in WAITING}, 'torch' in sys.modules]))"
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), **({said: "7"} if said else {})}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    wanted = {"GOMP_SPINCOUNT": "3000", "OMP_WAIT_POLICY": "active", "KMP_BLOCKTIME": "200"}
    if said:
        wanted = {name: "7" if name == said else None for name in wanted}
    assert json.loads(done.stdout.splitlines()[-1]) == [wanted, False]
