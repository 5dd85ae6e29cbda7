"""A node's backup in one process, for tests."""

import os
from collections.abc import Iterable, Sequence

import torch

from elastic_moe.backup.segment import Segment, Writer, parts_of
from elastic_moe.weights.digest import digest
from elastic_moe.weights.holding import Given
from support.sources import EXPERTS, LAYERS, NUM_BYTES, tensors_of

ALL = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]


def memfd() -> int:
    """A file for a segment; the caller's."""
    return os.memfd_create("test of a backup")


def path_of(file: int) -> str:
    """Where another process, or this one, opens it."""
    return f"/proc/{os.getpid()}/fd/{file}"


def write(writer: Writer, layer: int, expert: int, *, commit: bool = True) -> None:
    """The expert, as a daemon writes it."""
    tensors = tensors_of(layer, expert)
    data = [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]
    given = Given([str(t.dtype) for t in tensors], [list(t.shape) for t in tensors], digest(tensors))
    parts = parts_of(given, [len(d) for d in data])
    writer.set_parts(layer, parts)
    memory = writer.begin(layer, expert, parts[-1].begin + parts[-1].size)
    for part, one in zip(parts, data, strict=True):
        memory[part.begin : part.begin + part.size] = one
    if commit:
        writer.commit(layer, expert, given.digest)


def make_segment(file: int, places: Iterable[tuple[int, int]] = ALL, form: str = "form") -> Writer:
    """One in `file` that has these experts."""
    Segment.create(file, form, LAYERS, EXPERTS, 4 * NUM_BYTES)
    writer = Writer(file)
    for layer, expert in places:
        write(writer, layer, expert)
    return writer


def flip(writer: Writer, layer: int, expert: int, at: int = 8) -> None:
    """A bit of a copy that is there."""
    record = writer.find(layer, expert)
    assert record is not None
    writer.bytes_of(record)[at] ^= 1


def held(writer: Segment) -> Sequence[tuple[int, int]]:
    """(layer, expert) of all that are there."""
    return [(layer, expert) for layer, expert, _ in writer.held()]
