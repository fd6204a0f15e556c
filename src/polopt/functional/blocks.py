"""Tensors side by side in memory, for what stays while others come and go, and to be changed by one operation.

A tensor that is allocated where one has just been freed, and that stays, leaves a hole that later ones do not fit into. The
gradients and moments of a model of 135 million parameters, spread among its activations, cost most of a gigabyte like that.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def side_by_side(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Zeros of the tensors' shapes, types and devices, those of one type and device in one new block of memory."""
    sizes: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for t in tensors:
        sizes.setdefault((t.dtype, t.device), []).append(t.numel())
    parts = {
        (dtype, device): iter(torch.zeros(sum(counts), dtype=dtype, device=device).split(counts))
        for (dtype, device), counts in sizes.items()
    }
    return [next(parts[t.dtype, t.device]).view(t.shape) for t in tensors]


def block_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """The block that tensors lie in side by side, if they are all of it."""
    block = tensors[0]._base
    if block is None or any(t._base is not block for t in tensors):
        return None
    return block if sum(t.numel() for t in tensors) == block.numel() else None
