"""Positions and attention masks of one forward, from the ledger's columns. ``B`` rows, ``T`` new tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from streamllm.ledger import Ledger, Span


def next_positions(ledger: Ledger, span: Span) -> Tensor:
    """[B, T] position of every new token; a pad's is that of the first token beside it less its distance, at least 0.

    Evictions that are due must have been made.
    """
    columns = torch.arange(span.columns)
    if ledger.is_uniform and not span.is_padded:
        return (columns + ledger.position(ledger.rows[0])).expand(len(ledger.rows), -1)
    first = [ledger.position(row) - (span.columns - count) for row, count in zip(ledger.rows, span.counts, strict=True)]
    return (torch.tensor(first)[:, None] + columns).clamp_min(0)


def padding_mask(ledger: Ledger, span: Span, offset: int) -> Tensor:
    """[B, offset + T] of 0 and 1: which columns belong to each row, for rows of different age.

    ``offset``: columns before the new ones, in the space that all layers share.
    """
    first = torch.tensor([[offset - ledger.cached(row)] for row in ledger.rows])
    return (torch.arange(offset + span.columns) >= first).long()


def crossing_mask(ledger: Ledger, span: Span) -> Tensor:
    """[1, 1, T, E * P + N + T] additive: what each new token sees of what ``SinkLayer`` returns across E evictions.

    The columns are the pinned head (P) as it stands after the 1st .. E-th eviction, the columns in use (N, the pinned
    head first), and the new tokens.
    """
    row = ledger.rows[0]
    head, cached, block = ledger.head(row), ledger.cached(row), ledger.block
    column = torch.arange(span.columns)[:, None]
    # How many evictions have happened when a token's turn comes.
    turn = (column - (ledger.capacity(row) - cached) + block).div(block, rounding_mode="floor").clamp_min(0)
    variant = torch.arange(1, span.crossings + 1).repeat_interleave(head)[None]
    window = torch.arange(cached - head + span.columns)[None]
    visible = torch.cat(
        [
            variant == turn,
            (turn == 0).expand(-1, head),
            (window >= turn * block) & (window <= cached - head + column),
        ],
        dim=1,
    )
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
