"""Weights in the memory of other processes' GPUs on this host: copied over NVLink or the bus, by no work of theirs."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import PeerLost
from elastic_moe.memory import device_memory
from elastic_moe.placement.placement import EMPTY
from elastic_moe.weights.digest import digests
from elastic_moe.weights.holders import Holder
from elastic_moe.weights.holding import GpuTensor, Share, Shared
from elastic_moe.weights.link import Link, greet
from elastic_moe.weights.sources import Came, Landing, Origin, Source, Told, Until, Want

log = logging.getLogger(__name__)

AT_ONCE = 64
"""Experts that are copied before they are waited for, and verified together."""


@dataclass(eq=False)
class _Peer:
    """One that shares its memory."""

    origin: Origin
    shared: Shared
    digests: Mapping[str, int]
    """Of its dense tensors."""
    slots: Mapping[tuple[int, int], int]
    """By (layer, expert)."""


class PeerGpus(Source):
    """Of the processes that `find` names, those that share a GPU's memory with this one. For one thread.

    They are greeted, and their memory is mapped, at the first need; until `close` it lives on, even if they die. What
    they overwrite meanwhile has another digest when it is here; what cannot be mapped, another source has.
    """

    def __init__(self, nearest: Origin, find: Callable[[], Sequence[Holder]], deadlines: Deadlines, form: str) -> None:
        """`form`: see `Holding.form`."""
        self.nearest = nearest
        self._find = find
        self._deadlines = deadlines
        self._form = form
        self._stream = torch.cuda.Stream()
        self._mapped: dict[str, int] = {}
        """Address by allocation; 0 if it cannot be mapped."""
        self.dense_bytes = 0
        """Bytes of dense tensors that came and were right."""

    def close(self) -> None:
        """Give their memory back to them."""
        torch.cuda.synchronize(self._stream.device)
        for address in filter(None, self._mapped.values()):
            device_memory.close_exported(address, self._stream.device)
        self._mapped.clear()
        vars(self).pop("_peers", None)

    def dense(self, out: Mapping[str, torch.Tensor]) -> list[str]:
        """Fill tensors with the dense ones of these names. Returns the names of those that are right."""
        copied: dict[str, int] = {}
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for name, here in out.items():
            peer = next((peer for peer in self._peers if name in peer.shared.dense), None)
            there = peer.shared.dense[name] if peer else None
            if peer and there and there.shape == list(here.shape) and self._copy(there, 0, here):
                copied[name] = peer.digests[name]
        self._stream.synchronize()
        found = digests([[out[name]] for name in copied])
        right = [name for name, one in zip(copied, found, strict=True) if one == copied[name]]
        self.dense_bytes += sum(out[name].numel() * out[name].element_size() for name in right)
        return right

    def fetch(self, wants: Sequence[Want], landing: Landing, until: Until) -> Iterator[Told]:
        """See `Source.fetch`. What is not told of, nobody shares. While some are verified the next are copied."""
        load = Counter[_Peer]()
        before: list[Came] = []
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        try:
            for begin in range(0, len(wants) if self._peers else 0, AT_ONCE):
                copied = self._stream.record_event()
                coming = []
                for want in wants[begin : begin + AT_ONCE]:
                    able = [peer for peer in self._peers if (want.layer, want.expert) in peer.slots]
                    peer = min(able, key=lambda peer: load[peer], default=None)
                    if peer and self._bring(peer, want, landing.open(want)):
                        load[peer] += 1
                        coming.append(Came(want, peer.origin))
                copied.synchronize()
                yield before
                before = coming
            self._stream.synchronize()
            yield before
        finally:  # a copy that nobody waits for must not land on what another source brings
            self._stream.synchronize()

    def _bring(self, peer: _Peer, want: Want, out: Sequence[torch.Tensor]) -> bool:
        """Queue the copies of an expert; whether all are."""
        slot, tensors = peer.slots[want.layer, want.expert], peer.shared.layers[want.layer]
        fits = [there.shape[1:] for there in tensors] == [list(here.shape) for here in out]
        return fits and all(self._copy(there, slot, here) for there, here in zip(tensors, out, strict=True))

    def _copy(self, there: GpuTensor, part: int, here: torch.Tensor) -> bool:
        """Queue a copy of part `part` of a tensor, as large as `here`."""
        address = self._map(there.allocation)
        if not address or there.dtype != str(here.dtype) or not here.is_contiguous():
            return False
        size = here.numel() * here.element_size()
        device_memory.copy(here.data_ptr(), address + there.offset + part * size, size, self._stream)
        return True

    def _map(self, allocation: str) -> int:
        if allocation not in self._mapped:
            self._mapped[allocation] = 0
            try:
                self._mapped[allocation] = device_memory.open_exported(bytes.fromhex(allocation), self._stream.device)
            except PeerLost as error:
                log.warning("%s", error)
        return self._mapped[allocation]

    @cached_property
    def _peers(self) -> list[_Peer]:
        """Who shares."""
        holders, peers = self._find(), []
        links: list[Link[None]] = [Link(holder.address, holder.wire, holder.endpoint) for holder in holders]
        origins = {holder.address: holder.origin for holder in holders}
        try:
            for link in greet(links, self._deadlines.weights_s, self._deadlines.greeting_s) if links else ():
                if link.holding.form == self._form and (shared := self._ask(link)):
                    named = {name: dense.digest for name, dense in link.holding.dense.items()}
                    peers.append(_Peer(origins[link.address], shared, named, _slots(shared)))
        finally:
            for link in links:
                link.close()
        return peers

    def _ask(self, link: Link[None]) -> Shared | None:
        link.ask(Share())
        if not link.socket.poll(int(1000 * self._deadlines.weights_s)):
            return None
        _, shared, _ = link.receive()
        return shared if isinstance(shared, Shared) and shared.layers else None


def _slots(shared: Shared) -> dict[tuple[int, int], int]:
    return {
        (layer, expert): slot
        for layer, held in enumerate(shared.held)
        for slot, expert in enumerate(held)
        if expert != EMPTY
    }
