"""A server for tests: the application with a small model, in this process, and a real socket where one is needed."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from stories import STORIES
from streamllm.config import CacheConfig, SamplingConfig, ServeConfig
from streamllm.models import load
from streamllm.server.app import make_app, serve
from streamllm.server.conversations import Conversations
from streamllm.server.journal import Journal
from streamllm.server.keys import Keys
from streamllm.server.runs import Watched
from streamllm.server.service import Service

MODEL = "stories260K"


@dataclass
class Served:
    """A server, and what stands behind it."""

    app: FastAPI
    service: Service
    journal: io.StringIO
    url: str = ""


@contextmanager
def application(
    folder: Path,
    *,
    keys: tuple[str, ...] = (),
    hosts: list[str] | None = None,
    origins: tuple[str, ...] = (),
    window: int = 60,
    logs_messages: bool = False,
    template: str | None = None,
    **config: Any,
) -> Iterator[Served]:
    """The application with the model of the tests; it draws greedily."""
    model, tokenizer = load(STORIES)
    tokenizer.chat_template = template
    settings = ServeConfig(**{"slots": 4, "waiting": 8, **config})
    journal = io.StringIO()
    app = make_app(
        keys=Keys(keys), hosts=hosts, origins=origins, max_body=settings.max_body, journal=Journal(journal)
    )  # fmt: skip
    cache = CacheConfig(window=window, block=8)
    columns = settings.columns(cache.sinks + window + cache.block - 1, cache.sinks, window)
    engine = Watched(
        model, tokenizer, slots=settings.slots, waiting=settings.waiting, config=cache, columns=columns
    )  # fmt: skip
    conversations = Conversations(engine, folder, model_name=MODEL, resident=settings.resident)
    service = Service(
        engine=engine,
        conversations=conversations,
        metrics=app.state.metrics,
        model=MODEL,
        aliases=("tiny",),
        config=settings,
        sampling=SamplingConfig(temperature=0),
        logs_messages=logs_messages,
    )
    serve(app, service)
    try:
        yield Served(app, service, journal)
    finally:
        service.close()


@contextmanager
def listening(served: Served, *, buffer: int | None = None) -> Iterator[Served]:
    """The application on a socket of this machine; ``buffer``: bytes of each connection that wait to be sent."""
    place = socket.create_server(("127.0.0.1", 0))
    if buffer is not None:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    config = uvicorn.Config(served.app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([place],), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{place.getsockname()[1]}"
    try:
        assert until(lambda: server.started)
        yield served
    finally:
        server.should_exit = True
        thread.join(20)
        place.close()


def until(is_so: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait until something is so; whether it is, in time."""
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)
    return is_so()


def said(*texts: str) -> list[dict[str, str]]:
    """Messages, the user's first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
