"""Signals between members, over real sockets in one process."""

import queue
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from elastic_moe.deadlines import Deadlines
from elastic_moe.group.view import Member, View
from elastic_moe.membership import signals as module
from elastic_moe.membership.signals import JoinRequest, PeerDied, Signals, SignalSender, ViewRequest, Wake

WAIT_S = 10.0


class Peer:
    """One process's signals, and what it heard."""

    def __init__(self, rank: int, silent_s: float = 60.0) -> None:
        self.signals = Signals("127.0.0.1")
        self.member = Member(rank, 0, f"incarnation {rank}", 1, "host", self.signals.address, "")
        self.heard: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[Member] = queue.SimpleQueue()
        for kind in (PeerDied, ViewRequest, JoinRequest, Wake):
            self.signals.on(kind, self.heard.put)
        self.deadlines = Deadlines(
            progress_s=silent_s, ping_s=0.05, beat_s=0.05, heartbeat_s=0.01, heartbeat_timeout_s=0.1
        )

    def start(self) -> None:
        self.signals.start(self.member.incarnation, self.deadlines, self.lost.put)


@pytest.fixture
def make() -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def make(rank: int, silent_s: float = 60.0) -> Peer:
        peers.append(Peer(rank, silent_s))
        return peers[-1]

    yield make
    for peer in peers:
        peer.signals.close()


MEMBER = Member(7, 1, "x", 1, "host", "tcp://127.0.0.1:1", "127.0.0.1:2")


@pytest.mark.parametrize("signal", [ViewRequest(4, "d"), PeerDied(2, "y"), JoinRequest(MEMBER), Wake(1, "d", 2)])
def test_a_signal_arrives_as_it_was_sent(make, signal: msgspec.Struct):
    one, other = make(0), make(1)
    other.start()
    one.signals.tell([other.member], signal)
    assert other.heard.get(timeout=WAIT_S) == signal


def test_garbage_and_signals_nobody_minds_are_dropped(make):
    peer = make(0)
    peer.start()
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(peer.signals.address)
        for frames in ([b""], [b"\xff\x00"], [b"a", b"b", b""], [module.encode(module.Alive("nobody"))]):
            stranger.send_multipart(frames)
        stranger.send(module.encode(ViewRequest(9, "d")))
        assert peer.heard.get(timeout=WAIT_S) == ViewRequest(9, "d")
    assert peer.heard.empty()


def test_a_neighbour_that_is_not_heard_of_is_lost_and_only_it(make):
    peers = [make(rank, silent_s=0.5) for rank in range(4)]
    view = View(1, tuple(peer.member for peer in peers))
    for peer in peers[:3]:  # the last has a socket, and nobody who speaks
        peer.start()
    for peer in peers:
        peer.signals.watch(view, peer.member.rank)
    for peer in peers[:3]:
        assert peer.lost.get(timeout=WAIT_S).rank == 3
    smaller = View(2, view.members[:3])
    for peer in peers[:3]:
        peer.signals.watch(smaller, peer.member.rank)
        while not peer.lost.empty():
            peer.lost.get()
    time.sleep(1.0)
    assert all(peer.lost.empty() for peer in peers)


def test_silence_is_noticed_while_others_never_stop_talking(make):
    """A flood of signals leaves no pause in which to look."""
    peer, silent, talker = make(0, silent_s=0.5), make(1), make(2)
    peer.start()
    peer.signals.watch(View(1, (peer.member, silent.member)), 0)
    begin = time.monotonic()
    while peer.lost.empty() and time.monotonic() - begin < WAIT_S:
        for _ in range(20):
            talker.signals.tell([peer.member], Wake(1, "d", 1))
        time.sleep(0.002)
    assert peer.lost.get(timeout=0).rank == 1
    assert time.monotonic() - begin < 2


def test_who_has_slept_himself_takes_nobody_for_lost(make, monkeypatch: pytest.MonkeyPatch):
    one, other = make(0, silent_s=0.6), make(1, silent_s=0.6)
    slept = []
    one.signals.on(Wake, lambda _: slept.append(time.sleep(1.0)))  # as one that a busy machine does not run
    for peer in (one, other):
        peer.start()
        peer.signals.watch(View(1, (one.member, other.member)), peer.member.rank)
    time.sleep(0.2)
    other.signals.tell([one.member], Wake(1, "d", 1))
    time.sleep(1.6)
    assert slept
    assert one.lost.empty()
    assert other.lost.get(timeout=WAIT_S).rank == 0, "who does not sleep notices"


@pytest.mark.parametrize(("size", "rank", "places"), [
    (1, 0, []), (2, 1, [0]), (3, 0, [1, 2]), (5, 0, [1, 2, 3, 4]), (8, 3, [1, 2, 4, 5, 7]),
    (64, 0, [1, 2, 4, 8, 16, 32, 48, 56, 60, 62, 63]),
])  # fmt: skip
def test_who_minds_whom(size: int, rank: int, places: list[int]):
    """All in small groups; in large ones as many as there are powers of two; and always each other."""
    members = tuple(Member(7 * number, 0, f"i{number}", 1, "host", "s", "") for number in range(size))
    view = View(1, members)
    found = module.neighbours(view, 7 * rank)
    assert [member.rank // 7 for member in found] == places
    for member in found:
        assert members[rank] in module.neighbours(view, member.rank)


def test_an_address_without_a_process_blocks_nobody():
    sender = SignalSender()
    begin = time.monotonic()
    sender.connect(["tcp://127.0.0.1:9"])
    for _ in range(2000):
        sender.tell(["tcp://127.0.0.1:9"], Wake(1, "d", 1))
    sender.connect([])
    assert time.monotonic() - begin < 2
    sender.close()
