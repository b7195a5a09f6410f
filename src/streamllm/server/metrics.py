"""Figures for Prometheus: vLLM's names where they exist, and what nobody else has.

Each server has a registry of its own. No label grows: neither sessions nor keys are named. What others count (streams
that run, sessions on disk) is asked for when somebody looks; what is measured for each token is kept cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "streamllm:"

FINISHES = ("stop", "length", "interrupted")

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_LONG = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_SHARES = (0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95, 1.0)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str) -> Counter:
            return Counter(PREFIX + name, text, registry=self.registry)

        def times(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=tuple(buckets), registry=self.registry)

        self.prompt_tokens = counter("prompt_tokens", "Tokens that were read.")
        self.generation_tokens = counter("generation_tokens", "Tokens that were generated.")
        self.tokens_evicted = counter("tokens_evicted", "Tokens that have left a window.")
        self.rebases = counter("rebases", "Replies in which the positions of a window began anew.")
        self.recalled_passages = counter("recalled_passages", "Passages that were put in front of a turn.")
        self.time_to_first_token = times("time_to_first_token_seconds", "From request to first token.", _SECONDS)
        self.inter_token_latency = times("inter_token_latency_seconds", "Between two tokens of a reply.", _TOKEN)
        self.queue_time = times("request_queue_time_seconds", "From request to the first work on it.", _LONG)
        self.window_occupancy = times("window_occupancy", "Share of a cache in use after a reply.", _SHARES)
        self.e2e_latency = times("e2e_request_latency_seconds", "From request to the end of its reply.", _LONG)
        success = Counter(
            PREFIX + "request_success", "Replies that ended well.", ("finished_reason",), registry=self.registry
        )
        self.success = {name: success.labels(name) for name in FINISHES}

    def watch(self, gauges: Callable[[], Iterable[tuple[str, str, float]]]) -> None:
        """Show figures that are asked for when somebody looks: name, text and value of each."""
        self.registry.register(_Gauges(gauges))

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    def __init__(self, gauges: Callable[[], Iterable[tuple[str, str, float]]]) -> None:
        self._gauges = gauges

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        for name, text, value in self._gauges():
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
