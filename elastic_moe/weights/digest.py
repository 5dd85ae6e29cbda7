"""Digests of experts: a sum that every change of a single word alters, on any device, at memory speed."""

from collections.abc import Sequence

import torch

_CHUNK_WORDS = 1 << 16
_MIX = 0x1E3779B97F4A7C15  # odd


def digest(tensors: Sequence[torch.Tensor]) -> int:
    """The digest of an expert's tensors, in their order: 0 .. 2^63 - 1, equal on every device.

    Each 32-bit word is multiplied by an odd number that depends on its position, and all are summed modulo 2^64. An
    odd factor has an inverse, so no change of one word can go unseen; changes of several words cancel with a chance
    of about 2^-62. It guards against corruption and mix-ups, not against malice.
    """
    factors = torch.arange(_CHUNK_WORDS, device=tensors[0].device, dtype=torch.int64) * _MIX | 1
    total, chunk_factor = 0, 1
    for tensor in tensors:
        for chunk in _words(tensor).split(_CHUNK_WORDS):
            total += int((factors[: chunk.numel()] * chunk).sum()) * chunk_factor
            chunk_factor = chunk_factor * _MIX % 2**64
    return total % 2**63


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as int32 words, zero-padded."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.numel() % 4:
        data = torch.cat([data, data.new_zeros(4 - data.numel() % 4)])
    return data.view(torch.int32)
