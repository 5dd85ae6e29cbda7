"""What keeps strangers off a launch's sockets and out of its records: one secret, known to all its processes.

Every ZMQ socket speaks CURVE. All servers of a launch have the same key pair, made of the secret, and its public half
is as secret as the other: CURVE never sends it, and whoever does not have it cannot say the first word of a handshake
that the server can open. So to connect is to know the secret, both ways, and no ZAP handler has to look at the keys of
clients, which make new ones for each socket. Recorded frames cannot be said again: each connection has keys of its own.

A record that passes through others' hands (torchrun's store, a lighthouse), and a request for weights, carries a MAC of
itself and of what it is about, so that it counts in no other place. gloo and torchft's gRPC authenticate nobody: see
docs/architecture.md, "Strangers".
"""

import hashlib
import hmac
import logging
from typing import TypeVar

import msgspec
import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from elastic_moe.background import end_process, start_thread

MAX_BYTES = 1 << 20
"""The longest message of one part that a server takes, unless told: longer than the addresses of any group. A stranger
can have a socket keep so much, before the handshake fails, and no more."""

_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
"""Who speaks CURVE with another secret, as a node that was given another. What is no ZMTP libzmq drops at its first
bytes, untold, and who says nothing has only looked whether the host lives (`group/probe.py`)."""
Socket = TypeVar("Socket", bound=zmq.Socket)
log = logging.getLogger(__name__)


class Forged(ValueError):
    """A record is not of this launch, or not about what it is taken for."""


class Wire(msgspec.Struct, frozen=True):
    """Arms sockets and seals records with a secret; without one both stay as they are."""

    secret: str = ""

    def __repr__(self) -> str:
        return f"Wire({'***' if self.secret else ''})"

    def server(self, socket: Socket, max_bytes: int = MAX_BYTES) -> Socket:
        """`socket`, before it is bound: only processes of the launch connect, and say `max_bytes` at once at most. Who
        is refused is logged, in a thread of its own."""
        socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        if self.secret:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, self._server_key)
            start_thread("strangers", _watch, socket.get_monitor_socket(_REFUSED), on_error=end_process)
        return socket

    def client(self, socket: Socket) -> Socket:
        """`socket`, before it is connected: to servers of the launch only."""
        if self.secret:
            public, secret = zmq.curve_keypair()
            socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
            socket.setsockopt(zmq.CURVE_SERVERKEY, zmq.curve_public(self._server_key))
        return socket

    def seal(self, record: str, about: str) -> str:
        """`record` with its MAC, as one that says something about `about`."""
        return f"{self._mac(record, about)}.{record}" if self.secret else record

    def unseal(self, sealed: str, about: str) -> str:
        """The record.

        Raises:
            Forged: it was not sealed with this secret, or about something else.
        """
        if not self.secret:
            return sealed
        mac, _, record = sealed.partition(".")
        if not hmac.compare_digest(mac.encode(), self._mac(record, about).encode()):
            raise Forged(f"the record of {about} was not made with the secret of this launch")
        return record

    def of_weights(self) -> "Wire":
        """For requests for weights: its secret may be told to another instance, and opens nothing else."""
        return Wire(self._derived(b"weights").hex()) if self.secret else self

    @property
    def token(self) -> str:
        """What an HTTP client elsewhere shows to get what is not for everybody; empty without a secret."""
        return self._derived(b"http token").hex() if self.secret else ""

    @property
    def _server_key(self) -> bytes:
        return z85.encode(self._derived(b"curve server"))

    def _mac(self, record: str, about: str) -> str:
        return hmac.digest(self._derived(b"records"), f"{len(about)} {about}{record}".encode(), "sha256").hex()

    def _derived(self, purpose: bytes) -> bytes:
        return hashlib.blake2b(self.secret.encode(), digest_size=32, person=purpose).digest()


PLAIN = Wire()
"""Of a launch without a secret."""


def _watch(monitor: zmq.Socket) -> None:
    """Tell of refused connections: of the first, the 10th, the 100th. Until the server is closed."""
    refused, tell_at = 0, 1
    while (event := recv_monitor_message(monitor))["event"] != zmq.EVENT_MONITOR_STOPPED:
        refused += 1
        if refused == tell_at:
            where = event["endpoint"].decode()
            log.warning("%s has refused %d connections that do not know the secret of this launch", where, refused)
            tell_at *= 10
    monitor.close()
