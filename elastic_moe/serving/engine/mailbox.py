"""The engine's message socket: a thread that receives for the step loop and sends for it."""

import queue
import time
from collections.abc import Callable

import msgspec
import numpy as np
import zmq

from elastic_moe.background import OnError, end_process, start_thread
from elastic_moe.serving.protocol import (
    AskLoads,
    Cancel,
    Event,
    Finish,
    Hello,
    Loads,
    Rebalance,
    Status,
    Step,
    Submit,
    Tokens,
    decode_to_engine,
    encode,
)
from elastic_moe.wire import PLAIN, Wire

STATUS_EVERY_S = 1.0
MAX_SUBMIT_BYTES = 1 << 24
"""A prompt of 3 million tokens."""
FRONT_END_GONE_S = 10.0
"""A front end says Hello about once a second; after this long without one its requests are cancelled."""


class Mailbox:
    """One ROUTER socket, served by one thread. The step loop reads `inbox`, waits on it, and calls `send`."""

    def __init__(
        self,
        host: str,
        status: Callable[[], Status | None],
        loads: Callable[[], np.ndarray] | None = None,
        wire: Wire = PLAIN,
    ) -> None:
        """Bind a free port on `host`. `status` and `loads`, [L, E] in the window, are called in the mailbox's thread;
        the status is None while there is nothing to tell."""
        self._context = zmq.Context()
        self._router = wire.server(self._context.socket(zmq.ROUTER), MAX_SUBMIT_BYTES)
        self._router.setsockopt(zmq.LINGER, 200)
        self._router.setsockopt(zmq.SNDHWM, 0)
        self.address = f"tcp://{host}:{self._router.bind_to_random_port(f'tcp://{host}')}"
        self._outbox = self._context.socket(zmq.PULL)
        self._outbox.bind("inproc://outbox")
        self._sender = self._context.socket(zmq.PUSH)
        self._sender.connect("inproc://outbox")
        self._status = status
        self._loads = loads
        self._front_ends: dict[bytes, float] = {}
        self._owners: dict[str, bytes] = {}
        self.inbox: queue.SimpleQueue[Submit | Cancel | Rebalance | None] = queue.SimpleQueue()
        """For the step loop; None only wakes it."""

    def start(self, on_error: OnError = end_process) -> None:
        """Start answering. `on_error` is told if the thread dies."""
        start_thread("mailbox", self._serve, on_error=on_error)

    def send(self, message: Step | Event) -> None:
        """Tokens to the front ends that own the requests, events to all. From the step loop's thread only."""
        self._sender.send(encode(message))

    def announce(self) -> None:
        """Send a `Status` to every front end now. From the step loop's thread only."""
        self._sender.send(b"")

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._outbox, zmq.POLLIN)
        next_status = 0.0
        while True:
            ready = dict(poller.poll(int(STATUS_EVERY_S * 1000)))
            if self._router in ready:
                self._receive(*self._router.recv_multipart())
            if self._outbox in ready:
                frame = self._outbox.recv()
                if frame:
                    self._deliver(frame)
                else:
                    next_status = 0.0
            if time.monotonic() >= next_status:
                next_status = time.monotonic() + STATUS_EVERY_S
                self._expire_front_ends()
                self._broadcast_status()

    def _receive(self, sender: bytes, *frames: bytes) -> None:
        try:
            message = decode_to_engine(frames[-1])
        except ValueError:
            return  # not one of ours; a stranger on the port must not harm the rank
        if isinstance(message, Hello):
            new = sender not in self._front_ends
            self._front_ends[sender] = time.monotonic()
            status = self._status() if new else None
            if status:
                self._router.send_multipart([sender, encode(status)])
            return
        if isinstance(message, AskLoads):
            ready = self._loads is not None and self._status() is not None
            loads = np.rint(self._loads()).astype(np.int64).tolist() if self._loads and ready else []
            self._router.send_multipart([sender, encode(Loads(message.ask, loads))])
            return
        if isinstance(message, Submit):
            self._owners[message.request_id] = sender
        elif isinstance(message, Cancel):
            self._owners.pop(message.request_id, None)
        self.inbox.put(message)

    def _deliver(self, frame: bytes) -> None:
        message = msgspec.msgpack.decode(frame, type=Step | Event)
        if isinstance(message, Event):
            for front_end in self._front_ends:
                self._router.send_multipart([front_end, frame])
            return
        of_owner: dict[bytes, list[Tokens]] = {}
        for tokens in message.tokens:
            request_id = tokens.request_id
            owner = self._owners.pop(request_id, None) if tokens.finish else self._owners.get(request_id)
            if owner is not None:
                of_owner.setdefault(owner, []).append(tokens)
        for owner, some in of_owner.items():
            self._router.send_multipart([owner, encode(Step(some))])

    def _expire_front_ends(self) -> None:
        limit = time.monotonic() - FRONT_END_GONE_S
        for front_end in [f for f, seen in self._front_ends.items() if seen < limit]:
            del self._front_ends[front_end]
            status = self._status()
            for request_id in [r for r, owner in self._owners.items() if owner == front_end]:
                del self._owners[request_id]
                self.inbox.put(Cancel(request_id))
                if status:  # should it be alive after all, it reads this and submits again
                    dropped = Step([Tokens(request_id, status.incarnation, 0, [], Finish.DROPPED)])
                    self._router.send_multipart([front_end, encode(dropped)])

    def _broadcast_status(self) -> None:
        status = self._status() if self._front_ends else None
        if status:
            for front_end in self._front_ends:
                self._router.send_multipart([front_end, encode(status)])
