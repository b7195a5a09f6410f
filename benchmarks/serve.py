"""Does a crowd of clients get what each would get alone, fairly and in bounded memory, and how fast beside others?

``streamllm serve`` answers streaming clients on the embedded model, which are a process of their own. First 64 of them
chat at once, three times, every second one with seeded draws: each text is compared with that of the same request when
nobody else was there, and a sample of them with ``Chat`` in this process. Then they go on with texts, 1, 8, 16 and 64
at a time, and so they do at the servers of others on the same weights; all take turns, and who is not measured stands
still. Which servers those are stands in ``rivals``; one that is not installed is left out by name.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from clients import Asked, Reply, run_clients
from openings import openings
from place import begin, finish
from rivals import rivals
from served import Served, Weight, ours
from target import Target, print_targets
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import streamllm
from streamllm import Chat, SamplingConfig
from streamllm.checkpoint import EMBEDDED

MEGABYTE = 1_000_000

OWN = "streamllm"


@dataclass(frozen=True)
class Setting:
    """What to measure.

    Args:
        clients: of the crowd.
        crowds: how often it comes.
        reply: tokens of each reply in it.
        sample: texts that are compared with ``Chat`` in this process.
        counts: clients at once whose tokens per second are measured.
        tokens: of each text then.
        rounds: of all counts and servers.
        least: texts that one round has at least, so that few clients send several each.
        slots: of our server.
        compiles: whether ours compiles its step.
    """

    clients: int = 64
    crowds: int = 3
    reply: int = 128
    sample: int = 8
    counts: tuple[int, ...] = (1, 8, 16, 64)
    tokens: int = 64
    rounds: int = 3
    least: int = 8
    slots: int = 64
    compiles: bool = False


QUICK = Setting(clients=4, crowds=1, reply=6, sample=2, counts=(1, 2), tokens=4, rounds=1, least=2, slots=4)

PROMISED = 8
"""Clients from which on the promised ratio holds."""


# ---- the crowd


def sampling(number: int) -> dict[str, Any]:
    """How a client draws: every second one greedily, the others by their own seeds."""
    return {"temperature": 1.0, "seed": number} if number % 2 else {"temperature": 0.0}


def chats(setting: Setting, model: str) -> list[Asked]:
    """One request a client."""
    common = {"model": model, "max_tokens": setting.reply, "stream": True, "stream_options": {"include_usage": True}}
    return [
        ("/v1/chat/completions", {**common, **sampling(number), "messages": [{"role": "user", "content": text}]})
        for number, text in enumerate(islice(openings(0), setting.clients))
    ]


def crowd(
    server: Served, setting: Setting, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Any], list[Target]]:
    """Compare the crowd's texts, look at its paces, and weigh the server."""
    asked = chats(setting, server.model)
    before = server.rss
    _tell("one at a time")
    (alone,) = run_clients(server.url, [asked])
    peaks, spreads, differ, errors = [], [], 0, [reply.error for reply in alone if reply.error]
    for number in range(1, setting.crowds + 1):
        _tell(f"{setting.clients} at once, {number} of {setting.crowds}")
        with Weight(server) as weight:
            together = [each[0] for each in run_clients(server.url, [[one] for one in asked])]
        peaks.append(weight.peak)
        errors += [reply.error for reply in together if reply.error]
        differ += sum((a.text, a.finish) != (b.text, b.finish) for a, b in zip(alone, together, strict=True))
        paces = [reply.pace for reply in together if len(reply.times) > 2]
        spreads.append(max(paces) / min(paces))
    differ_here = sum(
        library(model, tokenizer, setting, body) != alone[number].text
        for number, (_, body) in islice(enumerate(asked), setting.sample)
    )
    growth = peaks[-1] / peaks[0] - 1
    targets = [
        Target(f"replies of {setting.clients} clients that failed", len(errors), 0, unit="replies"),
        Target("texts other than alone", differ, 0, unit="texts"),
        Target("texts other than in one process", differ_here, 0, unit="texts"),
        Target("slowest / fastest client, median between tokens", median(spreads), 2),
        Target("growth of the most memory, first to last crowd", growth, 0.05, unit="of what it was"),
    ]
    figures = {
        "texts_compared": setting.crowds * setting.clients,
        "texts_compared_in_one_process": setting.sample,
        "errors": errors[:10],
        "slowest_to_fastest": spreads,
        "bytes": {"before": before, "peaks": peaks, "after": server.rss},
        "requests_running_after": server.figure("streamllm:num_requests_running"),
    }
    return figures, targets


def library(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting, body: Mapping[str, Any]
) -> str:
    """The text that a request gets without a server."""
    draws = SamplingConfig(**{name: body[name] for name in ("temperature", "seed") if name in body})
    with Chat(model, tokenizer, sampling=draws, max_tokens=setting.reply) as chat:
        text: str = chat.send(body["messages"][0]["content"]).text()
    return text


# ---- beside others


@dataclass(frozen=True)
class Round:
    """One measurement of one server."""

    tokens_per_s: float
    cpu_ms: float
    first_s: float
    texts: list[str]


def measure_round(server: Served, setting: Setting, clients: int) -> Round:
    """So many clients at once; each sends one text, or several one after the other.

    Raises:
        RuntimeError: a reply failed.
    """
    each = max(1, setting.least // clients)
    texts = islice(openings(1), clients * each)
    common = {"model": server.model, "max_tokens": setting.tokens, "temperature": 0.0, "stream": True}
    if server.name == OWN:
        common["stream_options"] = {"include_usage": True}  # the others tell it anyhow, or refuse to be asked
    asked: list[Asked] = [("/v1/completions", {**common, "prompt": text}) for text in texts]
    before = server.cpu_s
    found = run_clients(server.url, [asked[i * each : (i + 1) * each] for i in range(clients)])
    replies: list[Reply] = [reply for of_client in found for reply in of_client]
    for reply in replies:
        if reply.error:
            raise RuntimeError(f"{server.name}: {reply.error}")
    seconds = max(reply.times[-1] for reply in replies) - min(reply.sent for reply in replies)
    tokens = sum(reply.tokens for reply in replies)
    cpu_ms = 1000 * (server.cpu_s - before) / tokens
    return Round(tokens / seconds, cpu_ms, median(reply.first for reply in replies), [reply.text for reply in replies])


def beside(
    servers: Sequence[Served], setting: Setting, left_out: dict[str, str]
) -> tuple[dict[str, Any], list[Target]]:
    """Tokens per second of all, in turns; one that fails is left out."""
    rounds: dict[str, dict[int, list[Round]]] = {server.name: {n: [] for n in setting.counts} for server in servers}
    for server in servers:
        server.hold()
    for number in range(setting.rounds + 1):
        for clients in setting.counts:  # the first round warms all of them up
            for server in servers:
                if server.name in left_out:
                    continue
                _tell(f"{server.name}, {clients} clients, round {number}")
                server.go_on()
                try:
                    found = measure_round(server, setting, clients)
                except RuntimeError as error:
                    if server.name == OWN:
                        raise
                    left_out[server.name] = str(error)
                    continue
                finally:
                    server.hold()
                if number:
                    rounds[server.name][clients].append(found)
    for server in servers:
        server.go_on()
    rss = {server.name: server.rss for server in servers if server.name not in left_out}
    figures = {
        name: {
            str(clients): {
                "tokens_per_s": median(found.tokens_per_s for found in those),
                "cpu_ms_per_token": median(found.cpu_ms for found in those),
                "first_text_s": median(found.first_s for found in those),
                "same_texts": _same(those, rounds[OWN][clients]),
            }
            for clients, those in of_server.items()
        }
        for name, of_server in rounds.items()
        if name not in left_out
    }
    return {"servers": figures, "rss_bytes": rss}, _ratios(figures, setting)


def _same(those: Sequence[Round], own: Sequence[Round]) -> float:
    """Share of texts that are the same as ours."""
    pairs = [pair for a, b in zip(those, own, strict=True) for pair in zip(a.texts, b.texts, strict=True)]
    return round(sum(a == b for a, b in pairs) / len(pairs), 4)


def _ratios(figures: Mapping[str, Any], setting: Setting) -> list[Target]:
    """Ours to each mode of transformers, at as many clients as something was promised for."""

    def speed(name: str, clients: int) -> float:
        found: float = figures[name][str(clients)]["tokens_per_s"]
        return found

    return [
        Target(
            f"tokens per second at {clients} clients, {OWN} / {name}",
            speed(OWN, clients) / speed(name, clients),
            3,
            at_least=True,
        )
        for name in figures
        if name.startswith("transformers")
        for clients in setting.counts
        if clients >= PROMISED
    ]


# ---- the whole


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting, folder: Path, python: Path | None
) -> tuple[dict[str, Any], list[Target]]:
    """Run everything; the figures and the targets."""
    with ExitStack() as running:
        flags = [f"--waiting={setting.clients}", *(["--compile"] if setting.compiles else [])]
        own = running.enter_context(ours(folder / "state", slots=setting.slots, resident=setting.clients, flags=flags))
        of_crowd, targets = crowd(own, setting, model, tokenizer)
        servers, left_out = [own], dict[str, str]()
        for rival in () if python is None else rivals(model, tokenizer, folder, python):
            why = rival.why_not()
            if why is None:
                _tell(f"starting {rival.name}")
                try:
                    servers.append(running.enter_context(rival.start()))
                except (RuntimeError, ImportError) as error:
                    why = str(error)
            if why is not None:
                left_out[rival.name] = why
        of_all, more = beside(servers, setting, left_out)
    figures = {
        "setting": asdict(setting),
        "crowd": of_crowd,
        **of_all,
        "left_out": left_out,
        "targets": [target.to_dict() for target in (*targets, *more)],
    }
    return figures, [*targets, *more]


def show(figures: Mapping[str, Any], targets: Sequence[Target]) -> None:
    """Print the tables."""
    width = max(map(len, figures["servers"]))
    print(f"{'tokens per second':<{width}}" + "".join(f"{n:>8}" for n in figures["setting"]["counts"]) + " clients")
    for name, found in figures["servers"].items():
        print(f"{name:<{width}}" + "".join(f"{each['tokens_per_s']:>8.0f}" for each in found.values()))
    for name, why in figures["left_out"].items():
        print(f"{name} is left out: {why}")
    held = figures["crowd"]["bytes"]
    print(
        f"\nthe server holds {held['before'] / MEGABYTE:.0f} MB, with a crowd {max(held['peaks']) / MEGABYTE:.0f} MB, "
        f"afterwards {held['after'] / MEGABYTE:.0f} MB\n"
    )
    print_targets(targets)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slots", type=int, default=Setting.slots, help="of our server (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=Setting.rounds, help="of all servers (default: %(default)s)")
    parser.add_argument("--rival-python", type=Path, help="interpreter that has the servers of others (default: this)")
    parser.add_argument("--compile", action="store_true", help="let our server compile its step; takes minutes")
    parser.add_argument("--alone", action="store_true", help="leave out the servers of others")
    parser.add_argument("--threads", type=int, help="of torch, in this process (default: its own)")
    parser.add_argument("--quick", action="store_true", help="to try the script; writes only to --out")
    parser.add_argument("--out", type=Path, help="where the record goes (default: docs/results/serve.json)")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    model, tokenizer = streamllm.load(dtype="float32")
    record = begin("serve", argv, f"{EMBEDDED}, embedded", "float32")
    python = None if options.alone else options.rival_python or Path(sys.executable)
    setting = QUICK if options.quick else Setting(slots=options.slots, rounds=options.rounds, compiles=options.compile)
    with tempfile.TemporaryDirectory() as folder:
        figures, targets = measure(model, tokenizer, setting, Path(folder), python)
    record.figures.update(figures)
    show(figures, targets)
    finish(record, options.out, quick=options.quick)


if __name__ == "__main__":
    main()
