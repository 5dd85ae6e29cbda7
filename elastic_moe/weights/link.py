"""The way to one holder of weights: requests, and what it answers to them, in their order. Without torch."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

import zmq

from elastic_moe.weights.holding import Answer, GiveDense, GiveExpert, Greet, Holding, Request, decode_answer, encode
from elastic_moe.wire import Wire

For = TypeVar("For")


class Link(Generic[For]):
    """For one thread. `For` is what a request was made for."""

    def __init__(self, address: str, wire: Wire, endpoint: str = "") -> None:
        """`endpoint` is where it is reached from here, if that is not the `address` that it names itself."""
        self.address = address
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint or address)
        self.holding = Holding()
        self.asked: deque[tuple[For | None, str]] = deque()
        """What it has not answered yet, and as it was sealed. None: a greeting."""
        self.since = 0.0
        """It was heard of, or asked when it had nothing to do."""
        self._wire = wire
        self._experts: frozenset[tuple[int, int]] = frozenset()

    def has(self, request: Request) -> bool:
        """Whether it has said so."""
        match request:
            case GiveDense(name):
                return name in self.holding.dense
            case GiveExpert(layer, expert):
                return (layer, expert) in self._experts
        return False

    def ask(self, request: Request, made_for: For | None = None) -> None:
        """Send a request, without waiting."""
        sealed = self._wire.seal(encode(request).decode(), self.address)
        if not self.asked:
            self.since = time.monotonic()
        self.socket.send_string(sealed)
        self.asked.append((made_for, sealed))

    def receive(self) -> tuple[For | None, Answer | None, Sequence[zmq.Frame]]:
        """What it says to the oldest request, and for whom; None instead if that was no holder of ours. Blocks."""
        header, *frames = self.socket.recv_multipart(copy=False)
        made_for, sealed = self.asked.popleft()
        self.since = time.monotonic()
        try:
            return made_for, decode_answer(self._wire.unseal(header.bytes.decode(), sealed)), frames
        except ValueError:
            return made_for, None, ()

    def greeted(self, holding: Holding) -> None:
        """It has said what it has."""
        self.holding = holding
        self._experts = frozenset((layer, expert) for layer, expert, _ in holding.experts)

    def close(self) -> None:
        """Disconnect."""
        self.socket.close()


AnyLink = TypeVar("AnyLink", bound=Link)


def greet(links: Sequence[AnyLink], first_s: float, then_s: float) -> list[AnyLink]:
    """Ask all what they have. Returns those who have said it: who does not answer within `then_s` seconds of another,
    or anybody within `first_s`, is taken for lost."""
    poller, answered, left = zmq.Poller(), [], {link.socket: link for link in links}
    for link in links:
        link.ask(Greet())
        poller.register(link.socket, zmq.POLLIN)
    while left and (ready := poller.poll(int(1000 * (then_s if len(left) < len(links) else first_s)))):
        for link in (left.pop(socket) for socket, _ in ready):
            poller.unregister(link.socket)
            _, holding, _ = link.receive()
            if isinstance(holding, Holding):
                link.greeted(holding)
                answered.append(link)
    return answered
