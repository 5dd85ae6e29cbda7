"""bench=balance: every balancing algorithm on every trace and size, on one CPU thread, compiled beforehand.

Of each placement: the milliseconds to compute it from nothing, max / mean rank load under its own trace (mean over the
layers, and the worst) and under the others, and what it takes to follow each other trace from it: share of the
slots moved, max / mean then, milliseconds. `_most` and `_worst` are maxima over the traces followed, else means.
"""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from elastic_moe.placement.balance import ALGORITHMS, balance, warm_up
from elastic_moe.placement.balancedness import max_over_mean, rank_loads
from elastic_moe.placement.placement import EMPTY, Placement
from elastic_moe.placement.topology import Topology
from launch.benchmarks.config import BenchConfig, Size

NUM_ZIPF = 3


def run(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """One result for each size, trace and algorithm."""
    warm_up()
    for size in config.size_list():
        traces = _read(Path(config.traces), size) if config.traces else _zipf(config.seed, size)
        topology = Topology.uniform(size.ranks, config.ranks_per_node)
        for name in traces:
            for algorithm in ALGORITHMS:
                found = _measure(algorithm, traces, name, topology, size, config.repeats)
                yield {"algorithm": algorithm, "trace": name, **size._asdict(), **found}


def _measure(
    algorithm: str, traces: dict[str, np.ndarray], name: str, topology: Topology, size: Size, repeats: int
) -> dict[str, float | None]:
    per_rank = size.slots // size.ranks

    def timed(loads: np.ndarray, current: Placement | None) -> tuple[Placement, float]:
        seconds, placement = [], None
        for _ in range(1 + repeats):
            begin = time.perf_counter()
            placement = balance(loads, topology, per_rank, current=current, algorithm=algorithm)
            seconds.append(time.perf_counter() - begin)
        assert placement is not None
        return placement, median(seconds[1:]) * 1e3

    def skew(placement: Placement, loads: np.ndarray) -> np.ndarray:
        return max_over_mean(rank_loads(placement.slots, loads, per_rank))

    first, ms = timed(traces[name], None)
    others = [loads for other, loads in traces.items() if other != name]
    followed = [timed(loads, first) for loads in others]
    moved = [_moved_share(first, placement) for placement, _ in followed]
    after = [float(skew(placement, loads).mean()) for (placement, _), loads in zip(followed, others, strict=True)]
    return {
        "ms": ms,
        "max_mean": float(skew(first, traces[name]).mean()),
        "max_mean_worst_layer": float(skew(first, traces[name]).max()),
        "max_mean_other": _mean([float(skew(first, loads).mean()) for loads in others]),
        "moved_share": _mean(moved),
        "moved_share_most": max(moved, default=None),
        "max_mean_moved": _mean(after),
        "max_mean_moved_worst": max(after, default=None),
        "ms_moved": _mean([ms for _, ms in followed]),
        "ms_moved_most": max((ms for _, ms in followed), default=None),
    }


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _moved_share(old: Placement, new: Placement) -> float:
    """Part of all slots that hold an expert which was not in them; what a rank keeps stays in its slot."""
    return float(((new.slots != old.slots) & (new.slots != EMPTY)).mean())


def _read(folder: Path, size: Size) -> dict[str, np.ndarray]:
    """The traces, without dense layers. Another size than theirs goes through all their numbers, over and over."""
    traces = {}
    for file in sorted(folder.glob("*.json")):
        try:
            counts = np.array(json.loads(file.read_text())["logical_count"], dtype=np.float64)
            counts = counts[counts.any(axis=1)]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f'{file}: not {{"logical_count": [L][E]}} ({error!r})') from error
        if not counts.size:
            raise ValueError(f"{file}: no layer has a token")
        traces[file.stem] = np.resize(counts, (size.layers, size.experts))
    return traces


def _zipf(seed: int, size: Size) -> dict[str, np.ndarray]:
    """Loads that fall with the rank of an expert, which is random in each layer, and drift from trace to trace."""
    random = np.random.default_rng(seed)
    falling = 1e6 / (1.0 + np.arange(size.experts)) ** 0.7
    base = random.permuted(np.tile(falling, (size.layers, 1)), axis=1)
    return {f"zipf-{i}": np.rint(base * random.lognormal(0.0, 0.5, base.shape)) for i in range(NUM_ZIPF)}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Milliseconds by size, and max / mean by trace at the first size."""
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    sizes = list(dict.fromkeys(_size_of(row) for row in rows))
    for algorithm in ALGORITHMS:
        own = [row for row in rows if row["algorithm"] == algorithm]
        left.plot(
            sizes, [mean(row["ms"] for row in own if _size_of(row) == size) for size in sizes], "o-", label=algorithm
        )
        at_first = [row for row in own if _size_of(row) == sizes[0]]
        right.plot([row["trace"] for row in at_first], [row["max_mean"] for row in at_first], "o", label=algorithm)
    left.set(yscale="log", ylabel="ms", title="time from nothing")
    left.tick_params(axis="x", rotation=30)
    right.set(ylabel="max / mean rank load", title=f"balance at {sizes[0]}")
    right.tick_params(axis="x", rotation=30)
    left.legend()
    figure.savefig(path)
    pyplot.close(figure)


def _size_of(row: dict[str, Any]) -> str:
    return "x".join(str(row[key]) for key in Size._fields)
