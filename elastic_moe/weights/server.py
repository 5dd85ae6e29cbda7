"""Weights of a running process, for whoever asks: one thread, a ROUTER socket, one request, one tensor or expert.

Requests and headers are sealed with a key of the launch's secret, so that strangers neither get nor give any. The bytes
travel in the clear, as all between ranks do (gloo, NCCL): under CURVE a core moves 0.35 GB/s of them instead of 1.3.
Nothing is copied or locked for a reader where bytes lie in memory of the host: what changes under its hands has
another digest when it arrives.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import zmq

from elastic_moe.background import OnError, end_process, start_thread
from elastic_moe.weights.holding import (
    Answer,
    GiveDense,
    GiveExpert,
    Given,
    Greet,
    Holding,
    Request,
    Share,
    Shared,
    decode_request,
    encode,
)
from elastic_moe.wire import PLAIN, Wire

POLL_MS = 500


class Gift(NamedTuple):
    """A header, and its frames: anything with a buffer, kept until it is sent."""

    header: Given
    frames: Sequence[memoryview] = ()


NOTHING = Gift(Given())


class Shelf(Protocol):
    """What a process gives."""

    def holding(self) -> Holding:
        """What is there now."""
        ...

    def dense(self, name: str) -> Gift:
        """`NOTHING` if it is not there."""
        ...

    def expert(self, layer: int, expert: int) -> Gift:
        """`NOTHING` if it is not there."""
        ...

    def share(self) -> Shared:
        """Where it is in the memory of a GPU."""
        ...


class WeightServer:
    """Gives what is on a shelf to whoever asks."""

    def __init__(self, host: str, wire: Wire = PLAIN, port: int = 0) -> None:
        """Bind `port` on `host`, or any that is free; requests wait until `start`."""
        self._wire = wire
        self._router = PLAIN.server(zmq.Context.instance().socket(zmq.ROUTER))
        if port:
            self._router.bind(f"tcp://{host}:{port}")
        else:
            port = self._router.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self._closed = threading.Event()

    def start(self, shelf: Shelf, on_error: OnError = end_process) -> None:
        """Answer from now on. `on_error` is told if the thread dies."""
        start_thread("weights", self._serve, shelf, on_error=on_error)

    def close(self) -> None:
        """Answer no more."""
        self._closed.set()

    def _serve(self, shelf: Shelf) -> None:
        while not self._closed.is_set():
            if not self._router.poll(POLL_MS):
                continue
            sender, *frames = self._router.recv_multipart()
            try:
                sealed = frames[-1].decode()
                request = decode_request(self._wire.unseal(sealed, self.address))
            except ValueError:
                continue  # not one of ours
            answer, parts = _answer(shelf, request)
            header = self._wire.seal(encode(answer).decode(), sealed).encode()
            self._router.send_multipart([sender, header, *parts], copy=False)
        self._router.close(linger=0)


def _answer(shelf: Shelf, request: Request) -> tuple[Answer, Sequence[memoryview]]:
    match request:
        case Greet():
            return shelf.holding(), ()
        case GiveDense(name):
            return shelf.dense(name)
        case GiveExpert(layer, expert):
            return shelf.expert(layer, expert)
        case Share():
            return shelf.share(), ()
