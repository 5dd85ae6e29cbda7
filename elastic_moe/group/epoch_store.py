"""Where the members of a view leave each other the addresses of a new group: each process offers one, over ZMQ.

Not torch's TCPStore: that looks up the name of every peer's address, on both sides of every connection, before it
serves it. Where the name service is slow or does not answer that is 5 s and more for each lookup, in the middle of a
recovery (torch 2.13, `c10d::detail::formatSockAddr`; seen here for one connection in 25).
"""

import threading
import time
from datetime import timedelta

import msgspec
import torch.distributed as dist
import zmq

from elastic_moe.background import end_process, start_thread
from elastic_moe.wire import PLAIN, Wire

KEEP_S = 600.0
"""How long a value is kept: longer than any `Deadlines.build_s`. The members of a group come to it within seconds of
each other, whatever its deadline."""


class PutRequest(msgspec.Struct, tag="put", frozen=True):
    """Client -> server: keep `value`."""

    key: str
    value: bytes


class GetRequest(msgspec.Struct, tag="get", frozen=True):
    """Client -> server: answer with the values of `keys` as soon as all are there, or never after `within_s`.

    With 0 seconds the answer comes at once, and is None unless all are there.
    """

    number: int
    keys: list[str]
    within_s: float


class GetReply(msgspec.Struct, frozen=True):
    """Server -> client: the values of `GetRequest` number `number`, in the order of its keys."""

    number: int
    values: list[bytes] | None


_encode = msgspec.msgpack.Encoder().encode
_decode_request = msgspec.msgpack.Decoder(PutRequest | GetRequest).decode
_decode_reply = msgspec.msgpack.Decoder(GetReply).decode


class StoreServer:
    """Keeps values for whoever asks; a thread of its own answers. Strangers' frames are dropped."""

    def __init__(self, host: str, wire: Wire = PLAIN) -> None:
        """Bind a free port on `host` and serve until the process ends."""
        self._router = wire.server(zmq.Context.instance().socket(zmq.ROUTER))
        self._router.bind(f"tcp://{host}:0")
        self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://")
        """`host:port`"""
        self._kept: dict[str, tuple[float, bytes]] = {}
        """Key -> (time until which it is kept, value), oldest first."""
        self._waiting: list[tuple[bytes, GetRequest, float]] = []
        start_thread("store", self._serve, on_error=end_process)

    def _serve(self) -> None:
        while True:
            client, frame = self._router.recv_multipart()[-2:]
            now = time.monotonic()
            try:
                request = _decode_request(frame)
            except ValueError:
                continue
            if isinstance(request, PutRequest):
                self._kept.pop(request.key, None)
                self._kept[request.key] = now + KEEP_S, request.value
            else:
                self._waiting.append((client, request, now + request.within_s))
            self._forget(now)
            self._waiting = [entry for entry in self._waiting if not self._answered(*entry[:2])]

    def _forget(self, now: float) -> None:
        while self._kept and (oldest := next(iter(self._kept))) and self._kept[oldest][0] < now:
            del self._kept[oldest]
        self._waiting = [entry for entry in self._waiting if entry[2] >= now]

    def _answered(self, client: bytes, request: GetRequest) -> bool:
        complete = all(key in self._kept for key in request.keys)
        if complete or not request.within_s:
            values = [self._kept[key][1] for key in request.keys] if complete else None
            self._router.send_multipart([client, _encode(GetReply(request.number, values))])
        return complete or not request.within_s


class EpochStore(dist.Store):
    """A client of a `StoreServer`, for `ProcessGroupGloo` and `ProcessGroupNCCL`: only what these call.

    Hold it as long as they are built: they keep the C++ half, which without this one implements nothing.
    """

    def __init__(self, address: str, timeout_s: float, wire: Wire = PLAIN) -> None:
        """`address` is `StoreServer.address`; `timeout_s` is how long `get` waits for a key unless told, in seconds."""
        super().__init__()
        self._socket = wire.client(zmq.Context.instance().socket(zmq.DEALER))
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(f"tcp://{address}")
        self._lock = threading.Lock()
        self._timeout_s = timeout_s
        self._number = 0

    def clone(self) -> "EpochStore":
        """Itself: the caller of C++ keeps no reference to a Python object that only it would hold."""
        return self

    def set(self, key: str, value: bytes | str) -> None:
        """Keep `value` under `key`; a later one replaces it."""
        with self._lock:
            self._socket.send(_encode(PutRequest(key, value.encode() if isinstance(value, str) else value)))

    def get(self, key: str) -> bytes:
        """The value of `key`, as soon as it is there.

        Raises:
            dist.DistStoreError: it did not come in time.
        """
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """The values of `keys`, as soon as all are there.

        Raises:
            dist.DistStoreError: they did not come in time.
        """
        return self._get(keys, self._timeout_s) or []

    def check(self, keys: list[str]) -> bool:
        """Whether all of `keys` are there now.

        Raises:
            dist.DistStoreError: the server does not answer.
        """
        return self._get(keys, 0.0) is not None

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Return when all of `keys` are there.

        Raises:
            dist.DistStoreError: they did not come in time.
        """
        self._get(keys, self._timeout_s if timeout is None else max(0.001, timeout.total_seconds()))

    def _get(self, keys: list[str], within_s: float) -> list[bytes] | None:
        with self._lock:
            self._number += 1
            self._socket.send(_encode(GetRequest(self._number, keys, within_s)))
            within_s = within_s or self._timeout_s
            deadline = time.monotonic() + within_s
            while self._socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                reply = _decode_reply(self._socket.recv())
                if reply.number == self._number:
                    return reply.values
        raise dist.DistStoreError(f"no value of {', '.join(keys)} within {within_s} s")
