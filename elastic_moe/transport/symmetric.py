"""PeerStaging: experts from rank to rank of one host by the copy engines, while the kernels of both go on."""

from collections.abc import Sequence

import torch

from elastic_moe.group.view import View
from elastic_moe.memory.peer_memory import PeerMemory


class PeerStaging:
    """A staging buffer on each rank, into which its peers copy.

    Who writes where, and when the owner may read, is for the caller to agree on: after `synchronize` of the writer
    and a word from it (over the control group, say) the bytes are there.
    """

    def __init__(
        self, incarnation: str, rank: int, num_seats: int, num_bytes: int, device: torch.device, *, timeout_s: float
    ) -> None:
        """Offer a buffer of `num_bytes`, the same on all ranks; `timeout_s` is how long `enter` waits for a peer."""
        self._memory = PeerMemory(_name(incarnation), rank, num_seats, num_bytes, device)
        self._stream = torch.cuda.Stream(device)
        self._timeout_s = timeout_s
        self._in_flight: list[torch.Tensor] = []

    @property
    def buffer(self) -> torch.Tensor:
        """uint8 [num_bytes]: what peers have pushed here. It keeps its address."""
        return self._memory.local

    def enter(self, view: View) -> None:
        """Connect the members of `view`, newcomers included, and let go of whoever left.

        Raises:
            PeerLost: a member did not offer its buffer in time.
        """
        self.synchronize()
        self._memory.connect({m.rank: _name(m.incarnation) for m in view.members}, self._timeout_s)

    def push(self, rank: int, offset: int, tensors: Sequence[torch.Tensor]) -> int:
        """Queue a copy of contiguous tensors, one after the other, into the buffer of `rank` from byte `offset` on.

        What the current stream has queued before is seen. The tensors must not be written before `synchronize`.

        Returns:
            The byte after the last one written.

        Raises:
            ValueError: they do not fit, or the rank is not connected.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self.buffer.device))
        for tensor in tensors:
            self._memory.write(rank, offset, tensor, self._stream)
            self._in_flight.append(tensor)
            offset += tensor.numel() * tensor.element_size()
        return offset

    def synchronize(self) -> None:
        """Wait until everything pushed from here has arrived."""
        self._stream.synchronize()
        self._in_flight.clear()

    def close(self) -> None:
        """Let go of all buffers."""
        self.synchronize()
        self._memory.close()


def _name(incarnation: str) -> str:
    return f"{incarnation}/staging"
