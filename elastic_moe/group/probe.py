"""Whether addresses can be reached: a TCP connection to each, which the kernel of a live host answers by itself."""

import contextlib
import errno
import selectors
import socket
import time
from collections.abc import Iterable

PROBE_S = 0.7
"""How long an answer may take: within a data centre a millisecond, and a lost packet is sent again after 0.2 s."""


def unreachable(addresses: Iterable[str], within_s: float = PROBE_S) -> set[str]:
    """Those of `addresses`, `tcp://HOST:PORT` or `HOST:PORT`, from which nothing comes back in time.

    One that refuses is reachable: its process has died, which others say.
    """
    return {address for address, code in _knock(addresses, within_s).items() if code not in (0, errno.ECONNREFUSED)}


def refused(addresses: Iterable[str], within_s: float = PROBE_S) -> set[str]:
    """Those of `addresses` whose host says that nobody listens: their processes have died."""
    return {address for address, code in _knock(addresses, within_s).items() if code == errno.ECONNREFUSED}


def _knock(addresses: Iterable[str], within_s: float) -> dict[str, int]:
    """The error of connecting to each, 0 for none."""
    waiting: dict[socket.socket, str] = {}
    found: dict[str, int] = {}
    deadline = time.monotonic() + within_s
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for address in addresses:
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            if not port:
                continue  # it offers nothing
            sock = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            sock.setblocking(False)
            found[address] = sock.connect_ex((host.strip("[]"), int(port)))
            if found[address] == errno.EINPROGRESS:
                waiting[sock] = address
                selector.register(sock, selectors.EVENT_WRITE)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                sock: socket.socket = key.fileobj  # pyright: ignore[reportAssignmentType]
                selector.unregister(sock)
                found[waiting.pop(sock)] = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return found
