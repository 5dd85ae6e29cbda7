"""bench=rejoin: how soon a killed rank serves again, with a spare process (`elastic.spare_process`) and without.

`serves_s`: from SIGKILL until all ranks serve, in the new epoch. `weights`: of the newcomers, who take them from the
members: on GPUs of one host out of their memory. Nothing streams meanwhile; what streams feel is for launch/chaos.py.
"""

import asyncio
import os
import re
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx

from launch.benchmarks.config import BenchConfig
from launch.gpus import gpus_for
from launch.random_model import SHAPES, random_model
from launch.server import POLL_S, START_TIMEOUT_S, OwnServer, ServerFailed, Target

SAID = re.compile(r"weights: ([0-9.]+) GB in ([0-9.]+) s.*from memory of others")
SETTLE_S = 20.0
"""Before each kill: the spare process has imported everything."""


def run(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One result without spare processes and one with them.

    Raises:
        ValueError: there is no GPU, or a server failed.
    """
    machine = gpus_for(config.name)[1] if config.device == "cuda" else f"{os.cpu_count()} CPU cores"
    with ExitStack() as stack:
        model = ["model=demo"]
        if config.device == "cuda":
            found = stack.enter_context(random_model(config.seed, SHAPES[config.shape]))
            model = [*found, f"model.dtype={config.dtype}", "exchange.kind=symmetric"]
        for spare in ("off", "on"):
            overrides = [
                *model,
                f"model.device={config.device}",
                f"elastic.redundant_slots={config.redundant_slots}",
                f"elastic.spare_process={spare}",
                "elastic.max_quick_deaths=1000",
                "server.port=0",
            ]
            try:
                yield {"machine": machine, "ranks": config.ranks, "spare_process": spare, **_measure(config, overrides)}
            except (ServerFailed, httpx.HTTPError) as error:
                raise ValueError(f"{error or type(error).__name__}") from error


def _measure(config: BenchConfig, overrides: list[str]) -> dict[str, Any]:
    with OwnServer(config.ranks, 1, overrides) as server:
        seconds = asyncio.run(_kill_all(config, server.url))
        of_newcomers = SAID.findall(server.nodes[0].err)[config.ranks :]
        server.forget_output()
    weights = sorted((float(took), float(gb)) for gb, took in of_newcomers)
    took, gb = weights[len(weights) // 2]
    return {
        "serves_s": {"median": round(statistics.median(seconds), 2), "longest": round(max(seconds), 2)},
        "weights": {"gb": gb, "s": took, "gb_per_s": round(gb / took, 2)},
    }


async def _kill_all(config: BenchConfig, url: str) -> list[float]:
    """One rank after the other, `repeats` times; seconds until all serve again."""
    seconds = []
    async with Target(url) as target:
        await target.until_all_serve(config.ranks)
        for number in range(config.repeats):
            await asyncio.sleep(SETTLE_S)
            before = await target.status()
            pids = {member["rank"]: member["pid"] for member in before["members"]}
            begin = time.monotonic()
            os.kill(pids[number % config.ranks], signal.SIGKILL)
            await _until_back(target, pids[number % config.ranks], config.ranks)
            seconds.append(time.monotonic() - begin)
    return seconds


async def _until_back(target: Target, killed: int, ranks: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        status = await target.status()
        pids = [member["pid"] for member in status["members"]]
        if status["phase"] == "serving" and len(pids) == ranks and killed not in pids:
            return
        await asyncio.sleep(POLL_S)
    raise ServerFailed(f"a killed rank was not back after {START_TIMEOUT_S:.0f} s")
