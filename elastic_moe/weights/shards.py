"""The safetensors files of one checkpoint folder: a tensor is read when it is asked for, from the file, in slices.

Not by a mapping: a file that is cut, or a disk that fails, would kill whoever touches the page. A read says so.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from elastic_moe.errors import CheckpointError

SLICE_BYTES = 1 << 24
"""Read at once; between slices there is progress."""
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
}  # fmt: skip
"""By their names in a header; others cannot be read."""
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def has_weights(folder: Path) -> bool:
    """Whether there is a checkpoint in it, complete or not."""
    return (folder / _SINGLE).is_file() or (folder / _INDEX).is_file()


class _Tensor(NamedTuple):
    path: Path
    file: int
    begin: int
    dtype: str
    shape: tuple[int, ...]
    place: tuple[int, int]


class Shards:
    """Tensors of a checkpoint by name. Opening reads the headers only.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors; or a tensor is in two of them.
    """

    def __init__(self, folder: Path) -> None:
        self.bytes_read = 0
        self._lock = threading.Lock()
        self.on_slice: Callable[[], None] = lambda: None
        """Called with every slice that was read, in the thread that reads."""
        self._tensors: dict[str, _Tensor] = {}
        headers = hashlib.sha256()
        with ExitStack() as files:
            for number, path in enumerate(_shard_paths(folder)):
                file, header, begin = _open(path, files)
                headers.update(f"{path.name} {os.fstat(file).st_size} ".encode() + header)
                entries = json.loads(header)
                entries.pop("__metadata__", None)
                for name, entry in entries.items():
                    if name in self._tensors:
                        other = self._tensors[name].path
                        raise CheckpointError(f"{name} is in {other} and in {path}: it may be in one only")
                    offset = begin + entry["data_offsets"][0]
                    shape = tuple(entry["shape"])
                    self._tensors[name] = _Tensor(path, file, offset, entry["dtype"], shape, (number, offset))
            self._files = files.pop_all()
        self.fingerprint = headers.hexdigest()[:16]
        """Of the names and sizes of files, and the names, dtypes, shapes and places of tensors; not of their values."""

    @property
    def names(self) -> Iterable[str]:
        """Every tensor of the checkpoint."""
        return self._tensors.keys()

    def place(self, name: str) -> tuple[int, int]:
        """Where the tensor lies: the number of its file and its place in there; reading in this order is fastest."""
        return self._tensors[name].place

    def where(self, name: str) -> Path:
        """The file that has it."""
        return self._tensors[name].path

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the header."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in the header.

        Raises:
            CheckpointError: torch has no such dtype.
        """
        tensor = self._tensors[name]
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{name} in {tensor.path} is {tensor.dtype}, which cannot be read")
        return DTYPES[tensor.dtype]

    def num_bytes(self, name: str, index: int | None = None) -> int:
        """What `read(name, index)` will read."""
        tensor = self._tensors[name]
        shape = tensor.shape if index is None else tensor.shape[1:]
        return prod(shape) * self.dtype(name).itemsize

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """The whole tensor, or the part `[index : index + 1]` of its first dimension, on the CPU.

        Raises:
            CheckpointError: the file cannot be read, or ends too early.
        """
        shape, size = self._tensors[name].shape, self.num_bytes(name, index)
        data = torch.empty(size, dtype=torch.uint8)
        self.fill(name, size * (index or 0), data.numpy().data)
        return data.view(self.dtype(name)).reshape(shape if index is None else (1, *shape[1:]))

    def fill(self, name: str, begin: int, out: memoryview) -> None:
        """Fill `out` with the bytes of the tensor from byte `begin` on, and of what follows it. From any thread.

        Raises:
            CheckpointError: the file cannot be read, or ends too early.
        """
        place = self._tensors[name].begin + begin
        for done in range(0, len(out), SLICE_BYTES):
            self._fill(out[done : done + SLICE_BYTES], place + done, name)
            self.on_slice()
        with self._lock:
            self.bytes_read += len(out)

    def close(self) -> None:
        """Close the files. Tensors already read stay valid."""
        self._files.close()

    def _fill(self, part: memoryview, begin: int, name: str) -> None:
        tensor = self._tensors[name]
        while part:
            try:
                count = os.preadv(tensor.file, [part], begin)
            except OSError as error:
                raise CheckpointError(f"cannot read {name} from {tensor.path}: {error}") from error
            if not count:
                raise CheckpointError(f"cannot read {name}: {tensor.path} ends at byte {begin}, it has been cut")
            part, begin = part[count:], begin + count


def _shard_paths(folder: Path) -> list[Path]:
    """As transformers chooses: the single file if it is there, else all files that the index names."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        raise CheckpointError(f"no checkpoint in {folder}: neither {_SINGLE} nor {_INDEX} is there")
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read the weight map of {index}: {error!r}") from error
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(f"{len(missing)} of {len(files)} shards are not in {folder}: {', '.join(missing[:4])}")
    return [folder / file for file in files]


def _open(path: Path, files: ExitStack) -> tuple[int, bytes, int]:
    """Descriptor, header, and where the data begins; safetensors checks that all of it fits together."""
    try:
        with safe_open(path, framework="pt", device="cpu"):
            pass
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        files.callback(os.close, file)
        size = int.from_bytes(os.pread(file, 8, 0), "little")
        return file, os.pread(file, size, 8), 8 + size
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
