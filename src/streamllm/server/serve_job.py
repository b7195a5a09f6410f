"""The process of a server: listens at once, loads the model beside it, and leaves in order.

Knows the terminal, signals and sockets, but no flags (``cli_serve``) and no routes (``app``). A first Ctrl-C or SIGTERM
lets the replies that run come to their end, for a while; a second leaves at once, and loses nothing but the tokens in
flight, since all that is said goes to disk as it comes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import platformdirs

from streamllm.checkpoint import EMBEDDED, shown
from streamllm.config import STALLED, CacheConfig, SamplingConfig, ServeConfig
from streamllm.console import Screen, quit_now
from streamllm.errors import ConfigError
from streamllm.server.memory import allocate_together, collect_often

if TYPE_CHECKING:
    from fastapi import FastAPI
    from uvicorn import Server

    from streamllm.server.keys import Keys
    from streamllm.server.service import Service
    from streamllm.session import Recall

PERSIST_SECONDS = 10.0
"""For replies that were broken off, to be written down."""

CLOSE_SECONDS = 2.0
"""For connections to end, when all replies have."""

TICK = 0.05
"""Seconds between two looks whether replies have ended."""

FILES = 65_536
"""Files that may be open, if the system allows so many: a conversation in memory has several, a connection one."""

MISSING = "streamllm serve needs {}, which is not installed: pip install 'streamllm[serve]'."


@dataclass(frozen=True)
class ServeJob:
    """What a server shall be; see the flags of ``streamllm serve``.

    Args:
        keys: API keys.
        hosts: more names by which it may be asked for.
        origins: other origins whose pages may use it.
        state: folder of the sessions; ``None``: among the user's state.
        certificate, private_key: files for TLS.
    """

    model: str | None
    device: str
    dtype: str
    quantize: str
    compile: bool
    cache: CacheConfig
    sampling: SamplingConfig
    max_tokens: int | None
    stop: tuple[str, ...]
    endless: bool
    recall: Recall
    template_options: dict[str, Any] | None
    serve: ServeConfig
    keys: tuple[str, ...]
    hosts: tuple[str, ...]
    origins: tuple[str, ...]
    state: Path | None
    certificate: Path | None
    private_key: Path | None
    logs_messages: bool
    quiet: bool

    def run(self) -> int:
        """Serve until a signal comes; return the exit status.

        Raises:
            StreamLLMError: it cannot begin, or the model cannot be loaded.
        """
        # 1. what can be refused before the model is loaded
        try:
            import uvicorn

            from streamllm.server.keys import Keys, check_exposure
        except ImportError as error:
            raise ConfigError(MISSING.format(error.name)) from error
        keys = Keys(self.keys)
        check_exposure(self.serve.host, keys)
        context = self._tls()
        place = listen(self.serve.host, self.serve.port)
        allow_files()
        allocate_together()
        with Screen(quiet=self.quiet, verbose=True) as screen, place:
            # 2. the socket answers, while the model is loaded
            app = self._app(keys, place)
            config = uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ws="none",
                timeout_graceful_shutdown=int(CLOSE_SECONDS),
            )
            config.load()
            config.ssl = context
            process = _Process(self, app, uvicorn.Server(config), screen, _url(place, is_tls=context is not None))
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what clients do wrong is told to them
            return process.run(place)

    def _app(self, keys: Keys, place: socket.socket) -> FastAPI:
        from streamllm.server.app import make_app
        from streamllm.server.journal import Journal
        from streamllm.server.keys import LOOPBACK, is_loopback

        hosts: list[str] | None = [*self.hosts] or None
        if is_loopback(self.serve.host):
            hosts = [*self.hosts, *LOOPBACK, "[::1]", self.serve.host, f"[{self.serve.host}]"]
        return make_app(
            keys=keys,
            hosts=hosts,
            origins=self.origins,
            max_body=self.serve.max_body,
            journal=Journal(is_quiet=self.quiet),
        )

    def _tls(self) -> ssl.SSLContext | None:
        """What encrypts; ``None``: nothing does."""
        if (self.certificate is None) != (self.private_key is None):
            raise ConfigError("--ssl-certfile and --ssl-keyfile go together: give both, or neither.")
        if self.certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # A key with a password is refused: nobody may be there who could be asked for it.
            context.load_cert_chain(self.certificate, self.private_key, password=lambda: b"")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"{self.certificate} and {self.private_key} cannot be used for TLS: {error.strerror or error}."
            ) from error
        return context

    def load(self, app: FastAPI) -> Service:
        """Load the model and what it answers with.

        Raises:
            StreamLLMError: it cannot be loaded.
        """
        from streamllm import models
        from streamllm.cache import SinkCache
        from streamllm.server.conversations import Conversations
        from streamllm.server.runs import Watched
        from streamllm.server.service import Service

        folder = models.locate(self.model)
        model, tokenizer = models.load(folder, device=self.device, dtype=self.dtype, quantize=self.quantize)
        state = self.state or platformdirs.user_state_path("streamllm") / "server"
        probe = SinkCache(model, self.cache.sinks, self.cache.window, self.cache.block, 1, None, self.cache.kv_dtype)
        engine = Watched(
            model,
            tokenizer,
            slots=self.serve.slots,
            waiting=self.serve.waiting,
            config=self.cache,
            columns=self.serve.columns(probe.capacity, probe.config.sinks, probe.config.window or 0),
            compile=self.compile,
            folder=state / ".swap",
        )
        name = shown(folder)
        name = Path(name).name if Path(name).is_dir() else name  # a folder by its last name, a Hub id as it is
        conversations = Conversations(
            engine,
            state,
            model_name=name,
            recall=self.recall,
            resident=self.serve.resident,
            most=self.serve.keep,
            idle=self.serve.idle,
            template_options=self.template_options,
        )
        return Service(
            engine=engine,
            conversations=conversations,
            metrics=app.state.metrics,
            model=name,
            aliases=tuple({Path(name).name, str(folder), self.model or EMBEDDED} - {name}),
            config=self.serve,
            sampling=self.sampling,
            stop=self.stop,
            max_tokens=self.max_tokens,
            endless=self.endless,
            logs_messages=self.logs_messages,
            tell=app.state.journal.tell,
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket that connections come to.

    On Linux a connection whose other end takes nothing for ``STALLED`` seconds breaks off by itself.

    Raises:
        ConfigError: it cannot be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        place = socket.socket(family, socket.SOCK_STREAM)
        if os.name != "nt":
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # each connection inherits it
            place.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * STALLED))
        try:
            place.bind(address)
            place.listen(2048)
        except BaseException:
            place.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"{host}, port {port}, cannot be listened on: {error.strerror or error}; choose another --port or --host."
        ) from error
    place.setblocking(False)
    return place


class _Process:
    """One server that runs: its loop, its loader and its signals."""

    def __init__(self, job: ServeJob, app: FastAPI, server: Server, screen: Screen, url: str) -> None:
        self._job, self._app, self._server, self._screen, self._url = job, app, server, screen, url
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = 0

    def run(self, place: socket.socket) -> int:
        """Serve on a socket."""
        self._server.capture_signals = nullcontext  # type: ignore[method-assign, assignment]  # they are ours
        before = self._take_signals()
        try:
            asyncio.run(self._serve(place))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._app.state.service is not None:
                self._app.state.service.close()
        if self._error is not None:
            raise self._error
        return 0

    async def _serve(self, place: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._load, name="streamllm-load", daemon=True).start()
        await self._server.serve(sockets=[place])

    def _load(self) -> None:
        """Load the model, in a thread, and tell so; or let the process end with what is wrong."""
        from streamllm.server.app import serve

        try:
            service = self._job.load(self._app)
        except BaseException as error:
            self._error = error
            self._server.should_exit = True
            return
        collect_often()
        self._screen.line(self._banner(service), is_dim=False)
        serve(self._app, service)

    def _banner(self, service: Service) -> str:
        from streamllm.doctor import sizes
        from streamllm.stats import grouped

        stats = service.engine.stats()
        cache = service.engine._new_cache()
        return (
            f"{service.model} · {sizes(cache)} · {stats.slots} slots · {grouped(stats.bytes_per_stream)} bytes a "
            f"stream · {self._url}"
        )

    # ---- leaving

    def _take_signals(self) -> dict[int, Any]:
        """Let the first signal end the service in order, and the second at once."""
        before = {}
        for name in ("SIGINT", "SIGTERM"):
            number = getattr(signal, name)
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, self._note)
        return before

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        loop = self._loop
        if self._signals > 1 or loop is None or self._app.state.service is None:
            quit_now(number, frame)
            return
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._begin_to_leave)

    def _begin_to_leave(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._leave())

    async def _leave(self) -> None:
        """Take no more requests, let replies end, break off what is left, and stop."""
        gate, runs, seconds = self._app.state.gate, self._app.state.service.runs, self._job.serve.drain_seconds
        gate.is_leaving, gate.retry_after = True, max(1, round(seconds))
        if runs.running:
            self._screen.line(f"leaving when {runs.running} replies have ended, in {seconds:g} s at the latest")
        if not await _until(lambda: not runs.running, seconds):
            runs.interrupt()
            await _until(lambda: not runs.running, PERSIST_SECONDS)
        self._server.should_exit = True


def allow_files() -> None:
    """Let the process open ``FILES``, or as many as it may."""
    with suppress(ImportError, OSError, ValueError):  # Windows; a system that forbids it
        import resource

        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = FILES if most == resource.RLIM_INFINITY else min(most, FILES)
        if now != resource.RLIM_INFINITY and now < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


async def _until(is_so: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is so, or so long; whether it is."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while not is_so() and loop.time() < end:
        await asyncio.sleep(TICK)
    return is_so()


def _url(place: socket.socket, *, is_tls: bool) -> str:
    host, port, *_ = place.getsockname()
    return f"http{'s' if is_tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def split_keys(given: Sequence[str]) -> tuple[str, ...]:
    """The keys, of which several may stand in one text, with commas."""
    return tuple(key.strip() for text in given for key in text.split(",") if key.strip())
