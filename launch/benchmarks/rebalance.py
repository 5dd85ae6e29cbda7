"""bench=rebalance: what the load balancer costs those who stream, and how soon it follows a shift of the load.

One server for each `eplb.mode`, all up at once (on CPUs about 540 MiB a rank), one at a time under load: `streams`
greedy streams about the King James Bible, and when they are complete as many about Python and Debian. Rounds alternate
over the modes, each beginning with another one; the first requests, short ones, are not counted. Progress goes to
standard error. `windows.py` says what the figures are.
"""

import asyncio
import os
import sys
import time
import timeit
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from elastic_moe.placement.balancedness import balancedness
from launch.benchmarks.config import BenchConfig
from launch.benchmarks.windows import MODES, Window, summary
from launch.random_model import SHAPE, SHAPES, random_model
from launch.server import OwnServer, ServerFailed, Target
from launch.streams import PROMPTS, Ask, Load, greedy_asks

NUM_SCRIPTURE = 12
"""The first of PROMPTS are of scripture, the others of Python and Debian."""
WARM_UP_TOKENS = 4
ON_GPU = ("exchange.kind=symmetric", "eplb.link_gb_per_s=100", "eplb.mb_per_step=64", "elastic.hang_timeout_s=60")
"""Experts go from memory to memory of a GPU, or over NVLink."""


def run(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One result a mode, after all rounds."""
    count_us = count_us_per_layer(num_tokens=config.streams)
    with ExitStack() as stack, asyncio.Runner() as runner:
        overrides = _overrides(config, stack)
        servers: dict[str, OwnServer] = {}
        try:
            for mode in MODES:
                servers[mode] = stack.enter_context(OwnServer(config.ranks, 1, [*overrides, f"eplb.mode={mode}"]))
                runner.run(_until_it_serves(servers[mode].url, config.ranks))
            windows = runner.run(_measure_all({mode: server.url for mode, server in servers.items()}, config))
        except (ServerFailed, httpx.HTTPError) as error:
            folders = ", ".join(str(server.folder) for server in servers.values())
            raise ValueError(f"{error or type(error).__name__} (what the servers said: {folders})") from error
        for server in servers.values():
            server.forget_output()
    yield from summary(windows, config.threshold, count_us)


def _overrides(config: BenchConfig, stack: ExitStack) -> list[str]:
    """What the servers are told, but for the mode."""
    chosen = ["model=demo"]
    on_gpu = config.device == "cuda"
    if config.model == "random":
        chosen = stack.enter_context(random_model(config.seed, SHAPES[config.shape] if on_gpu else SHAPE))
    return [
        *chosen,
        f"model.device={config.device}",
        f"model.dtype={config.dtype}",
        *(ON_GPU if on_gpu else ()),
        "server.port=0",
        "log_level=warning",
        f"elastic.redundant_slots={config.redundant_slots}",
        f"eplb.interval_s={config.interval_s}",
        f"eplb.threshold={config.threshold}",
        f"eplb.half_life_steps={config.half_life_steps}",
    ]


async def _until_it_serves(url: str, num_ranks: int) -> None:
    async with Target(url) as target:
        await target.until_all_serve(num_ranks)


async def _measure_all(urls: Mapping[str, str], config: BenchConfig) -> dict[str, list[Window]]:
    scripture, manuals = PROMPTS[:NUM_SCRIPTURE], PROMPTS[:NUM_SCRIPTURE:-1]
    domains = [greedy_asks(prompts, config.streams, config.tokens) for prompts in (scripture, manuals)]
    windows: dict[str, list[Window]] = {mode: [] for mode in MODES}
    async with AsyncExitStack() as stack:
        targets = {mode: await stack.enter_async_context(Target(url)) for mode, url in urls.items()}
        for target in targets.values():
            for prompts in (scripture, manuals):
                await _stream(target, greedy_asks(prompts, config.streams, WARM_UP_TOKENS))
        for number in range(config.repeats):
            first = number % len(MODES)
            for mode in MODES[first:] + MODES[:first]:
                windows[mode].append(await _measure(targets[mode], domains))
                _tell(number, mode, windows[mode][-1])
    return windows


async def _measure(target: Target, domains: Sequence[Sequence[Ask]]) -> Window:
    """One round. The loads are read at the beginning and the shift too, for a server that does not balance would not
    forget what was before."""
    await target.loads()
    began_at = time.time()
    first = await _stream(target, domains[0])
    await target.loads()
    shifted_at = time.time()
    second = await _stream(target, domains[1])
    ended_at = time.time()
    loads, status = await target.loads(), await target.status()
    reports = [event["report"] for event in await target.events()]
    moved = [
        report
        for report in reports
        if report["type"] == "rebalance" and report["num_moves"] and began_at < report["ended_at"] <= ended_at
    ]
    answers = (*first.answers, *second.answers)
    lag_s = max(first.lag_s, second.lag_s)
    max_mean = _max_mean(status, loads)
    return Window(began_at, shifted_at, ended_at, tuple(moved), max_mean, answers=answers, client_lag_s=lag_s)


async def _stream(target: Target, asks: Sequence[Ask]) -> Load:
    load = Load(target.url, await target.model(), asks)
    await load.run()
    for answer in load.answers:
        if not answer.finish:
            raise ServerFailed(f"a stream failed: {answer.error or 'cut off'}")
    return load


def _max_mean(status: Mapping[str, Any], loads: Mapping[str, Any]) -> float:
    """Of the placement and the loads that a server reports, averaged over the layers."""
    members = sorted(status["members"], key=lambda member: member["rank"])
    slots = np.concatenate([np.array(member["slots"]) for member in members], axis=1)
    even = balancedness(slots, np.array(loads["logical_count"]), slots.shape[1] // len(members))
    return float((1 / even).mean())


def _tell(number: int, mode: str, window: Window) -> None:
    busy = os.getloadavg()[0]
    print(
        f"round {number + 1} {mode}: {window.tokens_per_s:.1f} tokens/s, between two tokens {window.itl_ms()} ms, "
        f"{len(window.reports)} rebalances, max/mean {window.max_mean:.3f} at the end; load average {busy:.1f}, "
        f"this client was kept waiting for {window.client_lag_s * 1e3:.0f} ms at most",
        file=sys.stderr,
        flush=True,
    )


def count_us_per_layer(num_tokens: int, num_experts: int = 16, top_k: int = 4) -> float:
    """Microseconds for one layer's counting of a batch's choices, here and now: the best of many calls."""
    import torch

    from elastic_moe.placement.loads import LoadCounter

    torch.set_num_threads(1)
    counter = LoadCounter(1, num_experts, torch.device("cpu"))
    chosen = torch.randint(num_experts, (num_tokens, top_k), generator=torch.Generator().manual_seed(0))
    calls = 1000
    return min(timeit.repeat(lambda: counter.count(0, chosen), number=calls, repeat=20)) / calls * 1e6


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The longest wait between two tokens over the time of the last round, by mode; a line for each rebalance."""
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, axes = pyplot.subplots(len(rows), sharex=True, sharey=True, figsize=(11, 2.4 * len(rows)), layout="tight")
    for row, axis in zip(rows, axes, strict=True):
        for number, at in enumerate(row["moved_at_s"]):
            axis.axvline(at, color="tab:green", linewidth=0.8, label="" if number else "a rebalance ends")
        for at in row["shift_at_s"]:
            axis.axvline(at, color="tab:red", linestyle="--", label="the domain shifts")
        axis.plot(*zip(*row["timeline"], strict=True), color="tab:blue", label="longest wait")
        axis.set(ylabel="ms", title=f"eplb.mode={row['mode']}", yscale="log")
        axis.legend(loc="upper right", fontsize="small")
    axes[-1].set(xlabel="seconds")
    figure.savefig(path)
    pyplot.close(figure)
