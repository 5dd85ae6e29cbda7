"""The TCP connections of a gloo group, so that it can be aborted.

`ProcessGroupGloo.abort()` (torch 2.13) frees nobody who waits. A receive that times out does close all connections of
its group, but in the caller's thread, which was seen to deadlock with gloo's own. Shutting the sockets down from
outside is what the death of all peers looks like: gloo's thread finds the end of every stream and fails every call.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Set


class Connections:
    """The established connections of this process from or to any of `listeners`, held until they are shut."""

    def __init__(self, listeners: Set[tuple[str, int]]) -> None:
        """`listeners` are the addresses (IP, port) on which the group's members listen."""
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        for sock in _sockets():
            with contextlib.suppress(OSError):  # it is not connected
                if listeners & {sock.getsockname()[:2], sock.getpeername()[:2]}:
                    self._sockets.append(sock)
                    continue
            sock.close()

    def shut(self) -> None:
        """End all of them, in both directions. Safe to call twice and from any thread."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for sock in sockets:
            with contextlib.suppress(OSError):  # the other side was first
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def listening_ports() -> Iterator[int]:
    """TCP ports on which this process listens."""
    for sock in _sockets():
        with sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                yield sock.getsockname()[1]


def _sockets() -> Iterator[socket.socket]:
    """Every TCP socket of this process, under a file descriptor of its own."""
    for fd in [int(name) for name in os.listdir("/proc/self/fd") if _is_socket(name)]:
        with contextlib.suppress(OSError):  # closed meanwhile
            sock = socket.socket(fileno=os.dup(fd))
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                yield sock
            else:
                sock.close()


def _is_socket(name: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    except OSError:
        return False
