"""ElasticRuntime: the one object a process builds. It owns the view, its groups, and the placement registry."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from elastic_moe.exchange.collective import CollectiveExchange
from elastic_moe.exchange.interface import TokenExchange
from elastic_moe.membership.groups import EpochGroups
from elastic_moe.membership.launch import Launch
from elastic_moe.membership.rendezvous import Seat, host_of, meet
from elastic_moe.membership.view import View
from elastic_moe.placement.placement import Placement, fewest_slots, initial_placement
from elastic_moe.placement.registry import PlacementRegistry
from elastic_moe.placement.topology import Topology


class ElasticRuntime:
    """One rank's part of the group.

    Build it with `ElasticRuntime.join(...)`, place the experts (`elasticize` does), then run forwards inside
    `with runtime.step():`. All ranks run the same sequence of collective calls.
    """

    def __init__(self, seat: Seat, view: View, device: torch.device, timeout_s: float) -> None:
        """Build the groups of `view`. Collective over its members; `timeout_s` is the deadline of every exchange."""
        self.seat = seat
        self.view = view
        self.rank = seat.member.rank
        self.device = device
        self.topology = Topology.of_members([(m.rank, m.node) for m in view.members])
        self.groups = EpochGroups.build(view, self.rank, device, timeout_s)
        self.steps = 0
        self._registry: PlacementRegistry | None = None
        self._exchange: TokenExchange | None = None

    @classmethod
    def join(
        cls,
        launch: Launch,
        *,
        device: torch.device,
        address: str = "",
        start_timeout_s: float = 120.0,
        exchange_timeout_s: float = 30.0,
    ) -> "ElasticRuntime":
        """Meet the other ranks of the launch and build the first epoch's groups. Collective.

        Args:
            launch: this process's place, `Launch.from_torchrun(os.environ)`.
            device: where experts and tokens live: cpu (gloo) or a CUDA device (NCCL).
            address: endpoint of this process's message socket, for processes that serve requests.
            start_timeout_s: how long to wait for the others, in seconds.
            exchange_timeout_s: deadline of each exchange, in seconds.

        Raises:
            PeerLost: a rank did not come in time.
        """
        seat = Seat(launch, host_of(launch), address)
        return cls(seat, meet(launch, seat.member, start_timeout_s), device, exchange_timeout_s)

    @property
    def epoch(self) -> int:
        """The number of the current view."""
        return self.view.epoch

    @property
    def registry(self) -> PlacementRegistry:
        """The committed placement; RuntimeError before `place`."""
        if self._registry is None:
            raise RuntimeError("no experts are placed yet: call runtime.place or elasticize first")
        return self._registry

    @property
    def exchange(self) -> TokenExchange:
        """The way tokens travel in this epoch; RuntimeError before `place`."""
        if self._exchange is None:
            raise RuntimeError("no experts are placed yet: call runtime.place or elasticize first")
        return self._exchange

    def place(
        self, num_layers: int, num_experts: int, *, slots_per_rank: int | None = None, redundant_slots: int = 0
    ) -> Placement:
        """Commit the initial placement of L layers x E experts over this view's ranks.

        `slots_per_rank` S is ceil(E / R) + `redundant_slots` unless given. Every rank computes the same. Spare slots
        hold replicas if any were asked for (by either argument); the remainder of E / R alone makes none.

        Raises:
            NotEnoughSlots: R * S < E; the message says how many are needed.
        """
        replicate = slots_per_rank is not None or redundant_slots > 0
        if slots_per_rank is None:
            slots_per_rank = fewest_slots(num_experts, len(self.view.members)) + redundant_slots
        placement = initial_placement(num_layers, num_experts, self.topology, slots_per_rank, replicate=replicate)
        self._registry = PlacementRegistry(placement, self.rank, self.topology, self.device)
        self._exchange = CollectiveExchange(self.groups.data, self.view.ranks, slots_per_rank)
        return placement

    def agree(self, *flags: int) -> list[int]:
        """The largest value of each flag over all ranks. Collective; every rank gives as many flags.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        return self.groups.control.all_reduce_max(list(flags))

    @contextmanager
    def step(self) -> Iterator[None]:
        """One forward, in one epoch and one placement version. Counted in `steps` when it finishes."""
        yield
        self.steps += 1

    def close(self) -> None:
        """Abort the groups. Peers still inside a call get `PeerLost`."""
        self.groups.abort()
