"""The epoch this process is in, and the signals between members upon which it is left.

Nobody acts on a signal alone: a death heard of, a neighbour lost, another's wish only make this process leave, and ask
for the next view.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from elastic_moe.background import OnError, start_thread
from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import PeerLost
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.probe import unreachable
from elastic_moe.group.view import Member, View, incarnation_of
from elastic_moe.membership.quorum import Membership
from elastic_moe.membership.signals import Greeting, JoinRequest, PeerDied, Signals, ViewRequest

log = logging.getLogger(__name__)

GREET_S = 2.0
"""From one greeting of those who may be cut off to the next."""


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
        self._missed: dict[str, Member] = {}
        """Members that were lost without a word of their death, by incarnation: they may be cut off and live."""
        self.others: View | None = None
        """A group of the same launch that this process has to join."""

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
        self._on(ViewRequest, lambda signal: self._hear_request(signal))
        self._on(Greeting, lambda signal: self._hear_greeting(signal.view))
        self._on(PeerDied, lambda signal: self._peer_died(signal.rank, incarnation_of(signal.proof)))
        self._on(JoinRequest, self._let_join)
        self._signals.start(self._me.incarnation, deadlines, self._peer_is_silent, on_error)
        start_thread("greeter", self._greet, on_error=on_error)

    def enter(self, view: View, groups: EpochGroups) -> None:
        """Go over to `view`; its groups may still have to be built, and may be aborted meanwhile."""
        with self._lock:
            self._missed |= {m.incarnation: m for m in self.view.members}
            for incarnation in [m.incarnation for m in view.members]:
                self._missed.pop(incarnation, None)
            self.view, self._groups, self.others = view, groups, None
        self._signals.watch(view, self._me.rank)
        if self._membership.knows_a_death(view):
            self.abort(view.epoch)

    def leave(self, view: View) -> None:
        """Leave `view` if it is the current one, and tell its members, who may wait for us. Those who want to join ask
        for the next view already."""
        if self.abort(view.epoch):
            self._signals.tell(
                [m for m in view.members if m.rank != self._me.rank], ViewRequest(view.epoch, view.digest)
            )
            self._joining = {}

    def request_join(self, view: View) -> None:
        """Tell the members of `view` that this process waits to be taken in."""
        others = {m.signals: m.incarnation for m in view.members if m.incarnation != self._me.incarnation}
        unreached = tuple(others[address] for address in unreachable(others))
        self._signals.tell(view.members, JoinRequest(self._me, unreached))

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

    def _peer_is_silent(self, member: Member) -> None:
        """In the signals' thread. Its host may be gone, or only the wire to it."""
        if self.is_left:
            return
        if unreachable([member.signals]):
            self._membership.report([member.incarnation])
        log.warning("nothing is heard of rank %d: asking for a new view", member.rank)
        if self.view.has(member.rank, member.incarnation):
            self.leave(self.view)
        self._on_change()

    def _hear_request(self, request: ViewRequest) -> None:
        """Of this view, or of a later one that counts on this process: somebody knows more."""
        view = self.view
        if (request.epoch, request.digest) == (view.epoch, view.digest) or request.epoch > view.epoch:
            self.abort(view.epoch)

    def _greet(self) -> None:
        """Look for those who were lost without a word of their death: one of each group does."""
        while True:
            time.sleep(GREET_S)
            view = self.view
            first = view.members[0].incarnation == self._me.incarnation
            if not first or self._groups is None or self.is_left or not self._membership.is_settled:
                continue
            with self._lock:
                self._missed = {
                    name: m for name, m in self._missed.items() if not self._membership.has_died(m.rank, name)
                }
                missed = list(self._missed.values())
            live = [m for m in missed if m.signals not in unreachable([m.signals])]
            self._signals.tell(live, Greeting(view))

    def _hear_greeting(self, theirs: View) -> None:
        """Of a group of this launch. Two that share nobody become one: the smaller joins the other, as newcomers do. In
        a later view of one's own group one is a member without knowing, or has been left out."""
        mine = self.view
        names = {member.incarnation for member in mine.members}
        if self._groups is None or self.is_left or mine.digest == theirs.digest or not self._membership.is_settled:
            return
        if names & {member.incarnation for member in theirs.members}:
            if theirs.epoch > mine.epoch:
                self.leave(mine)
        elif (len(mine.members), mine.digest) < (len(theirs.members), theirs.digest):
            log.warning("there is another group, ranks %s: joining it", list(theirs.ranks))
            self.others = theirs
            self.leave(mine)
        else:
            self._signals.tell(theirs.members, Greeting(mine))

    def _let_join(self, request: JoinRequest) -> None:
        member, names = request.member, {m.incarnation for m in self.view.members}
        if member.incarnation not in names and not names & set(request.unreached):
            self._joining[member.rank] = member
