"""PeerMemory: one buffer of GPU memory on every rank of a host, mapped into all of them.

torch's own rendezvous of symmetric memory does not fit a group whose processes come and go: it counts its calls per
process, so a newcomer never meets the survivors; it waits on sockets without a deadline; and it keeps the memory of
dead ranks mapped for ever. Here each rank offers its buffer at a socket of its own, and whoever needs it comes for it.
"""

import contextlib
import os
import socket
import struct
import time
from collections.abc import Mapping

import torch

from elastic_moe.background import end_process, start_thread
from elastic_moe.errors import PeerLost
from elastic_moe.memory.device_memory import Block, allocate, as_tensor, attach, copy, detach

POLL_S = 0.01
OFFER_TIMEOUT_S = 2.0
"""How long the offering side waits for one that came to its socket and does not read."""


class PeerMemory:
    """This rank's buffer and those of its peers.

    Attributes:
        local: uint8 [num_bytes] of this rank, zero at first. Peers write it.
        table: int64 [R] on the device: where kernels here find the buffer of each seat, 0 for one that is not
            connected. Written in place, so a CUDA graph that reads it stays valid.
    """

    def __init__(self, name: str, rank: int, num_seats: int, num_bytes: int, device: torch.device) -> None:
        """Offer `num_bytes` to peers.

        Args:
            name: what peers know this buffer by, unique on the host, at most 80 characters.
            rank: EP rank of this process.
            num_seats: R.
            num_bytes: size of the buffer, the same on all ranks.
            device: where it is.
        """
        self.num_bytes = num_bytes
        self._device = device
        self._rank = rank
        torch.cuda.synchronize(device)  # the driver needs a context in this thread
        self._block, descriptor = allocate(num_bytes, device)
        self._peers: dict[int, tuple[str, Block]] = {rank: (name, self._block)}
        self.local = as_tensor(self._block, device)[:num_bytes].zero_()
        self.table = torch.zeros(num_seats, dtype=torch.int64, device=device)
        torch.cuda.synchronize(device)
        self._offer = _Offer(name, descriptor, num_bytes)

    def connect(self, names: Mapping[int, str], timeout_s: float) -> None:
        """Map the buffers of these seats (own one included) and let go of all others, also of those that another
        process holds now. Nothing happens for a seat that is connected already. No kernel here may be using a peer's
        buffer.

        Raises:
            PeerLost: a peer did not offer its memory within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        for rank, (name, block) in list(self._peers.items()):
            if rank != self._rank and names.get(rank) != name:
                del self._peers[rank]
                detach(block)
        for rank, name in names.items():
            if rank not in self._peers:
                descriptor = _fetch(name, self.num_bytes, rank, deadline)
                self._peers[rank] = (name, attach(descriptor, self._block.num_bytes, self._device))
        addresses = [self._peers[rank][1].address if rank in names else 0 for rank in range(len(self.table))]
        self.table.copy_(torch.tensor(addresses))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Seats whose buffers are mapped, this one included."""
        return tuple(sorted(self._peers))

    def write(self, rank: int, offset: int, tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Queue a copy of a contiguous device tensor into the buffer of `rank`, from byte `offset` on.

        Raises:
            ValueError: it does not fit, or the rank is not connected.
        """
        num_bytes = tensor.numel() * tensor.element_size()
        if rank not in self._peers or not 0 <= offset <= self.num_bytes - num_bytes:
            raise ValueError(
                f"cannot write {num_bytes} bytes at {offset} of rank {rank}: its buffer has {self.num_bytes} bytes; "
                f"connected are {list(self.ranks)}"
            )
        copy(self._peers[rank][1].address + offset, tensor.data_ptr(), num_bytes, stream)

    def close(self) -> None:
        """Let go of everything. No kernel may be using any of it; peers that have mapped this buffer keep it."""
        self._offer.close()
        torch.cuda.synchronize(self._device)
        self.table.zero_()
        for _, block in self._peers.values():
            detach(block)
        self._peers = {}


class _Offer:
    """Hands the descriptor to every process of this user that comes to the socket, in a thread of its own."""

    def __init__(self, name: str, descriptor: int, num_bytes: int) -> None:
        self._descriptor = descriptor
        self._num_bytes = num_bytes
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(_address(name))
        self._socket.listen(64)
        self._thread = start_thread("peer-memory", self._serve, on_error=end_process)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()
        self._thread.join(OFFER_TIMEOUT_S)
        os.close(self._descriptor)

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            with peer, contextlib.suppress(OSError):
                peer.settimeout(OFFER_TIMEOUT_S)
                if _user_of(peer) == os.getuid():
                    socket.send_fds(peer, [struct.pack("q", self._num_bytes)], [self._descriptor])


def _fetch(name: str, num_bytes: int, rank: int, deadline: float) -> int:
    """The descriptor of the memory that `rank` offers under `name`."""
    while True:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
                peer.settimeout(max(POLL_S, deadline - time.monotonic()))
                peer.connect(_address(name))
                said, descriptors, _, _ = socket.recv_fds(peer, 8, 1)
        except OSError as error:
            if time.monotonic() > deadline:
                raise PeerLost(f"rank {rank} offers no memory under {name}: {error}") from error
            time.sleep(POLL_S)
            continue
        if descriptors and said == struct.pack("q", num_bytes):
            return descriptors[0]
        for descriptor in descriptors:
            os.close(descriptor)
        raise PeerLost(f"rank {rank} offers other memory than {num_bytes} bytes under {name}")


def _address(name: str) -> str:
    """A name in the abstract namespace: it leaves no file behind."""
    return f"\0elastic_moe/{name}"


def _user_of(peer: socket.socket) -> int:
    layout = struct.Struct("3i")  # pid, uid, gid
    return layout.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))[1]
