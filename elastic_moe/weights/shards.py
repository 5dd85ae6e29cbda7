"""The safetensors files of one checkpoint folder, each mapped once; a tensor is read when it is asked for."""

import json
import re
from collections.abc import Iterable
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from elastic_moe.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Shards:
    """Tensors of a checkpoint by name. Opening reads the headers only.

    What `read` returns may share memory with the mapped file: copy it before the file can change.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.bytes_read = 0
        self._files = ExitStack()
        self._owner: dict[str, Any] = {}
        self._place: dict[str, tuple[int, int]] = {}
        with ExitStack() as files:
            for number, path in enumerate(_shard_paths(folder)):
                shard = files.enter_context(_open(path))
                names = shard.offset_keys()
                self._owner.update(dict.fromkeys(names, shard))
                self._place.update((name, (number, index)) for index, name in enumerate(names))
            self._files = files.pop_all()

    @property
    def names(self) -> Iterable[str]:
        """Every tensor of the checkpoint."""
        return self._owner.keys()

    def place(self, name: str) -> tuple[int, int]:
        """Where the tensor lies: the number of its file and its rank in there; reading in this order is fastest."""
        return self._place[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the header."""
        return tuple(self._owner[name].get_slice(name).get_shape())

    def num_bytes(self, name: str, index: int | None = None) -> int:
        """What `read(name, index)` will read."""
        part = self._owner[name].get_slice(name)
        shape = part.get_shape() if index is None else part.get_shape()[1:]
        bits = re.search(r"\d+", part.get_dtype())  # "BF16", "F8_E4M3"; BOOL takes a byte
        return prod(shape) * (int(bits.group()) if bits else 8) // 8

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """The whole tensor, or the part `[index : index + 1]` of its first dimension, on the CPU.

        Raises:
            CheckpointError: the file cannot be read.
        """
        try:
            part = self._owner[name].get_slice(name)
            tensor = part[...] if index is None else part[index : index + 1]
        except SafetensorError as error:
            raise CheckpointError(f"cannot read {name}: {error}") from error
        self.bytes_read += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Close the files. Tensors already read stay valid."""
        self._files.close()


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


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
