"""Backups of other nodes as a source, by Mooncake: their memory is read, and no process there does anything."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from elastic_moe.backup.mooncake import Read, RemoteMemory
from elastic_moe.backup.segment import ALIGN
from elastic_moe.deadlines import Deadlines
from elastic_moe.pulse import Pulse
from elastic_moe.weights.holders import Holder
from elastic_moe.weights.link import Link, greet
from elastic_moe.weights.sources import Came, Landing, Missed, Origin, Source, Told, Until, Want

GREET_S = 0.5
"""A daemon that lives answers sooner; the next source is not kept waiting for one that does not."""
AT_ONCE = 8
"""Experts of one read."""


@dataclass(frozen=True)
class _Copy:
    """Of an expert on another node."""

    session: str
    address: int
    size: int
    digest: int


class MooncakeMemory(Source):
    """What the daemons of other nodes have registered."""

    nearest = Origin.REMOTE_DRAM

    def __init__(
        self,
        find: Callable[[], Sequence[Holder]],
        start: Callable[[], RemoteMemory | None],
        deadlines: Deadlines,
        form: str,
        pulse: Pulse,
    ) -> None:
        """`find` names the daemons; `start` starts this process's engine, when it is needed first; `form`: see
        `Holding.form`. `pulse` is told of what is waited for."""
        self._find = find
        self._start = start
        self._deadlines = deadlines
        self._form = form
        self._pulse = pulse
        self._remote: RemoteMemory | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def fetch(self, wants: Sequence[Want], landing: Landing, until: Until) -> Iterator[Told]:
        """See `Source.fetch`. A session that fails is asked no more in this call: there is another source behind."""
        with self._pulse.expects(self._deadlines.wait_s):
            copies = self._copies()
            self._remote = self._remote or (self._start() if copies else None)
        if self._remote is None:
            return
        by_session: dict[str, list[Want]] = defaultdict(list)
        for want in wants:
            if copy := copies.get((want.layer, want.expert)):
                by_session[copy.session].append(want)
        for session, some in by_session.items():
            for begin in range(0, len(some), AT_ONCE):
                batch = some[begin : begin + AT_ONCE]
                began = time.monotonic()
                with self._pulse.expects(self._deadlines.wait_s):
                    told = self._read(self._remote, session, batch, copies, landing, until)
                yield told
                if isinstance(told[0], Missed):
                    why = f"the memory of {session} cannot be read ({time.monotonic() - began:.1f} s)"
                    yield [Missed(want, why) for want in some[begin + AT_ONCE :]]
                    break

    def _copies(self) -> dict[tuple[int, int], _Copy]:
        """Where each expert is, by those daemons that answer and have the same form."""
        links: list[Link[None]] = [Link(holder.address, holder.wire, holder.endpoint) for holder in self._find()]
        found = {}
        for link in greet(links, GREET_S, self._deadlines.greeting_s) if links else ():
            holding = link.holding
            if holding.session and holding.form == self._form:
                for (layer, expert, digest), (address, size) in zip(holding.experts, holding.places, strict=True):
                    found[layer, expert] = _Copy(holding.session, address, size, digest)
        for link in links:
            link.close()
        return found

    def _read(
        self,
        remote: RemoteMemory,
        session: str,
        wants: Sequence[Want],
        copies: dict[tuple[int, int], _Copy],
        landing: Landing,
        until: Until,
    ) -> list[Came | Missed]:
        places = [copies[want.layer, want.expert] for want in wants]
        room = -(-max(copy.size for copy in places) // ALIGN) * ALIGN
        out = [landing.open(want) for want in wants]
        base = self._room(remote, room * AT_ONCE, pinned=out[0][0].is_cuda)
        reads = [Read(base + room * turn, copy.address, copy.size) for turn, copy in enumerate(places)]
        if not remote.read(session, reads, min(self._deadlines.weights_s, until.left_s)):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # something may come there yet
            return [Missed(want, f"the memory of {session} cannot be read") for want in wants]
        told: list[Came | Missed] = []
        for turn, (want, copy, tensors) in enumerate(zip(wants, places, out, strict=True)):
            if _unpack(self._buffer[room * turn : room * turn + copy.size], tensors):
                told.append(Came(want, Origin.REMOTE_DRAM, copy.digest))
            else:
                told.append(Missed(want, f"what {session} has there has another size"))
        return told

    def _room(self, remote: RemoteMemory, size: int, *, pinned: bool) -> int:
        """The address of registered memory of `size` bytes at least."""
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            remote.register(self._buffer.data_ptr(), size)
        return self._buffer.data_ptr()


def _unpack(data: torch.Tensor, out: Sequence[torch.Tensor]) -> bool:
    """Whether that is what was wanted; it is in its place then."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in out]
    begins = np.cumsum([0, *(-(-size // ALIGN) * ALIGN for size in sizes)]).tolist()
    if begins[len(sizes) - 1] + sizes[-1] != len(data):
        return False
    for tensor, begin, size in zip(out, begins, sizes, strict=False):
        tensor.detach().copy_(data[begin : begin + size].view(tensor.dtype).view(tensor.shape))
    return True
