"""One step after another: what is learnt, what is saved, and that the same recipe does the same again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from streamllm.errors import StreamLLMError
from streamllm.train.recipe import Recipe
from streamllm.train.sequences import Sequences, Stretch
from streamllm.train.trainer import Trainer, compute_dtype, make_model, make_optimizers

SINK_ID = 1
RECIPE = Recipe(size="toy", vocabulary=300, context=32, tokens=8000, batch_tokens=256, dtype="float32", seed=3)


def trainer(**changes: Any) -> Trainer:
    """A trainer on a text that repeats itself, which even a tiny model can learn."""
    recipe = Recipe(**{**RECIPE.to_dict(), **changes})
    words = np.random.default_rng(0).integers(2, 300, (6, 5))
    tokens = words[np.random.default_rng(1).integers(0, 6, 1000)].ravel().astype(np.uint16)
    sequences = Sequences(tokens, [Stretch(0, len(tokens))], recipe.span, recipe.seed)
    return Trainer(recipe, make_model(recipe, sink_id=SINK_ID, end_id=0), sequences, sink_id=SINK_ID)


def advance(run: Trainer, steps: int) -> list[float]:
    return [run.advance().loss for _ in range(steps)]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("sink", ["token", "zero", "none"])
def test_every_kind_learns(sink: str, optimizer: str) -> None:
    """Reference: the loss of guessing among 300 ids, which is where it begins."""
    losses = advance(trainer(sink=sink, optimizer=optimizer), 30)
    assert losses[0] == pytest.approx(np.log(300), abs=0.3)
    assert losses[-1] < losses[0] - 1.5


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_going_on_equals_never_having_stopped(optimizer: str) -> None:
    """Reference: the uninterrupted run, losses and weights bit for bit."""
    whole = trainer(optimizer=optimizer)
    expected = advance(whole, 12)
    first, second = trainer(optimizer=optimizer), trainer(optimizer=optimizer)
    begun = advance(first, 5)
    second.load(*first.state())
    assert begun + advance(second, 7) == expected
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_parts_of_a_step_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: the same step in one forward."""
    whole = trainer()
    monkeypatch.setattr("streamllm.train.trainer.FORWARD_NUMBERS", {"cpu": 3 * 32 * 300})
    parts = trainer()
    assert (whole.parts, parts.parts) == (1, 4)
    for one, other in ((parts.advance(), whole.advance()) for _ in range(3)):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.norm == pytest.approx(other.norm, rel=1e-3)
    monkeypatch.setattr("streamllm.train.trainer.FORWARD_NUMBERS", {"cpu": 1})
    assert trainer().parts == RECIPE.batch


def test_twins_read_the_same_text_and_begin_with_the_same_weights() -> None:
    """Reference: the run without a sink; only the sink token in front is more."""
    token, zero, none = (trainer(sink=sink) for sink in ("token", "zero", "none"))
    for other in (zero, token):
        for one, two in zip(none.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(one, two)
    assert torch.equal(none.read(7), zero.read(7))
    assert torch.equal(token.read(7)[:, 1:], none.read(7))
    assert (token.read(7)[:, 0] == SINK_ID).all()
    assert token.read(7).shape == (RECIPE.batch, RECIPE.shape.context)


def test_another_seed_gives_other_weights_and_another_order() -> None:
    one, other = trainer(seed=1), trainer(seed=2)
    assert not torch.equal(one.read(0), other.read(0))
    assert not torch.equal(next(one.model.parameters()), next(other.model.parameters()))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_weight_is_trained_by_one_optimizer_and_only_inner_matrices_decay(optimizer: str) -> None:
    """Reference: the list of the model's own parameters."""
    run = trainer(optimizer=optimizer)
    groups = [group for one in make_optimizers(run.model, run.recipe) for group in one.param_groups]
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in run.model.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in run.model.named_parameters() if id(p) in decayed}
    assert names == {name for name, _ in run.model.named_parameters() if name.endswith("_proj.weight")}


def test_the_learning_rate_is_the_recipes() -> None:
    """Reference: the schedule, which has its own tests."""
    run = trainer()
    steps = [run.advance() for _ in range(4)]
    assert [step.rate for step in steps] == [run.recipe.rate(i) * run.recipe.learning_rate for i in range(4)]
    assert {group["lr"] for one in run.optimizers for group in one.param_groups} == {steps[-1].rate}


def test_a_loss_that_is_no_number_stops_before_the_weights_are_spoilt() -> None:
    """Reference: the weights before the step."""
    run = trainer()
    run.advance()
    before = [p.clone() for p in run.model.parameters()]
    loss = run.loss
    run.loss = lambda ids: loss(ids) * torch.nan  # type: ignore[method-assign]
    with pytest.raises(StreamLLMError, match=r"loss of step 2 is nan .* learning rate below 0\.006"):
        run.advance()
    assert run.step == 1
    assert all(torch.equal(one, two) for one, two in zip(before, run.model.parameters(), strict=True))


def test_held_out_loss_is_the_models_own() -> None:
    """Reference: the model's own loss over all sequences at once; the first token of the text counts for no twin."""
    run = trainer(sink="none")
    batch = run.read(3)
    with torch.no_grad():
        assert run.held_out(batch) == pytest.approx(float(run.loss(batch)), rel=1e-5)
        twin = trainer(sink="token")
        logits = twin.model(twin.begin(batch)).logits
    losses = torch.nn.functional.cross_entropy(logits[:, 1:-1].transpose(1, 2), batch[:, 1:])
    assert twin.held_out(batch) == pytest.approx(float(losses), rel=1e-5)


def test_without_a_compiler_training_goes_on_and_says_so() -> None:
    """Reference: the losses of the run that was not to be compiled, also where a run goes on."""
    notes: list[str] = []

    def fail(ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler")

    def lame() -> Trainer:
        run = trainer()
        run.model.set_attn_implementation("eager")
        run._compiled, run.note = fail, notes.append
        return run

    first, second = lame(), lame()
    losses = advance(first, 2)
    second.load(*first.state())
    assert losses + advance(second, 2) == advance(trainer(), 4)
    assert notes == 2 * ["training is not compiled, which is slower (RuntimeError: is a C++ compiler there?)"]
    assert second.model.config._attn_implementation == "sdpa"


def test_an_error_of_a_compiled_step_is_not_taken_for_a_missing_compiler() -> None:
    """Reference: the error itself."""
    run = trainer()
    run._compiled = run.loss
    run.advance()

    def fail(ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    run._compiled = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        run.advance()


def test_products_are_in_bfloat16_only_where_that_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: what the processor says of itself."""
    cpu = torch.device("cpu")
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda fast=fast: {"avx512_bf16": fast})
        assert compute_dtype(Recipe(dtype="auto"), cpu) == dtype
    assert compute_dtype(Recipe(dtype="float32"), cpu) == torch.float32
    assert compute_dtype(Recipe(dtype="bfloat16"), cpu) == torch.bfloat16
