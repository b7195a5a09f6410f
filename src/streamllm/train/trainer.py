"""The training run: read, learn, measure, save, over and over, until the recipe's last step.

A run is a pure function of its recipe, its text and the machine: the order of the text follows from the step, so going
on from a checkpoint equals never having stopped. Knows nothing about files of text, screens or flags. Shapes: ``B``
sequences of ``T`` tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import AdamW, Muon, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from streamllm import zero_sink
from streamllm.errors import StreamLLMError
from streamllm.train.recipe import Recipe
from streamllm.train.sequences import Sequences

FORWARD_NUMBERS = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Logits and attention weights of one forward at most; a step with more is done in several forwards whose gradients add
up."""

HELD_OUT_ROWS = 8
"""Held-out sequences of one forward."""


@dataclass(frozen=True)
class Step:
    """What one step did. ``loss`` in nats a token, ``seconds`` of its own."""

    number: int
    loss: float
    rate: float
    norm: float
    seconds: float


def make_model(recipe: Recipe, *, sink_id: int, end_id: int) -> LlamaForCausalLM:
    """A random Llama of the recipe's shape; the same seed gives the same weights whatever the sink."""
    shape = recipe.shape
    begins = recipe.sink == "token"
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=sink_id if begins else None,
        eos_token_id=end_id,
        pad_token_id=None,
        initializer_range=0.02,
    )
    if recipe.sink == "zero":
        zero_sink.mark(config)
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config)
    if recipe.sink == "zero":
        zero_sink.switch_on(model)
    return model


def make_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[Optimizer]:
    """AdamW for all, or Muon for the matrices inside the layers and AdamW for the rest.

    Muon's steps are scaled to the size of AdamW's, so one learning rate serves both.
    """
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    decay, rate, betas = recipe.weight_decay, recipe.learning_rate, (0.9, 0.95)
    if recipe.optimizer == "muon":
        return [
            Muon(inner, lr=rate, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            AdamW(rest, lr=rate, betas=betas, weight_decay=0.0),
        ]
    groups = [{"params": inner, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    return [AdamW(groups, lr=rate, betas=betas)]


def compute_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """The type of the matrix products: bfloat16 where the device has instructions for it, unless the recipe says."""
    if recipe.dtype != "auto":
        return torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # new in torch 2.10
    fast = device.type == "cpu" and (known.get("avx512_bf16") or known.get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


class Trainer:
    """A run on its way.

    Args:
        recipe: with ``tokens`` known.
        model: in float32, on its device.
        sequences: what is read.
        sink_id: begins every sequence, if the recipe's sink is a token.
        compiles: let torch.compile translate the forward (a C++ compiler is needed on a processor).
        note: is told if that does not work.

    Attributes:
        step: steps done.
        recent: steps that nobody has asked for with ``take_steps`` yet; a run that goes on still knows them.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: LlamaForCausalLM,
        sequences: Sequences,
        *,
        sink_id: int,
        compiles: bool = False,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.recipe, self.model, self.sequences, self.note = recipe, model, sequences, note
        self.device = model.device
        self.dtype = compute_dtype(recipe, self.device)
        self.optimizers = make_optimizers(model, recipe)
        self.step = 0
        self.recent: list[Step] = []
        self.prefix = [sink_id] if recipe.sink == "token" else []
        self._usual_attention = model.config._attn_implementation
        self._compiled: Callable[[Tensor], Tensor] | None = torch.compile(self.loss) if compiles else None
        self._has_compiled = False
        is_plain = compiles and self.device.type == "cpu" and recipe.sink != "zero"
        if is_plain:
            # On a processor, plain attention that is compiled is faster than the fused kernel (measured: 1.0 to 1.2).
            model.set_attn_implementation("eager")
        shape = recipe.shape
        numbers = shape.context * (shape.vocabulary + is_plain * shape.layers * shape.heads * shape.context)
        most = max(1, FORWARD_NUMBERS.get(self.device.type, FORWARD_NUMBERS["cpu"]) // numbers)
        self.parts = next(n for n in range(1, recipe.batch + 1) if recipe.batch % n == 0 and recipe.batch // n <= most)

    @property
    def tokens(self) -> int:
        """Tokens of text read so far."""
        return self.step * self.recipe.step_tokens

    def loss(self, ids: Tensor) -> Tensor:
        """Mean loss in nats over [B, T] sequences."""
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=enabled):
            loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def read(self, step: int) -> Tensor:
        """Sequences [B, T] of a step."""
        batch = torch.from_numpy(self.sequences.batch(step * self.recipe.batch, self.recipe.batch))
        return self.begin(batch).to(self.device)

    def begin(self, ids: Tensor) -> Tensor:
        """[B, T] with the sink token in front, if there is one."""
        return torch.cat([ids.new_tensor(self.prefix).expand(len(ids), -1), ids], dim=1)

    def advance(self) -> Step:
        """Do one step.

        Raises:
            StreamLLMError: the loss or the gradient is no number; the weights are still those before the step.
        """
        began = time.perf_counter()
        # 1. read
        ids = self.read(self.step)
        # 2. gradients, part by part
        total = 0.0
        for part in ids.chunk(self.parts):
            loss = self._forward(part) / self.parts
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise StreamLLMError(
                f"The loss of step {self.step + 1} is {total} (gradient norm {norm}): training has diverged; begin "
                f"again with a learning rate below {self.recipe.learning_rate}."
            )
        # 3. learn
        rate = self.recipe.rate(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * self.recipe.learning_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        step = Step(self.step, total, rate * self.recipe.learning_rate, norm, time.perf_counter() - began)
        self.recent.append(step)
        return step

    def take_steps(self) -> list[Step]:
        """The steps since this was called last."""
        steps, self.recent = self.recent, []
        return steps

    def _forward(self, ids: Tensor) -> Tensor:
        if self._compiled is None:
            return self.loss(ids)
        try:
            loss = self._compiled(ids)
        except Exception as error:  # no compiler, no headers, no support: many kinds
            if self._has_compiled:
                raise
            self.note(f"training is not compiled, which is slower ({type(error).__name__}: is a C++ compiler there?)")
            self._compiled = None
            self.model.set_attn_implementation(self._usual_attention)
            return self.loss(ids)
        self._has_compiled = True
        return loss

    @torch.no_grad()
    def held_out(self, batch: Tensor) -> float:
        """Mean loss in nats over [B, T] sequences that were not trained on, in the type of the training.

        The first token of a sequence is not foreseen, also where a sink token stands before it, so that twins that
        differ in the sink are measured on the same tokens.
        """
        total = 0.0
        for first in range(0, len(batch), HELD_OUT_ROWS):
            rows = batch[first : first + HELD_OUT_ROWS].to(self.device)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits = self.model(input_ids=self.begin(rows), use_cache=False).logits[:, -rows.shape[1] : -1]
            total += float(cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="sum"))
        return total / batch[:, 1:].numel()

    # ---- state

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that the next steps depend on: plain values, and tensors by name."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for number, optimizer in enumerate(self.optimizers):
            for index, slots in optimizer.state_dict()["state"].items():
                for name, value in slots.items():
                    tensors[f"optimizer.{number}.{index}.{name}"] = torch.as_tensor(value)
        return {"step": self.step, "recent": [asdict(step) for step in self.recent]}, tensors

    def load(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from what ``state`` gave.

        Raises:
            KeyError, ValueError, RuntimeError: it belongs to another model.
        """
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(tensors[f"model.{name}"])
        for number, optimizer in enumerate(self.optimizers):
            found: dict[int, dict[str, Tensor]] = {}
            prefix = f"optimizer.{number}."
            for key, tensor in tensors.items():
                if key.startswith(prefix):
                    index, name = key.removeprefix(prefix).split(".", 1)
                    found.setdefault(int(index), {})[name] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": found})
        self.step = int(values["step"])
        self.recent = [Step(**step) for step in values["recent"]]
