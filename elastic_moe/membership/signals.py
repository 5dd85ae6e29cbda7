"""Words between the members of a group, beside the collectives: somebody died, leave the epoch, take me in.

Each process binds one ROUTER socket, served by a thread; whoever has a word for it connects a DEALER. msgspec structs
in MessagePack, never pickle. A word only asks for a view; nobody acts on it alone.

Neighbours in the view's ring also tell each other twice a second that they live: a connection that falls silent
without an error (a host without power, a stopped process) is noticed by that.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import zmq

from elastic_moe.background import OnError, end_process, start_thread
from elastic_moe.group.view import Member, View

log = logging.getLogger(__name__)

PING_S = 0.5
LINGER_MS = 500
"""How long a word to a member that has been left behind may still take to go out."""


class PeerDied(msgspec.Struct, tag="peer_died", frozen=True):
    """Supervisor -> all members: this process has ended."""

    rank: int
    incarnation: str


class AskView(msgspec.Struct, tag="ask_view", frozen=True):
    """Member -> members: the groups of `epoch` are broken; leave them and ask for the next view."""

    epoch: int


class Knock(msgspec.Struct, tag="knock", frozen=True):
    """A process that is ready to be a member -> members: take me in at the next step you agree on."""

    member: Member


class Wake(msgspec.Struct, tag="wake", frozen=True):
    """Member -> members: I have entered handshake number `step` of `epoch`; if you sleep before it, come."""

    epoch: int
    step: int


class Alive(msgspec.Struct, tag="alive", frozen=True):
    """Member -> its neighbours in the ring."""

    incarnation: str


Word = PeerDied | AskView | Knock | Wake | Alive

encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Word).decode


class Mouth:
    """Sends words to addresses. From any thread; never waits for anybody."""

    def __init__(self) -> None:
        self._context = zmq.Context.instance()
        self._lock = threading.Lock()
        self._sockets: dict[str, zmq.Socket] = {}

    def know(self, addresses: Iterable[str]) -> None:
        """Be connected to these, ahead of need, and to no others."""
        wanted = set(addresses)
        with self._lock:
            for address in self._sockets.keys() - wanted:
                self._sockets.pop(address).close()
            for address in wanted:
                self._socket(address)

    def tell(self, addresses: Iterable[str], word: Word) -> None:
        """Send one word to each address."""
        frame = encode(word)
        with self._lock:
            for address in addresses:
                self._socket(address).send(frame)

    def close(self) -> None:
        """Close all; words on their way have `LINGER_MS` to go out."""
        self.know([])

    def _socket(self, address: str) -> zmq.Socket:
        if address not in self._sockets:
            socket = self._sockets[address] = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, LINGER_MS)
            socket.setsockopt(zmq.SNDHWM, 0)  # a dead peer must not block anybody; it is forgotten with its view
            socket.connect(address)
        return self._sockets[address]


class Signals:
    """This process's ear and mouth."""

    def __init__(self, host: str, port: int = 0) -> None:
        """Bind `port` on `host`, or a free one if that is 0 or taken; nothing is heard before `start`."""
        self._router = zmq.Context.instance().socket(zmq.ROUTER)
        try:
            self._router.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as error:
            log.warning(
                "port %d is taken (%s): whoever was away when this process came back may not find it", port, error
            )
            self._router.bind(f"tcp://{host}:0")
        self.address = str(self._router.getsockopt_string(zmq.LAST_ENDPOINT))
        self._mouth = Mouth()
        self._handlers: dict[type, Callable[[Any], None]] = {}
        self._lock = threading.Lock()
        self._neighbours: dict[str, Member] = {}
        self._heard: dict[str, float] = {}
        self._silence_s = float("inf")
        self._on_silence: Callable[[Member], None] = lambda _member: None
        self._closed = threading.Event()

    def on(self, kind: type[Word], handler: Callable[[Any], None]) -> None:
        """Call `handler(word)`, in the signals' thread, for each word of a kind. Words without one are dropped."""
        self._handlers[kind] = handler

    def start(
        self,
        incarnation: str,
        silence_s: float,
        on_silence: Callable[[Member], None],
        on_error: OnError = end_process,
    ) -> None:
        """Listen; call `on_silence(member)` when a neighbour has said nothing for `silence_s` seconds, and `on_error`
        if a handler raises, after which nothing is heard any more."""
        self._silence_s, self._on_silence = silence_s, on_silence
        start_thread("signals", self._serve, Alive(incarnation), on_error=on_error)

    def tell(self, members: Iterable[Member], word: Word) -> None:
        """Send one word to each member. From any thread."""
        self._mouth.tell([member.signals for member in members], word)

    def watch(self, view: View, rank: int) -> None:
        """From now on `view` counts: forget the other members, and mind the neighbours of `rank` in its ring."""
        others = [m for m in view.members if m.rank != rank]
        self._mouth.know(m.signals for m in others)
        before, behind = [m for m in others if m.rank < rank], [m for m in others if m.rank > rank]
        ring = behind + before
        with self._lock:
            self._neighbours = {m.incarnation: m for m in (ring[0], ring[-1])} if ring else {}
            self._heard = dict.fromkeys(self._neighbours, time.monotonic())

    def close(self) -> None:
        """Say and hear nothing more."""
        self._closed.set()
        self._mouth.close()

    def _serve(self, alive: Alive) -> None:
        next_ping = 0.0
        while not self._closed.is_set():
            if self._router.poll(int(PING_S * 1000)):
                self._receive(self._router.recv_multipart()[-1])
            else:
                self._listen_for_silence()  # only when all that came has been heard
            if time.monotonic() >= next_ping and not self._closed.is_set():
                next_ping = time.monotonic() + PING_S
                with self._lock:
                    neighbours = list(self._neighbours.values())
                self.tell(neighbours, alive)
        self._router.close(linger=0)

    def _receive(self, frame: bytes) -> None:
        try:
            word = _decode(frame)
        except msgspec.MsgspecError:
            return  # not one of ours; a stranger on the port must not harm the rank
        if isinstance(word, Alive):
            with self._lock:
                if word.incarnation in self._heard:
                    self._heard[word.incarnation] = time.monotonic()
        elif handler := self._handlers.get(type(word)):
            handler(word)

    def _listen_for_silence(self) -> None:
        now = time.monotonic()
        with self._lock:
            silent = [name for name, heard in self._heard.items() if now - heard > self._silence_s]
            for name in silent:
                self._heard[name] = now
            members = [self._neighbours[name] for name in silent]
        for member in members:
            self._on_silence(member)
