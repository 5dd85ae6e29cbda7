"""Agreement on who is in the group: a view from torchft's lighthouse, asked for by whoever observes a change.

The lighthouse (Rust, by heartbeats and quorum) decides; observation only asks. It waits for every process that sends
heartbeats, so a slow member is never left out. For one that died the survivors vote as soon as its supervisor has said
so (`note_death`); otherwise, as when a whole node is lost, it counts until its heartbeats have been missing for
`heartbeat_timeout_s`. Serving needs no lighthouse while nothing changes. Several may be named: all get heartbeats, the
first that answers is asked, so another node's takes over and knows already who lives.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from typing import TypeVar

import msgspec
from torchft.coordination import LighthouseClient, Quorum

from elastic_moe.background import OnError, end_process, start_thread
from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import PeerLost
from elastic_moe.group.probe import unreachable
from elastic_moe.group.view import Member, View
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

Answer = TypeVar("Answer")
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
        self._urls: list[str] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._requests: dict[int, Future[View]] = {}
        self._died_at: dict[str, float] = {}
        self._dead: set[str] = set()
        self.on_turn: Callable[[], None] = lambda: None
        """Called again and again while `next_view` waits."""
        self._trying, self._asked = "", ("", 0.0)
        """The lighthouse that is asked for a view, and since when."""
        self._unreached: set[str] = set()
        self._newcomer = True
        self._backoff_s = BACKOFF_S[0]
        self._known_since: dict[str, float] = {}
        self._calling = threading.Event()
        self._beating = threading.Event()
        self._closed = threading.Event()
        self._use(lighthouses)

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
        self._beating.set()

    def close(self) -> None:
        """Send heartbeats no more, and wait for their threads: one inside Rust code at the interpreter's end would
        abort the process."""
        self._closed.set()
        self._beating.set()
        for thread in self._threads:
            thread.join(2 * self._deadlines.connect_s)

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
        """Whether the lighthouse that all of a launch prefer counts this process, or is gone: only then may two groups
        that have been cut from each other ask for one view."""
        first = self._urls[0] if self._urls else ""
        since = self._known_since.get(first)
        if since is not None:
            return time.monotonic() - since > self._deadlines.settle_s
        return not first or bool(unreachable([first.removeprefix("http://")]))

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
                if self._call_is_lost():
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
        self._beating.set()
        future = self.request_view(view.epoch)
        if absent and self._calling.wait(self._deadlines.connect_s + self._deadlines.settle_s):
            time.sleep(ASKED_S)
            request_join(view)
        return future

    def _call_is_lost(self) -> bool:
        """Whether the lighthouse that is being asked was out of reach meanwhile: it may never have heard the call, and
        would let all others wait for one who sends heartbeats. Or whether one that all prefer is in reach again."""
        url, began = self._asked
        if url not in self._urls:
            return False
        settled = time.monotonic() - self._deadlines.settle_s
        preferred = self._urls[: self._urls.index(url)]
        return self._known_since.get(url, 0.0) > began or any(
            self._known_since.get(other, settled) < settled for other in preferred
        )

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
        self._beating.clear()
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
            quorum = self._call(lambda client: self._quorum(client, after))
            votes = votes_of(quorum, self._wire)
            members = members_without_disputes([record for _, record in votes])
            self._use([m.lighthouse for m in members if m.lighthouse])
            future.set_result(View(1 + max(step for step, _ in votes), members, tuple(self._urls)))
        except (PeerLost, ValueError) as error:  # or whoever waits would wait for ever
            future.set_exception(error if isinstance(error, PeerLost) else PeerLost(str(error)))

    def _quorum(self, client: LighthouseClient, after: int) -> Quorum:
        self._asked = self._trying, time.monotonic()
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

        def call(client: LighthouseClient) -> None:
            client.quorum(replica_id=name, timeout=timeout, step=0, data={"died": "yes"})

        def vote() -> None:
            try:
                self._call(call)
            except PeerLost as error:
                log.debug("voting for %s, which died: %s", name, error)

        start_thread("vote", vote, on_error=self._on_error)

    def _use(self, urls: Sequence[str]) -> None:
        for url in urls:
            if url not in self._urls:
                self._urls.append(url)
                self._threads.append(start_thread("heartbeat", self._beat, url, on_error=self._on_error))

    def _beat(self, url: str) -> None:
        client, name, timeout = None, _name(self._me.rank, self._me.incarnation), self._connect_timeout
        self._beating.wait()
        while not self._closed.wait(self._deadlines.heartbeat_s):
            if not self._beating.is_set():
                self._known_since.pop(url, None)
                self._beating.wait()
            try:
                client = client or LighthouseClient(url, timeout)
                client.heartbeat(name, timeout)
                self._known_since.setdefault(url, time.monotonic())
            except (RuntimeError, TimeoutError) as error:
                client = None
                self._known_since.pop(url, None)
                log.debug("heartbeat to %s: %s", url, error)

    def _settle(self, url: str) -> None:
        deadline = time.monotonic() + self._deadlines.connect_s
        while url not in self._known_since:
            if time.monotonic() > deadline:
                raise TimeoutError("it takes no heartbeats")
            time.sleep(self._deadlines.heartbeat_s / 10)
        time.sleep(max(0.0, self._known_since.get(url, 0.0) + self._deadlines.settle_s - time.monotonic()))

    def _call(self, call: Callable[[LighthouseClient], Answer]) -> Answer:
        """`call` on the first lighthouse that answers."""
        reasons = []
        for url in self._urls:
            try:
                self._settle(url)
                self._trying = url
                return call(LighthouseClient(url, self._connect_timeout))
            except (RuntimeError, TimeoutError) as error:
                reasons.append(f"{url}: {str(error).splitlines()[0]}")
        raise PeerLost(f"no lighthouse answered ({'; '.join(reasons) or 'none is known'})")

    @property
    def _connect_timeout(self) -> timedelta:
        return timedelta(seconds=self._deadlines.connect_s)


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
