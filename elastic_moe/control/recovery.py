"""Recovery: from "something broke" to a new epoch in which every expert has a live slot.

View (who is left) -> groups -> repair (what is missing, from the nearest copy, verified) -> vote -> commit. Each
member tells what it holds, and the plan is computed from that alone: nobody's opinion of the past is needed, so a
second loss on the way simply begins again at the view.
"""

import enum
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from elastic_moe.control.other_disks import Unread, read_elsewhere
from elastic_moe.control.report import Report
from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import DigestMismatch, PeerLost, TransferFailed
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.view import Member, View
from elastic_moe.membership.current_epoch import CurrentEpoch
from elastic_moe.membership.quorum import Membership
from elastic_moe.placement.placement import EMPTY, Placement, fewest_slots
from elastic_moe.placement.repair import grow, lower_bound_moves, repair
from elastic_moe.placement.topology import Topology
from elastic_moe.placement.transfers import SOURCES, Distance, TransferPlan, plan_transfers
from elastic_moe.transport.group import move_experts
from elastic_moe.weights.store import UNKNOWN, ExpertStore

log = logging.getLogger(__name__)

DEADLINE_S = 60.0
MOVES_IN_FLIGHT = 64
"""Experts on their way between ranks at once; bounds the receive buffers of the transport."""


class Phase(enum.Enum):
    """The phases of a recovery, in their order."""

    VIEW = "view"
    GROUPS = "groups"
    REPAIR = "repair"
    COMMIT = "commit"


class Recovery:
    """Leads one rank from one epoch to the next. Owns nothing: what it is given, it returns changed or as it was."""

    def __init__(
        self,
        me: Member,
        membership: Membership,
        epoch: CurrentEpoch,
        topology: Topology,
        store: ExpertStore,
        device: torch.device,
        *,
        deadlines: Deadlines,
        grow_slots: bool,
    ) -> None:
        """`epoch` enters each new view with its groups before they are built, so that other threads may abort them."""
        self._me = me
        self._membership = membership
        self._epoch = epoch
        self._topology = topology
        self._store = store
        self._device = device
        self._deadlines = deadlines
        self._grow_slots = grow_slots
        self._newcomer = False
        self._seconds: dict[str, float] = {}
        self._bytes = np.zeros(len(Distance), dtype=np.int64)
        self._rejected = 0
        self._lower_bound = 0

    def run(
        self, view: View, version: int, reason: str, *, newcomer: bool, deadline_s: float = DEADLINE_S
    ) -> tuple[Placement, Report]:
        """Go from `view` to a later one, in which all members agree on a placement.

        Args:
            view: the last known; its groups are aborted already.
            version: of the last placement committed here.
            reason: what was noticed, for the report.
            newcomer: this process has never been a member; what it holds must have the digests of the group.
            deadline_s: give up after this many seconds.

        Raises:
            PeerLost: no agreement within the deadline.
            NotEnoughSlots: the members' slots cannot hold all experts; the view and its groups are good.
            TransferFailed: an expert can be had from no source, on all members; the view and its groups are good.
        """
        old, noticed_at, begin, attempts = view, time.time(), time.monotonic(), 0
        self._newcomer = newcomer
        while True:
            attempts += 1
            try:
                with self._phase(Phase.VIEW):
                    view = self._membership.next_view(view, self._epoch.request_join, deadline_s)
                with self._phase(Phase.GROUPS):
                    groups = EpochGroups(view, self._me.rank, self._device, self._deadlines)
                    self._epoch.enter(view, groups)
                    groups.build()
                placement = self._repair(view, groups, version)
                break
            except PeerLost as error:
                log.warning("recovery attempt %d: %s", attempts, error)
                self._epoch.leave(view)
                if time.monotonic() - begin > deadline_s:
                    raise
        report = Report(
            epoch=view.epoch,
            ranks=view.ranks,
            lost=tuple(m.rank for m in old.members if not view.has(m.rank, m.incarnation)),
            joined=tuple(m.rank for m in view.members if not old.has(m.rank, m.incarnation)),
            reason=reason,
            noticed_at=noticed_at,
            phase_s=self._seconds,
            bytes_by_source={source: int(n) for source, n in zip(SOURCES, self._bytes, strict=True) if n},
            bytes_lower_bound=self._lower_bound,
            rejected=self._rejected,
            attempts=attempts,
        )
        return placement, report

    def _repair(self, view: View, groups: EpochGroups, version: int) -> Placement:
        self._bytes.fill(0)
        with self._phase(Phase.REPAIR):
            held, version = self._gather(groups, version)
            placement, held = self._plan(held, view, version + 1)
            plan = plan_transfers(held, placement, view.ranks, self._topology)
            unread = self._transfer(plan, groups)
        with self._phase(Phase.COMMIT):
            if self._vote(unread, groups):
                left = read_elsewhere(unread, self._store, groups)
                self._bytes[Distance.OUTSIDE] += (len(unread) - len(left)) * self._store.expert_bytes
                if self._vote(left, groups):
                    others = TransferFailed(f"a member of epoch {view.epoch} can have an expert from no source")
                    raise left[0].why if left else others
        return placement

    def _vote(self, unread: Sequence[Unread], groups: EpochGroups) -> bool:
        """Whether any member lacks an expert; if none does, all know the bytes of the whole group."""
        brought = np.zeros((self._topology.num_ranks, len(SOURCES)), dtype=np.int64)
        brought[self._me.rank] = self._bytes
        lacking, *brought = groups.control.all_reduce_max([int(bool(unread)), *brought.ravel().tolist()])
        if not lacking:
            self._bytes = np.reshape(brought, (-1, len(SOURCES))).sum(axis=0)
        return bool(lacking)

    def _gather(self, groups: EpochGroups, version: int) -> tuple[np.ndarray, int]:
        """What every seat holds, int32 [L, R * S]; and the newest placement version of all."""
        store = self._store
        num_slots, version, known = groups.control.all_reduce_max([store.num_slots, version, int(not self._newcomer)])
        store.grow(num_slots)
        store.record_digests()
        bystander = self._newcomer and known  # a newcomer has no say in what the right bytes are
        said = np.full_like(store.digests, UNKNOWN) if bystander else store.digests
        if given_up := store.trust(groups.control.all_reduce_max_array(said)):
            self._rejected += given_up
            log.warning("%d experts brought along have wrong digests", given_up)
        num_layers = store.held.shape[0]
        table = np.full((num_layers, self._topology.num_ranks, num_slots), EMPTY, dtype=np.int64)
        table[:, self._me.rank] = store.held
        table = groups.control.all_reduce_max_array(table)
        return table.reshape(num_layers, -1).astype(np.int32), version

    def _plan(self, held: np.ndarray, view: View, version: int) -> tuple[Placement, np.ndarray]:
        """The repaired placement; with more slots than before if it takes them and they may be added."""
        store, alive = self._store, view.ranks
        wanted = fewest_slots(store.num_experts, len(alive))
        if wanted > store.num_slots and self._grow_slots:
            held = grow(held, store.num_slots, wanted)
            store.grow(wanted)
        moves = lower_bound_moves(held, store.num_experts, store.num_slots, alive)
        self._lower_bound = moves * store.expert_bytes
        placement = repair(
            held, store.num_experts, store.num_slots, alive, self._topology, version=version, epoch=view.epoch
        )
        return placement, held

    def _transfer(self, plan: TransferPlan, groups: EpochGroups) -> list[Unread]:
        """Fill this rank's new slots, and serve the others'. Returns those that could not be filled."""
        store, rank = self._store, self._me.rank
        for move in plan.local_of(rank):
            source = store.tensors(move.layer, move.source % plan.slots_per_rank)
            for target, tensor in zip(store.vacate(move.layer, move.target % plan.slots_per_rank), source, strict=True):
                target.copy_(tensor)
        move_experts(
            plan,
            groups.data,
            groups.ranks,
            rank,
            read=lambda m: store.tensors(m.layer, m.source % plan.slots_per_rank),
            write=lambda m: store.vacate(m.layer, m.target % plan.slots_per_rank),
            in_flight=MOVES_IN_FLIGHT,
        )
        unread = []
        for move in plan.moves:
            if plan.rank_of(move.target) == rank:
                layer, slot, expert = move.layer, move.target % plan.slots_per_rank, move.expert
                if why := self._accept(layer, slot, expert, plan.distance(move)):
                    unread.append(Unread(layer, slot, expert, why))
        return unread

    def _accept(self, layer: int, slot: int, expert: int, distance: Distance) -> TransferFailed | None:
        """Verify what was moved into a slot, or read it from disk. Returns why not."""
        store = self._store
        if distance is not Distance.OUTSIDE:
            if store.accept(layer, slot, expert):
                self._bytes[distance] += store.expert_bytes
                return None
            self._rejected += 1
            log.warning("layer %d expert %d: the %s copy has a wrong digest; reading the disk", layer, expert, distance)
        store.vacate(layer, slot)
        try:
            store.read_from_disk(layer, slot, expert)
        except TransferFailed as error:
            self._rejected += isinstance(error, DigestMismatch)
            log.warning("%s; asking the other ranks", error)
            return error
        self._bytes[Distance.OUTSIDE] += store.expert_bytes
        return None

    @contextmanager
    def _phase(self, phase: Phase) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - begin
            self._seconds[phase.value] = self._seconds.get(phase.value, 0.0) + seconds
            log.debug("phase %s took %.1f ms", phase.value, seconds * 1e3)
