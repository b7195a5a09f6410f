"""The benchmark scripts run, and their records say on what; no time is asserted here."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from streamllm import stats

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script of benchmarks/ by its name; one thread, because many wait for each other on a busy machine."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("PYTHONPATH", str(Path(stats.__file__).parents[1]))  # for the processes that scripts start
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(threads)


def run(module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    """Run ``main`` and check what all records have in common; the last line of the output is the record, too."""
    out = tmp_path / "record.json"
    name = module.__name__
    module.main([*flags, "--quick", f"--out={out}"])
    record: dict[str, Any] = json.loads(out.read_text())
    shown = capsys.readouterr().out
    assert json.loads(shown.splitlines()[-1]) == record
    assert " met" in shown
    assert list(tmp_path.iterdir()) == [out]

    assert list(record) == ["name", "command", "began", "commit", "machine", "model", "dtype", "figures", "format"]
    assert record["name"] == name
    assert record["command"] == " ".join(["python", f"benchmarks/{name}.py", *flags, "--quick", "--out=record.json"])
    assert record["began"].endswith("+00:00")
    assert record["dtype"] == "float32"
    machine = record["machine"]
    keys = ["cpu", "cores", "ram_gib", "os", "python", "torch", "transformers", "streamllm", "threads", "load_before"]
    assert list(machine) == keys
    assert all(machine[key] for key in keys if key != "load_before")
    assert str(Path.home()) not in out.read_text()
    for target in record["figures"]["targets"]:
        assert set(target) == {"name", "value", "target", "is_met"}
    return record


def test_endless_measures_around_its_marks(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the marks of a trial; a cache that is full at both."""
    record = run(script("endless"), tmp_path, capsys, "--threads=1")
    marks = record["figures"]["marks"]
    assert [mark["tokens"] for mark in marks] == [400, 912]
    assert marks[0]["cache_bytes"] == marks[1]["cache_bytes"] > 0
    assert all(mark["rss_bytes"] > marks[0]["cache_bytes"] for mark in marks)
    assert len(record["figures"]["ratios"]) == 6


def test_endless_compares_at_100_000_however_long_it_goes_on(script: Any) -> None:
    """Reference: by hand."""
    make_setting = script("endless").make_setting
    marks = (2_000, 10_000, 50_000, 100_000)
    assert make_setting(None, 1, is_quick=False).marks == marks
    long = make_setting(1_000_000, 1, is_quick=False)
    assert long.marks == (*marks, 200_000, 500_000, 1_000_000)
    assert long.compared == 100_000
    assert make_setting(101_000, 1, is_quick=False).marks == (2_000, 10_000, 50_000, 101_000)
    with pytest.raises(ValueError, match="--tokens must be at least 4000"):
        make_setting(3_999, 1, is_quick=False)


def test_blocks_are_read_as_single_tokens_are(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the losses token by token, which the benchmark compares with."""
    figures = run(script("blocks"), tmp_path, capsys)["figures"]["runs"]
    assert len(figures) == 6
    for found in figures.values():
        assert found["tokens"] == 600 > found["window"]
        assert 0 < found["largest_difference"] < 1e-4
        assert found["ratio"]["min"] <= found["ratio"]["median"] <= found["ratio"]["max"]


def test_startup_times_help_and_the_first_token(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: help loads neither torch nor transformers."""
    record = run(script("startup"), tmp_path, capsys)
    assert record["figures"]["loaded_by_help"] == []
    assert len(record["figures"]["seconds"]) == 4


def test_pipe_feeds_a_text_and_watches_the_memory(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the bytes asked for, and the tokens of that text."""
    pipe = script("pipe")
    record = run(pipe, tmp_path, capsys, "--every=0.1", "--threads=1")
    figures = record["figures"]
    assert 20_000 <= figures["bytes_written"] < 20_100
    from tokenizers_for_tests import stories

    text = b"".join(pipe.cut(pipe.made_up_stories(), 20_000)).decode()
    assert figures["tokens_read"] == len(stories()(text)["input_ids"])
    assert figures["samples"][-1]["rss_bytes"] <= figures["rss_peak_bytes"]
    assert record["machine"]["threads"] == 1


def test_a_repeated_file_is_cut_to_size(script: Any, tmp_path: Path) -> None:
    """Reference: the file written three times."""
    pipe = script("pipe")
    file = tmp_path / "text"
    file.write_text("one\ntwo ü\n", encoding="utf-8")
    batches = list(pipe.cut(pipe.repeat_file(file), 33, batch=10))
    assert b"".join(batches) == file.read_bytes() * 3
    assert max(map(len, batches)) < 20


def test_pipe_says_why_the_command_failed(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the sentence of streamllm itself."""
    monkeypatch.setenv("STREAMLLM_BLOCK", "0")
    with pytest.raises(RuntimeError, match="block must be a whole number of at least 1"):
        script("pipe").measure(iter([b"text"]), 0.1)


def test_only_a_full_run_writes_to_docs(script: Any, tmp_path: Path) -> None:
    """Reference: by hand."""
    module = script("place")
    assert module.target_path("pipe", None, quick=False) == FOLDER.parent / "docs" / "results" / "pipe.json"
    assert module.target_path("pipe", None, quick=True) is None
    assert module.target_path("pipe", tmp_path, quick=True) == tmp_path


def test_chat_compares_turns_of_one_length(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reference: the setting of a trial; the turns of a session that is gone on with, counted by the script."""
    chat = script("chat")
    figures = run(chat, tmp_path, capsys, "--threads=1")["figures"]
    setting = figures["setting"]
    assert figures["turns"] == setting["late"] + setting["width"]
    assert figures["tokens"] >= figures["turns"] * figures["tokens_of_a_turn"]
    assert figures["bytes"]["snapshots"] == chat.SNAPSHOTS * figures["bytes"]["cache"]
    assert all(0 < found["min"] <= found["median"] <= found["max"] for found in figures["ms"].values())


def test_serve_compares_a_crowd_with_each_client_alone(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the replies that each client gets alone, which the benchmark compares with."""
    figures = run(serve := script("serve"), tmp_path, capsys, "--threads=1", "--alone")["figures"]
    targets = {target["name"]: target["value"] for target in figures["targets"]}
    assert targets["replies of 4 clients that failed"] == 0
    assert targets["texts other than alone"] == targets["texts other than in one process"] == 0
    assert figures["crowd"]["texts_compared"] == serve.QUICK.clients
    assert figures["crowd"]["bytes"]["peaks"][0] >= figures["crowd"]["bytes"]["before"]
    (found,) = figures["servers"].values()
    assert all(each["tokens_per_s"] > 0 and each["same_texts"] == 1 for each in found.values())


def test_a_server_that_is_not_installed_is_left_out_with_the_reason(script: Any, tmp_path: Path) -> None:
    """Reference: what Python says of a module that is not there, and an interpreter that is not there."""
    rivals = script("rivals")
    none: Any = None
    for rival in rivals.rivals(none, none, tmp_path, tmp_path / "python"):
        assert rival.why_not() == f"{tmp_path / 'python'} cannot be run: No such file or directory"
    missing = rivals.Rival("x", ("no_such_module",), Path(sys.executable), none)
    assert missing.why_not() == "ModuleNotFoundError: No module named 'no_such_module'"
    assert rivals.Rival("x", ("json",), Path(sys.executable), none).why_not() is None


def test_soak_knows_every_turn_and_weighs_the_server(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the setting of a trial; each client resends everything, far past its window."""
    figures = run(soak := script("soak"), tmp_path, capsys)["figures"]
    assert figures["failed"] == figures["unknown"] == 0
    assert len(figures["minutes"]) == len(figures["rss_bytes_by_minute"]) == soak.QUICK.minutes
    assert len(figures["turns"]) == soak.QUICK.clients
    assert all(0 < minute["read_tokens"] < 40 for minute in figures["minutes"] if minute["turns"])


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\n{}", "HTTP/1.1 429 Too Many Requests"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": [{"text": "a"}]}\n\n', "broke off"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": {"message": "full"}}\n\n', "full"),
        (b"", ""),
    ],
)
def test_a_client_says_what_went_wrong(script: Any, said: bytes, error: str) -> None:
    """Reference: by hand."""
    clients = script("clients")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        writer.write(said)
        writer.close()

    async def ask() -> Any:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await clients.ask(f"http://127.0.0.1:{port}", "/", {"x": 1})

    reply = asyncio.run(ask())
    assert reply.error is not None
    assert error in reply.error


@pytest.mark.slow
def test_a_conversation_is_the_same_through_kills_and_in_a_terminal(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the conversation that nothing interrupts, which the benchmark compares with. It takes a minute."""
    conversation = script("conversation")
    monkeypatch.setenv("STREAMLLM_SESSIONS", str(tmp_path / "elsewhere"))  # put back: the script names another folder
    figures = run(conversation, tmp_path, capsys)["figures"]
    assert figures["equal_after_kills"] == figures["equal_in_terminal"] == figures["turns"] == 40
    assert figures["tokens"] >= 40 * conversation.REPLY // 2
    assert len(figures["memory_bytes"]) == 4


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "is_met", "shown"),
    [
        (1.0, 1.0, False, True, "<= 1 x"),
        (1.01, 1.0, False, False, "<= 1 x"),
        (0.8, 0.8, True, True, ">= 0.8 x"),
        (0.7, 0.8, True, False, ">= 0.8 x"),
    ],
)
def test_a_target_is_met_up_to_its_limit(
    script: Any, value: float, limit: float, at_least: bool, is_met: bool, shown: str
) -> None:
    """Reference: by hand."""
    target = script("target").Target("x", value, limit, at_least)
    assert target.to_dict() == {"name": "x", "value": value, "target": shown, "is_met": is_met}


def test_training_counts_the_operations_of_the_matrix_products(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reference: the operations of a step are those that the recipe counts, which has its own test."""
    record = run(training := script("training"), tmp_path, capsys)
    for figures in record["figures"]["runs"].values():
        assert figures["share"] == pytest.approx(figures["gflops"] / figures["matmul_gflops"], rel=0.02)
        assert figures["compiled"] is False
    shape = training.Recipe(size="toy").shape
    products = sum(2 * count * wide * out for count, wide, out in training.products(shape))
    attention = 2 * shape.layers * shape.context * shape.hidden
    assert 3 * (products + attention) == shape.flops_per_token()
