"""Where columns of keys or values lie: in the model's own dtype, or in eight bits each.

A store knows nothing of streams. Shapes: ``B`` rows, ``H`` heads, ``C`` columns, ``D`` head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Store:
    """Columns [B, H, C, D] as they come."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    @classmethod
    def allocate(cls, like: Tensor, columns: int) -> Store:
        """``columns`` columns of zeros for states such as ``like`` [B, H, T, D]: 0 * nan is nan even behind a mask.

        Ordinary tensors even under inference_mode, so that ``generate()`` (no_grad) can go on with them.
        """
        with torch.inference_mode(False):
            return cls(like.new_zeros((*like.shape[:2], columns, like.shape[-1])))

    @classmethod
    def bytes_per_column(cls, size: int, itemsize: int, vectors: int) -> int:
        """Bytes of one token that takes ``size`` bytes in a dtype of ``itemsize``, in so many vectors of one scale."""
        return size

    @property
    def columns(self) -> int:
        """How many there are."""
        return self.data.shape[2]

    def parts(self) -> dict[str, Tensor]:
        """The tensors [B, H, C, ...] by the end of their name; all are cut along dimension 2 alike."""
        return {"": self.data}

    def cut(self, rows: slice, first: int, stop: int) -> Store:
        """The same columns ``first:stop`` of ``rows``, not copied."""
        return type(self)(*(part[rows, :, first:stop] for part in self.parts().values()))

    def fill(self, other: Store) -> None:
        """Take over the columns of ``other``, which has as many."""
        for mine, theirs in zip(self.parts().values(), other.parts().values(), strict=True):
            mine.copy_(theirs)

    def select(self, rows: Tensor) -> Store:
        """A copy with these rows."""
        return type(self)(*(part.index_select(0, rows.to(part.device)) for part in self.parts().values()))

    def clear(self) -> None:
        """Overwrite everything by zeros."""
        for part in self.parts().values():
            part.zero_()

    def clone(self) -> Store:
        """A copy in memory of its own."""
        with torch.inference_mode(False):
            return type(self)(*(part.clone() for part in self.parts().values()))

    def read(self) -> Tensor:
        """All columns [B, H, C, D], to be looked at only."""
        return self.data

    def write(self, states: Tensor) -> None:
        """Overwrite all columns by ``states`` [B, H, C, D]."""
        self.data.copy_(states)

    def put(self, rows: Tensor, columns: Tensor, states: Tensor) -> None:
        """Overwrite one column of each of ``rows`` [n], the one in ``columns`` [n], by ``states`` [n, H, D]."""
        self.data[rows, :, columns] = states


class Int8Store(Store):
    """Columns in eight bits, with one scale for the D numbers of a token's head (symmetric, largest at 127)."""

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        super().__init__(data)
        self.scale = scale  # [B, H, C, 1], of the model's dtype

    @classmethod
    def allocate(cls, like: Tensor, columns: int) -> Int8Store:
        """See ``Store``."""
        with torch.inference_mode(False):
            shape = (*like.shape[:2], columns)
            return cls(like.new_zeros((*shape, like.shape[-1]), dtype=torch.int8), like.new_zeros((*shape, 1)))

    @classmethod
    def bytes_per_column(cls, size: int, itemsize: int, vectors: int) -> int:
        """See ``Store``."""
        return size // itemsize + vectors * itemsize

    def parts(self) -> dict[str, Tensor]:
        """See ``Store``."""
        return {"": self.data, "_scale": self.scale}

    def read(self) -> Tensor:
        """See ``Store``."""
        return self.data.to(self.scale.dtype) * self.scale

    def write(self, states: Tensor) -> None:
        """See ``Store``."""
        for part, new in zip(self.parts().values(), _quantised(states), strict=True):
            part.copy_(new)

    def put(self, rows: Tensor, columns: Tensor, states: Tensor) -> None:
        """See ``Store``."""
        data, scale = _quantised(states)
        self.data[rows, :, columns] = data
        self.scale[rows, :, columns] = scale


def _quantised(states: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in -127..127 and their scale. What is not finite makes its scale so, and is no number when it is read."""
    scale = states.abs().amax(-1, keepdim=True) / 127
    # In half precision a quotient near 127 would be off by a quarter of a step.
    exact = torch.promote_types(states.dtype, torch.float32)
    steps = states.to(exact) / scale.masked_fill(scale == 0, 1).to(exact)
    return steps.round().clamp(-127, 127).to(torch.int8), scale


STORES: dict[str, type[Store]] = {"auto": Store, "int8": Int8Store}
"""By ``CacheConfig.kv_dtype``."""
