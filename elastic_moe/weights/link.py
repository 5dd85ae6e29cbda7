"""The way to one holder of weights: requests, and what it answers to them, in their order. Without torch."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

import zmq

from elastic_moe.weights.holding import Answer, GiveDense, GiveExpert, Holding, Request, decode_answer, encode
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
