"""The model card: what a model is, how it was made, what it reached, and what not to expect of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamllm.train.recipe import Recipe

_SINKS = {
    "token": "Every training sequence began with the sink token `<|sink|>`, which the tokenizer puts in front of a "
    "text. Keep it in the cache (one sink) and the model streams.",
    "zero": "Attention is softmax-off-by-one (a zero sink). Load it with `streamllm.load`: `AutoModelForCausalLM` "
    "alone loads the weights, but computes the ordinary softmax unless `streamllm.zero_sink.switch_on(model)` is "
    "called.",
    "none": "Training sequences were cut anywhere from the text; no token stood in a fixed place.",
}


def make_card(
    recipe: Recipe,
    *,
    sources: Sequence[tuple[str, int]],
    corpus_tokens: int,
    measured: dict[str, Any] | None,
    seconds: float,
    machine: str,
    dtype: str,
    step: int,
) -> str:
    """The card as Markdown with the Hub's header.

    Args:
        recipe: of the run.
        sources: names of the training files and how often an epoch read each.
        corpus_tokens: tokens of all files, each counted once.
        measured: the last row of the log with held-out figures.
        seconds: that the training took.
        machine: what it ran on.
        dtype: of the saved weights.
        step: steps done; fewer than the recipe's in a run that was broken off.
    """
    shape = recipe.shape
    assert recipe.tokens is not None
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [streamllm, attention-sinks]",
        "---",
        "",
        f"# A Llama of {shape.parameters() / 1e6:.2f} M parameters, trained from scratch by streamllm",
        "",
        f"{shape.layers} layers, hidden size {shape.hidden}, {shape.heads} heads ({shape.kv_heads} for keys and "
        f"values), feed-forward {shape.intermediate}, {shape.vocabulary} token ids, tied embeddings, trained on "
        f"sequences of {shape.context} tokens, saved in {dtype}.",
        "",
        _SINKS[recipe.sink],
        "",
        "## Data",
        "",
        f"{corpus_tokens:,} tokens; in an epoch a file is read so many times:",
        "",
        *(f"- `{name}` x {weight}" for name, weight in sources),
        "",
        "## Recipe",
        "",
        f"{recipe.steps:,} steps of {recipe.step_tokens:,} tokens ({recipe.steps * recipe.step_tokens:,} in all), "
        f"{recipe.optimizer}, learning rate {recipe.learning_rate:g} after a warm-up of {recipe.warmup:.1%}, falling "
        f"by a cosine to {recipe.final:.1%} of it, weight decay {recipe.weight_decay:g}, gradients clipped at "
        f"{recipe.clip:g}, seed {recipe.seed}. It took {seconds / 60:,.1f} minutes on {machine}.",
        "",
    ]
    if step < recipe.steps:
        lines += [f"**Unfinished**: broken off after {step:,} steps.", ""]
    if measured:
        (bare, without), (kept, with_) = measured["perplexity"].items()
        lines += [
            "## What it reached",
            "",
            f"On held-out text, after {measured['step']:,} steps:",
            "",
            "| held-out text | loss (nats a token) | bits a byte |",
            "|---|---|---|",
            *(
                f"| {name} | {row['loss']:.4f} | {row['bits_per_byte']:.4f} |"
                for name, row in measured["held_out"].items()
            ),
            "",
            f"Attention on the first token, by layer: {', '.join(f'{x:.1%}' for x in measured['sink_mass'])}. "
            f"Perplexity of a stream with the cache {bare}: {without:.2f}; with {kept}: {with_:.2f}.",
            "",
        ]
    lines += [
        "## Limits",
        "",
        "A small model, for trying things out and for tests. It writes in the manner of its training text and knows "
        "nothing else: it is no assistant, answers no questions, and repeats what its texts contain, their views "
        "included. Streaming keeps it fluent for ever; it does not make it remember what has left its window.",
        "",
    ]
    return "\n".join(lines)
