"""Speed of the sink cache beside plain transformers and beside the reference implementation's scheme.

One run, one process, on a random Llama of the 135M shape: only the shape matters for speed. Two regimes:

* decode, ms per token in the steady state: one token a forward. A turn of ours is two whole eviction cycles of 64
  tokens, so that the cost of evictions is in it; plain transformers is put back to the same context again and again.
* prefill, tokens per second: a prompt of 32,768 tokens through ``streamllm.stream``, beside a prompt of 1,024 tokens
  through the plain model before, amid and after it.

The methods take turns (A B C A B C ...), so that a slower minute of the machine meets all of them; a ratio is the
median over the rounds of the ratio within a round. All methods share one set of weights, run the same model code
(eager Python, no compilation), make logits of the last token only, and (but for ``stream()``, which is greedy) read
the same random ids. The plain model is an object of its own, without the hooks that a SinkCache needs.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from place import begin, finish
from raw_cache import RawCache
from target import Target, print_targets
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from streamllm import Chunk, SamplingConfig, SinkCache, stream
from streamllm.config import CacheConfig

BLOCK = CacheConfig.block
SINKS = CacheConfig.sinks

WARM_UP = 2
"""Tokens before each turn that are not timed: the method before has left its own data in the processor's caches."""


@dataclass(frozen=True)
class Setting:
    """What is measured on what.

    Args:
        hidden .. vocabulary: the model's shape.
        positions: its trained length.
        context: tokens that the plain model has before it, decoding and (its whole prompt) in prefill.
        windows: a short one, for all comparisons, and a long one.
        prompt: tokens of the long prompt.
        reference_tokens: tokens of one turn of the reference scheme, at the short and the long window.
        repeats: plain prefills in a row.
    """

    hidden: int = 576
    intermediate: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    vocabulary: int = 49152
    positions: int = 8192
    context: int = 1024
    windows: tuple[int, int] = (1020, 4092)
    prompt: int = 32768
    reference_tokens: tuple[int, int] = (32, 16)
    repeats: int = 3


QUICK = Setting(64, 128, 2, 4, 2, 512, 1024, 64, (60, 124), 600, (4, 4), 1)
"""For trying out the script; its figures mean nothing."""


def make_models(setting: Setting, attention: str) -> tuple[LlamaForCausalLM, LlamaForCausalLM, LlamaForCausalLM]:
    """Three models of the same weights, in the same memory.

    A plain one, one for the SinkCache to put hooks on, and one with the plain attention of the published code.
    """
    config = LlamaConfig(
        hidden_size=setting.hidden,
        intermediate_size=setting.intermediate,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        vocab_size=setting.vocabulary,
        max_position_embeddings=setting.positions,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config).eval()
    hooked, published = (LlamaForCausalLM(copy.deepcopy(config)).eval() for _ in range(2))
    for model in (hooked, published):
        model.load_state_dict(plain.state_dict(), assign=True)
        model.tie_weights()
    for model, kernel in ((plain, attention), (hooked, attention), (published, "eager")):
        model.set_attn_implementation(kernel)
    return plain, hooked, published


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of ``size`` words, so that ``stream()`` has something to spell."""
    words = {f"w{i}": i for i in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


def make_ids(setting: Setting, count: int) -> Tensor:
    """[1, count] random ids, the same at every call."""
    return torch.randint(setting.vocabulary, (1, count), generator=torch.Generator().manual_seed(0))


# ---- decode


class Method(ABC):
    """One way to decode in the steady state."""

    name: str
    length: int
    """Tokens of one stretch that is timed."""
    stretches: int = 1
    """Stretches of one turn."""

    def rewind(self) -> None:  # noqa: B027  # most methods are steady and need none
        """Get ready for a stretch; not timed."""

    @abstractmethod
    def step(self, token: Tensor) -> None:
        """Read one token [1, 1]."""

    @property
    @abstractmethod
    def context(self) -> int:
        """Tokens that the newest one attends to, itself included."""


class Plain(Method):
    """Plain transformers, put back to just below ``context`` tokens before each stretch, so that this is the mean."""

    length = 32
    stretches = 2 * BLOCK // length

    def __init__(self, model: LlamaForCausalLM, setting: Setting) -> None:
        self.name = f"DynamicCache, context {setting.context:,}"
        self.model = model
        self.begin = setting.context - self.length // 2
        self.cache = DynamicCache(config=model.config)
        _read(model, self.cache, make_ids(setting, self.begin))

    def rewind(self) -> None:
        """Drop the tokens of the stretch before."""
        self.cache.crop(-(self.context - self.begin))

    def step(self, token: Tensor) -> None:
        """Read one token."""
        _read(self.model, self.cache, token)

    @property
    def context(self) -> int:
        """Tokens cached."""
        return self.cache.get_seq_length()


class Ours(Method):
    """A SinkCache in a plain ``model(...)`` loop; a turn is two eviction cycles."""

    length = 2 * BLOCK

    def __init__(self, model: LlamaForCausalLM, setting: Setting, window: int) -> None:
        self.name = f"SinkCache, window {window:,}"
        self.model = model
        self.cache = SinkCache(model, SINKS, window, BLOCK)
        _read(model, self.cache, make_ids(setting, self.cache.capacity + 1))

    def step(self, token: Tensor) -> None:
        """Read one token."""
        _read(self.model, self.cache, token)

    @property
    def context(self) -> int:
        """Tokens cached."""
        return self.cache.tokens_cached


class Streaming(Method):
    """A SinkCache driven by ``streamllm.stream``: greedy, with text and statistics for every token."""

    length = 2 * BLOCK

    def __init__(self, model: LlamaForCausalLM, setting: Setting, window: int) -> None:
        self.name = f"stream(), window {window:,}"
        self.cache = SinkCache(model, SINKS, window, BLOCK)
        self.chunks: Iterator[Chunk] = stream(
            model,
            make_tokenizer(setting.vocabulary),
            make_ids(setting, self.cache.capacity + 1)[0].tolist(),
            sampling=SamplingConfig(temperature=0),
            cache=self.cache,
            on_end="pass",
        )
        next(self.chunks)

    def step(self, token: Tensor) -> None:
        """Read the token drawn last and draw the next; ``token`` is not used."""
        next(self.chunks)

    @property
    def context(self) -> int:
        """Tokens cached."""
        return self.cache.tokens_cached


class Reference(Method):
    """The reference implementation's scheme, see ``raw_cache``."""

    def __init__(self, model: LlamaForCausalLM, setting: Setting, window: int, length: int) -> None:
        kernel = model.config._attn_implementation
        self.name = f"reference scheme ({kernel}), {window:,}"
        self.length = length
        self.model = model
        self.cache = RawCache(model.model, SINKS, window)
        _read(model, self.cache, make_ids(setting, self.cache.size))

    def step(self, token: Tensor) -> None:
        """Evict one token and read one, at its index in the cache."""
        self.cache.make_room(1)
        _read(self.model, self.cache, token, position_ids=torch.tensor([[self.cache.get_seq_length()]]))

    @property
    def context(self) -> int:
        """Tokens cached."""
        return self.cache.get_seq_length()


@dataclass
class Series:
    """What one method took: ms per token of every round, and the tokens attended to, on average."""

    tokens_per_round: int
    context: float = 0.0
    rounds: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return median and spread, ready for JSON."""
        return {"ms_per_token": summary(self.rounds), "context": self.context, "tokens": self.tokens_per_round}


def measure_decode(methods: Sequence[Method], ids: Tensor, rounds: int) -> list[Series]:
    """Let the methods take turns; ``ids`` [1, N] are read by all, each from the first one on."""
    tokens = [ids[:, i : i + 1] for i in range(ids.shape[1])]
    series = [Series(method.length * method.stretches) for method in methods]
    for number in range(rounds):
        _tell(f"decode, round {number + 1} of {rounds}")
        for method, found in zip(methods, series, strict=True):
            milliseconds, found.context = _turn(method, tokens)
            found.rounds.append(milliseconds)
    return series


@torch.no_grad()
def _turn(method: Method, tokens: Sequence[Tensor]) -> tuple[float, float]:
    """One turn: ms per token, and the mean context."""
    for token in tokens[:WARM_UP]:
        method.step(token)
    seconds = 0.0
    contexts: list[int] = []
    for number in range(method.stretches):
        method.rewind()
        stretch = tokens[number * method.length : (number + 1) * method.length]
        began = time.perf_counter()
        for token in stretch:
            method.step(token)
            contexts.append(method.context)
        seconds += time.perf_counter() - began
    return seconds * 1000 / len(contexts), mean(contexts)


@torch.no_grad()
def _read(model: LlamaForCausalLM, cache: Cache, ids: Tensor, **options: Any) -> None:
    """One forward, with the logits of the last token."""
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **options)


# ---- prefill


@dataclass
class Prefill:
    """Tokens per second of every round: the long prompt through our loop, the short one through the plain model."""

    ours: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)


def measure_prefill(plain: LlamaForCausalLM, hooked: LlamaForCausalLM, setting: Setting, rounds: int) -> Prefill:
    """The long prompt in two halves, with plain prefills before, amid and after, of which the median counts."""
    long, short = make_ids(setting, setting.prompt)[0].tolist(), make_ids(setting, setting.context)
    halves = long[: len(long) // 2], long[len(long) // 2 :]
    tokenizer = make_tokenizer(setting.vocabulary)
    _plain_prefill(plain, short)
    found = Prefill()
    for number in range(rounds):
        _tell(f"prefill, round {number + 1} of {rounds}")
        cache = SinkCache(hooked, SINKS, setting.windows[0], BLOCK)
        seconds = 0.0
        shorts = [_plain_prefill(plain, short) for _ in range(setting.repeats)]
        for half in halves:
            began = time.perf_counter()
            for _ in stream(hooked, tokenizer, half, cache=cache, max_tokens=0):
                pass
            seconds += time.perf_counter() - began
            shorts += [_plain_prefill(plain, short) for _ in range(setting.repeats)]
        assert cache.tokens_seen == len(long) - 1  # the last id waits for the forward that makes logits
        found.ours.append(len(long) / seconds)
        found.plain.append(setting.context / median(shorts))
    return found


def _plain_prefill(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Seconds of one forward over ``ids`` into a new cache."""
    began = time.perf_counter()
    _read(model, DynamicCache(config=model.config), ids)
    return time.perf_counter() - began


# ---- all together


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, least, most, and the distance of these two relative to the median."""
    middle = median(values)
    return {
        "median": round(middle, 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "spread": round((max(values) - min(values)) / middle, 4),
        "rounds": [round(value, 4) for value in values],
    }


def ratio(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The ratios within each round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def measure(setting: Setting, rounds: int, prefill_rounds: int, attention: str) -> tuple[dict[str, Any], list[Target]]:
    """Run everything; the figures and the targets."""
    plain, hooked, published = make_models(setting, attention)
    short, long = setting.windows
    _tell("filling the caches")
    methods = (
        Plain(plain, setting),
        Ours(hooked, setting, short),
        Streaming(hooked, setting, short),
        Reference(published, setting, short, setting.reference_tokens[0]),
        Reference(plain, setting, short, setting.reference_tokens[0]),
        Ours(hooked, setting, long),
        Reference(published, setting, long, setting.reference_tokens[1]),
        Reference(plain, setting, long, setting.reference_tokens[1]),
    )
    series = measure_decode(methods, make_ids(setting, 2 * BLOCK), rounds)
    base, ours, looped, reference, best, ours_long, reference_long, best_long = (found.rounds for found in series)
    names = [method.name for method in methods]
    del methods
    prefill = measure_prefill(plain, hooked, setting, prefill_rounds)

    ratios = {
        f"decode: {names[1]} / {names[0]}": ratio(ours, base),
        f"decode: {names[1]} / {names[3]}": ratio(ours, reference),
        f"decode: {names[5]} / {names[6]}": ratio(ours_long, reference_long),
        f"prefill, tokens per s: {setting.prompt:,} through stream() / {setting.context:,} plain": ratio(
            prefill.ours, prefill.plain
        ),
        f"decode: {names[1]} / {names[4]}": ratio(ours, best),
        f"decode: {names[5]} / {names[7]}": ratio(ours_long, best_long),
        f"decode: {names[2]} / {names[0]}": ratio(looped, base),
        f"decode: {names[2]} / {names[1]}": ratio(looped, ours),
    }
    limits = ((1.0, False), (0.6, False), (0.35, False), (0.8, True))
    targets = [
        Target(name, median(values), limit, at_least=at_least)
        for (name, values), (limit, at_least) in zip(ratios.items(), limits, strict=False)
    ]
    figures = {
        "setting": {**asdict(setting), "attention": attention, "sinks": SINKS, "block": BLOCK},
        "decode": {name: found.to_dict() for name, found in zip(names, series, strict=True)},
        "prefill_tokens_per_s": {
            f"stream(), {setting.prompt:,} tokens, window {short:,}": summary(prefill.ours),
            f"DynamicCache, {setting.context:,} tokens": summary(prefill.plain),
        },
        "ratios": {name: summary(values) for name, values in ratios.items()},
        "targets": [target.to_dict() for target in targets],
    }
    return figures, targets


def show(figures: dict[str, Any], targets: Sequence[Target]) -> None:
    """Print the tables."""
    head = f"{'median':>10}{'min':>10}{'max':>10}{'spread':>8}"
    print(f"{'decode, ms per token':<40}{head}{'tokens':>8}{'context':>10}")
    for name, found in figures["decode"].items():
        print(f"{name:<40}{_cells(found['ms_per_token'], 2)}{found['tokens']:>8}{found['context']:>10,.1f}")
    print(f"\n{'prefill, tokens per second':<40}{head}")
    for name, found in figures["prefill_tokens_per_s"].items():
        print(f"{name:<40}{_cells(found, 0)}")
    width = max(map(len, figures["ratios"]))
    print(f"\n{'ratio, median of the rounds':<{width}}{head}")
    for name, found in figures["ratios"].items():
        print(f"{name:<{width}}{_cells(found, 3)}")
    print()
    print_targets(targets)


def _cells(found: dict[str, Any], digits: int) -> str:
    numbers = "".join(f"{found[name]:>10,.{digits}f}" for name in ("median", "min", "max"))
    return f"{numbers}{found['spread']:>8.1%}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of decoding (default: %(default)s)")
    parser.add_argument("--prefill-rounds", type=int, default=3, help="rounds of prefill (default: %(default)s)")
    parser.add_argument("--prompt", type=int, help="tokens of the long prompt (default: 32768)")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to try the script; writes only to --out")
    parser.add_argument("--out", type=Path, help="where the record goes (default: docs/results/speed.json)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own)")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    setting = QUICK if options.quick else Setting()
    if options.prompt is not None:
        setting = Setting(**{**asdict(setting), "prompt": options.prompt})
    shape = (
        f"random Llama: hidden {setting.hidden}, intermediate {setting.intermediate}, {setting.layers} layers, "
        f"{setting.heads} heads, {setting.kv_heads} key-value heads, vocabulary {setting.vocabulary}, tied, "
        f"{setting.positions} positions"
    )
    record = begin("speed", argv, shape, "float32")
    figures, targets = measure(setting, options.rounds, options.prefill_rounds, options.attention)
    record.figures.update(figures)
    show(figures, targets)
    finish(record, options.out, quick=options.quick)


if __name__ == "__main__":
    main()
