"""Ranks of a launch, each a process, and how every one of them ends.

The processes are forked from a server that has torch and transformers loaded (seconds saved for each). What they say
goes to a file each, results come back by file. A rank that ends another way than declared fails the test, whichever
rank it is; whoever still runs at the one deadline dumps its stacks and is killed.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from elastic_moe.membership.launch import Launch

PRELOAD = (
    "support.ranks",
    "elastic_moe.integrations.transformers",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
)
"""What the fork server has loaded."""
LOG_TAIL = 5000
"""Characters of a rank's log in the message of a failure."""


class Ranks:
    """The processes of one launch. A context manager: leaving it ends them, and a failure tells what they said."""

    def __init__(
        self, folder: Path, world_size: int, ranks_per_node: int | None = None, preload: Sequence[str] = ()
    ) -> None:
        """Nothing runs yet. `preload` is what the fork server loads besides, if it does not run already."""
        self._folder, self._world_size = folder, world_size
        self._per_node = ranks_per_node or world_size
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOAD, *preload])
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._running: dict[int, BaseProcess] = {}

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        if error is not None:
            error.add_note(self.logs())

    def launch(self, rank: int) -> Launch:
        """What torchrun would tell it."""
        local, node = rank % self._per_node, rank // self._per_node
        return Launch(rank, self._world_size, local, self._per_node, node, f"127.0.0.1:{self._store.port}")

    def start(self, rank: int, function: Callable[..., object], *args: Any) -> None:
        """`function(*args)` in a process of its own, that exits with 0 after it."""
        process = self._context.Process(target=_run, args=(str(self._log(rank)), function, args), daemon=True)
        process.start()
        self._running[rank] = process

    def wait(self, timeout_s: float) -> dict[int, int]:
        """The exit codes of those that ended, by rank, once there is one; none when nobody ends in time."""
        by_sentinel = {process.sentinel: rank for rank, process in self._running.items()}
        codes = {}
        for sentinel in wait(list(by_sentinel), max(0.0, timeout_s)):
            process = self._running.pop(rank := by_sentinel[sentinel])  # pyright: ignore[reportArgumentType]
            process.join()
            codes[rank] = process.exitcode
        return codes

    def kill(self) -> dict[int, int]:
        """End whoever still runs, its stacks in its log. Their exit codes: -9, unless they ended by themselves."""
        for process in self._running.values():
            os.kill(process.pid or 0, signal.SIGUSR1)
        for process in self._running.values():
            process.join(1.0)
            process.kill()
            process.join()
        codes = {rank: process.exitcode or 0 for rank, process in self._running.items()}
        self._running.clear()
        return codes

    def logs(self) -> str:
        """The end of what each rank has said."""
        paths = [path for rank in range(self._world_size) if (path := self._log(rank)).exists()]
        return "\n".join(f"--- {path.name}:\n{path.read_text()[-LOG_TAIL:]}" for path in paths)

    def _log(self, rank: int) -> Path:
        return self._folder / f"log-{rank}"


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    deadline_s: float = 60.0,
    ends: Mapping[int, int] | None = None,
    ranks_per_node: int | None = None,
) -> list[Any]:
    """`function(launch, *args)` on ranks 0..world_size-1; returns what each returned (None if it did not).

    `function` is a module-level function of a test module. `ends` gives the exit code of each rank that is not to
    exit with 0 (negative: killed by that signal).
    """
    deadline = time.monotonic() + deadline_s
    wanted = {rank: (ends or {}).get(rank, 0) for rank in range(world_size)}
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        results = [Path(name, f"result-{rank}") for rank in range(world_size)]
        with Ranks(Path(name), world_size, ranks_per_node) as ranks:
            for rank, result in enumerate(results):
                ranks.start(rank, _return, result, function, ranks.launch(rank), args)
            codes: dict[int, int] = {}
            while len(codes) < world_size and time.monotonic() < deadline:
                codes |= ranks.wait(deadline - time.monotonic())
            codes |= ranks.kill()
            assert codes == wanted, f"ranks ended with {codes}, wanted {wanted}"
        return [torch.load(result, weights_only=False) if result.exists() else None for result in results]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Whole or not at all."""
    write(part := path.with_name(f"part-{path.name}"))
    part.rename(path)


def _return(result: Path, function: Callable[..., Any], launch: Launch, args: tuple[Any, ...]) -> None:
    returned = function(launch, *args)
    write_whole(result, lambda part: torch.save(returned, part))


def _run(log: str, function: Callable[..., object], args: tuple[Any, ...]) -> None:
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    torch.set_num_threads(1)
    function(*args)
    os._exit(0)
