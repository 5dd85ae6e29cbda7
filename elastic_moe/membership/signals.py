"""Signals between the members of a group, beside the collectives: somebody died, leave the epoch, take me in.

A word that names a view names it by epoch and digest: two halves of a cut network both go on, with the same numbers.

Each process binds one ROUTER socket, served by a thread; whoever has a signal for it connects a DEALER. msgspec structs
in MessagePack, never pickle. A signal only asks for a view; nobody acts on it alone.

Neighbours in the view's ring also tell each other four times a second that they live: a member that is lost without an
error of its connection (a host without power, a stopped process) is noticed by that. A false alarm costs a recovery and
nobody: who lives is in the next view.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import zmq

from elastic_moe.background import OnError, end_process, start_thread
from elastic_moe.deadlines import Deadlines
from elastic_moe.group.view import Member, View
from elastic_moe.wire import PLAIN, Wire

log = logging.getLogger(__name__)

LINGER_MS = 500
"""How long a signal to a process that is no member any more may still take to go out."""


class PeerDied(msgspec.Struct, tag="peer_died", frozen=True):
    """Supervisor -> all members: the process with this proof has died; see `group.view.incarnation_of`."""

    rank: int
    proof: str


class ViewRequest(msgspec.Struct, tag="view_request", frozen=True):
    """Member -> members: the groups of the view with this epoch and digest are broken; leave them and ask for the next
    view."""

    epoch: int
    digest: str


class JoinRequest(msgspec.Struct, tag="join_request", frozen=True):
    """A process that is ready to be a member -> members: take me in at the next step you agree on, unless one of you is
    among those that I do not reach."""

    member: Member
    unreached: tuple[str, ...] = ()


class Wake(msgspec.Struct, tag="wake", frozen=True):
    """Member -> members: I have entered handshake number `step` in this view; if you sleep before it, come."""

    epoch: int
    digest: str
    step: int


class Greeting(msgspec.Struct, tag="greeting", frozen=True):
    """Member -> one that it lost without a word of its death: we are these; if you live, we are two groups of one
    launch."""

    view: View


class Alive(msgspec.Struct, tag="alive", frozen=True):
    """Member -> its neighbours in the ring."""

    incarnation: str


Signal = PeerDied | ViewRequest | JoinRequest | Wake | Greeting | Alive

encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Signal).decode


def neighbours(view: View, rank: int) -> list[Member]:
    """Members 1, 2, 4, ... places before and behind `rank` in the ring of a view: a cut wire between two members is
    noticed by both, at once in small groups, and in large ones by most."""
    place, size = view.group_rank(rank), len(view.members)
    steps = [2**power for power in range(size.bit_length()) if 2**power < size]
    places = {(place + sign * step) % size for step in steps for sign in (1, -1)}
    return [view.members[other] for other in sorted(places - {place})]


class SignalSender:
    """Sends signals to addresses. From any thread; never waits for anybody."""

    def __init__(self, wire: Wire = PLAIN) -> None:
        self._wire = wire
        self._context = zmq.Context.instance()
        self._lock = threading.Lock()
        self._sockets: dict[str, zmq.Socket] = {}

    def connect(self, addresses: Iterable[str]) -> None:
        """Be connected to these, ahead of need, and to no others."""
        wanted = set(addresses)
        with self._lock:
            for address in self._sockets.keys() - wanted:
                self._sockets.pop(address).close()
            for address in wanted:
                self._socket(address)

    def tell(self, addresses: Iterable[str], signal: Signal) -> None:
        """Send one signal to each address."""
        frame = encode(signal)
        with self._lock:
            for address in addresses:
                self._socket(address).send(frame)

    def close(self) -> None:
        """Close all; signals on their way have `LINGER_MS` to go out."""
        self.connect([])

    def _socket(self, address: str) -> zmq.Socket:
        if address not in self._sockets:
            socket = self._sockets[address] = self._wire.client(self._context.socket(zmq.DEALER))
            socket.setsockopt(zmq.LINGER, LINGER_MS)
            socket.setsockopt(zmq.SNDHWM, 0)  # a peer that died must not block anybody; it is forgotten with its view
            socket.connect(address)
        return self._sockets[address]


class Signals:
    """This process's signals, in and out."""

    def __init__(self, host: str, port: int = 0, wire: Wire = PLAIN) -> None:
        """Bind `port` on `host`, or a free one if that is 0 or taken; nothing is heard before `start`."""
        self._router = wire.server(zmq.Context.instance().socket(zmq.ROUTER))
        try:
            self._router.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError as error:
            log.warning("port %d is taken (%s): a rank that is lost now may not find this process later", port, error)
            self._router.bind(f"tcp://{host}:0")
        self.address = str(self._router.getsockopt_string(zmq.LAST_ENDPOINT))
        self._sender = SignalSender(wire)
        self._handlers: dict[type, Callable[[Any], None]] = {}
        self._lock = threading.Lock()
        self._neighbours: dict[str, Member] = {}
        self._heard: dict[str, float] = {}
        self._ping_s = self._lost_after_s = float("inf")
        self._on_lost: Callable[[Member], None] = lambda _member: None
        self._closed = threading.Event()

    def on(self, kind: type[Signal], handler: Callable[[Any], None]) -> None:
        """Call `handler(signal)`, in the listening thread, for each signal of a kind; those without one are dropped."""
        self._handlers[kind] = handler

    def start(
        self,
        incarnation: str,
        deadlines: Deadlines,
        on_lost: Callable[[Member], None],
        on_error: OnError = end_process,
    ) -> None:
        """Listen; call `on_lost(member)` when a neighbour has been silent for `progress_s` seconds, and `on_error` if
        a handler raises, after which nothing is heard any more."""
        self._ping_s, self._lost_after_s, self._on_lost = deadlines.ping_s, deadlines.progress_s, on_lost
        start_thread("signals", self._serve, Alive(incarnation), on_error=on_error)

    def tell(self, members: Iterable[Member], signal: Signal) -> None:
        """Send one signal to each member. From any thread."""
        self._sender.tell([member.signals for member in members], signal)

    def watch(self, view: View, rank: int) -> None:
        """From now on `view` counts: forget the other members, and mind the neighbours of `rank` in its ring."""
        self._sender.connect(m.signals for m in view.members if m.rank != rank)
        with self._lock:
            self._neighbours = {m.incarnation: m for m in neighbours(view, rank)}
            self._heard = dict.fromkeys(self._neighbours, time.monotonic())

    def close(self) -> None:
        """Say and hear nothing more."""
        self._closed.set()
        self._sender.close()

    def _serve(self, alive: Alive) -> None:
        next_ping = looked = time.monotonic()
        while not self._closed.is_set():
            if self._router.poll(max(0, int((next_ping - time.monotonic()) * 1000) + 1)):
                self._receive(self._router.recv_multipart()[-1])
            now = time.monotonic()
            if now >= next_ping and not self._closed.is_set():
                while self._router.poll(0) and time.monotonic() < now + self._ping_s:
                    self._receive(self._router.recv_multipart()[-1])  # what has come, before anybody is called silent
                self._look_for_losses(now, asleep_s=now - looked - self._ping_s)
                next_ping, looked = now + self._ping_s, now
                with self._lock:
                    neighbours = list(self._neighbours.values())
                self.tell(neighbours, alive)
        self._router.close(linger=0)

    def _receive(self, frame: bytes) -> None:
        try:
            signal = _decode(frame)
        except ValueError:
            return  # not one of ours; a stranger on the port must not harm the rank
        if isinstance(signal, Alive):
            with self._lock:
                if signal.incarnation in self._heard:
                    self._heard[signal.incarnation] = time.monotonic()
        elif handler := self._handlers.get(type(signal)):
            handler(signal)

    def _look_for_losses(self, now: float, asleep_s: float) -> None:
        """`asleep_s`: for so long this thread did not run, as it should have: the others may not have either."""
        with self._lock:
            if asleep_s > self._ping_s:
                self._heard = {name: heard + asleep_s for name, heard in self._heard.items()}
            lost = [name for name, heard in self._heard.items() if now - heard > self._lost_after_s]
            for name in lost:
                self._heard[name] = now
            members = [self._neighbours[name] for name in lost]
        for member in members:
            self._on_lost(member)
