"""llama.cpp on the same weights, through its own low-level interface, with its own defaults.

Contexts are as it makes them: keys and values in float16, flash attention where it thinks fit, 512 tokens a batch; only
the number of threads is told, the same as torch has. A step is one call of ``llama_decode``. Shapes: ``B`` rows, ``T``
tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import shutil
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamllm.bench.gguf_file import write_gguf
from streamllm.bench.method import Misfit, Steady
from streamllm.bench.rivals import check_positions
from streamllm.bench.subject import Subject
from streamllm.checkpoint import size
from streamllm.models import free_bytes

BATCH = 512
"""Tokens of one call while a prompt is read."""

ITEM = {"F32": 4.0, "F16": 2.0, "Q8_0": 34 / 32}
"""Bytes of a weight."""


class LlamaCpp(Steady):
    """Decoding at the end of a full context: the last steps before the window is full, again and again."""

    kind = "F32"
    length = 64

    def __init__(self, subject: Subject, window: int, rows: int = 1) -> None:
        super().__init__(subject, window, rows)
        self._context: Any = None
        if subject.device.type != "cpu":
            raise Misfit("llama.cpp is measured on the CPU only")
        check_positions(subject, window)
        self.length = min(self.length, window // 2)
        self.begin = window - self.length
        self.cached = 0
        self.model = _loaded(subject, self.kind)
        self.api = _api()
        options = self.api.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.n_batch = window * rows, rows, BATCH
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = self.api.llama_init_from_model(self.model.handle, options)
        if not self._context:
            raise Misfit("llama.cpp made no context of this size")
        self._batch = self.api.llama_batch_init(max(BATCH, rows), 0, 1)

    def fill(self) -> None:
        """Read what stands before a stretch."""
        self.read(self.subject.ids(self.rows, self.begin))

    def read(self, ids: Tensor) -> Tensor:
        """Read ids [B, T]; see ``Method``."""
        width = max(1, BATCH // self.rows)
        found = [self._decode(ids[:, first : first + width].tolist()) for first in range(0, ids.shape[1], width)]
        return found[-1]

    def step(self, ids: Tensor) -> Tensor:
        """Read ids [B, 1]; see ``Steady``."""
        return self._decode(ids.tolist())

    def rewind(self) -> None:
        """Drop the tokens of the stretch before."""
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self._context), -1, self.begin, -1)
        self.cached = min(self.cached, self.begin)

    def attended(self) -> int:
        """Tokens cached by a row."""
        return self.cached

    def _decode(self, ids: list[list[int]]) -> Tensor:
        """Read ids [B][T] in one call; the logits [B, V] after the last of each row."""
        batch, width, last = self._batch, len(ids[0]), []
        for row, tokens in enumerate(ids):
            for number, token in enumerate(tokens):
                place = row * width + number
                batch.token[place], batch.pos[place] = token, self.cached + number
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
                batch.logits[place] = number == width - 1
            last.append(row * width + width - 1)
        batch.n_tokens = len(ids) * width
        if code := self.api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed with code {code}")
        self.cached += width
        shape = (self.subject.vocabulary,)
        logits = [self.api.llama_get_logits_ith(self._context, place) for place in last]
        return torch.from_numpy(np.stack([np.ctypeslib.as_array(found, shape=shape) for found in logits]))

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, which it keeps in float16."""
        return int(self.rows * self.window * self._token_bytes)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that a step reads."""
        return int(self.model.weight_bytes)

    @property
    def step_bytes(self) -> float:
        """Bytes that a step cannot do without."""
        return self.weight_bytes + self.rows * self.context * self._token_bytes

    @property
    def _token_bytes(self) -> float:
        return self.subject.token_bytes / self.subject.model.dtype.itemsize * 2

    def close(self) -> None:
        """Free the context."""
        if self._context:
            self.api.llama_batch_free(self._batch)
            self.api.llama_free(self._context)
            self._context = None


class F32(LlamaCpp):
    """Weights as they are."""

    name = "llamacpp-f32"
    kind = "F32"


class F16(LlamaCpp):
    """Weights in half precision."""

    name = "llamacpp-f16"
    kind = "F16"


class Q8(LlamaCpp):
    """Weights in blocks of 32 of 8 bits."""

    name = "llamacpp-q8_0"
    kind = "Q8_0"


class _Loaded:
    """A model that llama.cpp has loaded, until the end of the process."""

    def __init__(self, subject: Subject, kind: str) -> None:
        api = _api()
        file = subject.folder / f"{kind}.gguf"
        need = int(sum(weight.numel() for weight in subject.plain.parameters()) * ITEM[kind])
        free, room = free_bytes(subject.device), shutil.disk_usage(subject.folder).free
        if (free is not None and need > free) or need > room:
            raise Misfit(f"a {kind} copy of the weights takes {size(need)}, more memory or disk than is free")
        self.weight_bytes = write_gguf(subject.plain, file, kind)
        self.handle = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
        file.unlink()  # it is mapped into memory, and goes when the process does
        if not self.handle:
            raise Misfit("llama.cpp could not load the weights")


def _loaded(subject: Subject, kind: str) -> _Loaded:
    """The subject's weights in llama.cpp; written and loaded once."""
    missing = [name for name in ("llama_cpp", "gguf") if find_spec(name) is None]
    if missing:
        package = missing[0].replace("llama_cpp", "llama-cpp-python")
        raise Misfit(f"the package {package} is not installed: make bench-peers")
    if not subject.is_llama:
        raise Misfit("only plain Llama models are written to GGUF here")
    if subject.model.config.head_dim % 2 or (kind == "Q8_0" and subject.model.config.hidden_size % 32):
        raise Misfit(f"weights of this shape cannot be {kind}")
    known: _Loaded | None = subject.made.get(kind)
    if known is None:
        known = subject.made[kind] = _Loaded(subject, kind)
    return known


def _api() -> Any:
    """The low-level interface, told to be quiet."""
    llama_cpp: Any = import_module("llama_cpp")  # an import would make it a dependency
    global _silence  # noqa: PLW0603 -- it must live as long as the library may call it
    if _silence is None:
        _silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(_silence, None)
        llama_cpp.llama_backend_init()
    return llama_cpp


_silence: Any = None
