"""ElasticRuntime: the one object a process builds. It owns the view, its groups, and the pool of experts."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from elastic_moe.background import Latch
from elastic_moe.config import EplbConfig, ExchangeConfig
from elastic_moe.control.rebalance import load_balancer
from elastic_moe.control.recovery import Recovery
from elastic_moe.control.report import Report
from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import PeerLost
from elastic_moe.exchange.epochs import TokenShape, exchanges_of
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.view import View
from elastic_moe.membership.current_epoch import CurrentEpoch
from elastic_moe.membership.launch import Launch, SeatStart, host_of
from elastic_moe.membership.quorum import Membership
from elastic_moe.membership.rendezvous import Seat, meet, refuse_a_stranger
from elastic_moe.placement.placement import Placement
from elastic_moe.placement.registry import PlacementRegistry
from elastic_moe.placement.topology import Topology
from elastic_moe.pulse import Pulse
from elastic_moe.runtime.hooks import Hooks
from elastic_moe.runtime.initial_placement import choose_placement
from elastic_moe.runtime.lockstep import come_back, others_run
from elastic_moe.runtime.pool import ExpertPool
from elastic_moe.supervision.channel import Beat
from elastic_moe.supervision.supervised import Supervised
from elastic_moe.transport.staging import open_staging
from elastic_moe.weights.disk import Disk
from elastic_moe.weights.manifest import DigestFile
from elastic_moe.weights.reserves import Reserves
from elastic_moe.weights.server import WeightServer
from elastic_moe.weights.shelf import EngineShelf
from elastic_moe.weights.sources import Source
from elastic_moe.weights.store import ExpertStore

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
        exchange_timeout_s: float = 15.0,
        deadlines: Deadlines | None = None,
        lighthouses: Sequence[str] = (),
        grow_slots: bool = True,
        min_members: int = 1,
        eplb: EplbConfig | None = None,
        exchange: ExchangeConfig | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        """`view` is the current one, or, for a process that takes a dead one's seat, the last known.

        A member builds the groups of `view` here, together with all others; a newcomer gets its first ones by
        `recover`, once it holds what it brings. `eplb`: how experts are balanced; `exchange`: how tokens travel;
        `pulse`: beats with all that this rank does; `deadlines`: all of them, instead of the two.
        """
        self.seat = seat
        self.rank = seat.member.rank
        self.device = device
        self.steps = 0  # forwards finished
        self.handshakes = 0
        """Calls of `agree` in this epoch: the number of the step that all ranks are in."""
        self.pulse = pulse or Pulse()
        self._thread = threading.get_ident()
        self._hooks = Hooks()
        self.on_rank_lost, self.on_rank_joined = self._hooks.rank_lost, self._hooks.rank_joined
        self.on_placement_changed, self.on_view = self._hooks.placement_changed, self._hooks.view
        self.on_change: Callable[[], None] = lambda: None
        """Called, in another thread, when the group is about to change: a rank that sleeps outside must come."""
        self._topology = topology
        self._latch = Latch()
        self.deadlines = deadlines or Deadlines.of(
            topology.num_ranks, exchange_s=exchange_timeout_s, start_s=start_timeout_s
        )
        self._grow_slots, self._min_members = grow_slots, min_members
        self._eplb = eplb or EplbConfig()
        self._exchange_config = exchange or ExchangeConfig()
        symmetric = self._exchange_config.kind == "symmetric"
        self._group_device = torch.device("cpu") if symmetric else device
        urls = lighthouses or view.lighthouses
        self._membership = Membership(seat.member, urls, self.deadlines, self.fail, seat.wire)
        self._membership.on_turn, self._membership.backups = self.pulse.beat, view.backups
        self._epoch = CurrentEpoch(seat.member, view, seat.signals, self._membership, lambda: self.on_change())
        self._exchanges = exchanges_of(exchange, seat.member, topology.num_ranks, device, self.deadlines.exchange_s)
        self._pool: ExpertPool | None = None
        self._weight_server: WeightServer | None = None
        self._supervised: Supervised | None = None
        self._epoch.listen(self.deadlines, self.fail)
        if view.has(self.rank, seat.member.incarnation):
            groups = EpochGroups(view, self.rank, self._group_device, self.deadlines, seat.wire)
            self._epoch.enter(view, groups.build())
            self._membership.start()

    @classmethod
    def join(
        cls,
        start: Launch | SeatStart,
        *,
        device: torch.device,
        address: str = "",
        start_timeout_s: float = 120.0,
        alike: Mapping[str, str] | None = None,
        weights_host: str = "",
        **settings: Any,
    ) -> "ElasticRuntime":
        """Meet the other ranks of the launch and build the first epoch's groups, collectively; or, for a process that
        takes a dead one's seat, prepare to be taken in by `recover` once the experts are loaded.

        Args:
            start: this process's place, `Launch.from_torchrun(os.environ)`; or what its supervisor said of it.
            device: where experts and tokens live: cpu (gloo) or a CUDA device (NCCL).
            address: endpoint for front ends, of a process that serves requests.
            start_timeout_s: how long to wait for the others, and then for those that load slowly, in seconds.
            alike: what all ranks must have the same, by names that a user knows.
            weights_host: address on which others may ask for weights; empty: that of the other sockets.
            **settings: see the constructor.

        Raises:
            PeerLost: a rank did not come in time.
            ValueError: `alike` differs; the message says in what, and where.
        """
        supervised = Supervised.of_launch(start) if isinstance(start, Launch) else None
        if isinstance(start, Launch):
            start = supervised.start if supervised else SeatStart(start)
        server = WeightServer(weights_host or host_of(start.launch), start.launch.wire.of_weights())
        seat = Seat(start, address=address, weights=server.address, alike=alike)
        view = start.rejoin or meet(start.launch, seat, start_timeout_s)
        refuse_a_stranger(seat, view)
        runtime = cls(seat, view, start.launch.topology, device, start_timeout_s=start_timeout_s, **settings)
        runtime._weight_server = server
        if supervised:
            runtime._supervised = supervised
            runtime.on_view.append(supervised.tell_view)
            supervised.begin(view, runtime.beat, runtime.deadlines.beat_s)
        return runtime

    @property
    def view(self) -> View:
        """The current members; of a process that is not one yet, the last known."""
        return self._epoch.view

    @property
    def is_member(self) -> bool:
        """Whether this process has been taken in."""
        return self._epoch.is_entered

    @property
    def groups(self) -> EpochGroups:
        """The current epoch's groups; PeerLost for a newcomer that has none yet."""
        return self._epoch.groups

    @property
    def pool(self) -> ExpertPool:
        """The experts of this rank; RuntimeError before `place`."""
        if self._pool is None:
            raise RuntimeError("no experts are placed yet: call runtime.place or elasticize first")
        return self._pool

    def place(
        self,
        num_layers: int,
        num_experts: int,
        *,
        slots_per_rank: int | None = None,
        redundant_slots: int = 0,
        tokens: TokenShape | None = None,
        expert_bytes: int = 0,
    ) -> Placement:
        """Commit the initial placement of L layers x E experts over all seats, see `choose_placement`.

        `tokens` is what travels, `expert_bytes` the size of the largest expert; with `exchange.kind=symmetric` memory
        is reserved for them.

        Raises:
            NotEnoughSlots: R * S < E; the message says how many are needed.
            ValueError: the file of initial loads cannot be read or does not fit; or tokens that cannot travel so.
        """
        if tokens is not None:
            self._exchanges.reserve(num_experts, tokens)
        eplb, me = self._eplb, self.seat.member
        placement = choose_placement(
            num_layers,
            num_experts,
            self._topology,
            eplb,
            slots_per_rank=slots_per_rank,
            redundant_slots=redundant_slots,
        )
        if eplb.mode != "off":
            load_balancer()
        self._pool = ExpertPool(
            PlacementRegistry(placement, self.rank, self._topology, self.device),
            self._exchanges,
            open_staging(
                self._exchange_config, eplb, me, self._topology, self.device, self.deadlines.exchange_s, expert_bytes
            ),
            eplb,
            self.device,
            self.deadlines,
            steps=lambda: self.steps,
            wake=lambda: self.on_change(),
            committed=self._hooks.call_placement_changed,
            pulse=self.pulse,
            on_error=self.fail,
        )
        if self._epoch.is_entered:
            self._pool.enter(self.view, self.groups)
        return placement

    def hold(
        self,
        store: ExpertStore,
        disk: Disk | None = None,
        dense: Mapping[str, torch.Tensor] | None = None,
        kept: DigestFile | None = None,
        form: str = "",
        others: Sequence[Source] = (),
    ) -> None:
        """Take the experts of this rank, loaded as the placement says, in order to move and restore them later.

        Args:
            store: all MoE layers, in the placement's order.
            disk: where an expert comes from that no live rank holds (the checkpoint).
            dense: the other tensors by their names in the state dict, for newcomers.
            kept: the digests that an earlier start has found.
            form: see `Holding.form`.
            others: where lost experts come from beside `disk`.

        Raises:
            ValueError: see `ExpertPool.hold`; `Undecided`, see `settle`.
            PeerLost: a peer died, left, or missed the deadline.
        """
        self.pool.hold(store, Reserves(disk, others))
        store.record_digests()
        if self._epoch.is_entered:
            with self.groups.control.patient(self.deadlines.start_s):  # for those that load slowly
                self.pool.settle(self.view, self.groups, dense or {}, kept)
            self.pool.balance(self.view, self.groups, changed=False)
        if self._weight_server is not None and dense is not None:
            self._weight_server.start(EngineShelf(store, dense, form), self.fail)

    def agree(self, *flags: int) -> list[int]:
        """The largest value of each flag over all ranks. Collective; every rank gives as many flags.

        Raises:
            PeerLost: a peer died, left, or missed the deadline; or all leave now to take a process in.
            RuntimeError: a background thread of this rank died.
        """
        self._latch.check()
        self.handshakes += 1
        self.pulse.beat()
        if self._pool is not None:
            with self.pulse.expects(self.deadlines.wait_s):  # the others may have to come to this step first
                self._pool.balancer.enter_step(self.handshakes)
        *agreed, joining = self.groups.control.all_reduce_max([*flags, int(self._epoch.somebody_joins)])
        if joining:
            raise PeerLost("a process joins")
        return agreed

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One forward, in one epoch and one placement version. Counted in `steps` when it finishes."""
        with self.pulse.expects(self.deadlines.wait_s if self.device.type == "cuda" else self.pulse.within_s):
            yield
            self.pool.exchange.check()
        self.steps += 1

    def run(self, forward: Callable[[], Result]) -> Result:
        """Run a forward to its end in one epoch, together with all ranks; when a rank is lost, recover and repeat it.

        `forward` must be repeatable (a KV cache is: the same entries are written again). What the ranks run need not
        match, only the sequence of MoE layer calls must. A rank that has nothing more to run calls `finish`.

        Raises:
            NotEnoughSlots, TransferFailed: the experts cannot be restored.
        """
        while True:
            try:
                self.agree(1)
                with self.step():
                    return forward()
            except PeerLost as error:
                come_back(self, str(error))

    def finish(self) -> None:
        """Take part, without tokens, in what the others still run, until every rank of the launch has come here, also
        those that are dead now and come back; then leave the group for good. Raises as `run` does."""
        while others_run(self, self._topology.num_ranks):
            pass
        with contextlib.suppress(PeerLost):
            self.groups.control.barrier()  # nobody leaves before all know that it is over
        if self._supervised is not None:
            self._supervised.tell_done()
        self.close()

    def join_idle(self) -> None:
        """Take part in one forward of the others without tokens. Raises PeerLost."""
        with self.step():
            self.pool.join_idle()

    def beat(self) -> Beat:
        """What to tell a supervisor: that this process lives, and that its main thread gets on. From any thread."""
        within_s = self.pulse.within_s
        if within_s is not None and self._epoch.is_entered and self.groups.waiting(self._thread):
            within_s = max(within_s, self.deadlines.wait_s)
        turns = self.groups.turns if self._epoch.is_entered else 0
        return Beat(self.pulse.count + turns, within_s)

    @property
    def change_is_wanted(self) -> bool:
        """Whether the epoch is over, or a process waits to be taken in."""
        return self._epoch.is_left or self._epoch.somebody_joins

    def recover(self, reason: str) -> Report:
        """Leave the current epoch and come back in the next: view, groups, repair, vote, commit. Collective in effect.

        Raises:
            NotEnoughSlots, TransferFailed: the experts cannot be restored (now).
            PeerLost: no agreement within a minute.
            RuntimeError: a background thread of this rank died.
        """
        self._latch.check()
        log.info("leaving epoch %d: %s", self.view.epoch, reason)
        pool = self.pool
        self._epoch.leave(self.view)
        pool.balancer.end_epoch()
        recovery = Recovery(
            self.seat.member,
            self._membership,
            self._epoch,
            self._topology,
            pool.store,
            pool.reserves,
            self._group_device,
            deadlines=self.deadlines,
            pulse=self.pulse,
            slots_per_rank=pool.slots_per_rank,
            grow_slots=self._grow_slots,
            min_members=self._min_members,
            wire=self.seat.wire,
        )
        newcomer = not self._epoch.is_entered
        with self.pulse.expects(self.deadlines.progress_s):
            placement, report = recovery.run(self.view, pool.placement.version, reason, newcomer=newcomer)
            pool.registry.commit(placement)
            pool.enter(self.view, self.groups)
        self.handshakes = 0
        pool.balance(self.view, self.groups, changed=True)
        log.info("recovered: %s", report)
        self._hooks.call(self.rank, self.view, placement, report)
        return report

    def fail(self, error: BaseException) -> None:
        """A thread of this rank has died of `error`: the call in flight breaks off, and the next one here raises. From
        any thread."""
        self._latch.set(error)
        self._epoch.abort(self.view.epoch)
        self.on_change()

    def close(self) -> None:
        """Leave for good. Peers still inside a call get `PeerLost`."""
        if self._pool is not None:
            self._pool.balancer.end_epoch()
        self._membership.close()
        self.seat.signals.close()
        if self._weight_server is not None:
            self._weight_server.close()
        if self._epoch.is_entered:
            self.groups.abort()
        self._exchanges.close()
