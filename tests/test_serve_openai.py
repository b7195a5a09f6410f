"""The server with OpenAI's own client, streaming and not, over a real socket."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from serving import MODEL, Served, application, listening, said
from streamllm.loop import generate
from streamllm.server.tokens import Spelling

ONCE = "Once upon a time there was a cat"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with application(tmp_path_factory.mktemp("sessions")) as made, listening(made) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def plain(served: Served, prompt: str, count: int) -> str:
    """The text by the library alone."""
    engine = served.service.engine
    config = engine.config
    return generate(
        engine.model,
        engine.tokenizer,
        prompt,
        sinks=config.sinks,
        window=config.window,
        block=config.block,
        max_tokens=count,
        sampling=served.service.sampling,
    )


# ---- chat completions


def test_a_chat_completion_is_the_librarys_text_and_its_usage_adds_up(served: Served, client: OpenAI) -> None:
    """Reference: ``generate`` with the same cache; the model has no chat template, so texts are joined as they are."""
    done = client.chat.completions.create(model=MODEL, messages=said(ONCE), max_tokens=20)
    (choice,) = done.choices
    assert choice.message.content == plain(served, ONCE, 20)
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    count = len(served.service.engine.tokenizer(ONCE)["input_ids"])
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (count, 20, count + 20)
    facts = done.model_extra["streamllm"]
    assert (facts["how"], facts["turn"], facts["finish"]) == ("new", 1, "length")


def test_a_stream_says_the_same_as_the_whole(client: OpenAI) -> None:
    """Reference: the answer to the same request without a stream."""
    whole = client.chat.completions.create(model=MODEL, messages=said("The dog"), max_tokens=15)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=said("The dog"), max_tokens=15, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].model_extra["streamllm"]["session_id"]


def test_an_unmodified_client_that_resends_everything_is_recognised(client: OpenAI) -> None:
    """Reference: the tokens of the first exchange, which are not read anew."""
    first = client.chat.completions.create(model=MODEL, messages=said("A bird sang"), max_tokens=12)
    reply = first.choices[0].message
    messages = [*said("A bird sang"), reply, {"role": "user", "content": "And then"}]
    second = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert second.model_extra["streamllm"]["how"] == "continued"
    assert second.model_extra["streamllm"]["session_id"] == first.model_extra["streamllm"]["session_id"]
    assert first.usage is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1


def test_stop_seed_and_choices_work_as_there(client: OpenAI) -> None:
    """Reference: the texts of each other."""
    free = client.chat.completions.create(model=MODEL, messages=said(ONCE), max_tokens=30).choices[0].message.content
    assert free is not None
    stop = free.split()[3]
    cut = client.chat.completions.create(model=MODEL, messages=said(ONCE), max_tokens=30, stop=[stop])
    assert cut.choices[0].message.content == free[: free.index(stop)]
    assert cut.choices[0].finish_reason == "stop"

    def drawn(seed: int) -> list[str | None]:
        done = client.chat.completions.create(
            model=MODEL, messages=said(ONCE), max_tokens=20, temperature=1.5, seed=seed, n=2
        )
        return [choice.message.content for choice in done.choices]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 2


def test_log_probabilities_come_with_each_token(client: OpenAI) -> None:
    """Reference: greedy draws take the likeliest token, so the drawn one heads its list."""
    done = client.chat.completions.create(model=MODEL, messages=said(ONCE), max_tokens=5, logprobs=True, top_logprobs=3)
    found = done.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert len(found.content) == 5
    for entry in found.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
        assert bytes(entry.bytes or []).decode() == entry.token


def test_a_bias_forbids_what_would_have_come(served: Served, client: OpenAI) -> None:
    """Reference: the same request without the bias."""
    first = client.completions.create(model=MODEL, prompt=ONCE, max_tokens=1)
    text = first.choices[0].text
    spelling = Spelling(served.service.engine.tokenizer, 0)
    bias = {str(i): -100 for i in range(served.service.vocabulary) if spelling.text(i) == text}
    assert bias
    other = client.completions.create(model=MODEL, prompt=ONCE, max_tokens=1, logit_bias=bias)
    assert other.choices[0].text != text


def test_content_in_parts_and_developer_messages_are_read(client: OpenAI) -> None:
    parts = [{"type": "text", "text": "Once upon"}, {"type": "text", "text": "a time"}]
    messages = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}]
    done = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    assert done.choices[0].message.content


# ---- completions


def test_completions_take_texts_and_ids_and_lists_of_them(served: Served, client: OpenAI) -> None:
    """Reference: ``generate``."""
    ids = served.service.engine.tokenizer("The dog")["input_ids"]
    done = client.completions.create(model=MODEL, prompt=[ONCE, "The dog"], max_tokens=10)
    assert [c.text for c in done.choices] == [plain(served, ONCE, 10), plain(served, "The dog", 10)]
    assert client.completions.create(model=MODEL, prompt=ids, max_tokens=10).choices[0].text == done.choices[1].text
    both = client.completions.create(model=MODEL, prompt=[ids, ids], max_tokens=10, n=2)
    assert [c.text for c in both.choices] == [done.choices[1].text] * 4
    assert both.usage is not None
    assert both.usage.prompt_tokens == 2 * len(ids)


def test_a_stream_of_completions_says_the_same(served: Served, client: OpenAI) -> None:
    """Reference: ``generate``."""
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(model=MODEL, prompt=[ONCE, "A fox"], max_tokens=10, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: plain(served, ONCE, 10), 1: plain(served, "A fox", 10)}


# ---- responses


def test_a_response_goes_on_by_the_id_of_the_one_before(client: OpenAI) -> None:
    first = client.responses.create(model=MODEL, input=ONCE, max_output_tokens=10)
    assert (first.status, first.object) == ("incomplete", "response")
    assert first.incomplete_details is not None
    assert first.incomplete_details.reason == "max_output_tokens"
    second = client.responses.create(
        model=MODEL, input=[{"role": "user", "content": "Then"}], max_output_tokens=5, previous_response_id=first.id
    )
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.total_tokens - 1
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=MODEL, input="x", previous_response_id=first.id)


def test_a_response_that_is_not_stored_cannot_be_asked_for(client: OpenAI) -> None:
    done = client.responses.create(model=MODEL, input=ONCE, max_output_tokens=3, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(done.id)


def test_the_clients_own_stream_helper_puts_a_response_together(client: OpenAI) -> None:
    """Reference: the answer without a stream, and the order that the client itself demands."""
    whole = client.responses.create(model=MODEL, input=ONCE, extra_body={"stop": "."})
    with client.responses.stream(model=MODEL, input=ONCE, extra_body={"stop": "."}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert final.status == "completed"
    assert list(dict.fromkeys(kinds)) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


# ---- models and errors


def test_the_model_is_listed_and_another_one_is_not_there(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    for name in ("gpt-4", MODEL.upper()):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model=name, messages=said("x"))
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
