"""Hosts that are one machine's network namespaces on one bridge, so that the wire between any two can be cut.

Needs root, and `ip` of iproute2. A cut drops frames silently, as a firewall or a broken cable does: who sends hears
nothing of it. Two ends are cut one by one, so that a link can fail in one direction.
"""

import contextlib
import itertools
import os
import secrets
import subprocess
from collections.abc import Iterable

NOWHERE = "02:00:00:00:00:01"
"""A hardware address that nobody has."""
PREFIX = "10.77"


class Network:
    """`num_hosts` hosts, all connected, and this machine with them. A context manager: leaving it takes all down."""

    def __init__(self, num_hosts: int) -> None:
        """See the class.

        Raises:
            ValueError: this user may not make namespaces.
        """
        if os.geteuid() != 0:
            raise ValueError("cutting the network between ranks needs root: it makes network namespaces")
        self._name = f"em{secrets.token_hex(3)}"
        self._net = f"{PREFIX}.{secrets.randbelow(250) + 1}"
        self._num_hosts = num_hosts
        self._cut: set[tuple[int, int]] = set()

    def __enter__(self) -> "Network":
        bridge = self._name
        try:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("addr", "add", f"{self._net}.254/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            for host in range(self._num_hosts):
                self._add(host)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def address(self, host: int) -> str:
        """Where the others reach it."""
        return f"{self._net}.{host + 1}"

    def command(self, host: int) -> list[str]:
        """What stands before a command that is to run on it."""
        return ["ip", "netns", "exec", self._space(host)]

    def cut(self, sources: Iterable[int], targets: Iterable[int], *, both_ways: bool = True) -> None:
        """From now on nothing that a source sends comes to a target; nor the other way, unless told otherwise."""
        for source, target in itertools.product(sources, targets):
            self._cut.update([(source, target), (target, source)] if both_ways else [(source, target)])
        for source, target in self._cut:
            address = self.address(target)
            _ip("-n", self._space(source), "neigh", "replace", address, "lladdr", NOWHERE, "dev", "eth0")

    def heal(self) -> None:
        """All are connected again."""
        for source, target in self._cut:
            _ip("-n", self._space(source), "neigh", "del", self.address(target), "dev", "eth0")
        self._cut.clear()

    def close(self) -> None:
        """Take all down; processes that still run there stay, and reach nobody."""
        for host in range(self._num_hosts):
            for command in (("link", "del", self._space(host)), ("netns", "del", self._space(host))):
                with contextlib.suppress(OSError):  # it was not made
                    _ip(*command)
        with contextlib.suppress(OSError):
            _ip("link", "del", self._name)

    def _add(self, host: int) -> None:
        space = outside = self._space(host)
        _ip("netns", "add", space)
        _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", outside, "master", self._name, "up")
        _ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        _ip("-n", space, "link", "set", "lo", "up")

    def _space(self, host: int) -> str:
        return f"{self._name}-{host}"


def _ip(*arguments: str) -> None:
    """OSError, in the words of `ip`, when it fails."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
