"""Servers of launch/server.py for tests: a failure tells what the server said, and nothing of it may be left."""

import contextlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

from launch.config import REPO
from launch.server import START_TIMEOUT_S, Node

DEMO_MODEL = REPO / "examples" / "demo_model"
STOP_WITHIN_S = 10.0
"""How long a server may take to end after SIGINT or SIGTERM."""

_SHM = Path("/dev/shm")


def wait_until(condition: Callable[[], Any], within_s: float, what: str) -> Any:
    """The first true value of `condition`; AssertionError when there is none in time."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(0.05)
    return value


class Launched(Node):
    """One command that runs launch/serve.py. A context manager: it ends all that comes of it."""

    def __init__(self, launcher: Sequence[str], *overrides: str) -> None:
        """Start it. `launcher` is what comes before launch/serve.py: `torchrun(4)`, or the interpreter alone."""
        self._folder = tempfile.TemporaryDirectory(prefix="serve-")
        self._shm_before = _shm_entries()
        super().__init__(launcher, *overrides, said=Path(self._folder.name) / "node")

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            error.add_note(self.log())
        self.kill()
        self._folder.cleanup()

    def wait(self, within_s: float) -> int:
        """The exit code of the command."""
        assert self.ends(within_s), f"still running after {within_s} s\n{self.log()}"
        return self.process.returncode

    def assert_nothing_left(self, within_s: float = 1.0) -> None:
        """No process (so no port, which ends with the last process that holds it) and no new /dev/shm entry."""
        try:
            wait_until(lambda: not self.processes(), within_s, "no process is left")
        except AssertionError as error:
            error.add_note("\n".join(f"{p.pid} {' '.join(p.cmdline())}" for p in self.processes()))
            raise
        # Other tests that run beside this one may hold entries of their own.
        wait_until(lambda: _shm_entries() - self._shm_before <= _shm_in_use(), 2.0, "no /dev/shm entry is left")


class Server(Launched):
    """A server that comes up: `with Server(torchrun(4), "model=demo") as server: ... server.url ...`.

    It takes a free port. Leaving the block kills what still runs; to see a clean end, call `stop`.
    """

    def __init__(self, launcher: Sequence[str], *overrides: str, start_within_s: float = START_TIMEOUT_S) -> None:
        """Start it, without waiting: `url` and whatever needs it wait until every rank serves."""
        super().__init__(launcher, "server.port=0", *overrides)
        self._deadline = time.monotonic() + start_within_s

    def __enter__(self) -> "Server":
        return self

    @property
    def url(self) -> str:
        """Its address, once /health says that it serves."""
        return self.wait_for_url(self._deadline - time.monotonic())

    def status(self) -> dict[str, Any]:
        """/elastic/status."""
        return httpx.get(f"{self.url}/elastic/status", timeout=10).raise_for_status().json()

    def engines(self) -> dict[int, psutil.Process]:
        """The engine processes of all nodes by rank."""
        return {member["rank"]: psutil.Process(member["pid"]) for member in self.status()["members"]}

    def wait_until_idle(self, within_s: float = 10.0) -> None:
        """Wait until neither the front end nor any rank has a request."""
        wait_until(lambda: num_requests(self.status()) == 0, within_s, "no request runs or waits")

    def stop(self, number: int = signal.SIGINT) -> None:
        """End it as a user does: it takes less than `STOP_WITHIN_S`, and nothing is left."""
        begin = time.monotonic()
        self.process.send_signal(number)
        self.wait(STOP_WITHIN_S)
        self.assert_nothing_left(max(1.0, begin + STOP_WITHIN_S - time.monotonic()))
        if self._url:
            host, _, port = self._url.removeprefix("http://").rpartition(":")
            with contextlib.closing(socket.socket()) as probe:
                assert probe.connect_ex((host, int(port))) != 0, f"{self._url} still listens"


@dataclass(frozen=True)
class Ended:
    """How a command ended that was not to come up."""

    code: int
    out: str
    err: str
    complaints: list[str]
    """Lines on standard error that begin with `elastic_moe: `."""
    seconds_after_complaint: float
    """From the first of these lines until no process was left."""


def run_to_end(launcher: Sequence[str], *overrides: str, within_s: float = 60.0) -> Ended:
    """Run the command until nothing of it is left."""
    with Launched(launcher, *overrides) as launched:
        wait_until(lambda: launched.complaints() or launched.process.poll() is not None, within_s, "an end")
        complained = time.monotonic()
        code = launched.wait(within_s)
        launched.assert_nothing_left(within_s=10.0)
        seconds = time.monotonic() - complained
        return Ended(code, launched.out, launched.err, launched.complaints(), seconds)


def num_requests(status: dict[str, Any]) -> int:
    """Requests that run or wait, at the front end or any rank."""
    places = [status["requests"], *status["members"]]
    return sum(place["running"] + place["waiting"] for place in places)


def _shm_entries() -> set[str]:
    return set(os.listdir(_SHM)) if _SHM.is_dir() else set()


def _shm_in_use() -> set[str]:
    """Entries of /dev/shm that a living process has mapped."""
    used = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            paths = (Path(m.path) for m in process.memory_maps() if m.path.startswith(f"{_SHM}/"))
            used |= {path.relative_to(_SHM).parts[0] for path in paths}
    return used
