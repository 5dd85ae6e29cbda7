"""Recovery: from "something broke" to a new epoch in which every expert has a live slot.

View (who is left) -> groups -> repair (what no live slot holds, from the nearest source, verified) -> vote -> commit.
Each member tells what it holds, and the plan is computed from that alone: nobody's opinion of the past is needed, so a
second loss on the way simply begins again at the view.
"""

import enum
import logging
import time

import numpy as np
import torch

from elastic_moe.control.report import Report
from elastic_moe.control.vote import Vote
from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import NotEnoughMembers, NotEnoughSlots, PeerLost
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.view import Member, View
from elastic_moe.membership.current_epoch import CurrentEpoch
from elastic_moe.membership.quorum import Membership
from elastic_moe.placement.placement import EMPTY, Placement, fewest_slots
from elastic_moe.placement.repair import grow, lower_bound_moves, repair, shrink
from elastic_moe.placement.topology import Topology
from elastic_moe.pulse import Pulse
from elastic_moe.weights.reserves import Reserves
from elastic_moe.weights.sources import Account, Until, fill
from elastic_moe.weights.store import UNKNOWN, ExpertStore
from elastic_moe.wire import PLAIN, Wire

log = logging.getLogger(__name__)


class Phase(enum.StrEnum):
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
        reserves: Reserves,
        device: torch.device,
        *,
        deadlines: Deadlines,
        pulse: Pulse,
        slots_per_rank: int,
        grow_slots: bool,
        min_members: int,
        wire: Wire = PLAIN,
    ) -> None:
        """`epoch` enters each new view with its groups before they are built, so that other threads may abort them;
        `device` is that of the data group. A rank has `slots_per_rank` slots, and more only where the experts need
        them and `grow_slots` allows it."""
        self._me = me
        self._membership = membership
        self._epoch = epoch
        self._topology = topology
        self._store = store
        self._reserves = reserves
        self._device = device
        self._deadlines = deadlines
        self._pulse = pulse
        self._slots_per_rank = slots_per_rank
        self._grow_slots = grow_slots
        self._min_members = min_members
        self._wire = wire
        self._newcomer = False
        self._phase: Phase | None = None
        self._phase_began = 0.0
        self._seconds: dict[str, float] = {}
        self._lower_bound = 0
        self._rejected = 0

    def run(self, view: View, version: int, reason: str, *, newcomer: bool) -> tuple[Placement, Report]:
        """Go from `view` to a later one, in which all members agree on a placement.

        Args:
            view: the last known; its groups are aborted already.
            version: of the last placement committed here.
            reason: what was noticed, for the report.
            newcomer: this process has never been a member; what it holds must have the digests of the group.

        Raises:
            PeerLost: no agreement within `Deadlines.recovery_s`.
            NotEnoughMembers: fewer than `min_members` are left; the view and its groups are good.
            NotEnoughSlots: the members' slots cannot hold all experts; the view and its groups are good.
            TransferFailed: an expert can be had from no source, on all members; the view and its groups are good.
        """
        old, noticed_at, begin, attempts = view, time.time(), time.monotonic(), 0
        deadline_s = self._deadlines.recovery_s
        self._newcomer = newcomer
        while True:
            attempts += 1
            try:
                self._enter(Phase.VIEW)
                view = self._membership.next_view(self._epoch.others or view, self._epoch.request_join, deadline_s)
                self._enter(Phase.GROUPS)
                groups = EpochGroups(view, self._me.rank, self._device, self._deadlines, self._wire)
                self._epoch.enter(view, groups)
                try:
                    groups.build()
                finally:
                    self._membership.report(groups.unreached)
                self._membership.entered(view)
                self._enter(Phase.REPAIR)
                placement, num_bytes = self._repair(view, groups, version)
                break
            except PeerLost as error:
                log.warning("recovery attempt %d: %s", attempts, error)
                self._epoch.leave(view)
                if time.monotonic() - begin > deadline_s:
                    raise
        self._enter(None)
        report = Report(
            epoch=view.epoch,
            ranks=view.ranks,
            lost=tuple(m.rank for m in old.members if not view.has(m.rank, m.incarnation)),
            joined=tuple(m.rank for m in view.members if not old.has(m.rank, m.incarnation)),
            reason=reason,
            noticed_at=noticed_at,
            phase_s=self._seconds,
            bytes_by_source=num_bytes,
            bytes_lower_bound=self._lower_bound,
            rejected=self._rejected,
            attempts=attempts,
        )
        return placement, report

    def _repair(self, view: View, groups: EpochGroups, version: int) -> tuple[Placement, dict[str, int]]:
        """The placement that all members hold now, and the bytes that came for it in the whole group.

        An expert is lost when no live slot holds it: so no replica can be a source here.
        """
        if len(view.members) < self._min_members:
            raise NotEnoughMembers(
                f"ranks {list(view.ranks)} are left, elastic.min_members={self._min_members}: waiting for others"
            )
        store, account = self._store, Account(on_progress=self._pulse.beat)
        held, version = self._gather(groups, version)
        held = self._fit_slots(held, view, groups)
        placement = self._plan(held, view, version + 1)
        vote = Vote(groups.control, account, before=lambda: self._enter(Phase.COMMIT))
        until = Until(is_cancelled=lambda: self._epoch.is_left)
        sources = self._reserves.all(store, groups)
        try:
            fill(store.wants(placement.of_rank(self._me.rank)), store, sources, account, until=until, any_lacks=vote)
        finally:
            self._rejected += account.rejected
        return placement, vote.num_bytes

    def _gather(self, groups: EpochGroups, version: int) -> tuple[np.ndarray, int]:
        """What every seat holds, int32 [L, R * S]; and the newest placement version of all."""
        store = self._store
        num_slots, version, known = groups.control.all_reduce_max([store.num_slots, version, int(not self._newcomer)])
        store.record_digests()
        bystander = self._newcomer and known  # a newcomer has no say in what the right bytes are
        said = np.full_like(store.digests, UNKNOWN) if bystander else store.digests
        if given_up := store.trust(groups.control.all_reduce_max_array(said)):
            self._rejected += given_up
            log.warning("%d experts brought along have wrong digests", given_up)
        num_layers = store.held.shape[0]
        table = np.full((num_layers, self._topology.num_ranks, num_slots), EMPTY, dtype=np.int64)
        table[:, self._me.rank, : store.num_slots] = store.held
        table = groups.control.all_reduce_max_array(table)
        return table.reshape(num_layers, -1).astype(np.int32), version

    def _fit_slots(self, held: np.ndarray, view: View, groups: EpochGroups) -> np.ndarray:
        """Have as many slots as it takes, the same number everywhere: more if they may be added and all have memory for
        them, no more than a rank is to have once they are not needed.

        Raises:
            NotEnoughSlots: a rank has no memory for so many, on all members; nothing has changed.
        """
        store, group = self._store, groups.control
        num_slots = held.shape[1] // self._topology.num_ranks
        wanted, usual = fewest_slots(store.num_experts, len(view.ranks)), self._slots_per_rank
        if wanted > num_slots and self._grow_slots:
            room = -group.all_reduce_max([-store.room()])[0]
            if wanted > room or any(group.all_reduce_max([int(not self._resized(wanted))])):
                store.resize(min(num_slots, store.num_slots))
                raise NotEnoughSlots(
                    f"{len(view.ranks)} ranks need {wanted} slots each for {store.num_experts} experts and have "
                    f"{num_slots}; one of them has memory for {min(room, wanted - 1)}: restart the ranks that are lost"
                )
            return grow(held, num_slots, wanted)
        if num_slots > usual:
            fewer = shrink(held, num_slots, usual)
            if not lower_bound_moves(fewer, store.num_experts, usual, view.ranks):
                store.resize(usual)
                return fewer
        if any(group.all_reduce_max([int(not self._resized(num_slots))])):  # a newcomer's
            store.resize(min(usual, store.num_slots))
            raise NotEnoughSlots(f"a rank that joins has no memory for the {num_slots} slots of the others")
        return held

    def _resized(self, num_slots: int) -> bool:
        try:
            self._store.resize(num_slots)
        except RuntimeError as error:
            log.error("no memory for %d slots: %s", num_slots, str(error).splitlines()[0])  # noqa: TRY400
            return False
        return True

    def _plan(self, held: np.ndarray, view: View, version: int) -> Placement:
        """The repaired placement."""
        store, alive = self._store, view.ranks
        moves = lower_bound_moves(held, store.num_experts, store.num_slots, alive)
        self._lower_bound = moves * store.expert_bytes
        return repair(
            held, store.num_experts, store.num_slots, alive, self._topology, version=version, epoch=view.epoch
        )

    def _enter(self, phase: Phase | None) -> None:
        """From here on the time is that of `phase`."""
        self._pulse.beat()
        now = time.monotonic()
        if self._phase is not None:
            seconds = now - self._phase_began
            self._seconds[self._phase.value] = self._seconds.get(self._phase.value, 0.0) + seconds
            log.debug("phase %s took %.1f ms", self._phase, seconds * 1e3)
        self._phase, self._phase_began = phase, now
