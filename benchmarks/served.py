"""A server as a process: started on a free port, waited for, weighed, held still beside others, and ended."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

PATIENCE = 900.0
"""Seconds that a server may take to be ready; compiling takes minutes."""

HOST = "127.0.0.1"


class Served:
    """A server that runs; ``with`` ends it.

    Args:
        name: for people.
        command: ``{port}`` in it stands for the port.
        model: as requests name it.
        health: path that is answered with 200 once the server is ready.
        is_foreign: whether it must not see our own source.

    Raises:
        RuntimeError: it does not become ready.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, model: str, health: str = "/health", is_foreign: bool = False
    ) -> None:
        self.name, self.model = name, model
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self._told: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed with the server
        self._process = subprocess.Popen(
            [part.format(port=self.port) for part in command],
            stdout=self._told,
            stderr=subprocess.STDOUT,
            env=environment() if is_foreign else None,
        )
        self._watched = psutil.Process(self._process.pid)
        try:
            self._wait(health)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Served:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def rss(self) -> int:
        """Bytes of memory."""
        found: int = self._watched.memory_info().rss
        return found

    @property
    def cpu_s(self) -> float:
        """Seconds that processors have worked for it."""
        times = self._watched.cpu_times()
        return float(times.user + times.system)

    def hold(self) -> None:
        """Let it stand still, so that it takes nothing from others."""
        self._watched.suspend()

    def go_on(self) -> None:
        """The contrary."""
        self._watched.resume()

    def figure(self, name: str) -> float:
        """One of the figures at /metrics."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=30)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return float(next(line for line in lines if line.startswith(name + " ")).rpartition(" ")[2])

    def close(self) -> None:
        """Ask it to leave, and see to it that it does."""
        if self._process.poll() is None:
            self._watched.resume()  # who stands still does not leave
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._told.close()

    def _wait(self, health: str) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self._process.poll() is None:
            connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
            try:
                connection.request("GET", health)
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            finally:
                connection.close()
            time.sleep(0.2)
        self._told.seek(0)
        said = self._told.read().decode(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"{self.name} is not ready: {' '.join(said) or 'it said nothing'}")


class Weight:
    """Looks at the memory of a server every so many seconds, in a thread, until closed; only the most is kept."""

    def __init__(self, server: Served, seconds: float = 0.05) -> None:
        self.peak = server.rss
        self._server, self._seconds = server, seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Weight:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(self._seconds):
            self.peak = max(self.peak, self._server.rss)


def ours(folder: Path, *, slots: int, resident: int, flags: Sequence[str] = ()) -> Served:
    """``streamllm serve`` on the embedded model, with its sessions in a folder."""
    command = [sys.executable, "-m", "streamllm", "serve", "--port={port}", f"--state={folder}", "--dtype=float32"]
    command += [f"--slots={slots}", f"--resident={resident}", "--quiet", *flags]
    return Served("streamllm", command, model="stories7M")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server((HOST, 0)) as place:
        found: int = place.getsockname()[1]
        return found


def environment() -> dict[str, str]:
    """Of the servers of others: ours without the path of our own source."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
