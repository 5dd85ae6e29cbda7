"""Servers as a user starts them: torchrun, launch/serve.py, real processes; and proof that nothing of them is left.

Every process of a server inherits a mark in its environment, so that it is found wherever it hangs in the process
tree: an orphan too.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_MODEL = REPOSITORY / "examples" / "demo_model"
STOP_WITHIN_S = 10.0
"""How long a server may take to end after SIGINT or SIGTERM."""

_MARK = "ELASTIC_MOE_TEST_SERVER"
_SHM = Path("/dev/shm")


def torchrun(ranks: int, *options: str) -> list[str]:
    """The command up to the script. Without options: one node, on a port that torchrun finds."""
    where = options or ("--standalone",)
    return [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(ranks)]


def two_nodes(ranks_per_node: int) -> list[list[str]]:
    """The two commands of a launch over two nodes, both on this host."""
    port = str(free_port())
    where = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", port)
    return [torchrun(ranks_per_node, *where, "--node-rank", str(node)) for node in range(2)]


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], Any], within_s: float, what: str) -> Any:
    """The first true value of `condition`; AssertionError when there is none in time."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(0.05)
    return value


class Launched:
    """One command that runs launch/serve.py, with all processes that come of it. A context manager: it ends them."""

    def __init__(self, launcher: Sequence[str], *overrides: str) -> None:
        """Start it. `launcher` is what comes before launch/serve.py: `torchrun(4)`, or the interpreter alone."""
        self._folder = tempfile.TemporaryDirectory(prefix="serve-")
        self._mark = uuid.uuid4().hex
        self._shm_before = _shm_entries()
        with self._path("out").open("wb") as out, self._path("err").open("wb") as err:
            self.process = subprocess.Popen(
                [*launcher, "launch/serve.py", *overrides],
                cwd=REPOSITORY,
                env={**os.environ, _MARK: self._mark},
                stdout=out,
                stderr=err,
                start_new_session=True,  # a Ctrl-C at the tests is not one at the server
            )

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is not None:
            error.add_note(self.log())
        self.kill()
        self._folder.cleanup()

    @property
    def out(self) -> str:
        """Its standard output so far."""
        return self._path("out").read_text()

    @property
    def err(self) -> str:
        """Its standard error so far."""
        return self._path("err").read_text()

    def log(self) -> str:
        """Both, for the message of a failure."""
        return f"--- stdout of {self.process.args}:\n{self.out}\n--- stderr:\n{self.err}"

    def complaints(self) -> list[str]:
        """The lines by which it refuses a user's mistake."""
        return [line for line in self.err.splitlines() if line.startswith("elastic_moe: ")]

    def processes(self) -> list[psutil.Process]:
        """All its processes that are alive, wherever they are in the process tree."""
        return [p for p in psutil.process_iter() if _environment(p).get(_MARK) == self._mark]

    def wait(self, within_s: float) -> int:
        """The exit code of the command."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {within_s} s\n{self.log()}") from None

    def assert_nothing_left(self, within_s: float = 1.0) -> None:
        """No process (so no port, which ends with the last process that holds it) and no new /dev/shm entry."""
        try:
            wait_until(lambda: not self.processes(), within_s, "no process is left")
        except AssertionError as error:
            error.add_note("\n".join(f"{p.pid} {' '.join(p.cmdline())}" for p in self.processes()))
            raise
        # Other tests that run beside this one may hold entries of their own.
        wait_until(lambda: _shm_entries() - self._shm_before <= _shm_in_use(), 2.0, "no /dev/shm entry is left")

    def kill(self) -> None:
        """End whatever is left, at once."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def _path(self, name: str) -> Path:
        return Path(self._folder.name, name)


class Server(Launched):
    """A server that comes up: `with Server(torchrun(4), "model=demo") as server: ... server.url ...`.

    It takes a free port. Leaving the block kills what still runs; to see a clean end, call `stop`.
    """

    def __init__(self, launcher: Sequence[str], *overrides: str, start_within_s: float = 120.0) -> None:
        """Start it, without waiting: `url` and whatever needs it wait until every rank serves."""
        super().__init__(launcher, "server.port=0", *overrides)
        self._deadline = time.monotonic() + start_within_s
        self._url = ""

    def __enter__(self) -> "Server":
        return self

    @property
    def url(self) -> str:
        """Its address, once /health says that it serves."""
        while not self._url:
            if self.process.poll() is not None or time.monotonic() > self._deadline:
                raise AssertionError(f"the server did not come up; exit code {self.process.poll()}\n{self.log()}")
            line = next((line for line in self.out.splitlines(keepends=True) if " at http" in line), "")
            if line.endswith("\n") and _is_healthy(address := line.rsplit(" at ", 1)[1].strip()):
                self._url = address
            else:
                time.sleep(0.1)
        return self._url

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
            address = self._url.removeprefix("http://").rsplit(":", 1)
            with contextlib.closing(socket.socket()) as probe:
                assert probe.connect_ex((address[0], int(address[1]))) != 0, f"{self._url} still listens"


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


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
        return {}


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
