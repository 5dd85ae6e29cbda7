"""Any benchmark: its results as they come, the table at the end, the drawing.

A benchmark is a module launch/benchmarks/NAME.py with `run(config) -> Iterator[dict]` of JSON-able results, and, if it
draws, `plot(rows, path)`; conf/bench/NAME.yaml has its keys and their defaults. Only the chosen one is imported.
"""

import importlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from launch.benchmarks.config import BenchConfig

WIDE = 240
"""Columns of a table that goes to a file."""

Row = dict[str, Any]


class Benchmark(Protocol):
    """What launch/benchmarks/NAME.py offers. ValueError: it cannot run here, in one line."""

    def run(self, config: BenchConfig) -> Iterator[Row]:
        """Measure; one result after the other."""
        ...


class PlottedBenchmark(Benchmark, Protocol):
    """A benchmark that can also draw: `bench.plot` is one of its keys."""

    def plot(self, rows: Sequence[Row], path: Path) -> None:
        """Write a PNG of all results."""
        ...


def run(config: BenchConfig) -> int:
    """Run, print and draw. ValueError when that cannot work, before anything is measured."""
    benchmark = cast(Benchmark, importlib.import_module(f"launch.benchmarks.{config.name}"))
    if config.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("bench.plot needs matplotlib: pip install -e '.[bench]'")
    rows = []
    for row in benchmark.run(config):
        print(json.dumps(row), flush=True)
        rows.append(row)
    _print_table(config.name, rows)
    if config.plot:
        cast(PlottedBenchmark, benchmark).plot(rows, Path(config.plot))
    return 0


def _print_table(name: str, rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list)))
    table = Table(*columns, title=f"bench={name}")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{key} {_cell(part)}" for key, part in value.items())
    return "" if value is None else str(value)
