"""The lighthouses (torchft's, in Rust) that count who lives, by heartbeats: all get them, the first that answers is
asked, so another node's takes over and knows already who lives."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from torchft.coordination import LighthouseClient

from elastic_moe.background import OnError, start_thread
from elastic_moe.deadlines import Deadlines
from elastic_moe.errors import PeerLost
from elastic_moe.group.probe import unreachable

Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


class Lighthouses:
    """Those that this process knows, in the order of preference. From any thread."""

    def __init__(self, name: str, urls: Sequence[str], deadlines: Deadlines, on_error: OnError) -> None:
        """`name` is this process's at all of them. Nothing is connected before it is needed; `on_error` is told of a
        thread that died."""
        self._name = name
        self._deadlines = deadlines
        self._on_error = on_error
        self._connect_timeout = timedelta(seconds=deadlines.connect_s)
        self._urls: list[str] = []
        self._threads: list[threading.Thread] = []
        self._known_since: dict[str, float] = {}
        """When the present unbroken row of heartbeats to each began."""
        self._beating = threading.Event()
        self._closed = threading.Event()
        self.add(urls)

    @property
    def urls(self) -> tuple[str, ...]:
        """All that are known."""
        return tuple(self._urls)

    def add(self, urls: Sequence[str]) -> None:
        """These are lighthouses too."""
        for url in urls:
            if url not in self._urls:
                self._urls.append(url)
                self._threads.append(start_thread("heartbeat", self._beat, url, on_error=self._on_error))

    def count_me(self, wanted: bool = True) -> None:
        """Send heartbeats from now on, or none: others wait for this process when a view is made, or do not."""
        (self._beating.set if wanted else self._beating.clear)()

    def close(self) -> None:
        """Send heartbeats no more, and wait for their threads: one inside Rust code at the interpreter's end would
        abort the process."""
        self._closed.set()
        self._beating.set()
        for thread in self._threads:
            thread.join(2 * self._deadlines.connect_s)

    def call(self, call: Callable[[str, LighthouseClient], Answer]) -> Answer:
        """`call(url, client)` on the first that answers.

        Raises:
            PeerLost: none did; it says why of each.
        """
        reasons = []
        for url in self._urls:
            try:
                self._settle(url)
                return call(url, LighthouseClient(url, self._connect_timeout))
            except (RuntimeError, TimeoutError) as error:
                reasons.append(f"{url}: {str(error).splitlines()[0]}")
        raise PeerLost(f"no lighthouse answered ({'; '.join(reasons) or 'none is known'})")

    @property
    def preferred_settled(self) -> bool:
        """Whether the one that all of a launch prefer counts this process, or is gone: only then may two groups that
        have been cut from each other ask for one view."""
        first = self._urls[0] if self._urls else ""
        since = self._known_since.get(first)
        if since is not None:
            return time.monotonic() - since > self._deadlines.settle_s
        return not first or bool(unreachable([first.removeprefix("http://")]))

    def may_have_missed(self, url: str, asked: float) -> bool:
        """Whether a call made to `url` at `asked` should be made again: it was out of reach since then, and may never
        have heard the call, so it would let all others wait for one who sends heartbeats; or one that all prefer has
        counted this process for long enough now."""
        settled = time.monotonic() - self._deadlines.settle_s
        preferred = self._urls[: self._urls.index(url)]
        return self._known_since.get(url, 0.0) > asked or any(
            self._known_since.get(other, settled) < settled for other in preferred
        )

    def _beat(self, url: str) -> None:
        client, timeout = None, self._connect_timeout
        self._beating.wait()
        while not self._closed.wait(self._deadlines.heartbeat_s):
            if not self._beating.is_set():
                self._known_since.pop(url, None)
                self._beating.wait()
            try:
                client = client or LighthouseClient(url, timeout)
                client.heartbeat(self._name, timeout)
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
