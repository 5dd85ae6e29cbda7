"""Digests of experts: a sum that every change of a single word alters, on any device, at memory speed."""

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from elastic_moe.weights.host_digest import CHUNK_WORDS, MIX, digest_of_bytes

_CHUNKS_AT_ONCE = 64
"""On a GPU without Triton: few kernels, and 34 MB for their products."""
_WORDS_AT_ONCE = 4096
"""By a program of the kernel."""


def digest(tensors: Sequence[torch.Tensor]) -> int:
    """The digest of an expert's tensors, in their order: 0 .. 2^63 - 1, equal on every device.

    Each 32-bit word is multiplied by an odd number that depends on its position, and all are summed modulo 2^64. An
    odd factor has an inverse, so no change of one word can go unseen; changes of several words cancel with a chance
    of about 2^-62. It guards against corruption and mix-ups, not against malice. Waits for a GPU once.
    """
    return digests([tensors])[0]


def digests(experts: Sequence[Sequence[torch.Tensor]]) -> list[int]:
    """The digest of each; on a GPU all of them by one kernel, where Triton is installed. All are on one device."""
    if not experts or not experts[0][0].is_cuda:
        return [digest_of_bytes(map(_bytes, tensors)) for tensors in experts]
    kernels = _kernels()
    return [_sum(tensors) for tensors in experts] if kernels is None else _sums(kernels, experts)


def _sum(tensors: Sequence[torch.Tensor]) -> int:
    """By torch alone."""
    device = tensors[0].device
    factors = _factors(device)
    sums: list[torch.Tensor] = []  # int64 arithmetic wraps, which is modulo 2^64
    for tensor in tensors:
        words = _words(tensor)
        whole = words.numel() // CHUNK_WORDS * CHUNK_WORDS
        sums += [(factors * chunks).sum(1) for chunks in words[:whole].view(-1, CHUNK_WORDS).split(_CHUNKS_AT_ONCE)]
        if whole < words.numel():
            sums.append((factors[: words.numel() - whole] * words[whole:]).sum().view(1))
    of_chunks = torch.cat(sums)
    return int((of_chunks * _powers(device, of_chunks.numel())).sum()) % 2**63


def _sums(kernels: Any, experts: Sequence[Sequence[torch.Tensor]]) -> list[int]:
    device = experts[0][0].device
    rows, kept = [], []  # one row for each tensor: where, how many words, its first chunk's number, whose it is
    for number, tensors in enumerate(experts):
        first = 0
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if not tensor.is_contiguous() or size % 4:
                kept.append(tensor := _words(tensor))
            rows.append((tensor.data_ptr(), -(-size // 4), first, number))
            first += -(-size // (4 * CHUNK_WORDS))
    table = torch.tensor(rows, dtype=torch.int64).to(device)
    sums = torch.zeros(len(experts), dtype=torch.int64, device=device)
    most = max(-(-words // CHUNK_WORDS) for _, words, *_ in rows)
    powers = _powers(device, max(first for *_, first, _ in rows) + most)
    with torch.cuda.device(device):
        kernels.add_chunks[(most, len(rows))](table, powers, sums, MIX, CHUNK_WORDS, _WORDS_AT_ONCE)
    return [total % 2**63 for total in sums.tolist()]


@cache
def _kernels() -> Any:
    """None where Triton is not installed."""
    try:
        return importlib.import_module("elastic_moe.weights.digest_kernels")
    except ImportError:
        return None


@cache
def _factors(device: torch.device) -> torch.Tensor:
    """Of the words of a chunk."""
    return torch.arange(CHUNK_WORDS, device=device, dtype=torch.int64) * MIX | 1


@cache
def _powers(device: torch.device, count: int) -> torch.Tensor:
    """Of the chunks: 1, MIX, MIX^2, ..., as signed numbers of the same bits."""
    powers = [pow(MIX, exponent, 2**64) for exponent in range(count)]
    return torch.tensor([power - 2**64 if power >= 2**63 else power for power in powers], device=device)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as int32 words, zero-padded."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.numel() % 4:
        data = torch.cat([data, data.new_zeros(4 - data.numel() % 4)])
    return data.view(torch.int32)
