"""A person at the page: a browser that types, presses and looks, and notes every complaint and every request.

Needs Chromium; ``find_browser`` says where it is.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.request
from typing import Any

from playwright.sync_api import Browser, Locator, Page

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

PATIENCE = 60_000
"""Milliseconds to wait for anything."""


def find_browser() -> str | None:
    """The browser's program; ``None``: there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def bare(text: str) -> str:
    """A text without blanks, which a page lays out as it likes."""
    return re.sub(r"\s+", "", text)


class Visitor:
    """One tab of a browser that keeps nothing from others.

    Args:
        url: of the server.
        settings: of the page, such as ``max_tokens``.
        options: of the browser's context, such as ``locale`` or ``viewport``.

    Attributes:
        complaints: what the browser wrote to its console, or could not catch.
        asked: addresses of all requests.
    """

    def __init__(self, browser: Browser, url: str, settings: dict[str, Any] | None = None, **options: Any) -> None:
        self.url = url
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1280, "height": 800}, **options})
        self.context.set_default_timeout(PATIENCE)
        text = json.dumps(json.dumps({"max_tokens": 24, "temperature": 1, "seed": 7, **(settings or {})}))
        self.context.add_init_script(
            f"localStorage.getItem('streamllm:settings') || localStorage.setItem('streamllm:settings', {text})"
        )
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page = self.open()

    def open(self, where: str = "") -> Page:
        """Another tab, at a part of the page."""
        page = self.context.new_page()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda told: self._hear(told.type, told.text))
        page.goto(self.url + where)
        self.until("models.length > 0", page)
        return page

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning", "assert"):
            self.complaints.append(text)

    def close(self) -> None:
        """Leave."""
        self.context.close()

    # ---- what a person does

    def say(self, text: str, *, waits: bool = True) -> None:
        """Type a message, press Enter, and read the reply to its end."""
        before = self.page.evaluate("log.total")
        self.page.fill("#say", text)
        self.page.press("#say", "Enter")
        self.until(f"log.total > {before}")
        if waits:
            self.wait()

    def wait(self) -> None:
        """Wait until no reply runs, and the list of sessions knows it."""
        self.until("run === null && !document.querySelector('#sessions [aria-current] .busy')")

    def wait_for_text(self, characters: int) -> None:
        """Wait until the running reply is so long."""
        self.until(f"run && run.turn.prose.length >= {characters}")

    def until(self, condition: str, page: Page | None = None) -> None:
        """Wait for a condition of the page; the browser's own way to wait is forbidden by the page's policy."""
        end = time.monotonic() + PATIENCE / 1000
        while not (page or self.page).evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, f"this never came: {condition}"
            (page or self.page).wait_for_timeout(25)

    # ---- what a person sees

    @property
    def last(self) -> Locator:
        """The newest turn."""
        return self.page.locator(".turn").last

    def said(self) -> list[str]:
        """What the person said, turn by turn."""
        return [text.partition(": ")[2] for text in self.page.locator(".said > div").all_text_contents()]

    def replies(self) -> list[str]:
        """What the model said, without blanks."""
        return [bare(text) for text in self.page.locator(".reply").all_text_contents()]

    def names(self) -> list[str]:
        """The sessions in the list."""
        return self.page.locator("#sessions b").all_text_contents()

    def count(self, name: str) -> int:
        """A figure of the strip, such as ``evicted``."""
        return int(re.sub(r"\D", "", self.page.inner_text(f"#n-{name}").partition("/")[0]))

    # ---- what the server has

    @property
    def session(self) -> str:
        """The id of the session that is shown."""
        return self.page.url.partition("#/")[2]

    def fetch(self, path: str) -> Any:
        """JSON of the server, past the page."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def view(self) -> Any:
        """The session, as the server has it."""
        return self.fetch(f"v1/sessions/{self.session}")

    def transcript(self) -> list[tuple[str, str]]:
        """What was said, as the server has it; replies without blanks."""
        found = self.fetch(f"v1/sessions/{self.session}/turns?limit=1000")["data"]
        return [(turn["user"], bare(turn["reply"])) for turn in found]
