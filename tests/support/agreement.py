"""Processes that agree on a view, in one process: real lighthouses, short deadlines."""

import time
from collections.abc import Callable, Iterator

import pytest
from torchft.coordination import LighthouseServer

from elastic_moe.deadlines import Deadlines
from elastic_moe.group.view import Member, View
from elastic_moe.membership.quorum import Membership
from elastic_moe.wire import PLAIN, Wire

WAIT_S = 10.0
NOBODY = "http://127.0.0.1:9"
FAST = Deadlines(
    progress_s=9.0,
    heartbeat_s=0.02,
    heartbeat_timeout_s=4.0,  # so that who dies is left out early by a vote alone
    settle_s=0.1,
    connect_s=0.4,
    view_call_s=8.0,
    death_vote_s=5.0,
)
QUICK_S = 2.0
"""Well below `heartbeat_timeout_s`."""


class Lighthouse:
    def __init__(self, heartbeat_timeout_s: float = FAST.heartbeat_timeout_s) -> None:
        self._server = LighthouseServer(
            bind="127.0.0.1:0",
            min_replicas=1,
            join_timeout_ms=60_000,
            quorum_tick_ms=10,
            heartbeat_timeout_ms=int(heartbeat_timeout_s * 1000),
        )
        self.url = f"http://127.0.0.1:{self._server.address().rsplit(':', 1)[1]}"

    def shut(self) -> None:
        self._server.shutdown()


def member(rank: int, lighthouse: str = "") -> Member:
    return Member(
        rank, rank // 2, f"i{rank}", 1, "host", f"tcp://127.0.0.1:{rank + 1}", "", f"address {rank}", "", lighthouse
    )


@pytest.fixture
def lighthouses() -> Iterator[Callable[..., Lighthouse]]:
    made: list[Lighthouse] = []

    def make(**settings: float) -> Lighthouse:
        made.append(Lighthouse(**settings))
        return made[-1]

    yield make
    for lighthouse in made:
        lighthouse.shut()


@pytest.fixture
def join() -> Iterator[Callable[..., Membership]]:
    made: list[Membership] = []

    def raised(error: BaseException) -> None:
        raise AssertionError("a thread died") from error

    def make(me: Member, *urls: str, deadlines: Deadlines = FAST, wire: Wire = PLAIN) -> Membership:
        made.append(Membership(me, urls, deadlines, raised, wire))
        return made[-1]

    yield make
    for membership in made:
        membership.close()


@pytest.fixture
def both(lighthouses, join) -> tuple[Membership, Membership]:
    """Ranks 3 and 1 of one lighthouse, which counts both."""
    url = lighthouses().url
    two = join(member(3), url), join(member(1), url)
    for membership in two:
        membership.start()
    wait_for_heartbeats(*two)
    return two


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_heartbeats(*memberships: Membership, urls: int = 1) -> None:
    wait_until(lambda: all(len(membership._lighthouses._known_since) == urls for membership in memberships))


def no_join(_view: View) -> None:
    raise AssertionError("nobody wants to join")
