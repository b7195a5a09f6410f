"""A stream that can be checked: beside the cache, the keys and values of its tokens as the model gave them.

A ``Witness`` is the cache itself, under test; it remembers of every token that is cached what arrived and where, and
forgets what is evicted, so that its memory is bounded. It knows neither how keys are turned (``exact``) nor the text.
Shapes: one row, ``H`` heads, ``N`` cached tokens, ``D`` head size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from streamllm.atomic import replacing
from streamllm.cache import SinkCache
from streamllm.errors import ConfigError
from streamllm.layer import SinkLayer

_CAME = "came"


@dataclass
class Arrivals:
    """What one layer was given, of the tokens that it still holds.

    Args:
        states: keys and values as the model gave them, [1, H, N, D] each.
        positions: [N] at which they arrived.
        restarts: [N] of positions, before they arrived.
    """

    states: tuple[Tensor, Tensor]
    positions: Tensor
    restarts: Tensor

    def cut(self, head: int, count: int) -> Arrivals:
        """The first ``head`` tokens and the newest ones, ``count`` in all."""
        total = len(self.positions)
        head = min(head, count)
        kept = torch.cat([torch.arange(head), torch.arange(total - count + head, total)])
        keys, values = (state[:, :, kept.to(state.device)] for state in self.states)
        return Arrivals((keys, values), self.positions[kept], self.restarts[kept])


class Witness(SinkCache):
    """A ``SinkCache`` of one row that remembers what arrived; arguments and errors are the same.

    Attributes:
        restarts: how often positions have begun anew, judged by what the model was told.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if len(self.rows) != 1:
            raise ConfigError(f"A witness watches one row, you asked for {len(self.rows)}.")
        self._forget()

    def _forget(self) -> None:
        self.restarts = 0
        self.arrivals: dict[int, Arrivals] = {}
        self._next = 0  # position that follows the newest token's
        self._arriving: dict[int, tuple[Tensor, Tensor]] = {}
        self._told = torch.empty(0, dtype=torch.long)

    # ---- what transformers and the gate call

    def enter(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Begin a forward; remember the positions that the model is told."""
        supplied = super().enter(*args, **kwargs)
        self._arriving = {}
        self._told = supplied["position_ids"][0].cpu()
        self._follow(int(self._told[0]))
        return supplied

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the states of a layer; remember them."""
        self._arriving[layer_idx] = (key_states.detach().clone(), value_states.detach().clone())
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def leave(self) -> None:
        """End the forward; forget what was evicted."""
        super().leave()
        new = torch.full_like(self._told, self.restarts)
        for index, (keys, values) in self._arriving.items():
            before = self.arrivals.get(index) or Arrivals(
                (keys[:, :, :0], values[:, :, :0]), self._told[:0], self._told[:0]
            )
            pairs = zip(before.states, (keys, values), strict=True)
            both = tuple(torch.cat(pair, dim=2) for pair in pairs)
            self.arrivals[index] = Arrivals(
                (both[0], both[1]), torch.cat([before.positions, self._told]), torch.cat([before.restarts, new])
            )
        self._arriving = {}
        self._next = int(self._told[-1]) + 1
        self._cut()

    def reset(self, row: int | None = None) -> None:
        """Forget everything."""
        super().reset(row)
        self._forget()

    # ---- what a checker calls

    def settle(self) -> None:
        """Carry out an eviction that is due now rather than at the next token; the stream stays the same."""
        if self.tokens_cached == self.capacity:
            self.evict(self.config.block)
            self._follow(int(self.position_ids(1)))
            self._cut()

    def offsets(self, index: int) -> Tensor:
        """[N] how far each token that layer ``index`` holds lies now from where it arrived.

        Positions are without a gap and end before the one that follows.
        """
        arrived = self.arrivals[index].positions
        return torch.arange(self._next - len(arrived), self._next) - arrived

    def head(self, index: int) -> int:
        """Pinned tokens that layer ``index`` holds: none, where the model brings its own window."""
        pinned = self.rows[0].pinned if self.spec.layers[index].kind == "sink" else 0
        return min(pinned, len(self.arrivals[index].positions))

    @property
    def turns(self) -> int:
        """Most restarts in the life of a cached key that is not pinned."""
        lives = (self.restarts - came.restarts[self.head(index) :] for index, came in self.arrivals.items())
        return max(int(life.max()) if len(life) else 0 for life in lives)

    def _follow(self, position: int) -> None:
        self.restarts += position < self._next
        self._next = position

    def _cut(self) -> None:
        for index, came in self.arrivals.items():
            layer = self.layers[index]
            assert isinstance(layer, SinkLayer)
            self.arrivals[index] = came.cut(self.head(index), layer.get_seq_length())

    # ---- on disk

    def save(self, path: Path, notes: Any) -> None:
        """Write the stream, what arrived, and JSON-able ``notes`` to ``path``, wholly or not at all.

        Raises:
            OSError: the disk is full.
        """
        snapshot, tensors = self.snapshot()
        for index, came in self.arrivals.items():
            named = dict(zip(("keys", "values"), came.states, strict=True))
            named |= {"positions": came.positions, "restarts": came.restarts}
            tensors |= {f"{_CAME}.{index}.{name}": tensor for name, tensor in named.items()}
        header = json.dumps({"cache": snapshot, "restarts": self.restarts, "next": self._next, "notes": notes})
        with replacing(path) as temporary:
            save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, temporary, metadata={_CAME: header})

    @classmethod
    def load(cls, path: Path, model: PreTrainedModel) -> tuple[Witness, Any] | None:
        """The stream and the notes that ``save`` wrote; ``None`` if there is no file that can be used."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()[_CAME])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dictionary
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            return None
        witness = cls.restore(model, header["cache"], tensors)
        assert isinstance(witness, Witness)
        witness.restarts, witness._next = header["restarts"], header["next"]
        for index in sorted({int(name.split(".")[1]) for name in tensors if name.startswith(_CAME)}):
            keys, values, positions, restarts = (
                tensors[f"{_CAME}.{index}.{name}"] for name in ("keys", "values", "positions", "restarts")
            )
            states = (keys.to(model.device), values.to(model.device))
            witness.arrivals[index] = Arrivals(states, positions, restarts)
        return witness, header["notes"]
