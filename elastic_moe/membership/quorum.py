"""Agreement on who is in the group: a view from torchft's lighthouse, asked for by whoever observes a change.

The lighthouse (Rust, by heartbeats and quorum) decides; observation only asks. Serving needs none while nothing
changes. Several lighthouses may be named: the first that answers is used, so another node's takes over.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import TypeVar

import msgspec
from torchft.coordination import LighthouseClient

from elastic_moe.errors import PeerLost
from elastic_moe.membership.view import Member, View

HEARTBEAT_S = 0.1
HEARTBEAT_TIMEOUT_MS = 500
"""A process silent for this long no longer counts as alive; matters when half of the group is lost at once."""
JOIN_TIMEOUT_MS = 100
"""How long a lighthouse waits for live members that have not asked for the view yet. Asking is done by a thread of
its own, so a member deep in a forward is not late."""
TICK_MS = 10
CALL_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 1.0

Answer = TypeVar("Answer")

log = logging.getLogger("elastic_moe.membership")


class Membership:
    """This process's part in the agreement. `heartbeat` and `request_view` run in threads of their own."""

    def __init__(self, me: Member, lighthouses: Sequence[str]) -> None:
        """`lighthouses` are URLs in the order of preference; nothing is connected before it is needed."""
        self._me = me
        self._urls = list(lighthouses)
        self._lock = threading.Lock()
        self._requests: dict[int, Future[View]] = {}
        self._stopped = threading.Event()
        self._id = f"{me.rank}:{me.incarnation}"

    def start(self) -> None:
        """Begin to send heartbeats: from now on others wait for this process when a view is made."""
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        """End the heartbeats."""
        self._stopped.set()

    def request_view(self, after: int) -> "Future[View]":
        """Ask for the view that follows epoch `after`. From any thread; asking again gets the same answer.

        The future fails with PeerLost when no lighthouse answered in time; ask again then.
        """
        with self._lock:
            future = self._requests.get(after)
            if future is None or (future.done() and future.exception() is not None):
                self._requests = {epoch: f for epoch, f in self._requests.items() if epoch >= after}
                future = self._requests[after] = Future()
                threading.Thread(target=self._ask, args=(after, future), name="view", daemon=True).start()
            return future

    def _ask(self, after: int, future: "Future[View]") -> None:
        try:
            future.set_result(self._call({}, lambda client: self._quorum(client, after)))
        except (PeerLost, ValueError) as error:
            future.set_exception(error if isinstance(error, PeerLost) else PeerLost(str(error)))

    def _quorum(self, client: LighthouseClient, after: int) -> View:
        quorum = client.quorum(
            replica_id=self._id,
            timeout=timedelta(seconds=CALL_TIMEOUT_S),
            address=self._me.address,
            store_address=self._me.store,
            step=after,
            world_size=1,
            shrink_only=False,
            data={"member": msgspec.json.encode(self._me).decode()},
        )
        members = [msgspec.json.decode(str((p.data or {})["member"]), type=Member) for p in quorum.participants]
        epoch = 1 + max(p.step for p in quorum.participants)
        return View(epoch, tuple(sorted(members, key=lambda m: m.rank)))

    def _beat(self) -> None:
        clients: dict[str, LighthouseClient] = {}
        while not self._stopped.wait(HEARTBEAT_S):
            try:
                self._call(clients, lambda client: client.heartbeat(self._id, timedelta(seconds=1)))
            except PeerLost as error:
                log.debug("%s", error)

    def _call(self, clients: dict[str, LighthouseClient], call: Callable[[LighthouseClient], Answer]) -> Answer:
        """`call` on the first lighthouse that answers; `clients` keeps the connections of one thread."""
        reasons = []
        for url in self._urls:
            try:
                if url not in clients:
                    clients[url] = LighthouseClient(url, timedelta(seconds=CONNECT_TIMEOUT_S))
                return call(clients[url])
            except (RuntimeError, TimeoutError) as error:
                clients.pop(url, None)
                reasons.append(f"{url}: {str(error).splitlines()[0]}")
        raise PeerLost(f"no lighthouse answered ({'; '.join(reasons) or 'none is known'})")
