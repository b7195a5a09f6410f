"""The trained model as an ordinary folder: config, weights, tokenizer, generation config, card, and the figure."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig

from streamllm.checkpoint import first_line
from streamllm.config import SamplingConfig
from streamllm.errors import StateError
from streamllm.models import quiet_libraries
from streamllm.train.card import make_card
from streamllm.train.vocabulary import dress

if TYPE_CHECKING:
    from streamllm.corpus import Source
    from streamllm.train.saved_run import SavedRun
    from streamllm.train.trainer import Trainer


def export(
    trainer: Trainer,
    tokenizer: Tokenizer,
    saved: SavedRun,
    out: Path,
    *,
    sources: Sequence[Source],
    corpus_tokens: int,
    dtype: str,
) -> None:
    """Write the model to ``out``, in which the run lies; file by file, each whole.

    Args:
        trainer: whose weights are written, in ``dtype``.
        tokenizer: as the text was encoded.
        saved: the run, for its log.
        sources: what was trained on, for the card, as is ``corpus_tokens``.

    Raises:
        StateError: the folder cannot be written; the checkpoint is whole.
    """
    recipe, rows, config = trainer.recipe, list(saved.rows()), trainer.model.config
    model = type(trainer.model)(config)
    model.load_state_dict(trainer.model.state_dict())
    model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        do_sample=True,
        temperature=SamplingConfig.temperature,
        top_p=SamplingConfig.top_p,
    )
    card = make_card(
        recipe,
        sources=[(source.file.name, source.weight) for source in sources],
        corpus_tokens=corpus_tokens,
        measured=next((row for row in reversed(rows) if "held_out" in row), None),
        seconds=max((row["seconds"] for row in rows if "seconds" in row), default=0.0),
        machine=_name(trainer.device),
        dtype=dtype,
        step=trainer.step,
    )
    part = saved.folder / "export"
    try:
        shutil.rmtree(part, ignore_errors=True)
        with quiet_libraries():
            model.save_pretrained(part)
            dress(tokenizer, context=recipe.shape.context, begins=recipe.sink == "token").save_pretrained(part)
        (part / "README.md").write_text(card, encoding="utf-8")
        for file in sorted(part.iterdir()):
            file.replace(out / file.name)
        _draw(rows, saved, f"{recipe.shape.parameters() / 1e6:.1f} M parameters, sink: {recipe.sink}")
    except Exception as error:  # of the system, of safetensors, of tokenizers: they have no common base
        why = getattr(error, "strerror", None) or first_line(error)
        raise StateError(
            f"The model cannot be written to {out}: {why}. The checkpoint is whole: make room and go on with --resume."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _name(device: torch.device) -> str:
    """What a card calls the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)} of a processor" if device.type == "cpu" else device.type


def _draw(rows: list[dict[str, Any]], saved: SavedRun, title: str) -> None:
    """The figure of the run, if matplotlib is there."""
    try:
        from streamllm.evaluate.figure import save_figure
        from streamllm.train.figure import draw_run

        save_figure(draw_run(rows, title), saved.folder / "loss")
    except ImportError:
        return
