"""bench=exchange: dispatch and combine of one MoE layer, through symmetric memory and through collectives.

Every combination of `rank_list`, `hidden_list` and `token_list` is measured. With a GPU for every rank each rank is a
process, NCCL the collective, and the limit is the bytes that leave a rank over the rate of its link. On fewer GPUs the
ranks of the symmetric exchange are streams of one process on one GPU (processes would take turns of milliseconds), the
collective is gloo through host memory between processes, and the limit is the bytes all ranks together move through the
memory they share.

Nothing is computed in between: `combine` returns the rows as they came.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # ranks that are streams must never wait for each other's

import torch

from launch.benchmarks.config import BenchConfig
from launch.benchmarks.lanes import Shape, in_one_process, in_processes
from launch.gpus import Rates, gpus_for, rates_of


def run(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One result for each combination; times in microseconds.

    Raises:
        ValueError: there is no GPU.
    """
    gpus = gpus_for(config.name)
    device = torch.cuda.get_device_name()
    rates = rates_of(device)
    for ranks in config.numbers("rank_list"):
        shapes = [
            Shape(config.seed, ranks, tokens, hidden, config.experts, config.top_k, config.fp8)
            for hidden in config.numbers("hidden_list")
            for tokens in config.numbers("token_list")
        ]
        own_gpus = gpus.num >= ranks
        collective = in_processes(shapes, own_gpus, config.repeats)
        for shape, figures in zip(shapes, collective, strict=True):
            if not own_gpus:
                if not shape.fits:
                    continue
                figures |= in_one_process(shape, config.repeats)
            dispatch, combine = limits_us(shape, rates, not own_gpus) if rates else (None, None)
            row = {"one_gpu": not own_gpus, "dispatch_limit_us": dispatch, "combine_limit_us": combine, **figures}
            rounded = {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}
            yield asdict(shape) | {"device": device} | rounded


def limits_us(shape: Shape, rates: Rates, one_gpu: bool) -> tuple[float, float]:
    """The least time for dispatch and for combine of all ranks, see the module's docstring."""
    row = shape.hidden * 2
    sent = row // 2 + shape.hidden // 128 * 4 if shape.fp8 else row
    tokens, rows = zip(*(shape.copies(rank) for rank in range(shape.ranks)), strict=True)
    if not one_gpu:
        return max(tokens) * sent / rates.link_bytes_per_s * 1e6, max(rows) * row / rates.link_bytes_per_s * 1e6
    all_rows = shape.ranks * shape.tokens * shape.top_k
    arrived = sum(tokens) + sum(shape.at_home(rank) for rank in range(shape.ranks))
    read = shape.ranks * shape.tokens * row
    dispatch, combine = read + 2 * arrived * sent + all_rows * row, 2 * all_rows * row
    return dispatch / rates.memory_bytes_per_s * 1e6, combine / rates.memory_bytes_per_s * 1e6
