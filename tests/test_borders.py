"""Evictions at the borders of turns: ``SinkCache.mark``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import reference
from families import FAMILIES, REFUSED_OR_EXTRA, VOCAB
from streamllm.cache import SinkCache
from streamllm.slots import Slots
from streamllm.state import load_state, save_state

S, W, B = 2, 12, 3
CAPACITY = S + W + B - 1
TURNS = (7, 3, 4, 1, 1, 5, 6, 40, 2, 9, 3, 8, 7, 6, 5, 4)
"""Tokens of each turn: shorter than a block, of half the window and a little more, and longer than the cache."""
BORDERS = [sum(TURNS[:n]) for n in range(len(TURNS))]
STREAMS = FAMILIES | REFUSED_OR_EXTRA


def kept_turns(t: int, S: int, W: int, B: int) -> list[int]:  # noqa: N803 - as in the reference
    """Indices of the tokens that token ``t`` attends to: whole turns leave if at least half the window stays.

    Written from the rule, over plain lists, beside ``reference.kept``.
    """
    held: list[int] = []
    for new in range(t + 1):
        if len(held) == S + W + B - 1:
            ends = [held.index(border) - S for border in BORDERS if border in held[S + B :] and border <= new]
            whole = bool(ends) and len(held) - S - ends[0] >= W // 2
            held[S : S + (ends[0] if whole else B)] = []
        held.append(new)
    return held


def make_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (sum(TURNS),), generator=torch.Generator().manual_seed(3))


def read(model: torch.nn.Module, cache: SinkCache, turns: Sequence[torch.Tensor], step: int) -> torch.Tensor:
    """Logits [T, V] of turns that are marked, each fed ``step`` tokens at a time."""
    logits = []
    for turn in turns:
        cache.mark()
        with torch.no_grad():
            logits += [model(part[None], past_key_values=cache).logits[0] for part in turn.split(step)]
    return torch.cat(logits)


@pytest.mark.parametrize("step", [1, 5, 1000])
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "bloom", "lfm2"])
def test_turns_leave_whole_as_in_the_literal_stream(name: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the literal stream with lists that drop whole turns; for learned positions the one that rereads."""
    model = STREAMS[name].make(trained=20)
    monkeypatch.setattr(reference, "kept", kept_turns)
    literal = reference.reread_logits if STREAMS[name].positions == "absolute" else reference.literal_logits
    want = literal(model, make_ids(), S, W, B)
    cache = SinkCache(model, S, W, B)
    found = read(model, cache, make_ids().split(TURNS), step)
    assert float((found - want).abs().max()) < 2e-5
    assert cache.tokens_cached == len(kept_turns(sum(TURNS) - 1, S, W, B))


def test_the_first_token_kept_is_a_border_whenever_turns_are_short() -> None:
    model = FAMILIES["llama"].make(trained=64)
    cache = SinkCache(model, S, W, B)
    borders = []
    for count in [5, 4, 6] * 30:
        cache.mark()
        borders.append(cache.tokens_seen)
        for _ in range(count):
            with torch.no_grad():
                model(torch.tensor([[7]]), past_key_values=cache)
            if cache.tokens_evicted:
                assert cache.tokens_evicted + S in borders
            assert len(cache.rows[0].borders) <= CAPACITY


def test_a_mark_before_anything_or_twice_changes_nothing() -> None:
    model = FAMILIES["llama"].make(trained=64)
    cache = SinkCache(model, S, W, B)
    cache.mark()
    cache.mark()
    assert cache.rows[0].borders == ()
    read(model, cache, [make_ids()[:5]], 5)
    cache.mark()
    cache.mark()
    assert cache.rows[0].borders == (5,)


def test_marks_go_along_with_copies_and_files(tmp_path: Path) -> None:
    """Reference: the cache that was never copied or saved."""
    model = FAMILIES["llama"].make(trained=20)
    turns = make_ids().split(TURNS)
    cache = SinkCache(model, S, W, B)
    read(model, cache, turns[:5], 4)
    cache.mark()
    save_state(tmp_path / "a.stream", cache)
    others = [cache.fork(), load_state(tmp_path / "a.stream", model).cache]
    want = read(model, cache, turns[5:], 4)
    for other in others:
        assert torch.equal(read(model, other, turns[5:], 4), want)


def test_rows_of_different_age_keep_their_own_marks() -> None:
    """Reference: each row alone."""
    model = FAMILIES["llama"].make(trained=20)
    ids = make_ids()
    lengths = ([9, 5, 20], [4, 14, 6])
    together = SinkCache(model, S, W, B, batch_size=2)
    alone = [SinkCache(model, S, W, B) for _ in lengths]
    first = [0, 0]
    for turn in zip(*lengths, strict=True):
        together.mark()
        new = [ids[start : start + count] for start, count in zip(first, turn, strict=True)]
        first = [start + count for start, count in zip(first, turn, strict=True)]
        want = [read(model, cache, [part], 1000)[-1] for cache, part in zip(alone, new, strict=True)]
        width = max(turn)
        padded = torch.stack([torch.nn.functional.pad(part, (width - len(part), 0)) for part in new])
        mask = torch.stack([torch.arange(width) >= width - len(part) for part in new]).long()
        with torch.no_grad():
            found = model(padded, attention_mask=mask, past_key_values=together).logits[:, -1]
        assert float((found - torch.stack(want)).abs().max()) < 2e-5


def test_a_stream_in_a_slot_evicts_at_the_same_borders() -> None:
    """Reference: usual forwards."""
    model = FAMILIES["llama"].make(torch.float32, trained=64)
    turns = make_ids().split(TURNS)
    plain, cache = SinkCache(model, S, W, B), SinkCache(model, S, W, B)
    slots = Slots(model, 1, 32)
    for number, turn in enumerate(turns):
        want = read(model, plain, [turn], 1)[-1]
        cache.mark()
        if number == 0:
            read(model, cache, [turn], 1)
            slots.take(cache)
            continue
        for token in turn.tolist():
            found = slots.step([cache], [token])[0]
        assert float((found - want).abs().max()) < 1e-4
        assert cache.rows[0].borders == plain.rows[0].borders
