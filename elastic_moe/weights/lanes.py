"""From files into tensors of any device: each thread reads into pinned memory of its own, and copies on from there.

file -> (pread) pinned slice -> (a stream of the thread's own) the tensors      a CUDA device
file -> (pread) the tensors                                                     the host, if nothing has to be changed

What lies together in a file is read at once: calls are what limits threads of Python, which give way at each of them.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from elastic_moe.weights.shards import SLICE_BYTES, Shards


@dataclass(frozen=True)
class Part:
    """A tensor of a checkpoint, or part `index` of its first dimension, and where it goes."""

    name: str
    index: int | None
    out: torch.Tensor
    """Of the shape of what is read, with one dimension at least; on any device, of any dtype, contiguous or not."""


class Lane(threading.local):
    """Of one thread at a time; what it keeps for the device it reads for goes with the thread."""

    def __init__(self) -> None:
        """Nothing is kept before it is needed."""
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._views: dict[object, list[torch.Tensor]] = {}
        """Of the beginning of `_memory`, by the sizes, dtypes and shapes of the pieces that are there."""
        self._bytes = memoryview(b"")
        self._stream: torch.cuda.Stream | None = None

    def read(self, shards: Shards, parts: Iterable[Part]) -> None:
        """Fill what all parts name, casting where needed. It is there, for every stream, when this returns.

        Args:
            shards: where they are.
            parts: in any order; all on one device.

        Raises:
            CheckpointError: a file cannot be read, or ends too early.
        """
        for run in _runs(shards, parts):
            device = run[0].out.device
            if device.type == "cpu" and all(piece.as_in_file for piece in run):
                for piece in run:
                    shards.fill(piece.name, piece.begin, _bytes(piece.out))
                continue
            came = self._take(run, device)
            shards.fill(run[0].name, run[0].begin, self._bytes[: sum(piece.size for piece in run)])
            with torch.cuda.stream(self._stream):  # None: no matter
                torch._foreach_copy_([piece.out for piece in run], came, non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()

    def _take(self, run: Sequence["_Piece"], device: torch.device) -> list[torch.Tensor]:
        """Memory for each piece, beside each other, that copies to `device` may start from."""
        cuda, size = device.type == "cuda", sum(piece.size for piece in run)
        if cuda and (self._stream is None or self._stream.device != device):
            self._stream = torch.cuda.Stream(device)
        if len(self._memory) < size or self._memory.is_pinned() != cuda:
            self._memory = torch.empty(max(size, SLICE_BYTES), dtype=torch.uint8, pin_memory=cuda)
            self._bytes = self._memory.numpy().data
            self._views.clear()
        key = tuple((piece.size, piece.dtype, piece.out.shape) for piece in run)
        if key not in self._views:
            parts = self._memory[:size].split([piece.size for piece in run])
            self._views[key] = [p.view(piece.dtype).view(piece.out.shape) for p, piece in zip(parts, run, strict=True)]
        return self._views[key]


class _Piece(NamedTuple):
    """Rows of a part, and where they lie."""

    file: int
    place: int
    """In the file."""
    size: int
    name: str
    begin: int
    """In the tensor `name`, in bytes."""
    dtype: torch.dtype
    out: torch.Tensor
    as_in_file: bool
    """Its bytes there are those of `out`."""


def _runs(shards: Shards, parts: Iterable[Part]) -> Iterator[list[_Piece]]:
    """Pieces that follow each other in a file: together a slice at most, unless one row of a tensor is more."""
    pieces = sorted((piece for part in parts for piece in _pieces(shards, part)), key=lambda piece: piece[:2])
    run: list[_Piece] = []
    for piece in pieces:
        if run:
            first, last = run[0], run[-1]
            follows = piece[:2] == (last.file, last.place + last.size)
            if not follows or piece.place + piece.size - first.place > SLICE_BYTES:
                yield run
                run = []
        run.append(piece)
    if run:
        yield run


def _pieces(shards: Shards, part: Part) -> Iterator[_Piece]:
    out, dtype = part.out, shards.dtype(part.name)
    if not out.numel():
        return
    size = shards.num_bytes(part.name, part.index)
    file, place = shards.place(part.name)
    offset, row = size * (part.index or 0), size // len(out)
    at_once = max(1, SLICE_BYTES // row)
    as_in_file = out.is_contiguous() and out.dtype == dtype
    for begin in range(0, len(out), at_once):
        rows = out if at_once >= len(out) else out[begin : begin + at_once]
        at = offset + begin * row
        yield _Piece(file, place + at, row * len(rows), part.name, at, dtype, rows, as_in_file)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # a row of one element may have any stride
    return flat.view(torch.uint8).numpy().data
