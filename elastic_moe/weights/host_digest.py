"""Digests of bytes in memory of the host, without torch: see `digest.py`."""

from collections.abc import Iterable

import numpy as np

CHUNK_WORDS = 1 << 16
"""What fits into a CPU's cache, with its products."""
MIX = 0x1E3779B97F4A7C15  # odd
_FACTORS = (np.arange(CHUNK_WORDS, dtype=np.uint64) * np.uint64(MIX) | np.uint64(1)).view(np.int64)
"""Of the words of a chunk."""


def digest_of_bytes(parts: Iterable[bytes | memoryview | np.ndarray]) -> int:
    """The digest of an expert whose tensors have these bytes, in their order: 0 .. 2^63 - 1."""
    total, power, products = 0, 1, np.empty(CHUNK_WORDS, dtype=np.int64)
    for part in parts:
        words = _words(np.frombuffer(part, dtype=np.uint8))
        for begin in range(0, len(words), CHUNK_WORDS):
            chunk = words[begin : begin + CHUNK_WORDS]
            found = np.multiply(chunk, _FACTORS[: len(chunk)], out=products[: len(chunk)], dtype=np.int64)
            total += power * int(found.sum())  # int64 arithmetic wraps, which is modulo 2^64
            power = power * MIX % 2**64
    return total % 2**63


def _words(data: np.ndarray) -> np.ndarray:
    """Bytes as int32 words, zero-padded."""
    if len(data) % 4:
        data = np.concatenate([data, np.zeros(4 - len(data) % 4, dtype=np.uint8)])
    return data.view(np.int32)
