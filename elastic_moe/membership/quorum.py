"""Agreement on who is in the group: a view from torchft's lighthouse, asked for by whoever observes a change.

The lighthouse (Rust, by heartbeats and quorum) decides; observation only asks. It waits for every process that sends
heartbeats, so a slow member is never left out. For one that died the survivors vote as soon as its supervisor has said
so (`note_death`); otherwise, as when a whole node is lost, it counts until its heartbeats have been missing for
`heartbeat_timeout_s`. Serving needs no lighthouse while nothing changes.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta

import msgspec
from torchft.coordination import LighthouseClient, Quorum

from elastic_moe.background import OnError, end_process, start_thread
from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import PeerLost
from elastic_moe.group.probe import unreachable
from elastic_moe.group.view import Backup, Member, View, backups_of
from elastic_moe.membership.lighthouses import Lighthouses
from elastic_moe.membership.verdict import Record, members_without_disputes
from elastic_moe.wire import PLAIN, Forged, Wire

BACKOFF_S = (1.0, 30.0)
"""How long a process stays out that the others could not reach: at first, and at most."""
MEET_S, MEET_AGAIN_S = 8.0, 0.2
"""How long a group that joins another asks again until the other asks too, and how often."""
JOIN_REQUEST_EVERY_S = 0.5
"""From one request to be taken in to the next: a member that does not hear one hears another."""
ASKED_S = 0.05
"""From a newcomer's call to its first request to be taken in: the call must be there before those of the members, for
the lighthouse answers as soon as all members of the last view have asked."""

log = logging.getLogger(__name__)


class Membership:
    """This process's part in the agreement. Everything that waits for a lighthouse runs in a thread of its own."""

    def __init__(
        self,
        me: Member,
        lighthouses: Sequence[str],
        deadlines: Deadlines,
        on_error: OnError = end_process,
        wire: Wire = PLAIN,
    ) -> None:
        """`lighthouses` are URLs in the order of preference; nothing is connected before it is needed. `on_error` is
        told of a thread that died."""
        self._me = me
        self._deadlines = deadlines
        self._on_error = on_error
        self._wire = wire
        self._lighthouses = Lighthouses(_name(me.rank, me.incarnation), lighthouses, deadlines, on_error)
        self._lock = threading.Lock()
        self._requests: dict[int, Future[View]] = {}
        self._died_at: dict[str, float] = {}
        self._dead: set[str] = set()
        self.backups: tuple[Backup, ...] = ()
        """See `View.backups`."""
        self.on_turn: Callable[[], None] = lambda: None
        """Called again and again while `next_view` waits."""
        self._asked: tuple[str, float] | None = None
        """The lighthouse that was last asked for a view, and when."""
        self._unreached: set[str] = set()
        self._newcomer = True
        self._backoff_s = BACKOFF_S[0]
        self._calling = threading.Event()
        self._closed = threading.Event()

    def entered(self, view: View) -> None:
        """`view` is the current one, and its groups are built: who was not reached before is no matter any more."""
        with self._lock:
            self._unreached, self._newcomer = set(), not view.has(self._me.rank, self._me.incarnation)
            self._backoff_s = BACKOFF_S[0]

    def report(self, unreached: Collection[str]) -> None:
        """These incarnations cannot be reached from here: the next view is one without them, or without this process.
        From any thread."""
        with self._lock:
            self._unreached |= set(unreached)

    def start(self) -> None:
        """Send heartbeats: from now on others wait for this process when a view is made."""
        self._lighthouses.count_me()

    def close(self) -> None:
        """Send heartbeats no more, and wait for none."""
        self._closed.set()
        self._lighthouses.close()

    def note_death(self, rank: int, incarnation: str) -> None:
        """The supervisor of this process says that it died. From any thread."""
        name = _name(rank, incarnation)
        with self._lock:
            self._died_at[name] = time.monotonic()
            self._dead.add(name)
            asking = any(not future.done() for future in self._requests.values())
        if asking:
            self._vote_for(name)

    def has_died(self, rank: int, incarnation: str) -> bool:
        """Whether its supervisor has said so, lately or ever."""
        with self._lock:
            return _name(rank, incarnation) in self._dead

    @property
    def is_settled(self) -> bool:
        """Whether two groups that have been cut from each other may ask for one view."""
        return self._lighthouses.preferred_settled

    def knows_a_death(self, view: View) -> bool:
        """Whether a member of `view` is known to have died: it voted, and died before the view came."""
        with self._lock:
            return any(_name(m.rank, m.incarnation) in self._died_at for m in view.members)

    def request_view(self, after: int) -> "Future[View]":
        """Ask for the view that follows epoch `after`. From any thread; asking again gets the same answer.

        The future fails with PeerLost when no lighthouse answered in time; ask again then.
        """
        with self._lock:
            future = self._requests.get(after)
            if future is not None and not (future.done() and future.exception() is not None):
                return future
            self._requests = {epoch: f for epoch, f in self._requests.items() if epoch >= after}
            future = self._requests[after] = Future()
            since = time.monotonic() - self._deadlines.death_vote_s
            self._died_at = {name: when for name, when in self._died_at.items() if when > since}
            died = list(self._died_at)
        start_thread("view", self._ask, after, future, on_error=future.set_exception)
        for name in died:
            self._vote_for(name)
        return future

    def next_view(self, view: View, request_join: Callable[[View], None], deadline_s: float) -> View:
        """The view that follows `view`, with this process in it.

        A newcomer, or a member that the others go on without, asks too, and sends requests to be taken in until the
        members ask as well.

        Raises:
            PeerLost: nobody agreed on anything within `deadline_s` seconds.
        """
        deadline = time.monotonic() + deadline_s
        joins_a_group = not self._newcomer and not view.has(self._me.rank, self._me.incarnation)
        meet_until = time.monotonic() + (MEET_S if joins_a_group else 0.0)
        future = self._call_for(view, request_join, deadline)
        while True:
            self.on_turn()
            try:
                found = future.result(JOIN_REQUEST_EVERY_S)
            except FutureTimeout:
                if self._asked and self._lighthouses.may_have_missed(*self._asked):
                    future = self._ask_again(view.epoch)
                request_join(view)
            except PeerLost as error:
                if time.monotonic() > deadline:
                    raise PeerLost(f"no view after epoch {view.epoch} within {deadline_s} s: {error}") from error
                future = self.request_view(view.epoch)
            else:
                if found.has(self._me.rank, self._me.incarnation):
                    if time.monotonic() > meet_until or _share_members(found, view):
                        return found
                    self._closed.wait(MEET_AGAIN_S)  # those that this group has to join have not asked yet
                    future = self._ask_again(view.epoch)
                    continue
                view = found
                self._stay_out(view)
                future = self._call_for(view, request_join, deadline)

    def _call_for(self, view: View, request_join: Callable[[View], None], deadline: float) -> "Future[View]":
        """Ask for the view after `view`; who is not in that asks its members too, once it reaches them all."""
        absent = not view.has(self._me.rank, self._me.incarnation)
        if absent:
            self._wait_until_reached(view, deadline)
        self._lighthouses.count_me()
        future = self.request_view(view.epoch)
        if absent and self._calling.wait(self._deadlines.connect_s + self._deadlines.settle_s):
            time.sleep(ASKED_S)
            request_join(view)
        return future

    def _ask_again(self, after: int) -> "Future[View]":
        with self._lock:
            self._requests.pop(after, None)
        return self.request_view(after)

    def _stay_out(self, view: View) -> None:
        """The others go on in `view`: they are not kept waiting by this process for a while, longer each time."""
        with self._lock:
            self._newcomer, self._unreached = True, set()
            wait_s, self._backoff_s = self._backoff_s, min(2 * self._backoff_s, BACKOFF_S[1])
        log.warning("left out of epoch %d, ranks %s: asking again in %.0f s", view.epoch, list(view.ranks), wait_s)
        self._lighthouses.count_me(False)
        end = time.monotonic() + wait_s
        while (left := end - time.monotonic()) > 0 and not self._closed.wait(min(left, JOIN_REQUEST_EVERY_S)):
            self.on_turn()

    def _wait_until_reached(self, view: View, deadline: float) -> None:
        """Its heartbeats, and a group that cannot be built, would hold the others up."""
        while silent := unreachable(member.signals for member in view.members if member.rank != self._me.rank):
            others = len(view.members) - view.has(self._me.rank, self._me.incarnation)
            if len(silent) == others or time.monotonic() > deadline:
                return  # of all of them nothing is left, or nothing is known any more
            log.warning("%s cannot be reached: not joining yet", ", ".join(sorted(silent)))
            self.on_turn()
            self._closed.wait(JOIN_REQUEST_EVERY_S)

    def _ask(self, after: int, future: "Future[View]") -> None:
        try:
            quorum = self._lighthouses.call(lambda url, client: self._quorum(url, client, after))
            votes = votes_of(quorum, self._wire)
            members = members_without_disputes([record for _, record in votes])
            self._lighthouses.add([m.lighthouse for m in members if m.lighthouse])
            self.backups = backups_of(members, self.backups)
            future.set_result(View(1 + max(step for step, _ in votes), members, self._lighthouses.urls, self.backups))
        except (PeerLost, ValueError) as error:  # or whoever waits would wait for ever
            future.set_exception(error if isinstance(error, PeerLost) else PeerLost(str(error)))

    def _quorum(self, url: str, client: LighthouseClient, after: int) -> Quorum:
        self._asked = url, time.monotonic()
        self._calling.set()
        name = _name(self._me.rank, self._me.incarnation)
        return client.quorum(
            replica_id=name,
            timeout=timedelta(seconds=self._deadlines.view_call_s),
            address=self._me.address,
            store_address=self._me.store,
            step=after,
            world_size=1,
            shrink_only=False,
            data={"record": self._wire.seal(msgspec.json.encode(self._record()).decode(), f"{name} after {after}")},
        )

    def _record(self) -> Record:
        with self._lock:
            return Record(self._me, self._newcomer, tuple(sorted(self._unreached)))

    def _vote_for(self, name: str) -> None:
        """Take the part in the vote of a process that died, without a member's record: so nobody waits for it."""
        timeout = timedelta(seconds=self._deadlines.death_vote_s)

        def call(_url: str, client: LighthouseClient) -> None:
            client.quorum(replica_id=name, timeout=timeout, step=0, data={"died": "yes"})

        def vote() -> None:
            try:
                self._lighthouses.call(call)
            except PeerLost as error:
                log.debug("voting for %s, which died: %s", name, error)

        start_thread("vote", vote, on_error=self._on_error)


def _share_members(one: View, other: View) -> bool:
    return bool({m.incarnation for m in one.members} & {m.incarnation for m in other.members})


def votes_of(quorum: Quorum, wire: Wire) -> list[tuple[int, Record]]:
    """The last epoch and the record of each process that voted for itself. One that the launch did not make, or made
    for another name or epoch, is a stranger's, and is left out."""
    votes = []
    for p in quorum.participants:
        if p.data and "record" in p.data:
            try:
                record = wire.unseal(str(p.data["record"]), f"{p.replica_id} after {p.step}")
            except Forged as error:
                log.warning("a stranger at the lighthouse is not counted: %s", error)
            else:
                votes.append((p.step, msgspec.json.decode(record, type=Record)))
    return votes


def _name(rank: int, incarnation: str) -> str:
    return f"{rank}:{incarnation}"
