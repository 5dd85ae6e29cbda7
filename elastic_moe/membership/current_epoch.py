"""The epoch this process is in, and the signals between members upon which it is left.

Nobody acts on a signal alone: a death heard of, a neighbour lost, another's wish only make this process leave, and ask
for the next view.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

from elastic_moe.background import OnError
from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import PeerLost
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.view import Member, View
from elastic_moe.membership.quorum import Membership
from elastic_moe.membership.signals import JoinRequest, PeerDied, Signals, ViewRequest

log = logging.getLogger(__name__)


class CurrentEpoch:
    """The view that counts, and its groups. Entered by the thread that recovers, left from any."""

    def __init__(
        self, me: Member, view: View, signals: Signals, membership: Membership, on_change: Callable[[], None]
    ) -> None:
        """`view` is the last known; its groups come with `enter`. `on_change` is called, in another thread, after
        every signal: a rank that sleeps must look."""
        self.view = view
        self._me = me
        self._signals = signals
        self._membership = membership
        self._on_change = on_change
        self._lock = threading.Lock()
        self._groups: EpochGroups | None = None
        self._left = -1
        self._joining: dict[int, Member] = {}

    @property
    def is_entered(self) -> bool:
        """Whether this process has ever had groups; a newcomer has not."""
        return self._groups is not None

    @property
    def groups(self) -> EpochGroups:
        """The groups of `view`; PeerLost for a newcomer that has none yet."""
        if self._groups is None:
            raise PeerLost("this process is not a member yet")
        return self._groups

    @property
    def is_left(self) -> bool:
        """Whether the current epoch was left: its next collective says so too."""
        return self._left == self.view.epoch

    @property
    def somebody_joins(self) -> bool:
        """Whether a process that is no member waits to be taken in."""
        joining, view = list(self._joining.values()), self.view
        return any(not view.has(m.rank, m.incarnation) for m in joining)

    def listen(self, deadlines: Deadlines, on_error: OnError) -> None:
        """Hear the signals of members and supervisors from now on, and mind the neighbours. `on_error` is told if
        nothing is heard any more."""
        self._on(ViewRequest, lambda signal: self.abort(signal.epoch))
        self._on(PeerDied, lambda signal: self._peer_died(signal.rank, signal.incarnation))
        self._on(JoinRequest, lambda signal: self._let_join(signal.member))
        self._signals.start(self._me.incarnation, deadlines, self._peer_is_lost, on_error)

    def enter(self, view: View, groups: EpochGroups) -> None:
        """Go over to `view`; its groups may still have to be built, and may be aborted meanwhile."""
        with self._lock:
            self.view, self._groups = view, groups
        self._signals.watch(view, self._me.rank)
        if self._membership.knows_a_death(view):
            self.abort(view.epoch)

    def leave(self, view: View) -> None:
        """Leave `view` if it is the current one, and tell its members, who may wait for us. Those who want to join ask
        for the next view already."""
        if self.abort(view.epoch):
            self._signals.tell([m for m in view.members if m.rank != self._me.rank], ViewRequest(view.epoch))
            self._joining = {}

    def request_join(self, view: View) -> None:
        """Tell the members of `view` that this process waits to be taken in."""
        self._signals.tell(view.members, JoinRequest(self._me))

    def abort(self, epoch: int) -> bool:
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

    def _on(self, kind: type, act: Callable[[Any], object]) -> None:
        def hear(signal: Any) -> None:
            act(signal)
            self._on_change()

        self._signals.on(kind, hear)

    def _peer_died(self, rank: int, incarnation: str) -> None:
        self._membership.note_death(rank, incarnation)
        view = self.view
        if view.has(rank, incarnation):
            self.abort(view.epoch)

    def _peer_is_lost(self, member: Member) -> None:
        log.warning("rank %d is lost, nothing is heard of it: asking for a new view", member.rank)
        if self.view.has(member.rank, member.incarnation):
            self.leave(self.view)
        self._on_change()

    def _let_join(self, member: Member) -> None:
        if not self.view.has(member.rank, member.incarnation):
            self._joining[member.rank] = member
