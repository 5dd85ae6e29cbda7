"""The line between a supervisor and its child: one socket pair, JSON lines both ways.

The end of file on either side is the death of the other: the kernel says so at once, whatever way it died.
"""

import os
import socket
import threading

import msgspec

from elastic_moe.group.view import View

READ_BYTES = 1 << 16


class Beat(msgspec.Struct, tag="beat", frozen=True):
    """Child -> supervisor, every `Deadlines.beat_s`: it lives.

    `progress` rises with every bit of work done. `within_s`: how many seconds what it does now may take until there is
    more; None while it waits for something that may never come.
    """

    progress: int
    within_s: float | None


class ViewChanged(msgspec.Struct, tag="view", frozen=True):
    """Child -> supervisor, and on to whoever wants to know: the members of the group, with their addresses."""

    view: View


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """Child -> supervisor: at work. `detail`: a front end's URL, the kind of device of an engine."""

    detail: str = ""


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """Child -> supervisor, before it exits with code 2: a user's mistake, in one line. Do not respawn."""

    reason: str


class Done(msgspec.Struct, tag="done", frozen=True):
    """Child -> supervisor: all its work is done; however it ends from now on, it is not started again."""


ToSupervisor = Ready | Refused | ViewChanged | Beat | Done


class Channel:
    """One end. `send` may be called from any thread, the others from one."""

    def __init__(self, sock: socket.socket, incoming: object) -> None:
        """`incoming` is the union of messages this end receives; the supervisor's is `ToSupervisor`."""
        self._sock = sock
        self._lock = threading.Lock()
        self._read = b""
        self._decode = msgspec.json.Decoder(incoming).decode  # pyright: ignore[reportArgumentType]

    @classmethod
    def of_child(cls, fd: int, incoming: object) -> "Channel":
        """The child's end, from the file descriptor number its supervisor passed on the command line. What the child
        starts does not get it."""
        os.set_inheritable(fd, False)
        return cls(socket.socket(fileno=fd), incoming)

    def fileno(self) -> int:
        """For polling."""
        return self._sock.fileno()

    def send(self, message: msgspec.Struct) -> bool:
        """Send one message; blocks while the other side does not read. False when it has died (`receive` tells of that,
        not this)."""
        with self._lock:
            try:
                self._sock.sendall(msgspec.json.encode(message) + b"\n")
            except OSError:
                return False
        return True

    def receive(self, *, wait: bool = True) -> object | None:
        """The next message, or None when the other side has died or closed. Blocks until one of these.

        Raises:
            BlockingIOError: with `wait` false, none of these is the case.
        """
        while b"\n" not in self._read:
            try:
                part = self._sock.recv(READ_BYTES, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                raise
            except OSError:
                return None
            if not part:
                return None
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return self._decode(line)

    def close(self) -> None:
        """Close this end; the other side reads the end of file."""
        self._sock.close()


def channel_pair() -> tuple[Channel, socket.socket]:
    """The supervisor's end, and the child's end as a bare inheritable socket."""
    ours, theirs = socket.socketpair()
    theirs.set_inheritable(True)
    return Channel(ours, ToSupervisor), theirs
