"""How fast this machine multiplies a matrix by a vector, which is what decoding waits for. Measured, not looked up.

Half the bytes are not always half the time: processors differ, and so do the libraries behind torch.
"""

from __future__ import annotations

import time

import torch
from torch.nn.functional import linear

BYTES = 1 << 25
"""Of the matrix in float32: more than the caches of one core."""

INPUTS, TRIES = 2048, 5


def speedup(dtype: str) -> float:
    """Return how many times as fast as in float32 a product is in ``dtype`` ("bfloat16" or "float16") on the CPU.

    0 where the processor has no instructions for it: reading a long prompt would be very slow, however fast a product
    with one vector is. Takes less than 0.1 seconds.
    """
    known = {
        "bfloat16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "float16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if not known[dtype]():
        return 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other on a busy machine, and would measure that
    try:
        return _seconds(torch.float32) / _seconds(getattr(torch, dtype))
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _seconds(dtype: torch.dtype) -> float:
    """The shortest of a few products; the first also makes the kernel."""
    matrix, vector = torch.ones(BYTES // 4 // INPUTS, INPUTS, dtype=dtype), torch.ones(1, INPUTS, dtype=dtype)
    taken = []
    for _ in range(TRIES):
        began = time.perf_counter()
        linear(vector, matrix)
        taken.append(time.perf_counter() - began)
    return min(taken)
