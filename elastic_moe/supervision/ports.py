"""Ports that a seat keeps over the lives of its process."""

import random
import socket
from pathlib import Path

FIRST = 10_000
"""Lower ports are likely to be somebody's."""
TRIES = 100
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def lasting_port(host: str) -> int:
    """A port that is free on `host` now, and that no outgoing connection is ever given.

    Others go on connecting to it when its process has died. Were it one of those that the kernel deals to outgoing
    connections, any process could be given it meanwhile, or a connection to it could even become one with itself; the
    next life could not bind it, and would not be found by a rank that was lost meanwhile.
    """
    low, high = (int(word) for word in _EPHEMERAL.read_text().split())
    lasting = [*range(FIRST, low), *range(high + 1, 2**16)]
    for port in random.sample(lasting, min(TRIES, len(lasting))):
        if _is_free(host, port):
            return port
    with socket.create_server((host, 0)) as probe:
        return probe.getsockname()[1]


def _is_free(host: str, port: int) -> bool:
    try:
        socket.create_server((host, port)).close()
    except OSError:
        return False
    return True
