"""The server against its own OpenAPI document: whatever fits it, or nearly, makes no mistake of the server's."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from starlette.testclient import TestClient

from serving import Served, application

SECONDS = 40.0
"""For all operations together."""

EXAMPLES = 25
"""Requests for each operation and kind."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("sessions")
    with application(folder, max_stream_tokens=2, max_body=100_000) as made:
        yield made


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_schemathesis_finds_no_mistake_of_the_server(served: Served, mode: str) -> None:
    """Reference: statuses below 500, but 503 for want of room; errors have OpenAI's shape."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis
        from schemathesis import GenerationMode

    schema: Any = schemathesis.openapi.from_dict(served.app.openapi())
    end = time.monotonic() + SECONDS / 2
    seen = 0
    with TestClient(served.app, raise_server_exceptions=False) as client:
        for result in schema.get_all_operations():
            operation = result.ok()
            strategy = operation.as_strategy(generation_mode=GenerationMode(mode))

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=strategy)
            def check(case: Any) -> None:
                nonlocal seen
                if time.monotonic() > end:
                    return
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    kwargs = case.as_transport_kwargs(base_url="http://testserver")
                    kwargs.pop("files", None)
                    try:
                        response = client.request(**kwargs)
                    except (UnicodeError, ValueError, TypeError):  # no client could send it
                        return
                seen += 1
                assert response.status_code < 500, (case, response.text[:500])
                if response.status_code >= 400:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    check()
                except Exception as error:
                    if type(error).__name__ not in ("Unsatisfiable", "SkipTest"):  # nothing can be made of it
                        raise
    assert seen > 20
