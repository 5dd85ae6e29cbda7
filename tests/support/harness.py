"""Run a function on several ranks, each a process, and check how every one of them ends.

The processes are forked from a server that has torch and transformers loaded (seconds saved for each). Results
come back by file; one deadline holds for all; whoever still runs then dumps its stacks and is killed. A rank that
ends another way than declared fails the test, whichever rank it is.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from elastic_moe.membership.launch import Launch

PRELOAD = [
    "support.harness",
    "elastic_moe.integrations.transformers",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
]


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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    per_node = ranks_per_node or world_size
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes = []
        for rank in range(world_size):
            launch = Launch(rank, world_size, rank % per_node, per_node, rank // per_node, f"127.0.0.1:{store.port}")
            process = context.Process(target=_child, args=(folder, function, launch, args), daemon=True)
            process.start()
            processes.append(process)
        codes = _wait_all(processes, deadline_s)
        wanted = [(ends or {}).get(rank, 0) for rank in range(world_size)]
        if codes != wanted:
            logs = "\n".join(
                f"--- rank {r}:\n{Path(folder, f'log-{r}').read_text()[-4000:]}" for r in range(world_size)
            )
            raise AssertionError(f"ranks ended with {codes}, wanted {wanted}\n{logs}")
        results = [Path(folder, f"result-{rank}") for rank in range(world_size)]
        return [torch.load(result, weights_only=False) if result.exists() else None for result in results]


def _wait_all(processes: list[BaseProcess], deadline_s: float) -> list[int | None]:
    deadline = time.monotonic() + deadline_s
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    stuck = [process for process in processes if process.exitcode is None]
    for process in stuck:
        os.kill(process.pid or 0, signal.SIGUSR1)
    for process in stuck:
        process.join(1.0)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _child(folder: str, function: Callable[..., Any], launch: Launch, args: tuple[Any, ...]) -> None:
    log = os.open(f"{folder}/log-{launch.rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    torch.set_num_threads(1)
    result = function(launch, *args)
    torch.save(result, f"{folder}/tmp-{launch.rank}")
    Path(folder, f"tmp-{launch.rank}").rename(Path(folder, f"result-{launch.rank}"))
    os._exit(0)
