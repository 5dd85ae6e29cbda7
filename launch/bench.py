"""Run one benchmark: a JSON line on stdout for each result as it comes, a table on standard error at the end.

    python launch/bench.py bench=balance bench.traces=/data/traces bench.plot=balance.png
    python launch/bench.py bench=rebalance bench.model=random bench.plot=rebalance.png
    python launch/bench.py bench=layer

A benchmark is a module launch/bench_NAME.py with `run(config) -> Iterator[dict]` of JSON-able results, and, if it
draws, `plot(rows, path)`; its defaults are in conf/bench/NAME.yaml. Only the chosen one is imported.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.benchmarks.config import BenchConfig, BenchRunConfig
from launch.config import help_text, load

USAGE = "usage: python launch/bench.py [bench=NAME] [bench.KEY=VALUE ...]"

WIDE = 240
"""Columns of a table that goes to a file."""

Row = dict[str, Any]


class Benchmark(Protocol):
    """What launch/bench_NAME.py offers. ValueError: it cannot run here, in one line."""

    def run(self, config: BenchConfig) -> Iterator[Row]:
        """Measure; one result after the other."""
        ...


class PlottedBenchmark(Benchmark, Protocol):
    """A benchmark that can also draw."""

    def plot(self, rows: Sequence[Row], path: Path) -> None:
        """Write a PNG of all results."""
        ...


def run(config: BenchConfig) -> None:
    """Run, print and draw. ValueError when that cannot work, before anything is measured."""
    benchmark = cast(Benchmark, importlib.import_module(f"launch.benchmarks.{config.name}"))
    if config.plot and not hasattr(benchmark, "plot"):
        raise ValueError(f"bench.plot={config.plot!r}: bench={config.name} draws nothing")
    if config.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("bench.plot needs matplotlib: pip install -e '.[bench]'")
    rows = []
    for row in benchmark.run(config):
        print(json.dumps(row), flush=True)
        rows.append(row)
    _print_table(config.name, rows)
    if config.plot:
        cast(PlottedBenchmark, benchmark).plot(rows, Path(config.plot))


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


def main() -> int:
    """0, or 2 with one line about a mistake."""
    overrides = sys.argv[1:]
    if "--help" in overrides or "-h" in overrides:
        print(help_text(BenchRunConfig, USAGE))
        return 0
    try:
        run(load(BenchRunConfig, "bench", overrides).bench)
    except ValueError as error:
        print(f"elastic_moe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
