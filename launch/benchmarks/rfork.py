"""bench=rfork: how soon an instance serves whose weights come from one that runs, and what the running one feels of it.

The fork has no weights on disk. `serves_s`: from its start until all its ranks serve, imports and all; `weights`: of
its slowest rank, greeting and verifying included. The seed streams all the time: `seed_itl_ms` are the gaps between
its tokens while no fork starts, `seed_forking_itl_ms` those while one does, in turn. `device=cpu` runs the demo model,
and both instances share the cores: the seed feels the fork's imports more than its reading.
"""

import asyncio
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from launch.benchmarks.config import BenchConfig
from launch.config import REPO
from launch.figures import percentile
from launch.fork import without_weights
from launch.gpus import gpus_for
from launch.random_model import SHAPES, random_model
from launch.server import OwnServer, ServerFailed, Target
from launch.streams import PROMPTS, Load, gaps_s, greedy_asks

SAID = re.compile(r"weights: ([0-9.]+) GB in ([0-9.]+) s")
CALM_S = 5.0
"""How long the seed is watched before each fork."""


def run(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One result for each number of ranks in `rank_list` that is forked from `ranks`.

    Raises:
        ValueError: there is no GPU, or a server failed.
    """
    machine = gpus_for(config.name)[1] if config.device == "cuda" else "CPU"
    with ExitStack() as stack:
        model = ["model=demo"]
        if config.device == "cuda":
            model = stack.enter_context(random_model(config.seed, SHAPES[config.shape]))
        source = next(
            (Path(one.split("=")[1]) for one in model if one.startswith("model.path=")),
            REPO / "examples" / "demo_model",
        )
        bare = stack.enter_context(without_weights(source))
        try:
            for found in asyncio.run(_measure(config, model, bare)):
                yield {"machine": machine, "ranks": config.ranks, **found}
        except (ServerFailed, httpx.HTTPError) as error:
            raise ValueError(f"{error or type(error).__name__}") from error


async def _measure(config: BenchConfig, model: list[str], bare: Path) -> list[dict[str, Any]]:
    overrides = [
        *model,
        f"model.device={config.device}",
        *([f"model.dtype={config.dtype}"] if config.device == "cuda" else []),
        "server.port=0",
        "elastic.hang_timeout_s=60",
    ]
    with OwnServer(config.ranks, 1, overrides) as seed:
        async with Target(seed.url) as target:
            await target.until_all_serve(config.ranks)
            await _gaps(target, config, CALM_S)
            own = [*overrides, f"model.path={bare}", f"model.load_from={seed.url}"]
            rows = [await _fork(config, target, own, ranks) for ranks in config.numbers("rank_list")]
        seed.forget_output()
    return rows


async def _fork(config: BenchConfig, seed: Target, overrides: list[str], ranks: int) -> dict[str, Any]:
    serves_s, weights, calm, forking = [], [], [], []
    for _ in range(config.repeats):
        calm += await _gaps(seed, config, CALM_S)
        begin = time.monotonic()
        with OwnServer(ranks, 1, overrides) as fork:
            ready = asyncio.create_task(_ready(fork, ranks))
            while not ready.done():
                forking += await _gaps(seed, config, 1.0)
            serves_s.append(await ready - begin)
            weights.append(max(_said(fork), key=lambda said: said["s"]))
        fork.forget_output()
    return {
        "forked_ranks": ranks,
        "serves_s": round(statistics.median(serves_s), 2),
        "weights": sorted(weights, key=lambda said: said["gb_per_s"])[len(weights) // 2],
        "seed_itl_ms": {"p50": percentile(calm, 50), "p99": percentile(calm, 99)},
        "seed_forking_itl_ms": {"p50": percentile(forking, 50), "p99": percentile(forking, 99)},
    }


async def _ready(server: OwnServer, ranks: int) -> float:
    """When all of it serves."""
    url = await asyncio.to_thread(lambda: server.url)
    async with Target(url) as target:
        await target.until_all_serve(ranks)
    return time.monotonic()


async def _gaps(target: Target, config: BenchConfig, seconds: float) -> list[float]:
    """Milliseconds between tokens of streams that are asked for again and again for so long."""
    found, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        load = Load(target.url, await target.model(), greedy_asks(PROMPTS, config.streams, config.tokens))
        await load.run()
        found += [gap * 1e3 for gap in gaps_s(load.answers)]
    return found


def _said(server: OwnServer) -> list[dict[str, float]]:
    """What each rank said of its weights."""
    found = [(float(gb), float(seconds)) for gb, seconds in SAID.findall(server.nodes[0].err)]
    if not found:
        raise ServerFailed(f"no rank said how its weights came, see {server.folder}")
    return [{"gb": gb, "s": seconds, "gb_per_s": round(gb / seconds, 2)} for gb, seconds in found]
