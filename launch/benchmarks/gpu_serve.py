"""bench=gpu_serve: tokens per second of a whole server on GPUs, by ranks, ways of exchange and streams.

The model is Qwen3-MoE with random weights (`bench.shape`). Ranks get a GPU each where there are as many, and are then
measured over NCCL too; else they share: then the figures show what sharing costs, not what more GPUs bring. One rank
exchanges nothing. Texts are compared with those of one rank without graphs (`tokens_equal`): in bfloat16 other batches
round otherwise. The limit beside each figure is that of each GPU reading the weights of its part of a step once.
"""

import asyncio
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from launch.benchmarks.config import BenchConfig
from launch.faults.load import PROMPTS, Answer, Ask, Load, gaps_s
from launch.faults.server import OwnServer, Target
from launch.gpus import gpus_for, ways
from launch.random_model import SHAPES, bytes_per_step, make_random_model

MEMORY_BYTES_PER_S = {"H100": 3.35e12, "H200": 4.3e12}
"""Datasheet of the H100, measured on the H200 (docs/performance.md)."""
WARM_UP_TOKENS = 8


def run(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One result for each number of ranks, kind of forward and number of streams.

    Raises:
        ValueError: there is no GPU, or a server failed.
    """
    gpus, machine = gpus_for(config.name)
    with tempfile.TemporaryDirectory(prefix="gpu-model-") as folder:
        make_random_model(Path(folder), config.seed, SHAPES[config.shape])
        wanted: dict[int, list[str]] = {}
        for ranks in config.rank_counts():
            for kind, graphs in ways(ranks, gpus):
                for row in asyncio.run(_measure(folder, ranks, kind, graphs, config, wanted)):
                    row["limit_itl_ms"] = _limit_ms(machine, config, row["streams"], min(ranks, gpus))
                    yield {"machine": machine, "ranks": ranks, "exchange": kind, "cuda_graphs": graphs, **row}


async def _measure(
    folder: str, ranks: int, kind: str, graphs: bool, config: BenchConfig, wanted: dict[int, list[str]]
) -> Sequence[dict[str, Any]]:
    overrides = [
        "model=hf",
        f"model.path={folder}",
        "model.name=random",
        f"model.dtype={config.dtype}",
        "model.device=cuda",
        "server.port=0",
        "log_level=warning",
        "serving.max_requests=256",
        f"serving.cuda_graphs={str(graphs).lower()}",
        f"exchange.kind={kind}",
        "elastic.hang_timeout_s=60",
    ]
    with OwnServer(ranks, 1, overrides) as server:
        try:
            target = Target(await server.url())
            await target.until_all_serve(ranks)
            rows = [await _stream(target, streams, config, wanted) for streams in config.stream_counts()]
            await target.close()
        except (RuntimeError, httpx.HTTPError) as error:
            raise ValueError(f"{error or type(error).__name__} (what the server said: {server.folder})") from error
        server.forget_output()
    return rows


async def _stream(target: Target, streams: int, config: BenchConfig, wanted: dict[int, list[str]]) -> dict[str, Any]:
    """The second of two equal runs: in the first, graphs are captured."""
    asks = [Ask(PROMPTS[i % len(PROMPTS)], config.tokens, temperature=0.0, seed=0) for i in range(streams)]
    model = await target.model()
    await Load(target.url, model, asks).run()
    load = Load(target.url, model, asks)
    begin = time.monotonic()
    await load.run()
    seconds = time.monotonic() - begin
    texts = [answer.text for answer in load.answers]
    same = sum(text == other for text, other in zip(texts, wanted.setdefault(streams, texts), strict=True))
    gaps = sorted(gaps_s(load.answers))
    return {
        "streams": streams,
        "tokens_per_s": _num_tokens(load.answers) / seconds,
        "itl_ms": {"p50": gaps[len(gaps) // 2] * 1e3, "p99": gaps[int(len(gaps) * 0.99)] * 1e3},
        "tokens_equal": same == len(texts),
        "texts_equal": f"{same}/{len(texts)}",
    }


def _limit_ms(machine: str, config: BenchConfig, streams: int, num_gpus: int) -> float | None:
    rate = next((rate for name, rate in MEMORY_BYTES_PER_S.items() if name in machine), None)
    return bytes_per_step(SHAPES[config.shape], streams, num_gpus) / rate * 1e3 if rate else None


def _num_tokens(answers: Sequence[Answer]) -> int:
    return sum(answer.num_tokens for answer in answers)
