"""The sockets of a launch, against strangers who reach its port and do not know its secret, and against members who
talk nonsense. Nothing of that has an effect, and after it the launch's own words are understood.
"""

import contextlib
import queue
import random
import socket
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from elastic_moe.deadlines import Deadlines
from elastic_moe.group.epoch_store import GetRequest, StoreServer
from elastic_moe.membership.launch import Launch, SeatStart
from elastic_moe.membership.signals import Signals, ViewRequest, encode
from elastic_moe.serving.engine.mailbox import Mailbox
from elastic_moe.serving.protocol import AskLoads
from elastic_moe.serving.protocol import encode as encode_serving
from elastic_moe.wire import MAX_BYTES, PLAIN, Forged, Wire

OURS, THEIRS = Wire("the secret of this launch"), Wire("the secret of another launch")
WAIT_S, REFUSED_S = 10.0, 0.4
"""For an effect; and for none: a client that is refused tries again every 0.1 s."""
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
"""How a ZMTP peer begins, https://rfc.zeromq.org/spec/23."""
CONNECTION_S = 10.0
WELCOMED = 64 + 170
"""Bytes of a server's greeting and WELCOME."""


class Server:
    """A socket of the launch, and a word that has an effect there: an answer, or something `heard`."""

    def __init__(self, address: str, word: bytes, heard: "queue.SimpleQueue[object] | None" = None) -> None:
        self.address = address if "//" in address else f"tcp://{address}"
        self.word, self._heard = word, heard

    @property
    def endpoint(self) -> tuple[str, int]:
        host, _, port = self.address.removeprefix("tcp://").rpartition(":")
        return host, int(port)

    def obeys(self, client: zmq.Socket, within_s: float = WAIT_S) -> bool:
        """Whether `client`, connected now, says the word with effect."""
        client.connect(self.address)
        client.send(self.word)
        return self.has_acted(client, within_s)

    def has_acted(self, client: zmq.Socket, within_s: float) -> bool:
        if self._heard is None:
            return bool(client.poll(int(within_s * 1000)))
        try:
            return self._heard.get(timeout=within_s) is not None
        except queue.Empty:
            return False


def signals(wire: Wire) -> Server:
    ours, heard = Signals("127.0.0.1", wire=wire), queue.SimpleQueue()
    ours.on(ViewRequest, heard.put)
    ours.start("me", Deadlines(), heard.put)
    return Server(ours.address, encode(ViewRequest(9, "digest")), heard)


def store(wire: Wire) -> Server:
    return Server(StoreServer("127.0.0.1", wire).address, msgspec.msgpack.encode(GetRequest(1, ["a"], 0.0)))


def mailbox(wire: Wire) -> Server:
    ours = Mailbox("127.0.0.1", lambda: None, wire=wire)
    ours.start()
    return Server(ours.address, encode_serving(AskLoads("ask")))


@pytest.fixture(params=[signals, store, mailbox], ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[[Wire], Server]:
    return request.param


@pytest.fixture
def dealer() -> Iterator[Callable[[], zmq.Socket]]:
    with zmq.Context() as context:
        context.linger = 0
        yield lambda: context.socket(zmq.DEALER)


def null(socket: zmq.Socket) -> zmq.Socket:
    return socket


def plain(socket: zmq.Socket) -> zmq.Socket:
    socket.plain_username, socket.plain_password = b"admin", b"admin"
    return socket


def random_key(socket: zmq.Socket) -> zmq.Socket:
    socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
    socket.curve_serverkey, _ = zmq.curve_keypair()
    return socket


@pytest.mark.parametrize("stranger", [null, plain, random_key, THEIRS.client], ids=["null", "plain", "key", "launch"])
def test_who_does_not_know_the_secret_is_not_heard(make, dealer, stranger, caplog):
    server = make(OURS)
    assert not server.obeys(stranger(dealer()), REFUSED_S)
    assert server.obeys(OURS.client(dealer()))
    if stranger == THEIRS.client:  # others may hang up before they are refused
        told = [record.getMessage() for record in caplog.records if "know the secret" in record.getMessage()]
        assert told == [f"{server.address} has refused 1 connections that do not know the secret of this launch"]


def test_without_a_secret_all_are_heard(make, dealer):
    assert make(PLAIN).obeys(dealer())


def test_a_member_gives_a_stranger_at_a_known_address_nothing(dealer):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as impostor:
        impostor.curve_server, impostor.curve_secretkey = True, zmq.curve_keypair()[1]
        port = impostor.bind_to_random_port("tcp://127.0.0.1")
        client = OURS.client(dealer())
        client.connect(f"tcp://127.0.0.1:{port}")
        client.send(b"what only a member may read")
        assert not impostor.poll(int(REFUSED_S * 1000))


@pytest.mark.parametrize(
    "said",
    [b"", b"GET / HTTP/1.1\r\n\r\n" * 50, random.Random(1).randbytes(5000), GREETING, GREETING[:30], bytes(64)],
    ids=["nothing", "http", "random", "greeting", "half", "zeros"],
)
def test_garbage_harms_nobody(make, dealer, said):
    server = make(OURS)
    strangers = [socket.create_connection(server.endpoint) for _ in range(20)]
    for stranger in strangers:
        stranger.send(said)
    assert server.obeys(OURS.client(dealer()))
    for stranger in strangers:
        stranger.close()


def test_who_says_too_much_before_the_handshake_is_cut_off(make, dealer):
    server = make(OURS)
    size = 64 * MAX_BYTES
    with socket.create_connection(server.endpoint) as stranger:
        stranger.settimeout(CONNECTION_S)
        stranger.send(GREETING + b"\x06" + size.to_bytes(8, "big"))
        with pytest.raises(ConnectionError):
            stranger.sendall(bytes(size))
    assert server.obeys(OURS.client(dealer()))


def test_what_was_recorded_cannot_be_said_again(make, dealer):
    server, said = make(OURS), bytearray()
    with socket.create_server(("127.0.0.1", 0)) as tap:
        threading.Thread(target=_relay, args=(tap, server.endpoint, said), daemon=True).start()
        client = OURS.client(dealer())
        client.connect(f"tcp://127.0.0.1:{tap.getsockname()[1]}")
        client.send(server.word)
        assert server.has_acted(client, WAIT_S)
        client.close()
    assert len(said) > 200
    with socket.create_connection(server.endpoint) as thief:
        thief.settimeout(CONNECTION_S)
        thief.sendall(bytes(said))
        answered = len(_until_closed(thief))
    assert answered <= WELCOMED, "no READY, so no word was taken and none was given"
    assert server._heard is None or server._heard.empty()
    assert server.obeys(OURS.client(dealer()))


def _relay(tap: socket.socket, to: tuple[str, int], said: bytearray) -> None:
    """Between one client and the server; what the client says is kept."""
    client, server = tap.accept()[0], socket.create_connection(to)
    back = threading.Thread(target=lambda: [client.sendall(chunk) for chunk in _chunks(server)], daemon=True)
    back.start()
    for chunk in _chunks(client):
        said += chunk
        server.sendall(chunk)
    server.close()


def _chunks(sock: socket.socket) -> Iterator[bytes]:
    with contextlib.suppress(OSError):
        while chunk := sock.recv(4096):
            yield chunk


def _until_closed(sock: socket.socket) -> bytes:
    return b"".join(_chunks(sock))


@pytest.mark.parametrize("seed", range(3))
def test_nonsense_of_a_member_harms_nobody(make, dealer, seed):
    server, chance, member = make(OURS), random.Random(seed), OURS.client(dealer())
    member.connect(server.address)
    for _ in range(100):
        parts = [chance.randbytes(chance.randrange(60)) for _ in range(chance.randrange(1, 4))]
        member.send_multipart(parts)
        member.send(server.word[: chance.randrange(len(server.word))])
        member.send(server.word[:-1] + chance.randbytes(3))
    assert server.obeys(OURS.client(dealer()))


def test_a_sealed_record_counts_for_what_it_was_made_for_only():
    record = '{"rank":1}'
    sealed = OURS.seal(record, "rank 1")
    assert OURS.unseal(sealed, "rank 1") == record
    for wire, text, about in [
        (OURS, sealed, "rank 2"),
        (OURS, sealed.replace("1}", "2}"), "rank 1"),
        (OURS, record, "rank 1"),
        (OURS, "", "rank 1"),
        (OURS, "\N{SNOWMAN}.x", "rank 1"),
        (THEIRS, sealed, "rank 1"),
    ]:
        with pytest.raises(Forged, match=f"the record of {about}"):
            wire.unseal(text, about)
    assert OURS.unseal(OURS.seal("bc", "a"), "a") == "bc"
    with pytest.raises(Forged):
        OURS.unseal(OURS.seal("bc", "a"), "ab")
    assert PLAIN.unseal(PLAIN.seal(record, "a"), "b") == record


def test_the_secret_travels_to_a_child_and_is_not_shown():
    start = SeatStart(Launch(wire=OURS))
    assert msgspec.json.decode(msgspec.json.encode(start), type=SeatStart) == start
    assert "secret of" not in f"{start} {start!r} {OURS}"
