"""bench=gpu_recovery: ranks on GPUs are killed while they stream, with CUDA graphs and without.

Gaps, phases of the recovery, and restored bytes. It is launch/chaos.py on a server whose ranks have a GPU each, or
share what there is, over symmetric memory: every text is compared with an undisturbed run. A lost expert is read from
disk where it has no live copy.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from launch.bench_config import BenchConfig
from launch.chaos import Chaos
from launch.chaos_config import ChaosRunConfig, server_overrides
from launch.chaos_server import OwnServer
from launch.config import load

KINDS = "calm,kill,kill_two,kill_in_recovery"


def run(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One result without CUDA graphs, one with.

    Raises:
        ValueError: there is no GPU, or the server failed.
    """
    import torch

    if not torch.cuda.is_available():
        raise ValueError("bench=gpu_recovery needs a GPU")
    machine = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    for graphs in (False, True):
        overrides = [
            "model=demo",
            "model.device=cuda",
            f"model.dtype={config.dtype}",
            "exchange.kind=symmetric",
            f"serving.cuda_graphs={str(graphs).lower()}",
            f"eplb.mode={config.eplb_mode}",
            f"elastic.redundant_slots={config.redundant_slots}",
            "elastic.hang_timeout_s=20",
            f"chaos.seed={config.seed}",
            f"chaos.faults={config.repeats}",
            f"chaos.kinds={KINDS}",
            f"chaos.ranks={config.ranks}",
            f"chaos.requests={config.streams}",
        ]
        chaos = load(ChaosRunConfig, "chaos", overrides)
        with OwnServer(config.ranks, 1, server_overrides(chaos, overrides)) as server:
            try:
                found = asyncio.run(Chaos(chaos.chaos, server, Console(stderr=True)).run())
            except RuntimeError as error:
                raise ValueError(f"{error} (what the server said: {server.folder})") from error
        repair_s = found["phase_ms"]["repair"]["p50"] / 1e3
        restored = sum(found["bytes_by_source"].values()) / max(1, found["faults"]["counted"])
        yield {
            "machine": machine,
            "cuda_graphs": graphs,
            "ranks": config.ranks,
            **found,
            "restored_gb_per_s": restored / repair_s / 1e9 if repair_s else None,
        }
