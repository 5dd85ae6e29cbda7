"""One round of the load balancer: sum the loads, decide, move experts into staging, swap them in, chunk by chunk."""

import fcntl
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import torch

from elastic_moe.config import EplbConfig
from elastic_moe.control.report import Outcome, RebalanceReport
from elastic_moe.control.vote import Vote
from elastic_moe.errors import TransferFailed
from elastic_moe.group.process_group import Group
from elastic_moe.group.view import View
from elastic_moe.placement.balancedness import MoveCost, balancedness, worth_moving
from elastic_moe.placement.chunks import chunks
from elastic_moe.placement.placement import EMPTY, Placement
from elastic_moe.placement.registry import PlacementRegistry, Tables
from elastic_moe.placement.topology import Topology
from elastic_moe.placement.transfers import TransferPlan, plan_transfers
from elastic_moe.transport.staging import MEGABYTE, Staging, Transfer
from elastic_moe.weights.reserves import Reserves
from elastic_moe.weights.sources import Account, Until, Want, fill
from elastic_moe.weights.staged import Replicas, Staged
from elastic_moe.weights.store import ExpertStore

log = logging.getLogger(__name__)

Swap = Callable[[Callable[[], None]], None]
"""Runs a function in the step loop, on all ranks before the same step, and waits until it has run."""


class Decision(msgspec.Struct, frozen=True):
    """What the first rank of a view has decided on, for all."""

    reason: str
    balancedness: list[float] = []
    """Mean over largest load of a rank, by layer, of the present placement."""
    max_mean: float = 0.0
    """Of the present placement, averaged over the layers."""
    max_mean_after: float = 0.0
    slots: bytes = b""
    """The placement to reach, int32 [L, P]; empty: the present one."""
    failed: bool = False
    """There is no plan, for a bug."""


def decide(
    loads: np.ndarray,
    current: Placement,
    alive: Sequence[int],
    topology: Topology,
    config: EplbConfig,
    expert_bytes: int,
    *,
    asked: bool,
    epoch: int,
) -> Decision:
    """Whether to move, and to which placement. Pure.

    Args:
        loads: float [L, E], tokens per expert in the window, of all ranks.
        current: the committed placement.
        alive: EP ranks of the members.
        topology: the node of every seat.
        config: threshold, algorithm, link rate and interval.
        expert_bytes: of one expert of one layer.
        asked: somebody wants the best placement, whatever the threshold says.
        epoch: of the new placement.
    """
    if not loads.any():
        return Decision("no tokens were counted yet")
    balanced = balancedness(current.slots, loads, current.slots_per_rank)
    uneven, by_layer = 1 / balanced, balanced.round(4).tolist()
    before = float(uneven.mean())
    if not asked and before <= config.threshold:
        reason = f"max/mean {before:.3f} is within eplb.threshold={config.threshold}"
        return Decision(reason, by_layer, before, before)
    from elastic_moe.placement.balance import balance  # compiled at the start by `load_balancer`, see there

    goal = balance(
        loads,
        topology,
        current.slots_per_rank,
        alive=alive,
        current=current,
        algorithm=config.algorithm,
        version=current.version + 1,
        epoch=epoch,
    )
    uneven_then = 1 / balancedness(goal.slots, loads, goal.slots_per_rank)
    after = float(uneven_then.mean())
    if after >= before:
        return Decision(f"no better placement than the present one, max/mean {before:.3f}", by_layer, before, before)
    most_received = max(arrivals(current, goal), default=0)
    cost = MoveCost(link_bytes_per_s=config.link_gb_per_s * 1e9, horizon_s=config.interval_s)
    pays, why = worth_moving(uneven, uneven_then, most_received * expert_bytes, cost)
    if not asked and not pays:
        return Decision(f"max/mean {before:.3f} -> {after:.3f} does not pay: {why}", by_layer, before, before)
    return Decision(f"max/mean {before:.3f} -> {after:.3f}: {why}", by_layer, before, after, goal.slots.tobytes())


def load_balancer() -> Callable[..., Placement]:
    """`placement.balance.balance`, compiled. Call it first in the main thread of a process, before it serves:
    it may wait for other processes.

    numba takes a second to import, and several to compile the first time on a machine: only those who balance pay, the
    processes of a host one after the other, so that all but the first find it compiled. (Compiled in a
    background thread beside torch's it was seen to crash.)
    """
    from elastic_moe.placement.balance import balance, warm_up

    with Path(tempfile.gettempdir(), f"elastic_moe-numba-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        warm_up()
    return balance


class Round:
    """One round on one rank. Every rank of the view runs it with the same loads; the first decides for all.

    Nothing that serves is touched but by `swap`: a round that breaks off leaves a placement that was committed, and
    the slots as it says.
    """

    def __init__(
        self,
        view: View,
        rank: int,
        group: Group,
        registry: PlacementRegistry,
        store: ExpertStore,
        reserves: Reserves,
        config: EplbConfig,
        staging: Staging,
        *,
        swap: Swap,
        pause: Callable[[], None],
        committed: Callable[[Placement], None],
    ) -> None:
        """
        Args:
            view: the members; `group` is theirs, for this round alone.
            rank: EP rank of this process.
            group: on the CPU.
            registry, store: what is placed and held here.
            reserves: where experts come from that came wrong.
            config: budgets.
            staging: how experts come.
            swap: how a chunk becomes current.
            pause: called when `eplb.mb_per_step` megabytes have come or gone.
            committed: called in the step loop with every new placement.
        """
        self._view = view
        self._rank = rank
        self._group = group
        self._registry = registry
        self._store = store
        self._reserves = reserves
        self._config = config
        self._staging = staging
        self._swap = swap
        self._pause = pause
        self._committed = committed
        self._phase_s: dict[str, float] = {}
        self._num_bytes: Counter[str] = Counter()
        self._num_moves = self._num_chunks = 0

    def run(self, number: int, loads: np.ndarray, ops: Sequence[str], *, asked: bool) -> RebalanceReport:
        """Decide on loads float [L, E] of the whole group, and do it.

        Args:
            number: of the round in its epoch.
            loads: the same on every rank.
            ops: names of the requests to answer.
            asked: on any rank: whatever the threshold says.

        Raises:
            PeerLost: a peer died, left, or missed the deadline.
        """
        registry, epoch = self._registry, self._view.epoch
        start = registry.placement
        with self._phase("plan"):
            decision = self._agree(loads, asked)
        outcome, reason, bound = Outcome.FAILED if decision.failed else Outcome.KEPT, decision.reason, 0
        if decision.slots:
            slots = np.frombuffer(decision.slots, dtype=np.int32).reshape(start.slots.shape)
            goal = Placement(slots, start.num_experts, start.slots_per_rank, start.version + 1, epoch)
            bound = sum(arrivals(start, goal)) * self._store.expert_bytes
            try:
                self._carry_out(goal)
                outcome = Outcome.MOVED
            except TransferFailed as error:
                outcome, reason = Outcome.FAILED, str(error)
                log.warning("rebalance broken off: %s", error)
        report = RebalanceReport(
            epoch=epoch,
            number=number,
            version=registry.placement.version,
            ops=tuple(ops),
            outcome=outcome,
            reason=reason,
            max_mean_before=decision.max_mean,
            max_mean_after=decision.max_mean_after,
            balancedness=decision.balancedness,
            num_moves=self._num_moves,
            num_chunks=self._num_chunks,
            phase_s=self._phase_s,
            bytes_by_source=dict(self._num_bytes),
            bytes_lower_bound=bound,
            ended_at=time.time(),
        )
        quiet = outcome is Outcome.KEPT or self._rank != self._view.ranks[0]
        log.log(logging.DEBUG if quiet else logging.INFO, "rebalance: %s", report)
        return report

    def _agree(self, loads: np.ndarray, asked: bool) -> Decision:
        """The first rank's decision, on every rank."""
        view, registry, said = self._view, self._registry, None
        if self._rank == view.ranks[0]:
            try:
                decision = decide(
                    loads,
                    registry.placement,
                    view.ranks,
                    registry.topology,
                    self._config,
                    self._store.expert_bytes,
                    asked=asked,
                    epoch=view.epoch,
                )
            except Exception as error:  # a plan is not worth a rank, least of all one after the other
                log.exception("the balancer failed; the placement stays as it is")
                decision = Decision(f"the balancer failed: {error}", failed=True)
            said = msgspec.msgpack.encode(decision)
        return msgspec.msgpack.decode(self._group.broadcast(said), type=Decision)

    def _carry_out(self, goal: Placement) -> None:
        registry, config, size = self._registry, self._config, self._store.expert_bytes
        in_staging = max(1, config.staging_mb * MEGABYTE // size)
        for slots in chunks(registry.placement.slots, goal, in_staging, config.layers_per_chunk):
            with self._phase("transfer"):
                placement = Placement(
                    slots, goal.num_experts, goal.slots_per_rank, registry.placement.version + 1, self._view.epoch
                )
                plan = plan_transfers(registry.placement.slots, placement, self._view.ranks, registry.topology)
                staged, num_bytes = self._stage(plan)
                tables = registry.prepare(placement)
            with self._phase("swap"):
                self._swap(lambda: self._publish(placement, tables, staged))  # noqa: B023 - runs before it returns
            self._num_chunks += 1
            self._num_moves += len(plan.moves)
            self._num_bytes.update(num_bytes)

    def _stage(self, plan: TransferPlan) -> tuple[Staged, dict[str, int]]:
        """Bring the experts of this rank's new slots into staging, verified; vote. With the bytes of the whole group.

        Raises:
            TransferFailed: a rank could not get one right.
        """
        store, group, staged, account = self._store, self._group, Staged(self._store), Account()
        transfer = Transfer(
            plan,
            self._view,
            self._rank,
            group,
            store.tensors,
            in_flight=max(1, int(self._config.mb_per_step * MEGABYTE / store.expert_bytes)),
            between=self._pause,
        )
        mine = [move for move in plan.moves if plan.rank_of(move.target) == self._rank]
        wants = [Want(move.layer, move.expert, move.target % plan.slots_per_rank) for move in mine]
        vote = Vote(group, account)
        until = Until(time.monotonic() + group.timeout_s)  # the others wait so long in their vote
        sources = [Replicas(self._staging, transfer, staged), *self._reserves.own]
        fill(wants, staged, sources, account, until=until, any_lacks=vote)
        return staged, vote.num_bytes

    def _publish(self, placement: Placement, tables: Tables, staged: Staged) -> None:
        """In the step loop: fill the slots, swap the tables."""
        store = self._store
        for layer, slot in np.argwhere(placement.of_rank(self._rank) != store.held).tolist():
            store.vacate(layer, slot)
        staged.install()
        self._registry.commit(placement, tables)
        if store.tensors(0, 0)[0].is_cuda:
            torch.cuda.current_stream().synchronize()  # the model may run on another stream
        self._committed(placement)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self._phase_s[name] = self._phase_s.get(name, 0.0) + time.monotonic() - begin


def arrivals(old: Placement, new: Placement) -> list[int]:
    """By rank, the experts of `new` that it does not hold in `old`: no way from one to the other moves fewer."""
    held = [_experts_of_rank(placement) for placement in (old, new)]
    return (held[1] & ~held[0]).sum(axis=(0, 2)).tolist()


def _experts_of_rank(placement: Placement) -> np.ndarray:
    """bool [L, R, E]."""
    layers, slots = np.nonzero(placement.slots != EMPTY)
    held = np.zeros((placement.num_layers, placement.num_ranks, placement.num_experts), dtype=bool)
    held[layers, slots // placement.slots_per_rank, placement.slots[layers, slots]] = True
    return held
