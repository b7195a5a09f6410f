"""Recipes: what is refused, how the learning rate goes, and sizes against real models."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from streamllm.errors import ConfigError
from streamllm.train.recipe import OPTIMIZERS, SINKS, SIZES, Recipe, Shape
from streamllm.train.trainer import make_model

SMALL = Shape(hidden=48, layers=3, heads=6, kv_heads=2, intermediate=80, vocabulary=300, context=64)


def llama(shape: Shape, device: str = "cpu") -> LlamaForCausalLM:
    """The model of this shape that is trained, with attention that torch can count."""
    with torch.device(device):
        model = make_model(Recipe(**dataclasses.asdict(shape)), sink_id=1, end_id=0)
    model.set_attn_implementation("eager")
    return model


# ---- sizes


@pytest.mark.parametrize("shape", [SMALL, *SIZES.values()], ids=str)
def test_weights_are_counted_as_a_real_model_has_them(shape: Shape) -> None:
    """Reference: ``LlamaForCausalLM``, without memory for its weights."""
    assert shape.parameters() == llama(shape, "meta").num_parameters()


@pytest.mark.parametrize("shape", [SMALL, dataclasses.replace(SMALL, layers=1, kv_heads=6, context=32)], ids=str)
def test_operations_are_counted_as_a_real_step_does_them(shape: Shape) -> None:
    """Reference: torch's own count of a forward and a backward.

    Plain attention multiplies over the whole context and then hides the future, of which the recipe counts the half
    that is needed; the angles of the rotations, a few operations, it does not count.
    """
    model = llama(shape)
    ids = torch.zeros(2, shape.context, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    hidden_half = 3 * 2 * shape.layers * shape.context * shape.hidden
    angles = shape.hidden // shape.heads  # a product with one number for each angle, of which there are half as many
    counted = counter.get_total_flops() / ids.numel()
    assert counted == pytest.approx(shape.flops_per_token() + hidden_half, abs=angles)


def test_fields_of_the_shape_replace_those_of_the_size() -> None:
    """Reference: the table of sizes."""
    assert Recipe(size="tiny").shape == SIZES["tiny"]
    changes: dict[str, Any] = {"hidden": 64, "layers": 3, "heads": 2, "kv_heads": 2, "context": 100, "vocabulary": 700}
    assert Recipe(size="tiny", **changes).shape == dataclasses.replace(SIZES["tiny"], **changes)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sink", SINKS)
def test_twins_read_the_same_text(size: str, sink: Any) -> None:
    """Reference: the model's context less the place of a sink token, whether there is one or not."""
    recipe = Recipe(size=size, sink=sink, tokens=10**7)
    shape = recipe.shape
    assert recipe.span == shape.context - 1
    assert recipe.batch * shape.context <= recipe.batch_tokens < (recipe.batch + 1) * shape.context
    assert recipe.step_tokens == recipe.batch * recipe.span
    assert abs(recipe.steps * recipe.step_tokens - 10**7) <= recipe.step_tokens / 2


def test_a_run_has_at_least_one_step() -> None:
    """Reference: one token, which is less than a step reads."""
    assert Recipe(tokens=1).steps == 1


def test_a_recipe_comes_back_from_json() -> None:
    """Reference: the recipe itself."""
    recipe = Recipe(size="tiny", sink="zero", tokens=12345, layers=3, learning_rate=1e-3)
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


# ---- the learning rate


@pytest.mark.parametrize(("warmup", "steps"), [(0.02, 500), (0.3, 40), (0.0, 10), (0.5, 3), (0.1, 2)])
def test_the_rate_rises_straight_to_its_highest_and_then_falls_to_its_end(warmup: float, steps: int) -> None:
    """Reference: a straight line, and a half cosine between the last step of the rise and the last of all."""
    recipe = Recipe(warmup=warmup, final=0.05, tokens=steps * Recipe().step_tokens)
    assert recipe.steps == steps
    rates = [recipe.rate(step) for step in range(steps)]
    rise = max(1, round(warmup * steps))
    assert rates[:rise] == pytest.approx([(step + 1) / rise for step in range(rise)])
    assert rates[rise - 1] == max(rates) == 1
    left = steps - rise
    assert rates[rise:] == pytest.approx(
        [0.05 + 0.95 * math.cos(math.pi / 2 * i / left) ** 2 for i in range(1, left + 1)]
    )
    assert rates[-1] == pytest.approx(0.05)
    assert rates[rise - 1 :] == sorted(set(rates[rise - 1 :]), reverse=True)


@pytest.mark.parametrize(("warmup", "final", "steps"), [(1.0, 0.0, 20), (0.02, 0.0, 1), (0.02, 1.0, 20)])
def test_runs_without_a_fall_end_at_the_highest_rate(warmup: float, final: float, steps: int) -> None:
    """Reference: one; these runs only rise, have a single step, or end where they are."""
    recipe = Recipe(warmup=warmup, final=final, tokens=steps * Recipe().step_tokens)
    assert recipe.steps == steps
    assert recipe.rate(steps - 1) == 1


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "huge"}, "no size 'huge' for training; choose one of toy, tiny"),
        ({"sink": "kitchen"}, "no sink 'kitchen' for training; choose one of token, zero, none"),
        ({"dtype": "int8"}, "no dtype 'int8' for training; choose one of auto, float32, bfloat16"),
        ({"optimizer": "sgd"}, f"choose one of {', '.join(OPTIMIZERS)}"),
        ({"tokens": 0}, "tokens must be a whole number of at least 1, you gave 0"),
        ({"tokens": 1e9}, "tokens must be a whole number of at least 1, you gave 1000000000.0"),
        ({"layers": 0}, "layers must be a whole number of at least 1, you gave 0"),
        ({"vocabulary": 257}, "vocabulary must be a whole number of at least 258, you gave 257"),
        ({"context": 31}, "context must be a whole number of at least 32, you gave 31"),
        ({"batch_tokens": 511}, "batch_tokens must be a whole number of at least 512, you gave 511"),
        ({"seed": -1}, "seed must be a whole number of at least 0, you gave -1"),
        ({"seed": 2**63}, "seed must be below 2\\*\\*63, you gave 9223372036854775808"),
        ({"heads": 3}, "hidden 256, 3 heads and 2 kv_heads cannot be"),
        ({"hidden": 100}, "hidden 100, 4 heads and 2 kv_heads cannot be: hidden must be an even multiple of heads"),
        ({"kv_heads": 3}, "4 heads and 3 kv_heads cannot be"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0, you gave 0"),
        ({"learning_rate": math.inf}, "learning_rate must be a number above 0, you gave inf"),
        ({"learning_rate": math.nan}, "learning_rate must be a number above 0, you gave nan"),
        ({"weight_decay": -0.1}, "weight_decay must be a number of at least 0, you gave -0.1"),
        ({"warmup": 1.01}, "warmup must be a number between 0 and 1, you gave 1.01"),
        ({"final": -0.01}, "final must be a number between 0 and 1, you gave -0.01"),
        ({"clip": 0.0}, "clip must be a number above 0, you gave 0.0"),
        ({"clip": math.nan}, "clip must be a number above 0, you gave nan"),
    ],
    ids=str,
)
def test_what_cannot_be_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    """Reference: the words of the message."""
    with pytest.raises(ConfigError, match=message):
        Recipe(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"warmup": 0, "final": 0, "weight_decay": 0},
        {"warmup": 1, "final": 1, "seed": 2**63 - 1, "clip": 1e9},
        {"batch_tokens": 512},
        {"vocabulary": 258, "context": 32, "layers": 1, "heads": 1, "kv_heads": 1, "hidden": 2, "intermediate": 1},
    ],
    ids=str,
)
def test_the_last_values_that_can_be_are_not_refused(changes: dict[str, Any]) -> None:
    """Reference: the values themselves."""
    recipe = Recipe(**changes)
    assert {name: getattr(recipe, name) for name in changes} == changes


def test_the_highest_seed_is_one_that_torch_takes() -> None:
    """Reference: torch and numpy, which draw the weights and the order."""
    before = torch.random.get_rng_state()
    torch.manual_seed(Recipe(seed=2**63 - 1).seed)
    torch.random.set_rng_state(before)


def test_a_recipe_cannot_be_changed() -> None:
    """Reference: the value before."""
    recipe = Recipe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.tokens = 5  # type: ignore[misc]
    assert recipe.tokens is None
