"""Run one benchmark: a JSON line on stdout for each result as it comes, a table on standard error at the end.

python launch/bench.py bench=balance bench.traces=/data/traces bench.plot=balance.png
python launch/bench.py bench=rebalance bench.model=random bench.plot=rebalance.png
python launch/bench.py bench=exchange bench.rank_list=2 bench.hidden_list=7168
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.benchmarks.config import BenchRunConfig
from launch.benchmarks.runner import run
from launch.command import run_command

USAGE = "usage: python launch/bench.py [bench=NAME] [bench.KEY=VALUE ...]"


def main() -> int:
    """0, or 2 with one line about a mistake."""
    return run_command(BenchRunConfig, "bench", USAGE, lambda config, _: run(config.bench))


if __name__ == "__main__":
    sys.exit(main())
