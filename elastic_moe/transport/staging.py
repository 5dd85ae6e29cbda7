"""Where the experts of a chunk wait, on the ranks they go to, until all ranks swap them in."""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from elastic_moe.config import EplbConfig, ExchangeConfig
from elastic_moe.group.process_group import Group
from elastic_moe.group.view import Member, View
from elastic_moe.placement.topology import Topology
from elastic_moe.placement.transfers import Move, TransferPlan
from elastic_moe.transport.group import move_experts, rounds, travels

if TYPE_CHECKING:
    from elastic_moe.transport.symmetric import PeerStaging

Slots = Callable[[int, int], Sequence[torch.Tensor]]
"""From (layer, slot of this rank) to the tensors there."""
MEGABYTE = 1_000_000
ALIGNED = 256
"""Tensors begin at multiples of so many bytes."""
MAX_TENSORS = 16
"""No expert has more."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Transfer:
    """The moves of one chunk, as one rank sees them."""

    plan: TransferPlan
    view: View
    rank: int
    group: Group
    """Of the members of `view`, on the CPU."""
    slots: Slots
    in_flight: int
    """Experts that may be on their way to or from one rank at once."""
    between: Callable[[], None]
    """Called when so many have come or gone."""

    def source(self, move: Move) -> Sequence[torch.Tensor]:
        """The tensors of a move whose source is here."""
        return self.slots(move.layer, move.source % self.plan.slots_per_rank)

    def target(self, move: Move) -> Sequence[torch.Tensor]:
        """The tensors of the slot of a move whose target is here; they hold what they held before."""
        return self.slots(move.layer, move.target % self.plan.slots_per_rank)


class Staging(ABC):
    """One way of bringing experts beside their slots. All ranks of a view call the same methods in the same order."""

    def enter(self, view: View) -> None:  # noqa: B027 - most have nothing to do
        """From now on `bring` is for the members of `view`.

        Raises:
            PeerLost: a member did not come.
        """

    @abstractmethod
    def bring(self, transfer: Transfer) -> Mapping[Move, Sequence[torch.Tensor]]:
        """The experts of all moves whose target is here, as they were in their sources. Slots are only read. They stay
        valid until the next `bring`, which no rank calls before it has used them.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """


class GroupStaging(Staging):
    """Over the CPU group, point to point; to and from a GPU through host memory."""

    def bring(self, transfer: Transfer) -> Mapping[Move, Sequence[torch.Tensor]]:
        """See `Staging.bring`."""
        return {**_copies(transfer), **_by_group(transfer)}


class MappedStaging(Staging):
    """Into GPU memory that the ranks of a host have mapped, by the copy engines of the sources. What does not fit into
    it takes the CPU group."""

    def __init__(self, peers: "PeerStaging") -> None:
        """`peers` is this process's, of the same size on all ranks."""
        self._peers = peers

    def enter(self, view: View) -> None:
        """See `Staging.enter`."""
        self._peers.enter(view)

    def bring(self, transfer: Transfer) -> Mapping[Move, Sequence[torch.Tensor]]:
        """See `Staging.bring`."""
        plan, rank = transfer.plan, transfer.rank
        like = transfer.slots(plan.moves[0].layer, 0) if plan.moves else ()
        begins = dict(self._begins(plan, _places(like)[-1]))
        transfer.group.barrier()  # nobody needs any more what the last chunk has left
        for number, moves in enumerate(rounds(replace(plan, moves=tuple(begins)), transfer.in_flight)):
            if number:
                transfer.between()
            for move in moves:
                if plan.rank_of(move.source) == rank:
                    for place, tensor in zip(_places(like), transfer.source(move), strict=False):
                        self._peers.push(plan.rank_of(move.target), begins[move] + place, [tensor])
            self._peers.synchronize()
        rest = tuple(move for move in plan.moves if move not in begins)
        staged = {**_copies(transfer), **_by_group(replace(transfer, plan=replace(plan, moves=rest)))}
        transfer.group.barrier()  # all have sent
        for move, begin in begins.items():
            if plan.rank_of(move.target) == rank:
                staged[move] = [self._view(begin + place, t) for place, t in zip(_places(like), like, strict=False)]
        return staged

    def _begins(self, plan: TransferPlan, expert_bytes: int) -> Iterator[tuple[Move, int]]:
        """Where in its target's buffer each move lands, for the moves between ranks that fit."""
        filled: Counter[int] = Counter()
        for move in travels(plan):
            target = plan.rank_of(move.target)
            if filled[target] + expert_bytes <= self._peers.buffer.numel():
                yield move, filled[target]
                filled[target] += expert_bytes

    def _view(self, begin: int, like: torch.Tensor) -> torch.Tensor:
        num_bytes = like.numel() * like.element_size()
        return self._peers.buffer[begin : begin + num_bytes].view(like.dtype).view(like.shape)


def open_staging(
    exchange: ExchangeConfig,
    eplb: EplbConfig,
    me: Member,
    topology: Topology,
    device: torch.device,
    timeout_s: float,
    expert_bytes: int = 0,
) -> Staging:
    """What the configuration asks for, for the process `me`: mapped memory goes with the symmetric exchange, and has
    room for one expert of `expert_bytes` at least."""
    if exchange.kind != "symmetric" or eplb.mode == "off":
        return GroupStaging()
    from elastic_moe.transport.symmetric import PeerStaging  # only here CUDA's own bindings are needed

    num_bytes = max(eplb.staging_mb * MEGABYTE, expert_bytes + ALIGNED * MAX_TENSORS)
    if num_bytes > eplb.staging_mb * MEGABYTE:
        log.warning("eplb.staging_mb=%d holds no expert: %.0f MB are taken", eplb.staging_mb, num_bytes / MEGABYTE)
    peers = PeerStaging(me.incarnation, me.rank, topology.num_ranks, num_bytes, device, timeout_s=timeout_s)
    return MappedStaging(peers)


def _copies(transfer: Transfer) -> dict[Move, Sequence[torch.Tensor]]:
    """Of the moves from one slot of this rank to another."""
    return {move: [t.clone() for t in transfer.source(move)] for move in transfer.plan.local_of(transfer.rank)}


def _by_group(transfer: Transfer) -> dict[Move, Sequence[torch.Tensor]]:
    received: dict[Move, Sequence[torch.Tensor]] = {}

    def write(move: Move) -> Sequence[torch.Tensor]:
        like = transfer.target(move)
        received[move] = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in like]
        return received[move]

    move_experts(
        transfer.plan,
        transfer.group,
        transfer.view.ranks,
        transfer.rank,
        read=transfer.source,
        write=write,
        in_flight=transfer.in_flight,
        between=transfer.between,
    )
    return received


def _places(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Where each tensor of an expert begins, in bytes from the first; last, where the next expert may begin."""
    places = [0]
    for tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        places.append(places[-1] + -(-num_bytes // ALIGNED) * ALIGNED)
    return places
