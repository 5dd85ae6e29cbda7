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
    waiting: dict[socket.socket, str] = {}
    silent: set[str] = set()
    deadline = time.monotonic() + within_s
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for address in addresses:
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            sock = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            sock.setblocking(False)
            code = sock.connect_ex((host.strip("[]"), int(port)))
            if code == errno.EINPROGRESS:
                waiting[sock] = address
                selector.register(sock, selectors.EVENT_WRITE)
            elif code not in (0, errno.ECONNREFUSED):
                silent.add(address)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                sock: socket.socket = key.fileobj  # pyright: ignore[reportAssignmentType]
                selector.unregister(sock)
                address = waiting.pop(sock)
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) not in (0, errno.ECONNREFUSED):
                    silent.add(address)
        return silent | set(waiting.values())
