"""ElasticRuntime: the one object a process builds. It owns the view, its groups, the placement and the experts held."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from elastic_moe.background import Latch
from elastic_moe.config import EplbConfig, ExchangeConfig
from elastic_moe.control.rebalance import load_balancer
from elastic_moe.control.rebalancer import Rebalancer
from elastic_moe.control.recovery import Recovery
from elastic_moe.control.report import Report
from elastic_moe.errors import PeerLost
from elastic_moe.exchange.epochs import exchanges_of
from elastic_moe.exchange.interface import TokenExchange
from elastic_moe.experts.slots import SlotExperts
from elastic_moe.group.groups import EpochGroups
from elastic_moe.group.view import View
from elastic_moe.membership.current_epoch import CurrentEpoch
from elastic_moe.membership.launch import Launch, SeatStart, host_of
from elastic_moe.membership.quorum import Membership
from elastic_moe.membership.rendezvous import Seat, meet
from elastic_moe.placement.loads import LoadCounter
from elastic_moe.placement.placement import Placement, fewest_slots, initial_placement
from elastic_moe.placement.registry import PlacementRegistry
from elastic_moe.placement.topology import Topology
from elastic_moe.runtime import lockstep
from elastic_moe.runtime.hooks import Hooks
from elastic_moe.runtime.idle import IdleForward, IdleLayer
from elastic_moe.runtime.initial_loads import read_loads
from elastic_moe.supervision.supervised import Supervised
from elastic_moe.transport.staging import open_staging
from elastic_moe.weights.peers import Peers, WeightServer
from elastic_moe.weights.store import ExpertStore, ReadExpert

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class ElasticRuntime:
    """One rank's part of the group.

    Build it with `join`, place the experts (`elasticize` does), then `run` forwards. All ranks call the same in order.

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
        start_timeout_s: float = 120.0,
        exchange_timeout_s: float = 30.0,
        silence_timeout_s: float = 20.0,
        lighthouses: Sequence[str] = (),
        grow_slots: bool = True,
        eplb: EplbConfig | None = None,
        exchange: ExchangeConfig | None = None,
    ) -> None:
        """`view` is the current one, or, for a process that takes a dead one's seat, the last known.

        A member builds the groups of `view` here, together with all others; a newcomer gets its first ones by
        `recover`, once it holds what it brings. `eplb`: how experts are balanced; `exchange`: how tokens travel.
        """
        self.seat = seat
        self.rank = seat.member.rank
        self.topology = topology
        self.device = device
        self.steps = 0  # forwards finished
        self.handshakes = 0
        """Calls of `agree` in this epoch: the number of the step that all ranks are in."""
        self._hooks = Hooks()
        self.on_rank_lost, self.on_rank_joined = self._hooks.rank_lost, self._hooks.rank_joined
        self.on_placement_changed, self.on_view = self._hooks.placement_changed, self._hooks.view
        self.on_change: Callable[[], None] = lambda: None
        """Called, in another thread, when the group is about to change: a rank that sleeps outside must come."""
        self.layers: Sequence[IdleLayer] = []
        """The ElasticMoELayer modules in their order; `elasticize` sets it."""
        self.idle = IdleForward()
        self.signals = seat.signals
        self._latch = Latch()
        self._start_timeout_s = start_timeout_s
        self._exchange_timeout_s = exchange_timeout_s
        self._grow_slots = grow_slots
        self._eplb = eplb or EplbConfig()
        self._exchange_config = exchange or ExchangeConfig()
        symmetric = self._exchange_config.kind == "symmetric"
        self._group_device = torch.device("cpu") if symmetric else device
        self._membership = Membership(seat.member, lighthouses or view.lighthouses, self.fail)
        self._epoch = CurrentEpoch(seat.member, view, seat.signals, self._membership, lambda: self.on_change())
        self._registry: PlacementRegistry | None = None
        self.exchanges = exchanges_of(exchange, seat.member, topology.num_ranks, device, exchange_timeout_s)
        self._exchange: TokenExchange | None = None
        self._load_counter: LoadCounter | None = None
        self._rebalancer: Rebalancer | None = None
        self._store: ExpertStore | None = None
        self._weight_server: WeightServer | None = None
        self._supervised: Supervised | None = None
        self._epoch.listen(silence_timeout_s, self.fail)
        if view.has(self.rank, seat.member.incarnation):
            self._epoch.enter(view, EpochGroups(view, self.rank, self._group_device, exchange_timeout_s).build())
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
            start_timeout_s: how long to wait for the others, and then for those that load slowly, in seconds.
            **settings: see the constructor.

        Raises:
            PeerLost: a rank did not come in time.
        """
        supervised = Supervised.of_launch(start) if isinstance(start, Launch) else None
        if isinstance(start, Launch):
            start = supervised.start if supervised else SeatStart(start)
        server = WeightServer(host_of(start.launch))
        seat = Seat(start, address=address, weights=server.address)
        view = start.rejoin or meet(start.launch, seat.member, start_timeout_s)
        runtime = cls(seat, view, start.launch.topology, device, start_timeout_s=start_timeout_s, **settings)
        runtime._weight_server = server
        if supervised:
            runtime._supervised = supervised
            runtime.on_view.append(supervised.tell_view)
            supervised.begin(view)
        return runtime

    @property
    def view(self) -> View:
        """The current members; of a process that is not one yet, the last known."""
        return self._epoch.view

    @property
    def epoch(self) -> int:
        """The number of the current view."""
        return self.view.epoch

    @property
    def is_whole(self) -> bool:
        """Whether a process sits in every seat of the launch."""
        return len(self.view.members) == self.topology.num_ranks

    @property
    def groups(self) -> EpochGroups:
        """The current epoch's groups; PeerLost for a newcomer that has none yet."""
        return self._epoch.groups

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

    @property
    def load_counter(self) -> LoadCounter:
        """Where the layers count their tokens; RuntimeError before `place`."""
        return _placed(self._load_counter)

    @property
    def rebalancer(self) -> Rebalancer:
        """The load balancer; RuntimeError before `place`."""
        return _placed(self._rebalancer)

    def place(
        self, num_layers: int, num_experts: int, *, slots_per_rank: int | None = None, redundant_slots: int = 0
    ) -> Placement:
        """Commit the initial placement of L layers x E experts over all seats.

        `slots_per_rank` S is ceil(E / R) + `redundant_slots` unless given. Every rank computes the same. Spare slots
        hold replicas if any were asked for (by either argument); the remainder of E / R alone makes none. With
        `eplb.initial_loads` experts are placed by these loads.

        Raises:
            NotEnoughSlots: R * S < E; the message says how many are needed.
            ValueError: the file of initial loads cannot be read or does not fit.
        """
        replicate = slots_per_rank is not None or redundant_slots > 0
        if slots_per_rank is None:
            slots_per_rank = fewest_slots(num_experts, self.topology.num_ranks) + redundant_slots
        if self._eplb.initial_loads:
            loads = read_loads(self._eplb.initial_loads, num_layers, num_experts)
            balance = load_balancer()
            placement = balance(loads, self.topology, slots_per_rank, algorithm=self._eplb.algorithm)
        else:
            placement = initial_placement(num_layers, num_experts, self.topology, slots_per_rank, replicate=replicate)
        self._registry = PlacementRegistry(placement, self.rank, self.topology, self.device)
        if self._eplb.mode != "off":
            load_balancer()
        self._load_counter = LoadCounter(num_layers, num_experts, self.device)
        config, me = self._exchange_config, self.seat.member
        staging = open_staging(config, self._eplb, me, self.topology, self.device, self._exchange_timeout_s)
        self._rebalancer = Rebalancer(
            self._eplb,
            self.rank,
            self._registry,
            self._load_counter,
            steps=lambda: self.steps,
            staging=staging,
            wake=lambda: self.on_change(),
            committed=self._hooks.call_placement_changed,
            on_error=self.fail,
        )
        self._use_groups()
        return placement

    def hold(self, layers: Sequence[SlotExperts], read: ReadExpert | None = None) -> None:
        """Take the experts of this rank, loaded as the placement says, in order to move and restore them later.

        Args:
            layers: of all MoE layers, in the placement's order.
            read: where an expert comes from that no live rank holds (the checkpoint).

        Raises:
            ValueError: experts shall be balanced, but there is no `read`: a loss amid a move could not be mended.
        """
        if read is None and self._eplb.mode != "off":
            raise ValueError(f"eplb.mode={self._eplb.mode} needs a checkpoint; elasticize with checkpoint=, or use off")
        self._store = ExpertStore(layers, self.registry.placement.of_rank(self.rank), read)
        self._store.record_digests()
        if self._epoch.is_entered:
            with self.groups.control.patient(self._start_timeout_s):  # for those that load slowly
                self._store.digests = self.groups.control.all_reduce_max_array(self._store.digests)
            self.rebalancer.begin_epoch(self.view, self.groups, self._store, changed=False)

    def peers(self) -> Peers | None:
        """Where a newcomer takes its weights from, before the disk; None for a process that is a member."""
        return None if self._epoch.is_entered else Peers(m for m in self.view.members if m.rank != self.rank)

    def give_weights(self, dense: Mapping[str, torch.Tensor]) -> None:
        """Offer the experts held here, and these dense tensors by their names in the state dict, to newcomers."""
        if self._weight_server is not None:
            self._weight_server.start(dense, self.store, self.fail)

    def agree(self, *flags: int) -> list[int]:
        """The largest value of each flag over all ranks. Collective; every rank gives as many flags.

        Raises:
            PeerLost: a peer died, left, or missed the deadline; or all leave now to take a process in.
            RuntimeError: a background thread of this rank died.
        """
        self._latch.check()
        self.handshakes += 1
        if self._rebalancer is not None:
            self._rebalancer.enter_step(self.handshakes)
        *agreed, joining = self.groups.control.all_reduce_max([*flags, int(self._epoch.somebody_knocks)])
        if joining:
            raise PeerLost("a process joins")
        return agreed

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One forward, in one epoch and one placement version. Counted in `steps` when it finishes."""
        yield
        self.exchange.check()
        self.steps += 1

    def run(self, forward: Callable[[], Result]) -> Result:
        """Run a forward to its end in one epoch, together with all ranks; when a rank is lost, recover and repeat it.

        `forward` must be repeatable (a KV cache is: the same entries are written again). What the ranks run need not
        match, only the sequence of MoE layer calls must. A rank that has nothing more to run calls `finish`.

        Raises:
            NotEnoughSlots, TransferFailed: the experts cannot be restored.
            PeerLost: no agreement within a minute.
        """
        return lockstep.run(self, forward)

    def finish(self) -> None:
        """Take part, without tokens, in what the others still run, until every rank of the launch has come here, also
        those that are dead now and come back; then leave the group for good.

        Raises:
            NotEnoughSlots, TransferFailed: the experts cannot be restored.
            PeerLost: no agreement within a minute.
        """
        lockstep.help_others(self)
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
        with self.step():
            self.idle(self.layers, self.registry.placement.slots_per_rank)

    def rehearse(self, act: Callable[[], None]) -> None:
        """Run `act`, forwards that reach nobody and count for nothing: kernels are loaded and CUDA graphs made before
        they are needed. Where `exchanges.can_rehearse`; while no peer waits for this rank."""
        with (
            self.load_counter.stopped(),
            self.exchanges.muted(self.registry.placement.slots_per_rank) as self._exchange,
        ):
            act()

    @property
    def change_is_wanted(self) -> bool:
        """Whether the epoch is over, or a process waits to be taken in."""
        return self._epoch.is_left or self._epoch.somebody_knocks

    def recover(self, reason: str) -> Report:
        """Leave the current epoch and come back in the next: view, groups, repair, vote, commit. Collective in effect.

        Raises:
            NotEnoughSlots, TransferFailed: the experts cannot be restored (now).
            PeerLost: no agreement within a minute.
            RuntimeError: a background thread of this rank died.
        """
        self._latch.check()
        log.info("leaving epoch %d: %s", self.epoch, reason)
        self._epoch.leave(self.view)
        self.rebalancer.end_epoch()
        recovery = Recovery(
            self.seat.member,
            self._membership,
            self._epoch,
            self.topology,
            self.store,
            self._group_device,
            exchange_timeout_s=self._exchange_timeout_s,
            grow_slots=self._grow_slots,
        )
        version, newcomer = self.registry.placement.version, not self._epoch.is_entered
        placement, report = recovery.run(self.view, version, reason, newcomer=newcomer)
        self.registry.commit(placement)
        self._use_groups()
        self.handshakes = 0
        self.rebalancer.begin_epoch(self.view, self.groups, self.store, changed=True)
        log.info("recovered: %s", report)
        self._hooks.call(self.rank, self.view, placement, report)
        return report

    def fail(self, error: BaseException) -> None:
        """A thread of this rank has died of `error`: the call in flight breaks off, and the next one here raises. From
        any thread."""
        self._latch.set(error)
        self._epoch.abort(self.epoch)
        self.on_change()

    def close(self) -> None:
        """Leave for good. Peers still inside a call get `PeerLost`."""
        if self._rebalancer is not None:
            self._rebalancer.end_epoch()
        self._membership.close()
        self.signals.close()
        if self._weight_server is not None:
            self._weight_server.close()
        if self._epoch.is_entered:
            self.groups.abort()
        self.exchanges.close()

    def _use_groups(self) -> None:
        if self._epoch.is_entered:
            self._exchange = self.exchanges.enter(self.view, self.groups, self.registry.placement.slots_per_rank)


def _placed(thing: Result | None) -> Result:
    if thing is None:
        raise RuntimeError("no experts are placed yet: call runtime.place or elasticize first")
    return thing
