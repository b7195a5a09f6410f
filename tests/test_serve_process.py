"""``streamllm serve`` as a process: it answers at once, drains, and says in one sentence why it cannot begin."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from typer.testing import CliRunner

from serving import MODEL, said, until
from stories import STORIES
from streamllm.cli import app
from streamllm.config import ServeConfig
from streamllm.errors import ConfigError, StreamLLMError
from streamllm.server.serve_job import FILES, split_keys

pytestmark = pytest.mark.usefixtures("no_settings", "foreground")


class Process:
    """The command, and what it writes."""

    def __init__(self, *arguments: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as place:
            self.port = place.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "streamllm", "serve", "--port", str(self.port), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def status(self, path: str = "/health") -> int:
        """Of an answer; 0: there is none."""
        try:
            return int(httpx2.get(self.url + path, timeout=5).status_code)
        except httpx2.TransportError:
            return 0

    def wait(self) -> int:
        """For its end: the exit status."""
        code = self.process.wait(60)
        self._thread.join()
        assert self.process.stdout is not None
        assert self.process.stdout.read() == ""
        self.process.stdout.close()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@contextmanager
def process(*arguments: str) -> Iterator[Process]:
    made = Process(*arguments)
    try:
        yield made
    finally:
        made.process.kill()
        if made.process.stdout is not None and not made.process.stdout.closed:
            made.wait()


def asked(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": said("Once upon a time"), "stream": True, **more}


def serve(*arguments: str) -> tuple[int, str]:
    """The command in this process: exit code and the sentence."""
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(result.exception, StreamLLMError), result.output
    return result.exception.exit_code, str(result.exception)


def test_it_answers_at_once_drains_on_sigterm_and_has_everything_after_a_restart(tmp_path: Path) -> None:
    """503 until the model is there; while leaving new requests are sent away, and the reply that runs is finished."""
    state = ("--state", str(tmp_path / "state"))
    with process(*state, "--drain-seconds", "30") as server:
        seen = set()
        assert until(lambda: bool(seen.add(server.status()) or 200 in seen), 60)
        assert 503 in seen
        assert until(lambda: any(line.startswith(f"{MODEL} · ") for line in server.lines))
        (banner,) = [line for line in server.lines if line.startswith(f"{MODEL} · ")]
        assert re.search(r"8 slots · [\d ]+ bytes a stream · " + re.escape(server.url), banner)
        assert httpx2.post(f"{server.url}/v1/sessions", json={"id": "kept"}).status_code == 201
        text = ""
        body = asked(session_id="kept", max_tokens=1500, temperature=0)
        with httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert until(lambda: server.status() == 503)
            refused = httpx2.post(f"{server.url}/v1/chat/completions", json=asked())
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            data = [line[6:] for line in lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        chunks = [json.loads(each)["choices"][0] for each in data[:-1]]
        text = "".join(each["delta"].get("content") or "" for each in chunks)
        assert chunks[-1]["finish_reason"] in ("stop", "length")
        assert server.wait() == 0
        assert not any("Traceback" in line for line in server.lines)
    with process(*state, "--drain-seconds", "0.2") as server:
        assert until(lambda: server.status() == 200, 60)
        (turn,) = httpx2.get(f"{server.url}/v1/sessions/kept/turns").json()["data"]
        assert turn["reply"] == text
        # what does not end in time is broken off, and kept
        body = asked(session_id="kept", endless=True)
        with httpx2.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            data = [line[6:] for line in lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        assert json.loads(data[-2])["streamllm"]["finish"] == "interrupted"
        assert server.wait() == 0
        assert not any("Traceback" in line for line in server.lines)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate by openssl")
def test_tls_is_spoken_and_drains_as_without_it(tmp_path: Path) -> None:
    """The certificate is the server's own, and is the only one that the client trusts; a key has no password."""
    certificate, key, locked = (tmp_path / name for name in ("cert.pem", "key.pem", "locked.pem"))
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate))  # fmt: skip
    openssl("rsa", "-aes128", "-passout", "pass:secret", "-in", str(key), "-out", str(locked))
    code, text = serve("--ssl-certfile", str(certificate), "--ssl-keyfile", str(locked))
    assert (code, "TLS" in text) == (2, True)
    files = ("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    with process("--state", str(tmp_path / "state"), "--drain-seconds", "0.2", *files) as server:
        url = f"https://localhost:{server.port}"
        trusted = ssl.create_default_context(cafile=certificate)
        with httpx2.Client(base_url=url, verify=trusted, timeout=60) as client:

            def status() -> int:
                with suppress(httpx2.TransportError):
                    return int(client.get("/health").status_code)
                return 0

            assert until(lambda: status() == 200, 60)
            assert server.status() == 0  # without TLS
            with pytest.raises(httpx2.ConnectError):
                httpx2.get(f"{url}/health")  # by a client that does not trust it
            assert any(line.rstrip().endswith(f"https://127.0.0.1:{server.port}") for line in server.lines)
            with client.stream("POST", "/v1/chat/completions", json=asked(endless=True)) as response:
                lines = response.iter_lines()
                next(lines)
                server.process.send_signal(signal.SIGTERM)
                assert [line for line in lines if line.startswith("data: ")][-1] == "data: [DONE]"
        assert server.wait() == 0
        assert not any("Traceback" in line for line in server.lines)


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, stdin=subprocess.DEVNULL)


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    with process("--state", str(tmp_path), "--api-key", "a,b") as server:
        assert until(lambda: server.status() == 200, 60)
        assert server.status("/v1/models") == 401
        headers = {"Authorization": "Bearer b"}
        url = f"{server.url}/v1/chat/completions"
        with httpx2.stream("POST", url, json=asked(endless=True), headers=headers, timeout=60) as response:
            lines = response.iter_lines()  # one that is let go of hangs up
            next(lines)
            server.process.send_signal(signal.SIGINT)
            assert until(lambda: server.status() == 503)
            began = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(10) == 128 + signal.SIGINT
            assert time.monotonic() - began < 5


def test_a_model_that_cannot_be_loaded_ends_the_process_with_its_sentence(tmp_path: Path) -> None:
    with process("--state", str(tmp_path), "-m", str(tmp_path / "nothing")) as server:
        assert server.wait() == 1
        assert "there is no folder" in server.lines[-1].lower()
        assert not any("Traceback" in line for line in server.lines)


def test_what_cannot_begin_says_why_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, text = serve("--port", str(taken.getsockname()[1]))
        assert (code, "cannot be listened on" in text, "--port" in text) == (2, True, True)
    code, text = serve("--host", "0.0.0.0")
    assert (code, "--api-key" in text) == (2, True)
    code, text = serve("--api-key", "a b")
    assert (code, "API key" in text) == (2, True)
    code, text = serve("--ssl-certfile", str(STORIES / "config.json"))
    assert (code, "--ssl-keyfile" in text) == (2, True)
    both = ("--ssl-certfile", str(STORIES / "config.json"), "--ssl-keyfile", str(STORIES / "config.json"))
    code, text = serve(*both)
    assert (code, "TLS" in text) == (2, True)
    code, text = serve("--recall", "maybe")
    assert (code, "--recall" in text) == (2, True)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, text = serve()
    assert (code, "pip install 'streamllm[serve]'" in text) == (2, True)


def test_many_files_may_be_open() -> None:
    """Reference: the system's own figures, in a process that may open few."""
    resource = pytest.importorskip("resource")
    code = (
        "import resource; from streamllm.server.serve_job import allow_files; "
        "most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; resource.setrlimit(resource.RLIMIT_NOFILE, (64, most)); "
        "allow_files(); print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    now, most = map(int, done.stdout.split())
    assert most == resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert now == (FILES if most == resource.RLIM_INFINITY else min(FILES, most)) > 64


def test_keys_can_stand_in_one_text() -> None:
    assert split_keys(["a, b", "c", ""]) == ("a", "b", "c")


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": -1},
        {"port": 65536},
        {"slots": 0},
        {"waiting": -1},
        {"resident": 1},
        {"max_stream_tokens": 0},
        {"max_per_key": 0},
        {"max_body": 0},
        {"keep": 0},
        {"idle": -1},
        {"drain_seconds": float("nan")},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ServeConfig(**wrong)
