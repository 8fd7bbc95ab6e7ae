"""The first value of the mask token's row: the mean of the vocabulary's."""

from __future__ import annotations

import torch
from torch import Tensor


def set_mean_row(table: Tensor, *, row: int, used_rows: int) -> Tensor:
    """A copy of an embedding table whose row ``row`` is the mean of its other rows among the first ``used_rows``.

    Args:
        table: ``(rows, hidden)``, unsharded, any float dtype; the mean is taken in float32.
        row: row to set, typically the first unused one, which becomes the mask token's.
        used_rows: rows that the tokenizer uses.

    Raises:
        ValueError: if ``row`` or ``used_rows`` lies outside of the table, or no other row is used.
    """
    if not 0 <= row < table.shape[0]:
        raise ValueError(
            f"token id {row} needs a row of its own, the padded embedding table has {table.shape[0]}: choose a "
            f"token the table has room for, or raise make_vocab_size_divisible_by"
        )
    others = used_rows - (row < used_rows)
    if not 0 < others or used_rows > table.shape[0]:
        raise ValueError(f"used_rows is {used_rows}, needed 1 to {table.shape[0]} and more than row {row} alone")
    total = table[:used_rows].sum(dim=0, dtype=torch.float32)
    if row < used_rows:
        total = total - table[row].float()
    table = table.clone()
    table[row] = (total / others).to(table.dtype)
    return table
