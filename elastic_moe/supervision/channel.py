"""The line between a supervisor and its child: one socket pair, JSON lines both ways.

The end of file on either side is the death of the other: the kernel says so at once, whatever way it died.
"""

import socket
import threading

import msgspec

from elastic_moe.group.view import View


class Beat(msgspec.Struct, tag="beat", frozen=True):
    """Child -> supervisor, about twice a second: it lives. `progress` rises with every bit of work done.

    `working` is False while the child legitimately waits: asleep, or for a peer inside a call with a deadline.
    """

    progress: int
    working: bool


class ViewChanged(msgspec.Struct, tag="view", frozen=True):
    """Child -> supervisor, and on to whoever wants to know: the members of the group, with their addresses."""

    view: View


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """Child -> supervisor: at work. `detail` is for people (a URL)."""

    detail: str = ""


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Child -> supervisor, before it exits with code 2: a user's mistake, in one line. Do not respawn."""

    reason: str


class Done(msgspec.Struct, tag="done", frozen=True):
    """Child -> supervisor: all its work is done; however it ends from now on, it is not started again."""


ToSupervisor = Ready | Refused | ViewChanged | Beat | Done


class Channel:
    """One end. `send` may be called from any thread, `receive` from one; both block briefly at most."""

    def __init__(self, sock: socket.socket, incoming: object) -> None:
        """`incoming` is the union of messages this end receives; the supervisor's is `ToSupervisor`."""
        self._sock = sock
        self._lock = threading.Lock()
        self._lines = sock.makefile("rb")
        self._decode = msgspec.json.Decoder(incoming).decode  # pyright: ignore[reportArgumentType]

    @classmethod
    def of_child(cls, fd: int, incoming: object) -> "Channel":
        """The child's end, from the file descriptor number its supervisor passed on the command line."""
        return cls(socket.socket(fileno=fd), incoming)

    def send(self, message: msgspec.Struct) -> bool:
        """Send one message. False when the other side has died (`receive` tells of that, not this)."""
        with self._lock:
            try:
                self._sock.sendall(msgspec.json.encode(message) + b"\n")
            except OSError:
                return False
        return True

    def receive(self) -> object | None:
        """The next message, or None when the other side has died or closed. Blocks until one of these."""
        try:
            line = self._lines.readline()
        except OSError:
            return None
        return self._decode(line) if line else None

    def close(self) -> None:
        """Close this end; the other side reads the end of file."""
        self._lines.close()
        self._sock.close()


def channel_pair() -> tuple[Channel, socket.socket]:
    """The supervisor's end, and the child's end as a bare inheritable socket."""
    ours, theirs = socket.socketpair()
    theirs.set_inheritable(True)
    return Channel(ours, ToSupervisor), theirs
