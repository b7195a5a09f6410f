"""The record and the meter, against clocks that are told what to say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc

import pytest

from streamllm import stats
from streamllm.stats import Meter, Stats, peak_rss_bytes


class Clock:
    """Says the times it was given, then goes on in steps of one second."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)
        self.now = 0.0

    def __call__(self) -> float:
        self.now = self.times.pop(0) if self.times else self.now + 1
        return self.now


def record(**changes: int | float | None) -> Stats:
    fields = {
        "tokens_seen": 81920,
        "tokens_generated": 500,
        "tokens_cached": 1024,
        "tokens_evicted": 80896,
        "cache_bytes": 5_242_880,
        "peak_rss_bytes": 123_456_789,
        "prefill_tokens_per_s": 900.0,
        "decode_tokens_per_s": 43.2,
        "ttft_s": 0.25,
    }
    return Stats(**(fields | changes))  # type: ignore[arg-type]


def test_the_line_is_the_one_of_the_style_guide() -> None:
    """Reference: the line written out in the style guide."""
    assert record().line() == "seen 81 920 · cached 1 024 · evicted 80 896 · 43 tok/s"


@pytest.mark.parametrize(
    ("speed", "shown"),
    [
        (0.0, ""),
        (0.04, " · 0.0 tok/s"),
        (1.26, " · 1.3 tok/s"),
        (12.6, " · 13 tok/s"),
        (1234567.0, " · 1 234 567 tok/s"),
    ],
)
def test_the_speed_is_left_out_while_unknown_and_keeps_a_decimal_while_slow(speed: float, shown: str) -> None:
    """Reference: written by hand for each speed."""
    line = record(tokens_seen=7, tokens_cached=7, tokens_evicted=0, decode_tokens_per_s=speed).line()
    assert line == "seen 7 · cached 7 · evicted 0" + shown


def test_the_dict_holds_every_field_and_survives_json() -> None:
    """Reference: the record built again from its JSON."""
    assert Stats(**json.loads(json.dumps(record(ttft_s=None).to_dict()))) == record(ttft_s=None)


def test_the_record_cannot_be_changed() -> None:
    """Reference: the same record before the attempt."""
    before = record()
    with pytest.raises(AttributeError):
        before.tokens_seen = 1  # type: ignore[misc]
    assert before == record()


def test_speeds_and_first_token_come_from_the_clock() -> None:
    """Reference: by hand. Made at 10 s, tokens at 12, 13 and 16 s: first after 2 s, then 2 tokens in 4 s."""
    meter = Meter(Clock(10.0, 12.0, 13.0, 16.0))
    meter.prefilled(100, 0.5)
    meter.prefilled(300, 1.5)
    for _ in range(3):
        meter.decoded()
    seen = meter.stats(seen=403, cached=128, evicted=275, cache_bytes=4096)
    assert (seen.ttft_s, seen.decode_tokens_per_s, seen.prefill_tokens_per_s) == (2.0, 0.5, 200.0)
    assert (seen.tokens_generated, seen.tokens_seen, seen.tokens_cached, seen.tokens_evicted) == (3, 403, 128, 275)
    assert seen.cache_bytes == 4096
    assert seen.peak_rss_bytes > 0


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_speeds_are_zero_before_there_is_anything_to_measure(n_tokens: int) -> None:
    """Reference: by hand; one token has no time between first and last."""
    meter = Meter(Clock())
    for _ in range(n_tokens):
        meter.decoded()
    seen = meter.stats(seen=0, cached=0, evicted=0, cache_bytes=0)
    assert (seen.prefill_tokens_per_s, seen.decode_tokens_per_s) == (0.0, 0.0)
    assert seen.ttft_s == (1.0 if n_tokens else None)


def test_tokens_in_no_time_at_all_do_not_divide_by_zero() -> None:
    """Reference: 0, the sign of an unknown speed."""
    meter = Meter(Clock(1.0, 1.0, 1.0))
    meter.prefilled(5, 0.0)
    meter.decoded()
    meter.decoded()
    seen = meter.stats(seen=7, cached=7, evicted=0, cache_bytes=0)
    assert (seen.prefill_tokens_per_s, seen.decode_tokens_per_s) == (0.0, 0.0)


def test_a_meter_does_not_grow_and_costs_microseconds() -> None:
    """Reference: the memory after the first thousand tokens; 50 microseconds, ten times the aim, for busy machines."""
    meter = Meter()

    def count(n_tokens: int) -> None:
        for i in range(n_tokens):
            meter.decoded()
            meter.stats(seen=i, cached=i, evicted=0, cache_bytes=0)

    count(1000)
    began = time.perf_counter()
    count(20_000)
    assert (time.perf_counter() - began) / 20_000 < 50e-6
    tracemalloc.start()
    count(1000)
    before = tracemalloc.get_traced_memory()[0]
    count(20_000)
    assert tracemalloc.get_traced_memory()[0] - before < 2000
    tracemalloc.stop()


def test_peak_memory_sees_a_large_allocation() -> None:
    """Reference: 200 MB filled in a fresh process raise its peak by 200 MB, to a tenth.

    A process inherits the peak of the one that started it, so a small one stands between it and this one.
    """
    inner = (
        "from streamllm.stats import peak_rss_bytes as peak\n"
        "before = peak(); block = b'x' * 200_000_000; print(peak() - before)"
    )
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert 180_000_000 < int(shown) < 220_000_000


def test_peak_memory_is_zero_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: 0, as the docstring says."""
    monkeypatch.setattr(stats, "resource", None)
    assert peak_rss_bytes() == 0


def test_importing_stats_does_not_import_torch() -> None:
    """Reference: the list of loaded modules of a fresh process."""
    script = "import streamllm.stats, sys; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert shown.strip() == "False"
