"""Agreement on who is in the group: a view from torchft's lighthouse, asked for by whoever observes a change.

The lighthouse (Rust, by heartbeats and quorum) decides; observation only asks. It waits for every process that sends
heartbeats, so a slow member is never left out; a dead one is spoken for by the survivors as soon as its supervisor
has said that it ended (`gone`), and otherwise, as when a whole node is lost, counts until its heartbeats have been
missing for `HEARTBEAT_TIMEOUT_MS`. Serving needs no lighthouse while nothing changes. Several may be named: all get
heartbeats, the first that answers is asked, so another node's takes over and knows already who is there.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from typing import TypeVar

import msgspec
from torchft.coordination import LighthouseClient

from elastic_moe.background import OnError, end_process, start_thread
from elastic_moe.errors import PeerLost
from elastic_moe.group.view import Member, View

HEARTBEAT_S = 0.1
HEARTBEAT_TIMEOUT_MS = 1000
JOIN_TIMEOUT_MS = 60_000
"""How long a lighthouse waits for a process that sends heartbeats but does not ask for the view. Longer than a call:
a newcomer whose call ends asks anew, so it is never given a view of its own while members live."""
TICK_MS = 10
CALL_TIMEOUT_S = 25.0
CONNECT_TIMEOUT_S = 1.0
SETTLE_S = 0.5
"""A lighthouse that has just begun knows only some of the members; it is not asked before all have sent heartbeats."""
KNOCK_EVERY_S = 0.5
ASKED_S = 0.05
"""From a newcomer's call to its knock: the call must be there before those of the members, for the lighthouse answers
as soon as all members of the last view have asked."""
SPOKEN_FOR_S = 3.0
"""How long after its end a process is spoken for: longer than its last heartbeat can count."""

Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


class Membership:
    """This process's part in the agreement. Everything that waits for a lighthouse runs in a thread of its own."""

    def __init__(self, me: Member, lighthouses: Sequence[str], on_error: OnError = end_process) -> None:
        """`lighthouses` are URLs in the order of preference; nothing is connected before it is needed. `on_error` is
        told of a thread that died."""
        self._me = me
        self._on_error = on_error
        self._urls: list[str] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._requests: dict[int, Future[View]] = {}
        self._gone: dict[str, float] = {}
        self._known_since: dict[str, float] = {}
        self._calling = threading.Event()
        self._beating = threading.Event()
        self._closed = threading.Event()
        self._use(lighthouses)

    def start(self) -> None:
        """Send heartbeats: from now on others wait for this process when a view is made."""
        self._beating.set()

    def close(self) -> None:
        """End the heartbeats for good, and wait for their threads: one inside Rust code at the interpreter's end would
        abort the process."""
        self._closed.set()
        self._beating.set()
        for thread in self._threads:
            thread.join(2 * CONNECT_TIMEOUT_S)

    def gone(self, rank: int, incarnation: str) -> None:
        """The supervisor of this process says that it ended. From any thread."""
        name = _name(rank, incarnation)
        with self._lock:
            self._gone[name] = time.monotonic()
            asking = any(not future.done() for future in self._requests.values())
        if asking:
            self._speak_for(name)

    def knows_dead(self, view: View) -> bool:
        """Whether a member of `view` is known to have ended: it voted, and died before the view came."""
        with self._lock:
            return any(_name(m.rank, m.incarnation) in self._gone for m in view.members)

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
            since = time.monotonic() - SPOKEN_FOR_S
            self._gone = {name: when for name, when in self._gone.items() if when > since}
            gone = list(self._gone)
        start_thread("view", self._ask, after, future, on_error=future.set_exception)
        for name in gone:
            self._speak_for(name)
        return future

    def next_view(self, view: View, knock: Callable[[View], None], deadline_s: float) -> View:
        """The view that follows `view`, with this process in it.

        A newcomer, or a member that the others have left behind, asks too, and knocks at the members until they come
        and ask as well.

        Raises:
            PeerLost: nobody agreed on anything within `deadline_s` seconds.
        """
        deadline = time.monotonic() + deadline_s
        self._beating.set()
        future = self.request_view(view.epoch)
        if not view.has(self._me.rank, self._me.incarnation) and self._calling.wait(CONNECT_TIMEOUT_S + SETTLE_S):
            time.sleep(ASKED_S)
            knock(view)
        while True:
            try:
                return future.result(KNOCK_EVERY_S)
            except FutureTimeout:
                knock(view)
            except PeerLost as error:
                if time.monotonic() > deadline:
                    raise PeerLost(f"no view after epoch {view.epoch} within {deadline_s} s: {error}") from error
                future = self.request_view(view.epoch)

    def _ask(self, after: int, future: "Future[View]") -> None:
        try:
            future.set_result(self._call(lambda client: self._quorum(client, after)))
        except (PeerLost, ValueError, msgspec.MsgspecError) as error:  # or whoever waits would wait for ever
            future.set_exception(error if isinstance(error, PeerLost) else PeerLost(str(error)))

    def _quorum(self, client: LighthouseClient, after: int) -> View:
        self._calling.set()
        quorum = client.quorum(
            replica_id=_name(self._me.rank, self._me.incarnation),
            timeout=timedelta(seconds=CALL_TIMEOUT_S),
            address=self._me.address,
            store_address=self._me.store,
            step=after,
            world_size=1,
            shrink_only=False,
            data={"member": msgspec.json.encode(self._me).decode()},
        )
        said = [p.data["member"] for p in quorum.participants if p.data and "member" in p.data]
        members = [msgspec.json.decode(str(member), type=Member) for member in said]
        members.sort(key=lambda m: m.rank)
        self._use([m.lighthouse for m in members if m.lighthouse])
        return View(1 + max(p.step for p in quorum.participants), tuple(members), tuple(self._urls))

    def _speak_for(self, name: str) -> None:
        """Take the dead process's part in the vote, without a member's record: so nobody waits for it."""

        def call(client: LighthouseClient) -> None:
            client.quorum(replica_id=name, timeout=timedelta(seconds=SPOKEN_FOR_S), step=0, data={"gone": "yes"})

        def speak() -> None:
            try:
                self._call(call)
            except PeerLost as error:
                log.debug("speaking for %s: %s", name, error)

        start_thread("speak", speak, on_error=self._on_error)

    def _use(self, urls: Sequence[str]) -> None:
        for url in urls:
            if url not in self._urls:
                self._urls.append(url)
                self._threads.append(start_thread("heartbeat", self._beat, url, on_error=self._on_error))

    def _beat(self, url: str) -> None:
        client, name = None, _name(self._me.rank, self._me.incarnation)
        self._beating.wait()
        while not self._closed.wait(HEARTBEAT_S):
            try:
                client = client or LighthouseClient(url, timedelta(seconds=CONNECT_TIMEOUT_S))
                client.heartbeat(name, timedelta(seconds=CONNECT_TIMEOUT_S))
                self._known_since.setdefault(url, time.monotonic())
            except (RuntimeError, TimeoutError) as error:
                client = None
                self._known_since.pop(url, None)
                log.debug("heartbeat to %s: %s", url, error)

    def _settle(self, url: str) -> None:
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while url not in self._known_since:
            if time.monotonic() > deadline:
                raise TimeoutError("it takes no heartbeats")
            time.sleep(HEARTBEAT_S / 10)
        time.sleep(max(0.0, self._known_since.get(url, 0.0) + SETTLE_S - time.monotonic()))

    def _call(self, call: Callable[[LighthouseClient], Answer]) -> Answer:
        """`call` on the first lighthouse that answers."""
        reasons = []
        for url in self._urls:
            try:
                self._settle(url)
                return call(LighthouseClient(url, timedelta(seconds=CONNECT_TIMEOUT_S)))
            except (RuntimeError, TimeoutError) as error:
                reasons.append(f"{url}: {str(error).splitlines()[0]}")
        raise PeerLost(f"no lighthouse answered ({'; '.join(reasons) or 'none is known'})")


def _name(rank: int, incarnation: str) -> str:
    return f"{rank}:{incarnation}"
