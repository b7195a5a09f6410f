"""How fast this machine reads memory, which is what bounds decoding, and the floor that follows from it.

A step must read every weight once and the keys and values of its context once. What it reads divided by the bandwidth
is the least time it can take: the floor. Models that fit into the processor's caches can be faster than that, as the
bandwidth is measured on tensors that do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PROBED_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}
"""Of the tensors that are read; far more than any cache holds."""

REPEATS = 7
"""Readings of each kind, of which the fastest counts: the others only show what disturbed them."""


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second, by the two ways of reading.

    Args:
        product: a matrix-vector product in float32.
        total: the sum of a tensor.
    """

    product: float
    total: float

    @property
    def best(self) -> float:
        """The better of the two."""
        return max(self.product, self.total)

    def to_dict(self) -> dict[str, float]:
        """GB/s, ready for JSON."""
        return {"product": round(self.product / 1e9, 2), "sum": round(self.total / 1e9, 2)}

    def floor_ms(self, count: float) -> float:
        """Least milliseconds in which ``count`` bytes can be read."""
        return count / self.best * 1000


def measure_bandwidth(device: torch.device, count: int | None = None) -> Bandwidth:
    """Read ``count`` bytes (``None``: enough to leave all caches behind) in both ways, with the threads in force."""
    count = count or PROBED_BYTES.get(device.type, PROBED_BYTES["cpu"])
    width = 4096
    rows = max(1, count // (4 * width))
    matrix = torch.ones((rows, width), device=device)
    vector = torch.ones(width, device=device)
    bytes_read = matrix.numel() * matrix.element_size()
    product = _fastest(lambda: torch.mv(matrix, vector), device)
    total = _fastest(matrix.sum, device)
    return Bandwidth(bytes_read / product, bytes_read / total)


def _fastest(read: Callable[[], Tensor], device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        read()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def wait(device: torch.device) -> None:
    """Wait until ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that one step reads.

    Rows of the embedding are looked up, not read; a head that is tied to it is read, and counted once.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    skipped = set() if head is None else set(map(id, _own(embedding))) - set(map(id, _own(head)))
    tensors = {id(t): t for module in model.modules() for t in _own(module) if id(t) not in skipped}
    return sum(tensor_bytes(t) for t in tensors.values())


def _own(module: nn.Module | None) -> Iterable[Tensor]:
    """Weights of ``module`` itself, and buffers where a quantised layer keeps its weights in them."""
    if module is None:
        return []
    buffers = [] if hasattr(module, "inv_freq") else module.buffers(recurse=False)
    return [*module.parameters(recurse=False), *buffers]


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of one that is made of others (quantised weights), the sum of theirs."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
