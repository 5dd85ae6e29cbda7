"""Words between members, over real sockets in one process."""

import queue
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from elastic_moe.group.view import Member, View
from elastic_moe.membership import signals as module
from elastic_moe.membership.signals import AskView, Knock, Mouth, PeerDied, Signals, Wake

WAIT_S = 10.0


class Peer:
    """One process's signals, and what it heard."""

    def __init__(self, rank: int, silence_s: float = 60.0) -> None:
        self.signals = Signals("127.0.0.1")
        self.member = Member(rank, 0, f"incarnation {rank}", 1, "host", self.signals.address, "")
        self.words: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.silent: queue.SimpleQueue[Member] = queue.SimpleQueue()
        for kind in (PeerDied, AskView, Knock, Wake):
            self.signals.on(kind, self.words.put)
        self.silence_s = silence_s

    def start(self) -> None:
        self.signals.start(self.member.incarnation, self.silence_s, self.silent.put)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Peer]]:
    monkeypatch.setattr(module, "PING_S", 0.05)
    peers: list[Peer] = []

    def make(rank: int, silence_s: float = 60.0) -> Peer:
        peers.append(Peer(rank, silence_s))
        return peers[-1]

    yield make
    for peer in peers:
        peer.signals.close()


MEMBER = Member(7, 1, "x", 1, "host", "tcp://127.0.0.1:1", "127.0.0.1:2")


@pytest.mark.parametrize("word", [AskView(4), PeerDied(2, "y"), Knock(MEMBER), Wake(1, 2)])
def test_a_word_arrives_as_it_was_sent(make, word: msgspec.Struct):
    one, other = make(0), make(1)
    other.start()
    one.signals.tell([other.member], word)
    assert other.words.get(timeout=WAIT_S) == word


def test_garbage_and_words_nobody_minds_are_dropped(make):
    peer = make(0)
    peer.start()
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(peer.signals.address)
        for frames in ([b""], [b"\xff\x00"], [b"a", b"b", b""], [module.encode(module.Alive("nobody"))]):
            stranger.send_multipart(frames)
        stranger.send(module.encode(AskView(9)))
        assert peer.words.get(timeout=WAIT_S) == AskView(9)
    assert peer.words.empty()


def test_a_silent_neighbour_is_reported_and_only_it(make):
    peers = [make(rank, silence_s=0.5) for rank in range(4)]
    view = View(1, tuple(peer.member for peer in peers))
    for peer in peers[:3]:  # the last has a socket, and nobody who speaks
        peer.start()
    for peer in peers:
        peer.signals.watch(view, peer.member.rank)
    for neighbour in (peers[0], peers[2]):
        assert neighbour.silent.get(timeout=WAIT_S).rank == 3
    assert peers[1].silent.empty()
    smaller = View(2, view.members[:3])
    for peer in peers[:3]:
        peer.signals.watch(smaller, peer.member.rank)
        while not peer.silent.empty():
            peer.silent.get()
    time.sleep(1.0)
    assert all(peer.silent.empty() for peer in peers)


def test_a_dead_address_blocks_nobody():
    mouth = Mouth()
    begin = time.monotonic()
    mouth.know(["tcp://127.0.0.1:9"])
    for _ in range(2000):
        mouth.tell(["tcp://127.0.0.1:9"], Wake(1, 1))
    mouth.know([])
    assert time.monotonic() - begin < 2
    mouth.close()
