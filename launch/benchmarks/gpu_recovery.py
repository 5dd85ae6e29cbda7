"""bench=gpu_recovery: ranks on GPUs are killed while they stream, over each way of exchange, with CUDA graphs or not.

Gaps, phases of the recovery, and restored bytes. It is launch/chaos.py on a server whose ranks have a GPU each (then
NCCL is measured too), or share what there is: every text is compared with an undisturbed run. A lost expert is read
from disk where it has no live copy.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
from rich.console import Console

from launch.benchmarks.config import BenchConfig
from launch.config import load
from launch.faults.config import ChaosRunConfig, server_overrides
from launch.faults.driver import break_server
from launch.faults.kinds import schedule
from launch.gpus import gpus_for, ways
from launch.random_model import SHAPES, random_model
from launch.server import OwnServer, ServerFailed

KINDS = "calm,kill,kill_two,kill_in_recovery"
FOR_TWO_RANKS = "calm,kill"


def run(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One result for each kind of exchange and forward.

    Raises:
        ValueError: there is no GPU, or the server failed.
    """
    gpus, machine = gpus_for(config.name)
    with ExitStack() as stack:
        model = ["model=demo"]
        if config.model == "random":
            model = stack.enter_context(random_model(config.seed, SHAPES[config.shape]))
        for kind, graphs in ways(config.ranks, gpus):
            found = _break_it(config, [*model, f"exchange.kind={kind}", f"serving.cuda_graphs={str(graphs).lower()}"])
            yield {"machine": machine, "ranks": config.ranks, "exchange": kind, "cuda_graphs": graphs, **found}


def _break_it(config: BenchConfig, chosen: list[str]) -> dict[str, Any]:
    overrides = [
        *chosen,
        "model.device=cuda",
        f"model.dtype={config.dtype}",
        f"eplb.mode={config.eplb_mode}",
        f"elastic.redundant_slots={config.redundant_slots}",
        "elastic.hang_timeout_s=20",
        f"chaos.seed={config.seed}",
        f"chaos.faults={config.repeats}",
        f"chaos.kinds={KINDS if config.ranks >= 3 else FOR_TWO_RANKS}",
        f"chaos.ranks={config.ranks}",
        f"chaos.requests={config.streams}",
    ]
    chaos = load(ChaosRunConfig, "chaos", overrides)
    with OwnServer(config.ranks, 1, server_overrides(chaos, overrides)) as server:
        try:
            found = break_server(chaos.chaos, server, Console(stderr=True))
        except (ServerFailed, httpx.HTTPError) as error:
            raise ValueError(f"{error or type(error).__name__} (what the server said: {server.folder})") from error
    faults = schedule(config.seed, config.repeats, chaos.chaos.kind_names(), [0] * config.ranks)
    restored = sum(found["bytes_by_source"].values()) / max(1, sum(fault.kind != "calm" for fault in faults))
    repair_s = found["phase_ms"].get("repair", {"p50": 0.0})["p50"] / 1e3
    return found | {"restored_gb_per_s": restored / repair_s / 1e9 if restored and repair_s else None}
