"""The server that launch/chaos.py drives: its own, or one that runs already."""

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

REPO = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.1


class Target:
    """A server by its address. Errors of the connection are httpx.HTTPError."""

    def __init__(self, url: str) -> None:
        """`url` as the server prints it."""
        self.url = url.rstrip("/")
        self._client = httpx.AsyncClient(base_url=self.url, timeout=5.0)

    async def model(self) -> str:
        """The name of the model it serves."""
        return (await self._get("/v1/models"))["data"][0]["id"]

    async def status(self) -> dict[str, Any]:
        """/elastic/status."""
        return await self._get("/elastic/status")

    async def events(self) -> list[dict[str, Any]]:
        """/elastic/events: per rank and recovery `rank` and `report`."""
        return await self._get("/elastic/events")

    async def loads(self) -> dict[str, Any]:
        """/elastic/loads."""
        return await self._get("/elastic/loads")

    async def until_all_serve(self, num_ranks: int) -> None:
        """Wait until so many ranks serve; RuntimeError when they do not in time."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            status = await self.status()
            if status["phase"] == "serving" and len(status["members"]) == num_ranks:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"not all ranks serve at {self.url} after {START_TIMEOUT_S:.0f} s")
            await asyncio.sleep(POLL_S)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _get(self, path: str) -> Any:
        return (await self._client.get(path)).raise_for_status().json()


class OwnServer:
    """One torchrun command for each node. A context manager: leaving it ends all processes, whatever happened."""

    def __init__(self, ranks: int, nodes: int, overrides: Sequence[str], model: str = "") -> None:
        """Start it, without waiting. `model` is a checkpoint folder of which the last node gets a copy of its own, as
        on a disk that can go bad alone; empty: all nodes read the same."""
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.disk = self.folder / "model" if model else None
        """The last node's copy."""
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        per_node = ["--nproc-per-node", str(ranks // nodes), "launch/serve.py", *overrides]
        if nodes == 1:
            self._commands = [[*torchrun, "--standalone", *per_node]]
        else:
            port = str(_free_port())
            where = ["--nnodes", str(nodes), "--master-addr", "127.0.0.1", "--master-port", port]
            self._commands = [[*torchrun, *where, "--node-rank", str(node), *per_node] for node in range(nodes)]
        if self.disk is not None:
            shutil.copytree(model, self.disk)
            self._commands[-1].append(f"model.path={self.disk}")
        self._nodes = [self._start(node) for node in range(nodes)]

    def __enter__(self) -> "OwnServer":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    async def url(self) -> str:
        """The address of the first node, once it says so; RuntimeError when it ends or takes too long."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._nodes[0].poll() is None and time.monotonic() < deadline:
            for line in (self.folder / "node0.out").read_text().splitlines(keepends=True):
                if " at http" in line and line.endswith("\n"):
                    return line.rsplit(" at ", 1)[1].strip()
            await asyncio.sleep(0.1)
        said = (self.folder / "node0.err").read_text().splitlines()
        why = next((line for line in said if line.startswith("elastic_moe: ")), f"see {self.folder}")
        raise RuntimeError(f"the server did not come up: {why.removeprefix('elastic_moe: ')}")

    def processes(self, node: int) -> list[psutil.Process]:
        """The process tree of a node, its torchrun first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._nodes[node].pid)
            return [root, *root.children(recursive=True)]
        return []

    def stop(self) -> None:
        """End it as a user does, by SIGINT; kill what has not ended in time."""
        trees = [process for node in range(len(self._nodes)) for process in self.processes(node)]
        for node in self._nodes:
            if node.poll() is None:
                node.send_signal(signal.SIGINT)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for node in self._nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(max(0.0, deadline - time.monotonic()))
        for process in trees:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for node in self._nodes:
            node.wait()

    def forget_output(self) -> None:
        """Remove the files with what the server said."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, node: int) -> subprocess.Popen[bytes]:
        out, err = self.folder / f"node{node}.out", self.folder / f"node{node}.err"
        with out.open("ab") as stdout, err.open("ab") as stderr:
            return subprocess.Popen(
                self._commands[node],
                cwd=REPO,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,  # a Ctrl-C here is not one there: `stop` is
            )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]
