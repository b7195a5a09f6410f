"""Sampling against ``generate()`` of transformers and against plain formulas."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, RepetitionPenaltyLogitsProcessor

from stories import STORIES
from streamllm.config import SamplingConfig
from streamllm.errors import ConfigError, StateError, StreamLLMError
from streamllm.sampling import Sampler, draw

V = 97

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 1.0, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 2.0, "top_p": 0.8, "top_k": 30, "min_p": 0.02, "repetition_penalty": 1.3},
    {"temperature": 1, "top_p": 1, "repetition_penalty": 2},
]

LIKE_OPENAI: list[dict[str, Any]] = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7, "temperature": 0},
    {"presence_penalty": -0.5, "frequency_penalty": 2, "repetition_penalty": 1.3},
    {"logit_bias": ((3, 4.5), (96, -100), (V, 1), (10**9, 1))},
    {"logit_bias": [[5, -math.inf], [6, 2]], "frequency_penalty": 0.3, "temperature": 1.3, "top_k": 20},
]
"""What a server is asked for; ids beyond the vocabulary are among them."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(STORIES)
    return loaded


def logits_of(seed: int, n: int = 1, spread: float = 3.0) -> torch.Tensor:
    """Random logits [n, V]."""
    return torch.randn(n, V, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_are_those_of_generate(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    """Reference: ``model.generate(do_sample=True)`` with the same seed, whose raw logits the sampler gets."""
    prompt = torch.tensor([[1, 403, 407, 261, 378]])
    torch.manual_seed(11)
    options = {"top_k": 0, "min_p": 0.0} | settings
    options |= {name: float(options[name]) for name in ("temperature", "repetition_penalty") if name in options}
    out = model.generate(
        prompt,
        do_sample=True,
        max_new_tokens=40,
        min_new_tokens=40,
        eos_token_id=None,
        pad_token_id=2,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    sampler = Sampler(SamplingConfig(seed=11, **settings))
    sampler.observe(prompt[0].tolist())
    drawn = [sampler(logits[0]) for logits in out.logits]
    assert drawn == out.sequences[0, prompt.shape[1] :].tolist()
    assert len(set(drawn)) > 5


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_draws_are_those_of_generate(model: PreTrainedModel, penalty: float) -> None:
    """Reference: ``model.generate(do_sample=False)`` with the same penalty."""
    prompt = torch.tensor([[1, 403, 407, 261, 378]])
    out = model.generate(
        prompt,
        do_sample=False,
        max_new_tokens=60,
        eos_token_id=None,
        pad_token_id=2,
        repetition_penalty=penalty,
        output_logits=True,
        return_dict_in_generate=True,
    )
    sampler = Sampler(SamplingConfig(temperature=0, repetition_penalty=penalty))
    sampler.observe(prompt[0].tolist())
    assert [sampler(logits[0]) for logits in out.logits] == out.sequences[0, prompt.shape[1] :].tolist()


def test_draws_follow_the_probabilities() -> None:
    """Reference: softmax of the logits over the temperature; 20 000 draws, five standard deviations."""
    logits, temperature, draws = logits_of(3)[0][:8], 1.7, 20_000
    sampler = Sampler(SamplingConfig(temperature=temperature, top_p=1, seed=5))
    counts = torch.bincount(torch.tensor([sampler(logits) for _ in range(draws)]), minlength=8)
    wanted = torch.softmax(logits / temperature, -1)
    assert ((counts / draws - wanted).abs() < 5 * (wanted * (1 - wanted) / draws).sqrt()).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 0.5, 3.0])
def test_banned_ids_are_never_drawn(temperature: float) -> None:
    """Reference: the ban itself; the three most likely ids are banned, and ids beyond the vocabulary do no harm."""
    logits = logits_of(4)[0]
    banned = logits.topk(3).indices.tolist()
    sampler = Sampler(SamplingConfig(temperature=temperature, seed=1), banned=[*banned, banned[0], V, 10**9])
    before = logits.clone()
    drawn = {sampler(logits) for _ in range(300)}
    assert not drawn & set(banned)
    assert torch.equal(logits, before)
    if temperature < 1e-5:
        assert drawn == {int(logits.topk(4).indices[3])}


def test_the_penalty_reaches_back_as_far_as_its_window_and_no_further() -> None:
    """Reference: the formula on a plain list: logits of the last two ids divided if positive, else multiplied."""
    config = SamplingConfig(temperature=0, repetition_penalty=3.0, repetition_window=2)
    sampler = Sampler(config)
    sampler.observe([1, 2, 3])
    logits = torch.tensor([0.5, 2.0, 2.9, -0.1, 1.2])
    drawn, recent = [], [2, 3]
    for _ in range(8):
        drawn.append(sampler(logits))
        assert list(sampler.recent) == [*recent, drawn[-1]][-2:]
        scores = [(x / 3.0 if x > 0 else x * 3.0) if i in recent else x for i, x in enumerate(logits.tolist())]
        assert drawn[-1] == scores.index(max(scores))
        recent = [*recent, drawn[-1]][-2:]
    assert set(drawn) == {1, 2, 4}


def test_the_sampler_remembers_no_more_than_its_window() -> None:
    """Reference: the window; 100 000 ids are observed."""
    sampler = Sampler(SamplingConfig(repetition_window=50))
    sampler.observe(range(100_000))
    assert list(sampler.recent) == list(range(99_950, 100_000))


@pytest.mark.parametrize("settings", LIKE_OPENAI, ids=str)
@pytest.mark.parametrize("window", [3, 256])
def test_penalties_and_bias_are_those_of_openai(settings: dict[str, Any], window: int) -> None:
    """Reference: transformers' repetition penalty, the published formula and a sum, then a sampler without penalties.

    A second reply counts anew, and prompts never count.
    """
    settings = {"seed": 3, "repetition_window": window, **settings}
    config = SamplingConfig(**settings)
    sampler = Sampler(config, banned=[7])
    plain = Sampler(config.replace(presence_penalty=0, frequency_penalty=0, logit_bias=(), repetition_penalty=1))
    recent: list[int] = []
    for reply in range(2):
        sampler.begin()
        sampler.observe([1, 2, 2, 4, 1])
        recent, drawn = [*recent, 1, 2, 2, 4, 1], []
        for row in logits_of(20 + reply, 60, spread=1.0):
            scores = RepetitionPenaltyLogitsProcessor(config.repetition_penalty)(
                torch.tensor([recent[-window:]]), row[None].clone()
            )[0]
            for token in range(V):
                count = drawn[-window:].count(token)
                scores[token] -= count * config.frequency_penalty + (count > 0) * config.presence_penalty
                scores[token] += dict(config.logit_bias).get(token, 0.0)
            scores[7] = -math.inf
            drawn.append(plain(scores))
            assert sampler(row) == drawn[-1]
            recent.append(drawn[-1])
        assert list(sampler.drawn) == drawn[-window:]
        assert len(set(drawn)) > 5


def test_the_bias_is_that_of_generate(model: PreTrainedModel) -> None:
    """Reference: ``model.generate(sequence_bias=...)`` with the same seed, whose raw logits the sampler gets."""
    prompt, bias = torch.tensor([[1, 403, 407, 261, 378]]), ((261, 2.5), (286, -3.0), (31, 6.0))
    torch.manual_seed(11)
    out = model.generate(
        prompt,
        do_sample=True,
        max_new_tokens=60,
        min_new_tokens=60,
        top_k=0,
        top_p=0.95,
        temperature=0.8,
        eos_token_id=None,
        pad_token_id=2,
        sequence_bias={(token,): number for token, number in bias},
        output_logits=True,
        return_dict_in_generate=True,
    )
    sampler, plain = Sampler(SamplingConfig(seed=11, logit_bias=bias)), Sampler(SamplingConfig(seed=11))
    drawn = [sampler(logits[0]) for logits in out.logits]
    assert drawn == out.sequences[0, prompt.shape[1] :].tolist()
    assert drawn != [plain(logits[0]) for logits in out.logits]


def test_a_token_that_is_drawn_again_and_again_gives_way() -> None:
    """Reference: by hand: 0.25 a time from a lead of 1.1, and a quarter more once; the fifth draw is another."""
    logits = torch.tensor([0.0, 2.0, 0.9])
    sampler = Sampler(SamplingConfig(temperature=0, frequency_penalty=0.25, presence_penalty=0.25))
    sampler.observe([1, 1, 1, 1, 1, 1, 1])
    assert [sampler(logits) for _ in range(5)] == [1, 1, 1, 1, 2]
    sampler.begin([1, 1, 1])
    assert [sampler(logits) for _ in range(2)] == [1, 2]
    sampler.begin()
    assert [sampler(logits) for _ in range(5)] == [1, 1, 1, 1, 2]


def test_a_sampler_remembers_what_counts_instead_of_what_it_drew() -> None:
    """Reference: by hand."""
    sampler = Sampler(SamplingConfig(temperature=0))
    sampler.observe([4])
    assert sampler(torch.tensor([0.0, 1.0])) == 1
    sampler.correct(0)
    assert (list(sampler.recent), list(sampler.drawn)) == ([4, 0], [0])


@pytest.mark.parametrize("settings", [*SETTINGS, {"temperature": 0.0}, *LIKE_OPENAI], ids=str)
def test_a_sampler_from_its_state_goes_on_with_the_same_draws(settings: dict[str, Any]) -> None:
    """Reference: the sampler that was never stopped; the state goes through JSON."""
    rows = logits_of(6, 80)
    whole = Sampler(SamplingConfig(repetition_window=7, **settings), banned=[5, 3])
    whole.observe([9, 9, 4])
    for row in rows[:40]:
        whole(row)
    resumed = Sampler.from_state(json.loads(json.dumps(whole.state())))
    assert (resumed.seed, resumed.recent, resumed.recent.maxlen) == (whole.seed, whole.recent, 7)
    assert (resumed.config, resumed.banned) == (whole.config, (3, 5))
    assert (resumed.drawn, resumed.drawn.maxlen, len(resumed.drawn)) == (whole.drawn, 7, 7)
    assert [resumed(row) for row in rows[40:]] == [whole(row) for row in rows[40:]]


@pytest.mark.parametrize("seed", [2, 3])
def test_a_sampler_with_other_settings_has_drawn_the_same(seed: int) -> None:
    """Reference: what the first one drew; the window is another."""
    first = Sampler(SamplingConfig(seed=2))
    drawn = [first(row) for row in logits_of(6, 30)]
    other = first.changed(SamplingConfig(seed=seed, frequency_penalty=1, repetition_window=4))
    assert (list(other.drawn), other.drawn.maxlen) == (drawn[-4:], 4)


def test_a_state_of_an_older_version_goes_on_as_it_did() -> None:
    """Reference: the fields of version 0.1.0, and the sampler that was never stopped."""
    rows = logits_of(6, 40)
    whole = Sampler(SamplingConfig(seed=1, repetition_penalty=1.2))
    for row in rows[:20]:
        whole(row)
    old = whole.state()
    del old["drawn"]
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_window", "seed")
    old["config"] = {name: old["config"][name] for name in names}
    resumed = Sampler.from_state(json.loads(json.dumps(old)))
    assert (resumed.config, list(resumed.drawn)) == (whole.config, [])
    assert [resumed(row) for row in rows[20:]] == [whole(row) for row in rows[20:]]


def test_the_same_seed_gives_the_same_draws_and_no_seed_a_new_one_each_time() -> None:
    """Reference: a second sampler, made with the seed that the first one tells."""
    rows = logits_of(7, 50)
    first, other = Sampler(SamplingConfig()), Sampler(SamplingConfig())
    again = Sampler(SamplingConfig(seed=first.seed))
    drawn = [first(row) for row in rows]
    assert drawn == [again(row) for row in rows]
    assert first.seed != other.seed
    assert drawn != [other(row) for row in rows]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.8}, {"repetition_penalty": 1.2}], ids=str)
def test_half_precision_logits_are_drawn_from_in_float32(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    """Reference: the same logits turned to float32 beforehand."""
    rows = logits_of(8, 2000).to(dtype)  # so many, because rounding changes one draw in a hundred
    config = SamplingConfig(seed=2, **settings)
    low, full = Sampler(config), Sampler(config)
    assert [low(row) for row in rows] == [full(row.float()) for row in rows]


def make_samplers() -> list[Sampler]:
    """One sampler of each kind: all settings, greedy and not, with bans and without, some of which have read ids."""
    kinds = [*SETTINGS, {}, {"temperature": 0}, {"temperature": 0, "repetition_penalty": 1.4}, *LIKE_OPENAI]
    samplers = []
    for seed in range(2 * len(kinds)):
        config = SamplingConfig(seed=seed, repetition_window=9, **kinds[seed % len(kinds)])
        samplers.append(Sampler(config, banned=[3, seed, 10**6] if seed >= len(kinds) else []))
        samplers[-1].observe(range(seed))
    return samplers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_drawn_together_are_drawn_as_if_alone(dtype: torch.dtype) -> None:
    """Reference: each sampler in a call of its own, for 40 tokens; what it remembers and its state are compared too."""
    together, alone = make_samplers(), make_samplers()
    for step in range(40):
        logits = logits_of(step, len(alone)).to(dtype)
        before = logits.clone()
        assert draw(logits, together) == [sampler(row) for sampler, row in zip(alone, logits, strict=True)]
        assert torch.equal(logits, before)
    assert [sampler.state() for sampler in together] == [sampler.state() for sampler in alone]
    assert draw(torch.empty(0, V), []) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_cannot_be_drawn_from_does_no_harm_to_the_others(bad: float) -> None:
    """Reference: the other rows without it, and the error that the bad row raises alone."""
    together, alone = make_samplers(), make_samplers()
    logits = logits_of(1, len(alone))
    poisoned = [2, len(SETTINGS) + 1, len(alone) - 3]  # the second and the third are greedy or have bans
    for i in poisoned:
        logits[i] = bad
    drawn = draw(logits, together)
    for i, (sampler, row) in enumerate(zip(alone, logits, strict=True)):
        if i in poisoned:
            read, wrote = list(sampler.recent), list(sampler.drawn)
            with pytest.raises(StreamLLMError) as error:
                sampler(row)
            assert (type(drawn[i]), str(drawn[i])) == (StreamLLMError, str(error.value))
            assert (list(together[i].recent), list(together[i].drawn)) == (read, wrote)
        else:
            assert drawn[i] == sampler(row)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_a_clear_error(bad: float, temperature: float) -> None:
    """Reference: the words of the message; torch itself would pick the bad id or die in its kernel."""
    logits = logits_of(9)[0]
    logits[17] = bad
    with pytest.raises(StreamLLMError, match=rf"not finite \(the largest is {bad}\).*load the model with dtype"):
        Sampler(SamplingConfig(temperature=temperature))(logits)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_banning_everything_is_a_clear_error(temperature: float) -> None:
    """Reference: the words of the message."""
    sampler = Sampler(SamplingConfig(temperature=temperature), banned=range(V))
    with pytest.raises(StreamLLMError, match=f"No token is left.*after banning {V} ids; ban fewer"):
        sampler(logits_of(9)[0])


def test_a_bias_that_forbids_everything_is_a_clear_error() -> None:
    """Reference: the words of the message."""
    sampler = Sampler(SamplingConfig(logit_bias=[(token, -math.inf) for token in range(V)]))
    with pytest.raises(StreamLLMError, match=f"No token is left.*after banning 0 ids and a bias for {V}"):
        sampler(logits_of(9)[0])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_minus_infinity_for_some_ids_is_no_error(temperature: float) -> None:
    """Reference: the only id that is left."""
    logits = torch.full((V,), -math.inf)
    logits[31] = -2.0
    assert Sampler(SamplingConfig(temperature=temperature))(logits) == 31


@pytest.mark.parametrize(
    ("settings", "banned", "words"),
    [
        ({"temperature": math.inf}, [], "temperature must be a finite number, you gave inf"),
        ({"repetition_penalty": math.inf}, [], "repetition_penalty must be a finite number, you gave inf"),
        ({"presence_penalty": math.inf}, [], "presence_penalty must be a number from -1,000,000,000 to .* gave inf; 0"),
        ({"frequency_penalty": math.nan}, [], "frequency_penalty must be a number from .* you gave nan"),
        ({"frequency_penalty": True}, [], "frequency_penalty must be a number from .* you gave True"),
        ({"presence_penalty": "1"}, [], "presence_penalty must be a number from .* you gave '1'"),
        ({"logit_bias": {"5": 1}}, [], "logit_bias must be pairs of an id and a bias, you gave {'5': 1}"),
        ({"logit_bias": [5]}, [], "pairs of an id and a bias, one of those you gave is 5"),
        ({"logit_bias": [(5, 1, 2)]}, [], r"one of those you gave is \(5, 1, 2\)"),
        ({"logit_bias": [(-5, 1)]}, [], "each id of logit_bias must be a whole number of at least 0, you gave -5"),
        ({"logit_bias": [("5", 1)]}, [], "each id of logit_bias must be a whole number of at least 0, you gave '5'"),
        ({"logit_bias": [(5, math.inf)]}, [], "the bias of id 5 in logit_bias must be .* forbid the id, you gave inf"),
        ({"logit_bias": [(5, 10**400)]}, [], "the bias of id 5 in logit_bias must be a number from"),
        ({"logit_bias": [(5, math.nan)]}, [], "the bias of id 5 in logit_bias must be .* you gave nan"),
        ({"logit_bias": [(5, 1), (5, 2)]}, [], "logit_bias names id 5 twice, with 1.0 and 2: give each id once"),
        ({}, [3, -1], "banned ids must be at least 0, you gave -1"),
    ],
)
def test_numbers_that_cannot_be_used_are_refused(settings: dict[str, Any], banned: list[int], words: str) -> None:
    """Reference: the words of the message."""
    with pytest.raises(ConfigError, match=words):
        Sampler(SamplingConfig(**settings), banned=banned)


@pytest.mark.parametrize(
    "damage",
    [
        {"generator": "AAAA"},
        {"generator": "???"},
        {"config": {"temperature": -1}},
        {"config": {"heat": 1}},
        {"recent": ["x"]},
        {"drawn": ["x"]},
        {"drawn": None},
        {"config": {"logit_bias": [[1]]}},
        {"seed": None},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(damage: dict[str, Any]) -> None:
    """Reference: the state before the damage, which is accepted."""
    state = Sampler(SamplingConfig()).state()
    assert Sampler.from_state(state).seed == state["seed"]
    with pytest.raises(StateError, match="saved sampler cannot be used"):
        Sampler.from_state(state | damage)


def test_a_state_without_a_field_or_from_another_device_is_refused() -> None:
    """Reference: the words of the messages."""
    state = Sampler(SamplingConfig()).state()
    for name in ("config", "banned", "recent", "seed", "generator"):
        with pytest.raises(StateError, match=f"KeyError: '{name}'"):
            Sampler.from_state({key: value for key, value in state.items() if key != name})
    with pytest.raises(StateError, match="saved on 'cuda' and cannot go on with the same draws on 'cpu'"):
        Sampler.from_state(state | {"device": "cuda"})


def test_the_config_in_the_state_is_the_one_given() -> None:
    """Reference: ``dataclasses.asdict``."""
    config = SamplingConfig(temperature=0.3, top_k=5, seed=4)
    assert Sampler(config).state()["config"] == dataclasses.asdict(config)


@pytest.mark.parametrize("settings", [{}, *SETTINGS, *LIKE_OPENAI], ids=str)
def test_a_config_that_went_through_json_is_the_same(settings: dict[str, Any]) -> None:
    """Reference: the config itself, also as the key of a dictionary."""
    config = SamplingConfig(**settings)
    again = SamplingConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert {config: 1}[again] == 1
