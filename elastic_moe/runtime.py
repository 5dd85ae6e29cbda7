"""ElasticRuntime: the one object a process builds. It owns the view, its groups, the placement and the experts held."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from elastic_moe.control.recovery import Recovery
from elastic_moe.control.report import Report
from elastic_moe.errors import PeerLost
from elastic_moe.exchange.collective import CollectiveExchange
from elastic_moe.exchange.interface import TokenExchange
from elastic_moe.experts.slots import SlotExperts
from elastic_moe.membership.channel import SeatStart
from elastic_moe.membership.groups import EpochGroups
from elastic_moe.membership.launch import Launch, host_of
from elastic_moe.membership.quorum import Membership
from elastic_moe.membership.rendezvous import Seat, meet
from elastic_moe.membership.signals import AskView, Knock, PeerDied
from elastic_moe.membership.supervised import Supervised
from elastic_moe.membership.view import Member, View
from elastic_moe.placement.placement import Placement, fewest_slots, initial_placement
from elastic_moe.placement.registry import PlacementRegistry
from elastic_moe.placement.topology import Topology
from elastic_moe.weights.peers import Peers, WeightServer
from elastic_moe.weights.store import ExpertStore, ReadExpert

log = logging.getLogger("elastic_moe.runtime")

RECOVERY_DEADLINE_S = 60.0
FINISH_POLL_S = 0.05
Result = TypeVar("Result")


class IdleLayer(Protocol):
    """What the runtime needs to know of an ElasticMoELayer."""

    def join_idle(self) -> None:
        """Take part in this layer's exchange with no tokens."""


class ElasticRuntime:
    """One rank's part of the group.

    Build it with `ElasticRuntime.join(...)`, place the experts (`elasticize` does), then run forwards with
    `runtime.run(forward)`. All ranks run the same sequence of collective calls.

    Attributes:
        on_rank_lost, on_rank_joined: called with (rank,) after the recovery that found it, on every other rank.
        on_placement_changed: called with (placement,) after every commit but the first.
        on_view: called with (view,) after every recovery.
    """

    def __init__(
        self,
        seat: Seat,
        view: View,
        topology: Topology,
        device: torch.device,
        *,
        exchange_timeout_s: float = 30.0,
        silence_timeout_s: float = 20.0,
        lighthouses: Sequence[str] = (),
        grow_slots: bool = True,
    ) -> None:
        """`view` is the current one, or, for a process that takes a dead one's seat, the last known.

        A member builds the groups of `view` here, together with all others; a newcomer gets its first ones by
        `recover`, once it holds what it wants to bring.
        """
        self.seat = seat
        self.view = view
        self.rank = seat.member.rank
        self.topology = topology
        self.device = device
        self.steps = 0
        self.on_rank_lost: list[Callable[[int], None]] = []
        self.on_rank_joined: list[Callable[[int], None]] = []
        self.on_placement_changed: list[Callable[[Placement], None]] = []
        self.on_view: list[Callable[[View], None]] = []
        self.on_change: Callable[[], None] = lambda: None
        """Called, in another thread, when the group is about to change: a rank that sleeps outside must come."""
        self.layers: Sequence[IdleLayer] = []
        """The ElasticMoELayer modules in their order; `elasticize` sets it."""
        self.signals = seat.signals
        self._knocking: dict[int, Member] = {}
        self._exchange_timeout_s = exchange_timeout_s
        self._grow_slots = grow_slots
        self._membership = Membership(seat.member, lighthouses or view.lighthouses)
        self._lock = threading.Lock()
        self._left = -1
        self._groups: EpochGroups | None = None
        self._registry: PlacementRegistry | None = None
        self._exchange: TokenExchange | None = None
        self._store: ExpertStore | None = None
        self._weight_server: WeightServer | None = None
        self._supervised: Supervised | None = None
        self._hear(silence_timeout_s)
        if view.has(self.rank, seat.member.incarnation):
            self.signals.watch(view, self.rank)
            self._groups = EpochGroups(view, self.rank, device, exchange_timeout_s).build()
            self._membership.start()

    @classmethod
    def join(
        cls,
        start: Launch | SeatStart,
        *,
        device: torch.device,
        address: str = "",
        start_timeout_s: float = 120.0,
        **settings: Any,
    ) -> "ElasticRuntime":
        """Meet the other ranks of the launch and build the first epoch's groups, collectively; or, for a process that
        takes a dead one's seat, prepare to be taken in by `recover` once the experts are loaded.

        Args:
            start: this process's place, `Launch.from_torchrun(os.environ)`; or what its supervisor said of it.
            device: where experts and tokens live: cpu (gloo) or a CUDA device (NCCL).
            address: endpoint for front ends, of a process that serves requests.
            start_timeout_s: how long to wait for the others, in seconds.
            **settings: see the constructor.

        Raises:
            PeerLost: a rank did not come in time.
        """
        supervised = Supervised.of_launch(start) if isinstance(start, Launch) else None
        if isinstance(start, Launch):
            start = supervised.start if supervised else SeatStart(start)
        launch = start.launch
        host = host_of(launch)
        server = WeightServer(host)
        seat = Seat(
            launch,
            host,
            signals_port=start.signals_port,
            address=address,
            weights=server.address,
            lighthouse=start.lighthouse,
        )
        view = start.rejoin or meet(launch, seat.member, start_timeout_s)
        runtime = cls(seat, view, topology_of(launch), device, **settings)
        runtime._weight_server = server
        if supervised:
            runtime._supervised = supervised
            runtime.on_view.append(supervised.tell_view)
            if start.rejoin is None:
                supervised.tell_view(view)
            supervised.begin()
        return runtime

    @property
    def epoch(self) -> int:
        """The number of the current view."""
        return self.view.epoch

    @property
    def groups(self) -> EpochGroups:
        """The current epoch's groups; PeerLost for a newcomer that has none yet."""
        if self._groups is None:
            raise PeerLost("this process is not a member yet")
        return self._groups

    @property
    def registry(self) -> PlacementRegistry:
        """The committed placement; RuntimeError before `place`."""
        return _placed(self._registry)

    @property
    def exchange(self) -> TokenExchange:
        """The way tokens travel in this epoch; RuntimeError before `place`."""
        return _placed(self._exchange)

    @property
    def store(self) -> ExpertStore:
        """The experts held here; RuntimeError before `hold`."""
        return _placed(self._store)

    def place(
        self, num_layers: int, num_experts: int, *, slots_per_rank: int | None = None, redundant_slots: int = 0
    ) -> Placement:
        """Commit the initial placement of L layers x E experts over all seats.

        `slots_per_rank` S is ceil(E / R) + `redundant_slots` unless given. Every rank computes the same. Spare slots
        hold replicas if any were asked for (by either argument); the remainder of E / R alone makes none.

        Raises:
            NotEnoughSlots: R * S < E; the message says how many are needed.
        """
        replicate = slots_per_rank is not None or redundant_slots > 0
        if slots_per_rank is None:
            slots_per_rank = fewest_slots(num_experts, self.topology.num_ranks) + redundant_slots
        placement = initial_placement(num_layers, num_experts, self.topology, slots_per_rank, replicate=replicate)
        self._registry = PlacementRegistry(placement, self.rank, self.topology, self.device)
        self._use_groups()
        return placement

    def hold(self, layers: Sequence[SlotExperts], read: ReadExpert | None = None) -> None:
        """Take the experts of this rank, loaded as the placement says, in order to move and restore them later.

        Args:
            layers: of all MoE layers, in the placement's order.
            read: where an expert comes from that no live rank holds (the checkpoint).
        """
        self._store = ExpertStore(layers, self.registry.placement.of_rank(self.rank), read)
        self._store.record_digests()
        if self._groups is not None:
            self._store.digests = self.groups.control.all_reduce_max_array(self._store.digests)

    def peers(self) -> Peers | None:
        """Where a newcomer takes its weights from, before the disk; None for a process that is a member."""
        if self._groups is not None:
            return None
        return Peers(m for m in self.view.members if m.rank != self.rank)

    def give_weights(self, dense: Mapping[str, torch.Tensor]) -> None:
        """Offer the experts held here, and these dense tensors by their names in the state dict, to newcomers."""
        if self._weight_server is not None:
            self._weight_server.start(dense, self.store)

    def agree(self, *flags: int) -> list[int]:
        """The largest value of each flag over all ranks. Collective; every rank gives as many flags.

        Raises:
            PeerLost: a peer died, left, or missed the deadline; or all leave now to take a process in.
        """
        *agreed, joining = self.groups.control.all_reduce_max([*flags, int(self._somebody_knocks)])
        if joining:
            raise PeerLost("a process joins")
        return agreed

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One forward, in one epoch and one placement version. Counted in `steps` when it finishes."""
        yield
        self.steps += 1

    def run(self, forward: Callable[[], Result]) -> Result:
        """Run a forward to its end in one epoch, together with all ranks; when a rank is lost, recover and repeat it.

        `forward` must be repeatable (a KV cache is: the same entries are written again). What the ranks run need not
        match, only the sequence of MoE layer calls must. A rank that has nothing more to run calls `finish`.

        Raises:
            NotEnoughSlots, TransferFailed: the experts cannot be restored.
            PeerLost: no agreement within a minute.
        """
        while True:
            try:
                self.agree(1)
                with self.step():
                    return forward()
            except PeerLost as error:
                self.recover(str(error))

    def finish(self) -> None:
        """Take part, without tokens, in what the others still run, until every rank of the launch has come here, also
        those that are dead now and come back; then leave the group for good.

        Raises:
            NotEnoughSlots, TransferFailed: the experts cannot be restored.
            PeerLost: no agreement within a minute.
        """
        while True:
            try:
                (busy,) = self.agree(0)
                if busy:
                    self.join_idle()
                elif len(self.view.members) == self.topology.num_ranks:
                    break
                else:
                    time.sleep(FINISH_POLL_S)
            except PeerLost as error:
                self.recover(str(error))
        with contextlib.suppress(PeerLost):
            self.groups.control.barrier()  # nobody leaves before all know that it is over
        if self._supervised is not None:
            self._supervised.tell_done()
        self.close()

    def join_idle(self) -> None:
        """Take part in one forward of the others without tokens.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        with torch.no_grad(), self.step():
            for layer in self.layers:
                layer.join_idle()

    @property
    def epoch_is_over(self) -> bool:
        """Whether the current epoch was left and `recover` has to be called; its next collective would say so too."""
        return self._left == self.view.epoch

    def leave_epoch(self, epoch: int) -> bool:
        """Abort the groups of `epoch` and ask for the next view, if it is the current one. From any thread.

        The call in flight in that epoch, and every later one, gets PeerLost.
        """
        with self._lock:
            if epoch != self.view.epoch or self._groups is None:
                return False
            self._left = epoch
            self._groups.abort()
        self._membership.request_view(epoch)
        return True

    @property
    def change_is_wanted(self) -> bool:
        """Whether the epoch is over, or a process waits to be taken in."""
        return self.epoch_is_over or self._somebody_knocks

    @property
    def _somebody_knocks(self) -> bool:
        knocking, view = list(self._knocking.values()), self.view
        return any(not view.has(m.rank, m.incarnation) for m in knocking)

    def recover(self, reason: str) -> Report:
        """Leave the current epoch and come back in the next: view, groups, repair, vote, commit. Collective in effect.

        Raises:
            NotEnoughSlots, TransferFailed: the experts cannot be restored (now).
            PeerLost: no agreement within a minute.
        """
        log.info("leaving epoch %d: %s", self.epoch, reason)
        self._leave(self.view)
        recovery = Recovery(
            self.seat.member,
            self._membership,
            self.topology,
            self.store,
            self.device,
            exchange_timeout_s=self._exchange_timeout_s,
            grow_slots=self._grow_slots,
            knock=lambda view: self.signals.tell(view.members, Knock(self.seat.member)),
            enter=self._enter,
            leave=self._leave,
        )
        version = self.registry.placement.version
        newcomer = self._groups is None
        placement, report = recovery.run(self.view, version, reason, RECOVERY_DEADLINE_S, newcomer=newcomer)
        self.registry.commit(placement)
        self._use_groups()
        log.info("recovered: %s", report)
        for hook in self.on_view:
            hook(self.view)
        self._call_hooks(report, placement)
        return report

    def close(self) -> None:
        """Leave for good. Peers still inside a call get `PeerLost`."""
        self._membership.close()
        self.signals.close()
        if self._weight_server is not None:
            self._weight_server.close()
        if self._groups is not None:
            self._groups.abort()

    def _enter(self, view: View, groups: EpochGroups) -> None:
        with self._lock:
            self.view, self._groups = view, groups
        self.signals.watch(view, self.rank)
        if self._membership.knows_dead(view):
            self.leave_epoch(view.epoch)

    def _leave(self, view: View) -> None:
        """Leave `view` if it is the current one, and tell its members, who may wait for us. Those who knocked ask for
        the next view already."""
        if self.leave_epoch(view.epoch):
            self.signals.tell([m for m in view.members if m.rank != self.rank], AskView(view.epoch))
            self._knocking = {}

    def _hear(self, silence_timeout_s: float) -> None:
        def handle(kind: type, act: Callable[[Any], object]) -> None:
            def hear(word: Any) -> None:
                act(word)
                self.on_change()

            self.signals.on(kind, hear)

        handle(AskView, lambda word: self.leave_epoch(word.epoch))
        handle(PeerDied, lambda word: self._peer_died(word.rank, word.incarnation))
        handle(Knock, lambda word: self._let_knock(word.member))
        self.signals.start(self.seat.member.incarnation, silence_timeout_s, self._peer_is_silent)

    def _peer_died(self, rank: int, incarnation: str) -> None:
        self._membership.gone(rank, incarnation)
        view = self.view
        if view.has(rank, incarnation):
            self.leave_epoch(view.epoch)

    def _peer_is_silent(self, member: Member) -> None:
        log.warning("rank %d is silent: asking for a new view", member.rank)
        if self.view.has(member.rank, member.incarnation):
            self._leave(self.view)
        self.on_change()

    def _let_knock(self, member: Member) -> None:
        if not self.view.has(member.rank, member.incarnation):
            self._knocking[member.rank] = member

    def _use_groups(self) -> None:
        if self._groups is not None:
            slots_per_rank = self.registry.placement.slots_per_rank
            self._exchange = CollectiveExchange(self._groups.data, self._groups.ranks, slots_per_rank)

    def _call_hooks(self, report: Report, placement: Placement) -> None:
        for ranks, hooks in ((report.lost, self.on_rank_lost), (report.joined, self.on_rank_joined)):
            for rank in ranks:
                for hook in hooks if rank != self.rank else ():
                    hook(rank)
        for hook in self.on_placement_changed:
            hook(placement)


def topology_of(launch: Launch) -> Topology:
    """The seats of a launch: torchrun deals its ranks in order, the same number to each node."""
    return Topology.uniform(launch.world_size, launch.local_world_size)


Owned = TypeVar("Owned")


def _placed(thing: Owned | None) -> Owned:
    if thing is None:
        raise RuntimeError("no experts are placed yet: call runtime.place or elasticize first")
    return thing
