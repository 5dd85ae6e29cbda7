"""From a file into tensors of any device: each thread reads slices into pinned memory of its own, and sends them off.

file -> (pread) pinned slice -> (its own stream) the tensor          a CUDA device: two slices take turns
file -> (pread) the tensor                                            the host, where nothing has to be changed
"""

import threading
from collections.abc import Iterator

import torch

from elastic_moe.weights.shards import SLICE_BYTES, Shards


class Lane(threading.local):
    """Of one thread at a time; what it keeps for the device it reads for goes with the thread.

    A tensor is complete after `wait`, and may be used on every stream then.
    """

    def __init__(self) -> None:
        """Nothing is kept before it is needed."""
        self._stream: torch.cuda.Stream | None = None
        self._slices: Iterator[_Slice] = iter(())

    def read(self, shards: Shards, name: str, index: int | None, out: torch.Tensor) -> None:
        """Fill `out` with the tensor `name`, or with part `index` of its first dimension, casting where needed.

        Args:
            shards: where it is.
            name: of the tensor.
            index: see `Shards.read`.
            out: of the shape of what is read, with one dimension at least; on any device, contiguous or not.

        Raises:
            CheckpointError: the file cannot be read, or ends too early.
        """
        dtype = shards.dtype(name) or out.dtype
        if out.device.type == "cpu" and out.is_contiguous() and out.dtype == dtype:
            shards.fill(name, index, 0, _bytes(out))
            return
        row_bytes = shards.num_bytes(name, index) // max(1, len(out))
        at_once = max(1, SLICE_BYTES // max(1, row_bytes))
        for begin in range(0, len(out), at_once):
            rows = out[begin : begin + at_once]
            part = self._next_slice(out.device).take(row_bytes * len(rows))
            shards.fill(name, index, begin * row_bytes, part.numpy().data)
            with torch.cuda.stream(self._stream):  # None: no matter
                rows.copy_(part.view(dtype).view(rows.shape), non_blocking=True)

    def wait(self) -> None:
        """Until all that was read is where it should be."""
        if self._stream is not None:
            self._stream.synchronize()

    def _next_slice(self, device: torch.device) -> "_Slice":
        if (used := next(self._slices, None)) is not None:
            return used
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        both = [_Slice(self._stream), _Slice(self._stream)]
        self._slices = _in_turn(both)
        return next(self._slices)


class _Slice:
    """Memory of the host that copies to `stream`'s device start from."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._sent = torch.cuda.Event() if stream else None

    def sent(self) -> None:
        """A copy out of it is on the stream."""
        if self._sent is not None:
            self._sent.record(self._stream)

    def take(self, size: int) -> torch.Tensor:
        """uint8 [size], as soon as what it held before has been sent."""
        if self._sent is not None:
            self._sent.synchronize()
        if len(self._memory) < size:
            self._memory = torch.empty(max(size, SLICE_BYTES), dtype=torch.uint8, pin_memory=self._stream is not None)
        return self._memory[:size]


def _in_turn(slices: list[_Slice]) -> Iterator[_Slice]:
    while True:
        for one in slices:
            yield one
            one.sent()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
