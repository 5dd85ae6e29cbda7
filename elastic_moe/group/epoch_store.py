"""Where the members of a view leave each other the addresses of a new group: each process offers one, over ZMQ.

Not torch's TCPStore: that looks up the name of every peer's address, on both sides of every connection, before it
serves it. Where the name service is slow or does not answer that is 5 s and more for each lookup, in the middle of a
recovery (torch 2.13, `c10d::detail::formatSockAddr`; seen here for one connection in 25).
"""

import threading
import time
from datetime import timedelta
from typing import NamedTuple

import msgspec
import torch.distributed as dist
import zmq

from elastic_moe.background import end_process, start_thread
from elastic_moe.wire import PLAIN, Wire

KEEP_S, SWEEP_S = 600.0, 1.0
"""How long a value is kept: longer than anybody waits for another (`Deadlines.build_s`), for the members of a group
come to it within seconds of each other, whatever its deadline. And how often what is over is looked for."""


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


encode = msgspec.msgpack.Encoder().encode
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
        self._waiting: dict[str, list[_Asker]] = {}
        """Under one key that it still lacks, each of those who wait."""
        self._swept = time.monotonic()
        start_thread("store", self._serve, on_error=end_process)

    def _serve(self) -> None:
        while True:
            client, frame = self._router.recv_multipart()[-2:]
            now = time.monotonic()
            try:
                request = _decode_request(frame)
            except ValueError:
                continue
            if now > self._swept + SWEEP_S:
                self._sweep(now)
            if isinstance(request, GetRequest):
                self._answer(_Asker(client, request, now + request.within_s))
                continue
            self._kept.pop(request.key, None)
            self._kept[request.key] = now + KEEP_S, request.value
            for asker in self._waiting.pop(request.key, ()):
                self._answer(asker)

    def _answer(self, asker: "_Asker") -> None:
        """If all is there, or it shall not wait; else it waits for what it lacks first. Each of its keys is looked for
        once or twice, so that R members who all ask for the values of all cost R * R looks, not R times as many."""
        client, request, _, begin = asker
        keys = request.keys
        lacking = self._first_lacking(keys, begin)
        if lacking == len(keys) and begin:
            lacking = self._first_lacking(keys, 0)  # one may have been kept too long meanwhile
        if lacking < len(keys) and request.within_s:
            self._waiting.setdefault(keys[lacking], []).append(asker._replace(begin=lacking))
            return
        values = [self._kept[key][1] for key in keys] if lacking == len(keys) else None
        self._router.send_multipart([client, encode(GetReply(request.number, values))])

    def _first_lacking(self, keys: list[str], begin: int) -> int:
        return next((at for at in range(begin, len(keys)) if keys[at] not in self._kept), len(keys))

    def _sweep(self, now: float) -> None:
        self._swept = now
        while self._kept and (oldest := next(iter(self._kept))) and self._kept[oldest][0] < now:
            del self._kept[oldest]
        waiting = {key: [asker for asker in askers if asker.until >= now] for key, askers in self._waiting.items()}
        self._waiting = {key: askers for key, askers in waiting.items() if askers}


class _Asker(NamedTuple):
    """Who waits for values, until when, and from which of its keys on some are lacking."""

    client: bytes
    request: GetRequest
    until: float
    begin: int = 0


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
            self._socket.send(encode(PutRequest(key, value.encode() if isinstance(value, str) else value)))

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
            self._socket.send(encode(GetRequest(self._number, keys, within_s)))
            within_s = within_s or self._timeout_s
            deadline = time.monotonic() + within_s
            while self._socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                reply = _decode_reply(self._socket.recv())
                if reply.number == self._number:
                    return reply.values
        raise dist.DistStoreError(f"no value of {', '.join(keys)} within {within_s} s")


class RankValues(dist.Store):
    """What `ProcessGroupGloo` builds on: it puts one value a rank under `NAME/RANK`, and then waits for and gets the
    others' one by one. Here the first that it wants brings all: one request a rank, not two for each peer.
    """

    def __init__(self, store: dist.Store, size: int) -> None:
        """`size` ranks build on `store`. Hold it as long as they are built."""
        super().__init__()
        self._store = store
        self._size = size
        self._got: dict[str, bytes] = {}

    def clone(self) -> "RankValues":
        """See `EpochStore.clone`."""
        return self

    def set(self, key: str, value: bytes | str) -> None:
        """Keep `value` under `key`."""
        self._store.set(key, value)  # pyright: ignore[reportArgumentType]  (torch takes bytes too)

    def get(self, key: str) -> bytes:
        """The value of `key`.

        Raises:
            dist.DistStoreError: one of the ranks did not put its own in time.
        """
        self.wait([key])
        return self._got[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Return when all of `keys` are there, and those of the other ranks too.

        Raises:
            dist.DistStoreError: one of the ranks did not put its own in time.
        """
        for name in {key.rpartition("/")[0] for key in keys if key not in self._got}:
            names = [f"{name}/{rank}" for rank in range(self._size)]
            self._got |= dict(zip(names, self._store.multi_get(names), strict=True))
