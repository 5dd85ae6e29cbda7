"""Servers as a user starts them: torchrun, launch/serve.py, real processes; and a server by its address.

Every process of a server inherits a mark in its environment, so that it is found wherever it is in the process tree: an
orphan too.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from launch.config import REPO
from launch.network import Network

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.1
MARK = "ELASTIC_MOE_SERVER"
COMPLAINT = "elastic_moe: "


class ServerFailed(Exception):
    """A server does not come up, or not with all its ranks, or does not do what it is there for."""


def torchrun(ranks: int, *options: str) -> list[str]:
    """The command up to the script. Without options: one node, on a port that torchrun finds."""
    where = options or ("--standalone",)
    return [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(ranks)]


def several_nodes(nodes: int, ranks_per_node: int, address: str = "127.0.0.1") -> list[list[str]]:
    """The commands of a launch over several nodes, whose first is at `address`; by default all are on this host."""
    where = ("--nnodes", str(nodes), "--master-addr", address, "--master-port", str(free_port()))
    return [torchrun(ranks_per_node, *where, "--node-rank", str(node)) for node in range(nodes)]


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Node:
    """One command that runs launch/serve.py, with all processes that come of it."""

    def __init__(self, launcher: Sequence[str], *overrides: str, said: Path) -> None:
        """Start it, without waiting.

        Args:
            launcher: what comes before launch/serve.py: `torchrun(4)`, or the interpreter alone.
            overrides: what comes after it.
            said: standard output goes to this file with the suffix .out, standard error with .err.
        """
        self._out, self._err = said.with_suffix(".out"), said.with_suffix(".err")
        self._mark = uuid.uuid4().hex
        self._url = ""
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*launcher, "launch/serve.py", *overrides],
                cwd=REPO,
                env={"OMP_NUM_THREADS": "1", **os.environ, MARK: self._mark},
                stdout=out,
                stderr=err,
                start_new_session=True,  # a Ctrl-C here is not one there
            )

    @property
    def out(self) -> str:
        """Its standard output so far."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """Its standard error so far."""
        return self._err.read_text()

    def log(self) -> str:
        """Both, for people."""
        return f"--- stdout of {self.process.args}:\n{self.out}\n--- stderr:\n{self.err}"

    def complaints(self) -> list[str]:
        """The lines by which it refuses a user's mistake."""
        return [line for line in self.err.splitlines() if line.startswith(COMPLAINT)]

    def processes(self) -> list[psutil.Process]:
        """All its processes that are alive, wherever they are in the process tree; the command is the first."""
        own = [process for process in psutil.process_iter() if _environment(process).get(MARK) == self._mark]
        return sorted(own, key=lambda process: process.pid != self.process.pid)

    def wait_for_url(self, within_s: float) -> str:
        """Its address, once /health says that it serves; ServerFailed when the command ends before that, or it takes
        longer."""
        deadline = time.monotonic() + within_s
        while not (self._url or self._look_for_url()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                why = next(iter(self.complaints()), f"exit code {self.process.returncode}, see {self._err}")
                raise ServerFailed(f"the server did not come up: {why.removeprefix(COMPLAINT)}")
            time.sleep(POLL_S)
        return self._url

    def _look_for_url(self) -> str:
        for line in self.out.splitlines(keepends=True):
            if " at http" in line and line.endswith("\n") and _is_healthy(url := line.rsplit(" at ", 1)[1].strip()):
                self._url = url
        return self._url

    def ends(self, within_s: float) -> bool:
        """Whether the command ends in time."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, within_s))
            return True
        return False

    def kill(self) -> None:
        """End all its processes, at once."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


class OwnServer:
    """A server on this machine, of one node or several. A context manager: leaving it ends all processes in any
    case."""

    def __init__(
        self, ranks: int, nodes: int, overrides: Sequence[str], model: str = "", network: Network | None = None
    ) -> None:
        """Start it, without waiting.

        Args:
            ranks: of all nodes.
            nodes: how many commands.
            overrides: what launch/serve.py is told.
            model: a checkpoint folder of which the last node gets a copy of its own, as on a disk that can go bad
                alone; empty: all nodes read the same.
            network: each node is a host of it; None: all are this host.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="serve-"))
        """What the server says is here."""
        self.disk = self.folder / "model" if model else None
        """The last node's copy."""
        if self.disk is not None:
            shutil.copytree(model, self.disk)
        launchers = [torchrun(ranks)]
        if nodes > 1:
            launchers = several_nodes(nodes, ranks // nodes, network.address(0) if network else "127.0.0.1")
        self.nodes = []
        for number, launcher in enumerate(launchers):
            own = [f"model.path={self.disk}"] if self.disk is not None and number == nodes - 1 else []
            if network is not None:
                launcher = [*network.command(number), *launcher]
                own.append(f"server.host={network.address(number)}")
            self.nodes.append(Node(launcher, *overrides, *own, said=self.folder / f"node{number}"))

    def __enter__(self) -> "OwnServer":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The address of the first node, once it serves; ServerFailed when it does not in time."""
        return self.nodes[0].wait_for_url(START_TIMEOUT_S)

    def stop(self) -> bool:
        """End it as a user does, by SIGINT; kill what has not ended in time. Whether all commands ended by
        themselves."""
        for node in self.nodes:
            if node.process.poll() is None:
                node.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        ended = [node.ends(deadline - time.monotonic()) for node in self.nodes]
        for node in self.nodes:
            node.kill()
        return all(ended)

    def forget_output(self) -> None:
        """Remove the files with what the server said."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Target:
    """A server by its address. Errors of the connection are httpx.HTTPError."""

    def __init__(self, url: str) -> None:
        """`url` as the server prints it."""
        self.url = url.rstrip("/")
        self._client = httpx.AsyncClient(base_url=self.url, timeout=5.0)

    async def __aenter__(self) -> "Target":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._client.aclose()

    async def model(self) -> str:
        """The name of the model it serves."""
        return (await self._get("/v1/models"))["data"][0]["id"]

    async def status(self) -> dict[str, Any]:
        """/elastic/status."""
        return await self._get("/elastic/status")

    async def complete(self, prompt: list[int]) -> int:
        """The HTTP status of the answer to a prompt of tokens."""
        body = {"model": await self.model(), "prompt": prompt, "max_tokens": 8}
        return (await self._client.post("/v1/completions", json=body, timeout=120.0)).status_code

    async def events(self) -> list[dict[str, Any]]:
        """/elastic/events: per rank and recovery `rank` and `report`."""
        return await self._get("/elastic/events")

    async def loads(self) -> dict[str, Any]:
        """/elastic/loads."""
        return await self._get("/elastic/loads")

    async def until_all_serve(self, num_ranks: int) -> None:
        """Wait until so many ranks serve; ServerFailed when they do not in time."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            status = await self.status()
            if status["phase"] == "serving" and len(status["members"]) == num_ranks:
                return
            if time.monotonic() > deadline:
                raise ServerFailed(f"not all ranks serve at {self.url} after {START_TIMEOUT_S:.0f} s")
            await asyncio.sleep(POLL_S)

    async def _get(self, path: str) -> Any:
        return (await self._client.get(path)).raise_for_status().json()


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
