"""The page in a real browser, before a real server: chat, sessions, the picture of the cache, and what cannot get in.

Every test leaves with two checks: the browser has not complained, and no request has left the machine.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from visitor import FLAGS, PATIENCE, Visitor, bare, find_browser

MODEL = Path(__file__).resolve().parent / "models" / "stories260K"

expect.set_options(PATIENCE)

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium here; apt-get install chromium")

LONG = {"max_tokens": 40}
ENDLESS = {"endless": True, "max_tokens": None}

Enter = Callable[..., Visitor]


@contextmanager
def served(state: Path, *flags: str) -> Iterator[str]:
    """The address of ``streamllm serve``, in a process of its own that leaves in order."""
    command = [sys.executable, "-m", "streamllm", "serve", "--port", "0", "--state", str(state), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        told = ""
        for line in process.stdout:
            told += line
            if found := re.search(r"http://\S+?:\d+", line):
                break
        else:
            pytest.fail(f"the server did not begin:\n{told}")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield found[0] + "/"
        process.terminate()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tiny model with a small window."""
    with served(tmp_path_factory.mktemp("state"), "-m", str(MODEL), "--window", "124", "--block", "8") as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def enter(browser: Browser, server: str) -> Iterator[Enter]:
    """Make visitors, and see at the end that nothing was wrong and nothing left the machine."""
    visitors: list[Visitor] = []

    def come(settings: dict[str, Any] | None = None, **options: Any) -> Visitor:
        visitors.append(Visitor(browser, server, settings, **options))
        return visitors[-1]

    yield come
    for visitor in visitors:
        visitor.close()
        assert visitor.complaints == []
        outside = [url for url in visitor.asked if not url.startswith((server, f"blob:{server}", "data:"))]
        assert outside == []


# ---- the conversation and the picture


def test_a_conversation_far_past_the_window_shows_what_has_left(enter: Enter) -> None:
    """Reference: the figures and the transcript of the server."""
    visitor = enter(LONG)
    messages = [f"Once upon a time there was cat {number}" for number in range(5)]
    for message in messages:
        visitor.say(message)
    window = visitor.view()["window"]
    assert window["evicted"] > window["capacity"]
    assert visitor.count("evicted") == window["evicted"]
    assert visitor.count("pinned") == window["pinned"]
    assert visitor.count("window") == window["cached"] - window["pinned"]
    assert visitor.said() == messages
    assert visitor.replies() == [reply for _, reply in visitor.transcript()]
    gone = window["turns_evicted"]
    assert gone >= 3
    expect(visitor.page.locator(".turn.gone")).to_have_count(gone)
    expect(visitor.page.locator("#border")).to_have_text(
        f"Turns 1 to {gone} have left the window: forgotten, unless recalled"
    )
    assert f"{window['evicted']:,} evicted".replace(",", "\u202f") in str(
        visitor.page.get_attribute("#strip", "aria-label")
    )
    expect(visitor.last.locator(".meta")).to_contain_text("tok/s")


def test_memory_is_flat_and_the_plots_have_a_bounded_number_of_points(enter: Enter) -> None:
    """Constant from the first eviction on, as the cache says of itself."""
    visitor = enter(LONG)
    for _ in range(4):
        visitor.say("The dog ran")
    curve = visitor.page.evaluate("picture.memory.saved")
    capacity = visitor.view()["window"]["capacity"]
    full = [size for seen, size in zip(curve["xs"], curve["ys"], strict=True) if seen > capacity + 1]
    assert len(full) > 20
    assert max(full) == statistics.mode(full)
    assert full.count(max(full)) > 0.9 * len(full)
    assert curve["xs"] == sorted(curve["xs"])
    found = visitor.page.evaluate(
        "() => { const curve = new Curve(); for (let x = 1; x <= 100000; x += 1) curve.add(x, x < 50000 ? 2 : 4);"
        " return [curve.xs.length, curve.stride, curve.ys[0], curve.ys.at(-1), curve.xs.at(-1), MOST_POINTS]; }"
    )
    assert found[0] <= found[5]
    assert found[1:5] == [512, 2, 4, pytest.approx(100000, abs=512)]


@pytest.mark.parametrize("canvas", ["strip", "plot-memory", "plot-time"])
def test_something_is_drawn(enter: Enter, canvas: str) -> None:
    """Reference: an empty canvas, all of whose pixels are alike."""
    visitor = enter()
    visitor.say("Once upon a time")
    visitor.page.wait_for_timeout(300)
    colours = visitor.page.evaluate(
        f"""() => {{
            const canvas = $("{canvas}");
            const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return new Set(new Uint32Array(pixels.buffer)).size;
        }}"""
    )
    assert colours > 3
    assert visitor.page.get_attribute(f"#{canvas}", "role") == "img"


# ---- a reply that runs


def test_a_reply_is_stopped_and_goes_on(enter: Enter) -> None:
    """Reference: the server's transcript, which has one reply made of both parts."""
    visitor = enter(ENDLESS)
    visitor.say("Once upon a time", waits=False)
    visitor.wait_for_text(100)
    expect(visitor.page.locator("#send")).to_have_text("Stop")
    visitor.page.click("#send")
    visitor.wait()
    expect(visitor.last.locator(".meta")).to_contain_text("stopped")
    (before,) = visitor.replies()
    assert [("Once upon a time", before)] == visitor.transcript()
    visitor.last.get_by_role("button", name="Continue").click()
    visitor.wait_for_text(len(before) * 2 + 100)
    visitor.page.keyboard.press("Escape")
    visitor.wait()
    (after,) = visitor.replies()
    assert after.startswith(before)
    assert len(after) > len(before)
    assert [("Once upon a time", after)] == visitor.transcript()


def test_a_reload_in_the_middle_picks_the_running_reply_up(enter: Enter) -> None:
    """Reference: the text before the reload is the beginning of that after it, which is the server's."""
    visitor = enter(ENDLESS)
    visitor.say("Once upon a time", waits=False)
    visitor.wait_for_text(150)
    visitor.page.reload()
    (before,) = [visitor.page.evaluate("(tab.get('runs') || [])[0]?.length")]
    visitor.wait_for_text(before + 150)
    visitor.page.keyboard.press("Escape")
    visitor.wait()
    assert visitor.said() == ["Once upon a time"]
    assert visitor.replies() == [visitor.transcript()[0][1]]


def test_a_reply_goes_on_while_another_session_is_shown(enter: Enter) -> None:
    visitor = enter(ENDLESS)
    visitor.say("A story that runs", waits=False)
    visitor.wait_for_text(60)
    visitor.page.keyboard.press("Alt+n")
    expect(visitor.page.locator("#empty")).to_be_visible()
    expect(visitor.page.locator("#sessions .busy")).to_have_text("replying")
    visitor.page.get_by_role("button", name="A story that runs").click()
    visitor.wait_for_text(200)
    visitor.page.keyboard.press("Escape")
    visitor.wait()
    assert visitor.replies() == [visitor.transcript()[0][1]]


def test_a_lost_connection_is_picked_up_where_it_broke(enter: Enter) -> None:
    """The page's own stream is broken off, as a network does it; reference: the transcript."""
    visitor = enter(ENDLESS)
    visitor.say("Once upon a time", waits=False)
    visitor.wait_for_text(100)
    first = visitor.page.evaluate(
        "run.controller.abort(), run.controller = new AbortController(), run.turn.prose.length"
    )
    visitor.wait_for_text(first + 200)
    visitor.page.keyboard.press("Escape")
    visitor.wait()
    assert visitor.replies() == [visitor.transcript()[0][1]]


def test_an_endless_story_does_not_grow_the_page(enter: Enter) -> None:
    """Reference: the number of nodes when the bound is reached for the first time."""
    visitor = enter(ENDLESS)
    visitor.page.evaluate("MOST_CHARACTERS = 300, MOST_TAIL = 100")
    visitor.page.get_by_role("button", name="Tell me a story without end").click()
    counts = []
    for length in (600, 1000, 1400):
        visitor.wait_for_text(length)
        counts.append(visitor.page.evaluate("[document.querySelectorAll('*').length, $('turns').textContent.length]"))
    visitor.page.keyboard.press("Escape")
    visitor.wait()
    assert max(nodes for nodes, _ in counts) < counts[0][0] + 60
    assert max(letters for _, letters in counts) < 300 + 100 + 300
    expect(visitor.page.locator(".cut")).to_contain_text("earlier characters of this reply are not shown")
    (shown,) = visitor.replies()
    assert visitor.transcript()[0][1].endswith(shown[-100:])


# ---- turns


def test_the_last_reply_is_drawn_again(enter: Enter) -> None:
    visitor = enter({"seed": None, "max_tokens": 40})
    visitor.say("Once upon a time")
    (first,) = visitor.replies()
    visitor.last.get_by_role("button", name="Regenerate").click()
    visitor.wait()
    assert visitor.transcript() == [("Once upon a time", visitor.replies()[0])]
    assert visitor.replies() != [first]


def test_an_edited_turn_takes_the_later_ones_back(enter: Enter) -> None:
    visitor = enter()
    for message in ("A cat", "A dog", "A cow"):
        visitor.say(message)
    turn = visitor.page.locator(".turn").nth(1)
    turn.hover()
    turn.get_by_role("button", name="Edit").click()
    box = turn.get_by_role("textbox")
    expect(box).to_be_focused()
    expect(turn).to_contain_text("The turn after this one will be taken back.")
    box.fill("A horse")
    box.press("Enter")
    visitor.wait()
    assert visitor.said() == ["A cat", "A horse"]
    assert visitor.transcript() == list(zip(visitor.said(), visitor.replies(), strict=True))


def test_earlier_turns_are_fetched_when_they_are_asked_for_and_later_ones_leave(enter: Enter) -> None:
    """Reference: the numbers of the turns, with bounds so small that both happen."""
    visitor = enter({"max_tokens": 2})
    for number in range(1, 8):
        visitor.say(f"word {number}")
    visitor.page.evaluate("MOST_TURNS = 4; PAGE_OF_TURNS = 3; loadTail()")
    expect(visitor.page.locator(".turn")).to_have_count(3)
    visitor.page.click("#earlier")
    expect(visitor.page.locator(".turn")).to_have_count(4)
    assert visitor.said() == [f"word {number}" for number in (2, 3, 4, 5)]
    expect(visitor.page.get_by_role("button", name="Regenerate")).to_have_count(0)
    visitor.page.click("#later")
    expect(visitor.page.locator(".said").last).to_contain_text("word 7")
    visitor.page.click("#earlier")
    visitor.say("word 8")
    assert visitor.said()[-2:] == ["word 7", "word 8"]


# ---- sessions


def test_a_session_is_renamed_forked_and_deleted(enter: Enter) -> None:
    visitor = enter()
    visitor.say("A little fox")
    visitor.say("went home")
    visitor.page.get_by_role("button", name="Rename the session").click()
    visitor.page.get_by_role("textbox", name="Rename the session").fill("The fox")
    visitor.page.keyboard.press("Enter")
    expect(visitor.page.locator("#title")).to_have_text("The fox")
    assert visitor.view()["title"] == "The fox"
    first = visitor.session
    turn = visitor.page.locator(".turn").first
    turn.hover()
    turn.get_by_role("button", name="Fork from here").click()
    expect(visitor.page.locator(".turn")).to_have_count(1)
    assert visitor.session != first
    visitor.say("met a bear")
    assert visitor.said() == ["A little fox", "met a bear"]
    assert [user for user, _ in visitor.transcript()] == ["A little fox", "met a bear"]
    copy = visitor.session
    visitor.page.get_by_role("button", name="Delete the session").click()
    visitor.page.get_by_role("button", name="Delete", exact=True).click()
    expect(visitor.page.locator("#empty")).to_be_visible()
    ids = [each["id"] for each in visitor.fetch("v1/sessions?limit=1000")["data"]]
    assert first in ids
    assert copy not in ids
    visitor.page.get_by_role("button", name="The fox").click()
    expect(visitor.page.locator(".turn")).to_have_count(2)
    assert visitor.said() == ["A little fox", "went home"]


def test_what_is_exported_can_be_imported(enter: Enter, tmp_path: Path) -> None:
    """Reference: the turns of the session that was exported."""
    visitor = enter()
    visitor.say("A little hen")
    before, first = visitor.transcript(), visitor.session
    with visitor.page.expect_download() as waiting:
        visitor.page.get_by_role("button", name="Export the session").click()
    file = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(file)
    assert "session.json" in zipfile.ZipFile(file).namelist()
    with visitor.page.expect_file_chooser() as choosing:
        visitor.page.get_by_role("button", name="Import a session").click()
    choosing.value.set_files(file)
    visitor.until(f"session && session.id !== {json.dumps(first)}")
    expect(visitor.page.locator(".turn")).to_have_count(1)
    assert visitor.transcript() == before
    visitor.say("went on")
    assert visitor.said() == ["A little hen", "went on"]


@contextmanager
def delayed(page: Page, path: str) -> Iterator[None]:
    """Hold requests of a path back while something is done; behind the block their answers have come."""
    held: list[Route] = []
    is_over = False

    def hold(route: Route) -> None:
        if is_over:
            route.continue_()
        else:
            held.append(route)

    page.route(path, hold)
    try:
        yield
        page.wait_for_timeout(200)  # what would not wait for them has time to go wrong
        assert held
    finally:
        is_over = True
        for route in held:
            route.continue_()
        page.unroute(path)
    for route in held:
        route.request.response()
    page.wait_for_timeout(100)  # and the page has read them


def say_soon(visitor: Visitor, text: str) -> None:
    """Send a message, and do not wait for anything."""
    visitor.page.fill("#say", text)
    visitor.page.press("#say", "Enter")


@pytest.fixture
def two(enter: Enter) -> tuple[Visitor, str, str]:
    """A visitor of a new conversation, and two others, "A little hen" and "A little fox"."""
    visitor, ids = enter(), []
    for text in ("A little hen", "A little fox"):
        visitor.say(text)
        ids.append(visitor.session)
        visitor.page.get_by_role("button", name="New session").first.click()
    return visitor, *ids


def test_what_is_said_while_turns_are_on_their_way_comes_behind_them(two: tuple[Visitor, str, str]) -> None:
    """The answer with the turns of another session is held back while a message is sent in it, and more is typed."""
    visitor, first, _ = two
    with delayed(visitor.page, "**/turns?**"):
        visitor.page.evaluate(f"void openSession({json.dumps(first)})")
        say_soon(visitor, "went on")
        visitor.page.locator("#say").press_sequentially("and on")
    visitor.until("log.total === 2")
    visitor.wait()
    assert visitor.said() == ["A little hen", "went on"]
    assert visitor.transcript() == list(zip(visitor.said(), visitor.replies(), strict=True))
    assert visitor.page.input_value("#say") == "and on"


@pytest.mark.parametrize("path", ["", "/turns?*"])
def test_of_two_sessions_opened_at_once_the_later_one_is_shown(two: tuple[Visitor, str, str], path: str) -> None:
    """The answer about the one that was opened first comes last."""
    visitor, first, second = two
    with delayed(visitor.page, f"**/v1/sessions/{first}{path}"):
        visitor.page.evaluate(f"void openSession({json.dumps(first)})")
        visitor.page.wait_for_timeout(100)
        visitor.page.evaluate(f"openSession({json.dumps(second)})")
    assert visitor.session == second
    assert visitor.said() == ["A little fox"]
    assert visitor.page.url.endswith(second)


@pytest.mark.parametrize("other", ["a session", "a new one"])
def test_a_message_never_goes_to_another_session_than_it_was_said_in(two: tuple[Visitor, str, str], other: str) -> None:
    """While it waits for its session another one is opened, or begun: it is in the box again."""
    visitor, first, second = two
    with delayed(visitor.page, f"**/v1/sessions/{first}"):
        visitor.page.evaluate(f"void openSession({json.dumps(first)})")
        say_soon(visitor, "went on")
        if other == "a session":
            visitor.page.evaluate(f"openSession({json.dumps(second)})")
        else:
            visitor.page.keyboard.press("Alt+n")
    assert visitor.page.input_value("#say") == "went on"
    assert visitor.page.evaluate("run") is None
    assert visitor.said() == (["A little fox"] if other == "a session" else [])


def test_what_is_said_before_the_page_has_found_its_session_is_said_there(enter: Enter) -> None:
    visitor = enter()
    visitor.say("A little hen")
    first = visitor.session
    with delayed(visitor.page, "**/v1/sessions?**"):
        visitor.page.reload()
        visitor.until("models.length > 0")
        say_soon(visitor, "went on")
        visitor.until("log.total === 2")
    visitor.wait()
    assert visitor.session == first
    assert visitor.said() == ["A little hen", "went on"]


def test_a_message_before_a_session_that_does_not_come_is_kept_and_sent_when_it_does(enter: Enter) -> None:
    """As while a model is being loaded; the page goes on by itself to look for its sessions."""
    visitor = enter()
    visitor.say("A little hen")
    first, path = visitor.session, re.compile(r"/v1/(sessions|models)")
    visitor.page.route(path, refuse(503))
    visitor.page.reload()
    alert = visitor.page.get_by_role("alert")
    expect(alert).to_contain_text("The server is not ready")
    say_soon(visitor, "went on")
    expect(visitor.page.locator("#say")).to_have_value("went on")
    visitor.page.unroute(path)
    visitor.until("sessions.length > 0 && session")
    expect(alert).to_have_count(0)
    visitor.page.route(path, refuse(503))
    visitor.page.evaluate("begin()")
    visitor.page.goto(f"{visitor.url}#/{first}")
    visitor.page.reload()
    expect(alert).to_contain_text("The server is not ready")
    say_soon(visitor, "went on")
    visitor.until("retry !== null && retry !== wake")
    visitor.page.unroute(path)
    visitor.page.get_by_role("button", name="Try again").click()
    visitor.until("log.total === 2")
    visitor.wait()
    assert visitor.session == first
    assert visitor.said() == ["A little hen", "went on"]
    assert all("503" in text for text in visitor.complaints)
    visitor.complaints.clear()


def test_trouble_that_comes_before_the_list_of_sessions_stays(enter: Enter) -> None:
    visitor = enter()
    alert = visitor.page.get_by_role("alert")
    with delayed(visitor.page, "**/v1/sessions?**"):
        visitor.page.reload()
        visitor.until("models.length > 0")
        visitor.page.route("**/v1/chat/completions", lambda route: route.abort())
        say_soon(visitor, "A little owl")
        expect(alert).to_contain_text("The server does not answer.")
    expect(alert).to_contain_text("The server does not answer.")
    assert all("Failed to load resource" in text for text in visitor.complaints)
    visitor.complaints.clear()


def test_the_link_to_the_message_stays_in_the_conversation(enter: Enter) -> None:
    visitor = enter()
    visitor.say("A little hen")
    first = visitor.session
    visitor.page.locator("#skip").focus()
    visitor.page.keyboard.press("Enter")
    expect(visitor.page.locator("#say")).to_be_focused()
    assert visitor.session == first
    assert visitor.page.url.endswith(first)


def test_settings_reach_the_server(enter: Enter) -> None:
    """Reference: the body of the request, and the session's system prompt."""
    visitor = enter()
    bodies: list[dict[str, Any]] = []
    visitor.page.on(
        "request", lambda request: bodies.append(request.post_data_json) if "completions" in request.url else None
    )
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_label("System prompt").fill("You tell stories.")
    visitor.page.get_by_label("Temperature").fill("3")
    visitor.page.get_by_role("button", name="Save").click()
    expect(visitor.page.locator("#settings-wrong")).to_have_text("Temperature: this number is out of its range.")
    for name, value in {"Temperature": "0.5", "Top p": "0.9", "Seed": "3", "Most tokens of a reply": "5"}.items():
        visitor.page.get_by_label(name).fill(value)
    visitor.page.get_by_role("switch", name="Recall").click()
    visitor.page.get_by_role("button", name="Save").click()
    visitor.say("Once")
    wanted = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "max_tokens": 5, "recall": "off"}
    assert {name: bodies[0][name] for name in wanted} == wanted
    assert visitor.view()["system"] == "You tell stories."
    assert visitor.view()["window"]["pinned"] > 4
    expect(visitor.last.locator(".meta")).to_contain_text("cut off")
    visitor.page.reload()
    visitor.page.get_by_role("button", name="Settings").click()
    expect(visitor.page.get_by_label("Seed")).to_have_value("3")
    expect(visitor.page.locator("#facts")).to_contain_text("slack =")


def test_what_was_recalled_is_shown_and_marked(enter: Enter) -> None:
    visitor = enter({"max_tokens": 45})
    visitor.say("Zorblax has a hat")
    for _ in range(3):
        visitor.say("Then they went home")
    visitor.say("What does Zorblax have?")
    expect(visitor.last.locator(".recalled")).to_contain_text("Recalled from turn")
    visitor.last.locator("summary").click()
    expect(visitor.last.locator(".recalled blockquote").first).to_contain_text("Zorblax has a hat")
    assert visitor.page.evaluate("picture.recalls.length") > 0


# ---- what cannot get in

NASTY = '<script>window.pwned = 1</script><img src="x" onerror="window.pwned = 1"><b onclick="x">b</b>'


def spoken(text: str) -> Callable[[Route], None]:
    """A server that says this, whatever it is asked."""
    pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
    chunks: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": piece}, "finish_reason": None}]} for piece in pieces
    ]
    chunks.append(
        {"choices": [{"delta": {}, "finish_reason": "stop"}], "streamllm": {"finish": "end", "notes": [text]}}
    )
    body = "".join(f"id: {number}\ndata: {json.dumps(chunk)}\n\n" for number, chunk in enumerate(chunks, 1))
    body += f"id: {len(chunks) + 1}\ndata: [DONE]\n\n"
    return lambda route: route.fulfill(headers={"Content-Type": "text/event-stream", "X-Request-Id": "r"}, body=body)


def test_nothing_that_is_said_or_named_becomes_markup(enter: Enter) -> None:
    """Reference: the fixed set of elements, and the same text to be read."""
    visitor = enter()
    visitor.say("first")
    said = f"{NASTY}\n\n# {NASTY}\n- {NASTY}\n\n```html\n{NASTY}\n```\n[x](javascript:alert(1)) ![y](https://example.org/y.png)"
    visitor.page.route("**/v1/chat/completions", spoken(said))
    visitor.say(NASTY)
    visitor.page.get_by_role("button", name="Rename the session").click()
    visitor.page.locator("#ask-input").fill(NASTY[:100])
    visitor.page.keyboard.press("Enter")
    expect(visitor.page.locator("#title")).to_have_text(NASTY[:100])
    visitor.page.wait_for_timeout(100)
    found = visitor.page.evaluate(
        """() => {
            const inside = [...document.querySelectorAll("#turns *, #sessions *, #title *")];
            return {
                tags: [...new Set(inside.map(each => each.tagName.toLowerCase()))],
                handlers: inside.flatMap(each => each.getAttributeNames()).filter(name => name.startsWith("on")),
                links: [...document.querySelectorAll("#turns a")].map(each => [each.href, each.rel]),
                pwned: window.pwned === undefined,
            };
        }"""
    )
    assert set(found["tags"]) <= set(
        "li div span p details summary blockquote h3 ul ol pre code a button svg use b".split()
    )
    assert found["handlers"] == []
    assert found["links"] == [["https://example.org/y.png", "noopener noreferrer nofollow"]]
    assert found["pwned"]
    assert visitor.replies()[-1].count(bare(NASTY)) == 4
    assert visitor.said()[-1] == NASTY


def test_the_policy_allows_the_one_script_and_nothing_else(enter: Enter, server: str) -> None:
    """Reference: what an injected script, handler and image could do without it."""
    with urllib.request.urlopen(server, timeout=30) as answer:
        policy, page = answer.headers["Content-Security-Policy"], answer.read().decode()
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert "innerHTML" not in page
    assert re.search(r"""(?:src|href)=["']?(?!data:|#)[a-z/]""", page) is None
    visitor = enter()
    visitor.page.evaluate(
        """() => {
            const box = document.createElement("div");
            box.innerHTML = '<img src="https://example.org/x.png" onerror="window.pwned = 1">';
            const script = document.createElement("script");
            script.textContent = "window.pwned = 2";
            document.body.append(box, script);
        }"""
    )
    visitor.page.wait_for_timeout(100)
    assert visitor.page.evaluate("window.pwned === undefined")
    assert len(visitor.complaints) >= 2
    assert all("Content Security Policy" in text for text in visitor.complaints)
    visitor.complaints.clear()
    visitor.asked = [url for url in visitor.asked if "example.org" not in url]


# ---- prose

DRAW = """([text, cuts]) => {
    const root = document.createElement("div");
    const prose = new Prose(root, MOST_CHARACTERS);
    let from = 0;
    for (const cut of cuts) { prose.push(text.slice(from, cut)); prose.draw(); from = cut; }
    prose.push(text.slice(from));
    prose.end();
    return root.innerHTML.replace(/<span[^>]*>|<\\/span>/g, "").replace(/ (rel|target|title|tabindex)="[^"]*"/g, "");
}"""

PROSE = {
    "one\ntwo\n\nthree": "<p>one\ntwo</p><p>three</p>",
    "**b** *i* _j_ `c`": "<p><strong>b</strong> <em>i</em> <em>j</em> <code>c</code></p>",
    "snake_case_name 2 * 3 * 4": "<p>snake_case_name 2 * 3 * 4</p>",
    " a blank before": "<p>a blank before</p>",
    "**bold with *italics* in it**": "<p><strong>bold with <em>italics</em> in it</strong></p>",
    "a **mark that never ends": "<p>a **mark that never ends</p>",
    "# One\n### Three\ntext": "<h3>One</h3><h5>Three</h5><p>text</p>",
    "#no heading": "<p>#no heading</p>",
    "- a\n- b\n  - c\n- d\n\nend": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul><p>end</p>",
    "3. x\n4. y": '<ol><li value="3">x</li><li value="4">y</li></ol>',
    "> q\n> r\n\ns": "<blockquote><p>q\nr</p></blockquote><p>s</p>",
    "```py\nif a < b:\n\n    c()\n```\nd": "<pre><code>if a &lt; b:\n\n    c()</code></pre><p>d</p>",
    "```\nnever closed": "<pre><code>never closed</code></pre>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "see https://a.org/b_c_d.": '<p>see <a href="https://a.org/b_c_d">https://a.org/b_c_d</a>.</p>',
    "[c](http://c.org/)": '<p><a href="http://c.org/">c</a></p>',
    "[x](javascript:a) [y](data:,z) [z](//e.org)": "<p>[x](javascript:a) [y](data:,z) [z](//e.org)</p>",
    "<b>&amp;\\*": "<p>&lt;b&gt;&amp;amp;*</p>",
    "``a`b``": "<p><code>a`b</code></p>",
    "文字**粗**体": "<p>文字<strong>粗</strong>体</p>",
}


def test_prose_is_drawn_alike_however_it_is_cut(enter: Enter) -> None:
    """Reference: the table above, for each text at once, letter by letter, and cut at random."""
    visitor = enter()
    draw = random.Random(5)
    for text, wanted in PROSE.items():
        some = sorted(draw.sample(range(len(text)), len(text) // 3))
        for cuts in ([], list(range(1, len(text))), some):
            assert visitor.page.evaluate(DRAW, [text, cuts]) == wanted, (text, cuts)


def test_a_very_long_reply_costs_no_more_for_each_of_its_letters(enter: Enter) -> None:
    """150,000 letters of each kind, a few at a time: elements stay bounded, and the time is that of one pass."""
    visitor = enter()
    found = visitor.page.evaluate(
        """pieces => pieces.map(piece => {
            const root = document.createElement("div");
            const prose = new Prose(root, 20000);
            const began = performance.now();
            for (let length = 0; length < 150000; length += piece.length) prose.push(piece);
            prose.end();
            const seconds = (performance.now() - began) / 1000;
            return [piece, root.querySelectorAll("*").length, root.textContent.length, seconds];
        })""",
        ["word ", "**b** ", "_", "*a ", "[", "`", "- x\n", "1. y\n", "line\n\n", "```\ncode\n", "> q\n", "#"],
    )
    for piece, elements, letters, seconds in found:
        assert elements < 8000, piece
        assert letters < 25000, piece
        assert seconds < 8, piece


# ---- words, colours, sizes, keys


def test_both_languages_say_everything(enter: Enter) -> None:
    """Reference: the other language's table; each word of one is there in the other, and of the same kind."""
    visitor = enter()
    kind = "Array.isArray(word) ? word.length : typeof word"
    kinds = f"Object.fromEntries(Object.entries(WORDS.{{}}).map(([name, word]) => [name, {kind}]))"
    assert visitor.page.evaluate(kinds.format("en")) == visitor.page.evaluate(kinds.format("zh"))


def test_the_page_speaks_the_language_of_the_browser_until_it_is_told(enter: Enter) -> None:
    visitor = enter(locale="zh-CN")
    expect(visitor.page.locator("#new")).to_have_text("新会话")
    assert visitor.page.get_attribute("html", "lang") == "zh-Hans"
    visitor.say("Once")
    expect(visitor.last.locator(".meta")).to_contain_text("词元/秒")
    visitor.page.get_by_role("button", name="English（英文）").click()
    expect(visitor.page.locator("#new")).to_have_text("New session")
    expect(visitor.last.locator(".meta")).to_contain_text("tok/s")
    visitor.page.reload()
    expect(visitor.page.locator("#new")).to_have_text("New session")
    expect(enter(locale="fr-FR").page.locator("#new")).to_have_text("New session")


def brightness(page: Page) -> int:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) // 3


def test_colours_follow_the_system_until_they_are_chosen(enter: Enter) -> None:
    visitor = enter(color_scheme="dark")
    assert brightness(visitor.page) < 60
    visitor.page.get_by_role("button", name="Colours: as the system has them").click()
    assert brightness(visitor.page) > 200
    visitor.page.reload()
    assert brightness(visitor.page) > 200
    visitor.page.get_by_role("button", name="Colours: light").click()
    assert brightness(visitor.page) < 60


def test_a_phone_scrolls_in_one_direction_only_and_has_a_drawer(enter: Enter) -> None:
    visitor = enter(viewport={"width": 375, "height": 700}, has_touch=True)
    page = visitor.page
    wide = "Math.max(...[...document.querySelectorAll('html, body, main, #log, #turns')].map(each => each.scrollWidth))"
    assert page.evaluate(wide) <= 375
    page.route(
        "**/v1/chat/completions",
        spoken("x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n- " + "https://example.org/" + "z" * 300),
    )
    visitor.say("w" * 300)
    assert page.evaluate(wide) <= 375
    for name in ("log", "cache", "composer"):
        box = page.locator(f"#{name}").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 375
    page.get_by_role("button", name="Sessions").click()
    expect(page.get_by_role("button", name="Close")).to_be_focused()
    expect(page.get_by_role("button", name="New session")).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Sessions")).to_be_focused()
    expect(page.locator("#new")).not_to_be_in_viewport()


def test_everything_can_be_done_without_a_mouse(enter: Enter) -> None:
    visitor = enter()
    page = visitor.page
    expect(page.locator("#say")).to_be_focused()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    visitor.page.wait_for_selector(".turn")
    visitor.wait()
    assert visitor.said() == ["One\ntwo"]
    page.keyboard.press("ArrowUp")
    expect(visitor.last.get_by_role("textbox")).to_be_focused()
    page.keyboard.press("Escape")
    expect(visitor.last.get_by_role("button", name="Edit")).to_be_focused()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(visitor.last.get_by_role("button", name="Edit")).to_be_focused()
    page.keyboard.press("/")
    expect(page.locator("#say")).to_be_focused()
    page.keyboard.press("Alt+e")
    expect(page.get_by_role("switch", name="Endless")).to_have_attribute("aria-checked", "true")
    page.keyboard.press("Alt+r")
    visitor.wait_for_text(40)
    page.keyboard.press("Escape")
    visitor.wait()
    (before,) = visitor.replies()
    page.keyboard.press("Alt+c")
    visitor.wait_for_text(2 * len(before) + 40)
    page.keyboard.press("Escape")
    visitor.wait()
    assert len(visitor.replies()[0]) > len(before)
    page.keyboard.press("Alt+s")
    expect(page.get_by_label("System prompt")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#say")).to_be_focused()
    page.keyboard.press("Alt+l")
    assert page.evaluate("document.activeElement.dataset.session") == visitor.session
    rings = []
    for _ in range(12):
        page.keyboard.press("Tab")
        rings.append(
            page.evaluate("[document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]")
        )
    assert all(style == "solid" for tag, style in rings if tag == "BUTTON")
    page.keyboard.press("Alt+n")
    expect(page.locator("#say")).to_be_focused()
    expect(page.locator("#empty")).to_be_visible()


def test_everything_that_can_be_pressed_has_a_name(enter: Enter) -> None:
    """Reference: the names that the browser computes for those who cannot see the page."""
    visitor = enter()
    visitor.say("Once")
    for opener in ("", "#open-settings", "#open-keys", "#rename", "#delete"):
        if opener:
            visitor.page.click(opener)
        tree = visitor.page.locator("body").aria_snapshot()
        bare_ones = re.findall(
            r"- (?:button|textbox|spinbutton|switch|img|link|dialog|heading)(?: \[[^\]]*\])*:?$", tree, re.M
        )
        assert bare_ones == [], tree
        visitor.page.keyboard.press("Escape")


# ---- trouble


def refuse(status: int, **headers: str) -> Callable[[Route], None]:
    body = {"error": {"message": "no", "type": "x", "param": None, "code": None}}
    return lambda route: route.fulfill(status=status, headers=headers, json=body)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (refuse(429, **{"Retry-After": "3"}), "All places are taken just now. Try again in 3\u00a0seconds."),
        (refuse(503), "The server is not ready: it is loading its model, or shutting down."),
        (refuse(409), "This conversation is answering another window just now."),
        (refuse(400), "The server refused: no"),
        (lambda route: route.abort(), "The server does not answer."),
    ],
    ids=["busy", "leaving", "held", "refused", "gone"],
)
def test_trouble_is_told_in_plain_words_and_nothing_is_lost(enter: Enter, answer: Any, words: str) -> None:
    """What was typed is there again, and trying again sends it."""
    visitor = enter()
    visitor.page.route("**/v1/chat/completions", answer)
    visitor.page.fill("#say", "A little owl")
    visitor.page.press("#say", "Enter")
    expect(visitor.page.get_by_role("alert")).to_contain_text(words.replace("\u00a0", " "))
    expect(visitor.page.locator("#say")).to_have_value("A little owl")
    expect(visitor.page.locator(".turn")).to_have_count(0)
    visitor.page.unroute("**/v1/chat/completions")
    visitor.page.get_by_role("button", name="Try again").click()
    visitor.page.wait_for_selector(".turn")
    visitor.wait()
    assert visitor.transcript() == [("A little owl", visitor.replies()[0])]
    assert all("Failed to load resource" in text for text in visitor.complaints)
    visitor.complaints.clear()


def test_a_key_is_asked_for_and_kept_in_this_tab_only(enter: Enter) -> None:
    """The door of a server that has a key, put before one that has none."""
    visitor = enter()
    page = visitor.page

    def door(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_()
        else:
            refuse(401)(route)

    page.route("**/v1/**", door)
    page.reload()
    asked = page.get_by_role("dialog", name="API key")
    expect(asked).to_contain_text("kept in this tab only")
    page.keyboard.type("open")
    page.keyboard.press("Enter")
    expect(asked).to_contain_text("does not know this key")
    page.keyboard.type("sesame")
    page.keyboard.press("Enter")
    expect(asked).to_be_hidden()
    visitor.say("Once")
    assert page.evaluate(
        "[JSON.stringify(sessionStorage).includes('sesame'), JSON.stringify(localStorage).includes('sesame')]"
    ) == [True, False]
    assert all("401" in text for text in visitor.complaints)
    visitor.complaints.clear()


@pytest.mark.parametrize("way", ["a new tab", "the address"])
def test_a_session_that_is_gone_is_said_to_be(enter: Enter, way: str) -> None:
    visitor = enter()
    if way == "a new tab":
        page = visitor.open("#/there-is-none")
    else:
        page = visitor.page
        page.goto(f"{visitor.url}#/there-is-none")
    expect(page.get_by_role("alert")).to_contain_text("This session is not on the server any more.")
    expect(page.locator("#empty")).to_be_visible()
    assert page.evaluate("location.hash") == ""
    assert all("404" in text for text in visitor.complaints)
    visitor.complaints.clear()


# ---- the picture of the README


@pytest.mark.slow
def test_the_picture_of_the_readme_is_taken(browser: Browser, tmp_path: Path) -> None:
    """``make page`` keeps it: the embedded model after a conversation past its window, with something recalled."""
    picture = Path(os.environ.get("STREAMLLM_PICTURE") or tmp_path / "page.png")
    with served(tmp_path / "state", "--seed", "5") as url:
        visitor = Visitor(browser, url, {"max_tokens": 90, "temperature": 0.7})
        visitor.say("Once upon a time there was a bear called Bruno")
        for message in (
            "In the evening they went home",
            "The next day it rained",
            "Then they met a fox",
            "They danced in the garden",
        ):
            visitor.say(message)
        visitor.say("Who was Bruno?")
        visitor.page.mouse.move(0, 0)
        visitor.page.wait_for_timeout(500)
        visitor.page.screenshot(path=picture)
        assert visitor.count("evicted") > 0
        assert visitor.complaints == []
        visitor.close()
    assert picture.stat().st_size < 200_000
