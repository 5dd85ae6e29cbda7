"""bench=gpu_serve: tokens per second of a whole server on GPUs, by ranks, ways of exchange and streams.

The model is Qwen3-MoE with random weights (`bench.shape`). Ranks get a GPU each where there are as many, and are then
measured over NCCL too; else they share: then the figures show what sharing costs, not what more GPUs bring. One rank
exchanges nothing. Texts are compared with those of one rank without graphs (`tokens_equal`): in bfloat16 other batches
round otherwise. The limit beside each figure is that of each GPU reading the weights of its part of a step once.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.pool import Pool
from typing import Any

import httpx

from launch.benchmarks.config import BenchConfig
from launch.figures import percentile
from launch.gpus import gpus_for, rates_of, ways
from launch.random_model import SHAPES, bytes_per_step, random_model
from launch.server import OwnServer, ServerFailed, Target
from launch.streams import PROMPTS, Answer, Ask, Load, gaps_s, greedy_asks

OF_ONE_CLIENT = 32
"""Streams that one process reads: it takes about 150 us for a token, and would measure itself with more."""


def run(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One result for each number of ranks, kind of forward and number of streams.

    Raises:
        ValueError: there is no GPU, or a server failed.
    """
    gpus, machine = gpus_for(config.name)
    with random_model(config.seed, SHAPES[config.shape]) as model:
        wanted: dict[int, list[str]] = {}
        for ranks in config.numbers("rank_list"):
            for kind, graphs in ways(ranks, gpus):
                for row in _measure(model, ranks, kind, graphs, config, wanted):
                    row["limit_itl_ms"] = _limit_ms(machine, config, row["streams"], min(ranks, gpus))
                    yield {"machine": machine, "ranks": ranks, "exchange": kind, "cuda_graphs": graphs, **row}


def _measure(
    model: list[str], ranks: int, kind: str, graphs: bool, config: BenchConfig, wanted: dict[int, list[str]]
) -> Sequence[dict[str, Any]]:
    overrides = [
        *model,
        f"model.dtype={config.dtype}",
        "model.device=cuda",
        "server.port=0",
        "log_level=warning",
        "serving.max_requests=256",
        f"serving.cuda_graphs={str(graphs).lower()}",
        f"exchange.kind={kind}",
        f"serving.attention={config.attention}",
        "serving.kv_cache_tokens=262144",
        "elastic.hang_timeout_s=60",
    ]
    with OwnServer(ranks, 1, overrides) as server:
        try:
            rows = asyncio.run(_stream_all(server.url, ranks, config, wanted))
        except (ServerFailed, httpx.HTTPError) as error:
            raise ValueError(f"{error or type(error).__name__} (what the server said: {server.folder})") from error
        server.forget_output()
    return rows


async def _stream_all(
    url: str, ranks: int, config: BenchConfig, wanted: dict[int, list[str]]
) -> Sequence[dict[str, Any]]:
    async with Target(url) as target:
        await target.until_all_serve(ranks)
        return [await _stream(target, streams, config, wanted) for streams in config.numbers("stream_list")]


async def _stream(target: Target, streams: int, config: BenchConfig, wanted: dict[int, list[str]]) -> dict[str, Any]:
    """The second of two equal runs: in the first, graphs are captured."""
    asks = greedy_asks(PROMPTS, streams, config.tokens, config.words)
    model = await target.model()
    with get_context("spawn").Pool(-(-streams // OF_ONE_CLIENT)) as clients:
        await _answers(clients, target.url, model, asks)
        begin = time.monotonic()
        answers = await _answers(clients, target.url, model, asks)
        seconds = time.monotonic() - begin
    texts = [answer.text for answer in answers]
    same = sum(text == other for text, other in zip(texts, wanted.setdefault(streams, texts), strict=True))
    gaps_ms = [gap * 1e3 for gap in gaps_s(answers)]
    return {
        "streams": streams,
        "tokens_per_s": sum(answer.num_tokens for answer in answers) / seconds,
        "itl_ms": {"p50": percentile(gaps_ms, 50), "p99": percentile(gaps_ms, 99)},
        "tokens_equal": same == len(texts),
        "texts_equal": f"{same}/{len(texts)}",
    }


async def _answers(clients: Pool, url: str, model: str, asks: Sequence[Ask]) -> list[Answer]:
    shares = [(url, model, asks[begin : begin + OF_ONE_CLIENT]) for begin in range(0, len(asks), OF_ONE_CLIENT)]
    found = await asyncio.to_thread(clients.starmap, _share, shares, 1)
    return [answer for share in found for answer in share]


def _share(url: str, model: str, asks: Sequence[Ask]) -> list[Answer]:
    load = Load(url, model, asks)
    asyncio.run(load.run())
    return load.answers


def _limit_ms(machine: str, config: BenchConfig, streams: int, num_gpus: int) -> float | None:
    rates = rates_of(machine)
    return bytes_per_step(SHAPES[config.shape], streams, num_gpus) / rates.memory_bytes_per_s * 1e3 if rates else None
