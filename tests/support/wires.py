"""A process group between the threads of a test: what `group.Group` promises, without processes or sockets."""

import queue
import threading
from typing import Any

import numpy as np
import torch

from elastic_moe.errors import PeerLost

WAIT_S = 5.0


class Wires:
    """What `size` ranks share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=WAIT_S)
        self.said: list[Any] = [None] * size
        self.parcels: dict[tuple[int, int, int], queue.SimpleQueue[torch.Tensor]] = {}
        self.lock = threading.Lock()
        self.spoilt: set[int] = set()
        """Numbers of the parcels of which a bit is flipped on their way, counted over the whole group."""
        self.dies_at: int | None = None
        """The number of the parcel at which its sender dies."""
        self.sent = 0
        self.counted: int | None = None
        """Only the parcels of this rank are counted, if it is set."""

    def lane(self, source: int, target: int, tag: int) -> "queue.SimpleQueue[torch.Tensor]":
        with self.lock:
            return self.parcels.setdefault((source, target, tag), queue.SimpleQueue())

    def spoil(self, sender: int, tensor: torch.Tensor) -> torch.Tensor:
        with self.lock:
            if self.counted not in (None, sender):
                return tensor
            if self.sent == self.dies_at:
                self.barrier.abort()
                raise SystemExit("died")
            if self.sent in self.spoilt:
                tensor.view(torch.uint8)[3] ^= 8
            self.sent += 1
        return tensor


class WireGroup:
    """One rank's end."""

    on_cpu = True
    timeout_s = WAIT_S

    def __init__(self, wires: Wires, rank: int) -> None:
        self.wires, self.rank, self.size = wires, rank, wires.size

    def _gather(self, mine: Any) -> list[Any]:
        wires = self.wires
        wires.said[self.rank] = mine
        try:
            wires.barrier.wait()
            said = list(wires.said)
            wires.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise PeerLost("a collective broke off") from error
        return said

    def all_reduce_max(self, values: list[int]) -> list[int]:
        return np.max(self._gather(values), axis=0).tolist()

    def all_reduce_max_array(self, values: np.ndarray) -> np.ndarray:
        return np.max(self._gather(values), axis=0)

    def all_reduce_sum_array(self, values: np.ndarray) -> np.ndarray:
        return np.sum(self._gather(values), axis=0)

    def broadcast(self, message: bytes | None) -> bytes:
        (only,) = [said for said in self._gather(message) if said is not None]
        return only

    def barrier(self) -> None:
        self._gather(0)

    def exchange(self, sends: Any, receives: Any) -> None:
        for tensor, peer, tag in sends:
            self.wires.lane(self.rank, peer, tag).put(self.wires.spoil(self.rank, tensor.clone()))
        for tensor, peer, tag in receives:
            tensor.copy_(self._next(peer, tag))

    def _next(self, peer: int, tag: int) -> torch.Tensor:
        lane = self.wires.lane(peer, self.rank, tag)
        for _ in range(int(WAIT_S / 0.02)):
            try:
                return lane.get(timeout=0.02)
            except queue.Empty:
                if self.wires.barrier.broken:
                    break
        raise PeerLost("an exchange broke off")
