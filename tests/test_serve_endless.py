"""One unmodified client that resends everything talks to the server far past the window; only new turns are read."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from serving import MODEL, Served, application, listening, said, until
from streamllm.session import Chat

WINDOW, REPLY = 60, 12


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with application(tmp_path, window=WINDOW) as made, listening(made) as server:
        yield server


@pytest.mark.parametrize("turns", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_a_client_that_resends_everything_goes_on_for_ever_and_only_new_turns_are_read(
    served: Served, turns: int
) -> None:
    """Reference: ``Chat`` with the same cache, which is told each message once; the tokens of each, counted by hand."""
    engine = served.service.engine
    config = engine.config
    messages: list[ChatCompletionMessageParam] = []
    total, sessions = 0, set()
    with (
        OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
        Chat(
            engine.model,
            engine.tokenizer,
            sinks=config.sinks,
            window=config.window,
            block=config.block,
            sampling=served.service.sampling,
        ) as alone,
    ):
        for number in range(1, turns + 1):
            text = f" Then {number} birds came to Lily."
            messages.append({"role": "user", "content": text})
            want = alone.send(text, max_tokens=REPLY)
            if number % 2:
                done = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=REPLY)
                reply, usage, facts = done.choices[0].message.content, done.usage, (done.model_extra or {})["streamllm"]
            else:
                chunks = list(
                    client.chat.completions.create(
                        model=MODEL, messages=messages, max_tokens=REPLY, stream=True,
                        stream_options={"include_usage": True},
                    )
                )  # fmt: skip
                reply = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
                usage, facts = chunks[-1].usage, (chunks[-2].model_extra or {})["streamllm"]
            assert reply == want.text(), f"turn {number}"
            messages.append({"role": "assistant", "content": reply})

            assert usage is not None
            assert usage.prompt_tokens_details is not None
            new = len(engine.tokenizer(text)["input_ids"])
            read = usage.prompt_tokens - (usage.prompt_tokens_details.cached_tokens or 0)
            assert 0 < read <= new + 3, f"turn {number}: {read} tokens were read, the message has {new}"
            assert usage.prompt_tokens == total + read or number == 1
            total = usage.prompt_tokens + usage.completion_tokens
            sessions.add(facts["session_id"])
            assert facts["how"] == ("continued" if number > 1 else "new")
            assert facts["turns"] == number
            assert facts["tokens_cached"] <= facts["capacity"] == config.sinks + WINDOW + config.block - 1
        assert len(sessions) == 1
        assert facts["turns_evicted"] > turns - 10
        assert total > (turns // 5) * WINDOW
        assert alone.tokens_seen == facts["tokens_seen"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_conversations_that_left_memory_are_not_kept_in_cycles(tmp_path: Path, is_streamed: bool) -> None:
    """Python looks for cycles seldom, and a conversation has megabytes. Reference: the objects that are alive."""

    def alive() -> int:
        return sum(type(each) is Chat for each in gc.get_objects())

    with (
        application(tmp_path, slots=2, resident=2) as made,
        listening(made) as served,
        httpx2.Client(base_url=served.url, timeout=60) as client,
    ):
        gc.collect()
        gc.disable()
        try:
            before = alive()
            for number in range(6):
                body = {"model": MODEL, "messages": said(f"Story {number}"), "max_tokens": 3, "stream": is_streamed}
                assert client.post("/v1/chat/completions", json=body).status_code == 200
            assert until(lambda: alive() <= before + 2)
        finally:
            gc.enable()
