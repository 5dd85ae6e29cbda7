"""A node's backup: memory that all its processes map. The daemon writes, engines read, and it outlives them all.

    page 0: what it is | a row of JSON for each layer: its tensors | a record for each expert | arenas of bytes

Its file has no name: the supervisor keeps it open, others open it as /proc/PID/fd/N. It grows by arenas, each of which
is mapped by itself, so that no address ever changes. A record's generation is odd while its bytes are written.
"""

import mmap
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from elastic_moe.weights.holding import Given

MAGIC = b"elastic_moe backup 1"
PAGE = mmap.PAGESIZE
ROW_BYTES = 1024
"""For the tensors of an expert of one layer, as JSON."""
ARENA_BYTES = 1 << 26
"""At least; of a larger expert a multiple of its size."""
ALIGN = 64
RECORD = np.dtype([("generation", "<i8"), ("offset", "<i8"), ("size", "<i8"), ("digest", "<i8")])


class Shape(msgspec.Struct, frozen=True):
    """The first page."""

    form: str
    """See `Holding.form`."""
    num_layers: int
    num_experts: int
    arena_bytes: int


class Part(msgspec.Struct, frozen=True):
    """A tensor of an expert of a layer."""

    dtype: str
    shape: list[int]
    size: int
    """In bytes."""
    begin: int
    """In the record."""


class Record(NamedTuple):
    """A copy of an expert that is there."""

    offset: int
    size: int
    digest: int


def parts_of(given: Given, sizes: Sequence[int]) -> list[Part]:
    """The tensors of an expert beside each other, each where a GPU's copy likes to begin."""
    parts, begin = [], 0
    for dtype, shape, size in zip(given.dtypes, given.shapes, sizes, strict=True):
        parts.append(Part(dtype, shape, size, begin))
        begin += -(-size // ALIGN) * ALIGN
    return parts


class Segment:
    """A mapping of it."""

    def __init__(self, file: int) -> None:
        """Map what is in `file`, an open descriptor that is the caller's.

        Raises:
            ValueError: there is none in it.
        """
        self._file = file
        head = os.pread(file, PAGE, 0)
        if not head.startswith(MAGIC):
            raise ValueError("this is no backup")
        self.shape = msgspec.json.decode(head[len(MAGIC) :].rstrip(b"\0"), type=Shape)
        layers, experts = self.shape.num_layers, self.shape.num_experts
        self._data = _data_begin(layers, experts)
        self._table = mmap.mmap(file, self._data)
        self._rows = memoryview(self._table)[PAGE : PAGE + layers * ROW_BYTES]
        self._records = np.frombuffer(self._table, RECORD, layers * experts, PAGE + layers * ROW_BYTES)
        self._records = self._records.reshape(layers, experts)
        self._arenas: list[mmap.mmap] = []
        self.on_arena: Callable[[int, int], None] = lambda _address, _size: None
        """Called with the address and the size of every arena that is mapped."""

    @classmethod
    def create(cls, file: int, form: str, num_layers: int, num_experts: int, largest: int) -> "Segment":
        """An empty one in `file`, for experts of `largest` bytes at most."""
        aligned = -(-largest // PAGE) * PAGE
        arena_bytes = aligned * max(1, ARENA_BYTES // aligned)
        head = MAGIC + msgspec.json.encode(Shape(form, num_layers, num_experts, arena_bytes))
        os.ftruncate(file, 0)
        os.ftruncate(file, _data_begin(num_layers, num_experts))
        os.pwrite(file, head, 0)
        return cls(file)

    def parts(self, layer: int) -> list[Part]:
        """The tensors of an expert of a layer; none before the first is there."""
        row = bytes(self._rows[layer * ROW_BYTES : (layer + 1) * ROW_BYTES]).rstrip(b"\0")
        return msgspec.json.decode(row, type=list[Part]) if row else []

    def set_parts(self, layer: int, parts: Sequence[Part]) -> None:
        """Before the first is written."""
        row = msgspec.json.encode(parts)
        if len(row) > ROW_BYTES:
            raise ValueError(f"layer {layer}: its experts have too many tensors for a backup")
        self._rows[layer * ROW_BYTES : layer * ROW_BYTES + len(row)] = row

    def find(self, layer: int, expert: int) -> Record | None:
        """The copy of an expert, if it is there."""
        if not (0 <= layer < self.shape.num_layers and 0 <= expert < self.shape.num_experts):
            return None
        generation, *place = self._records[layer, expert].item()
        return Record(*place) if generation and generation % 2 == 0 else None

    def held(self) -> list[tuple[int, int, int]]:
        """(layer, expert, digest) of all that are there."""
        generations = self._records["generation"]
        places = np.argwhere((generations > 0) & (generations % 2 == 0)).tolist()
        return [(layer, expert, int(self._records[layer, expert]["digest"])) for layer, expert in places]

    def bytes_of(self, record: Record) -> memoryview:
        """The memory of a copy. It may change at any time, and has another digest then."""
        arena, begin = divmod(record.offset, self.shape.arena_bytes)
        return memoryview(self.arena(arena))[begin : begin + record.size]

    def arena(self, number: int) -> mmap.mmap:
        """An arena that is in the file."""
        size = self.shape.arena_bytes
        while len(self._arenas) <= number:
            self._arenas.append(mmap.mmap(self._file, size, offset=self._data + len(self._arenas) * size))
            self.on_arena(_address(self._arenas[-1]), size)
        return self._arenas[number]

    def map_all(self) -> None:
        """Map the arenas that are in the file."""
        if self.num_arenas:
            self.arena(self.num_arenas - 1)

    def address_of(self, record: Record) -> tuple[int, int]:
        """Where a copy is in the memory of this process, and its bytes."""
        arena, begin = divmod(record.offset, self.shape.arena_bytes)
        return _address(self.arena(arena)) + begin, record.size

    @property
    def num_arenas(self) -> int:
        """In the file now."""
        return (os.fstat(self._file).st_size - self._data) // self.shape.arena_bytes


class Writer(Segment):
    """The daemon's: the only one that writes."""

    def __init__(self, file: int) -> None:
        super().__init__(file)
        self._free: dict[int, list[int]] = {}
        """Offsets by size."""
        used = self._records["offset"] + self._records["size"]
        self._end = int(used.max(initial=0))
        for layer, expert in np.argwhere(self._records["generation"] % 2 == 1).tolist():
            self.drop(layer, expert)  # whoever wrote it has died

    def begin(self, layer: int, expert: int, size: int) -> memoryview:
        """Memory for a copy, in place of the one that is there. It counts when it is committed.

        Raises:
            OSError: there is no memory.
        """
        record = self._records[layer, expert]
        if record["generation"] == 0 or record["size"] != size:
            self.drop(layer, expert)
            record["offset"], record["size"] = self._take(size), size
        record["generation"] += 1 + record["generation"] % 2
        return self.bytes_of(Record(int(record["offset"]), size, 0))

    def commit(self, layer: int, expert: int, digest: int) -> None:
        """It is written, and has this digest."""
        record = self._records[layer, expert]
        record["digest"] = digest
        record["generation"] += 1

    def drop(self, layer: int, expert: int) -> None:
        """It is there no more."""
        record = self._records[layer, expert]
        if record["generation"]:
            record["generation"] = 0
            self._free.setdefault(int(record["size"]), []).append(int(record["offset"]))

    def _take(self, size: int) -> int:
        if self._free.get(size):
            return self._free[size].pop()
        arena_bytes = self.shape.arena_bytes
        begin = -(-self._end // ALIGN) * ALIGN
        if begin % arena_bytes + size > arena_bytes:
            begin = -(-begin // arena_bytes) * arena_bytes
        arena = begin // arena_bytes
        if arena >= self.num_arenas:
            os.posix_fallocate(self._file, self._data + arena * arena_bytes, arena_bytes)  # or a write would kill
        self._end = begin + size
        return begin


def _address(memory: mmap.mmap) -> int:
    return np.frombuffer(memory, dtype=np.uint8).ctypes.data


def _data_begin(num_layers: int, num_experts: int) -> int:
    size = PAGE + num_layers * ROW_BYTES + num_layers * num_experts * RECORD.itemsize
    return -(-size // PAGE) * PAGE
