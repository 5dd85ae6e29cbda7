"""What launch/bench.py may be told: which benchmark, and the keys of all of them.

conf/bench/NAME.yaml has the keys that a benchmark obeys, with its own defaults; any other key is refused.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from elastic_moe.config import check, setting
from launch.config import CONF
from launch.random_model import SHAPES

NAMES = tuple(sorted(file.stem for file in (CONF / "bench").glob("*.yaml")))
MODELS = ("demo", "random")
DEVICES = ("cpu", "cuda")
OF_SIZE = "must be a comma list of LAYERSxEXPERTSxSLOTSxRANKS, with EXPERTS <= SLOTS, and SLOTS a multiple of RANKS"
OF_LIST = "must be a comma list of whole numbers, 1 or more"
AT_LEAST = {
    **dict.fromkeys(("seed", "redundant_slots", "words"), 0),
    **dict.fromkeys(("repeats", "ranks_per_node", "streams", "half_life_steps", "experts", "top_k"), 1),
    **dict.fromkeys(("ranks", "tokens"), 2),
}
"""The smallest value of a whole number."""
LEAST_OF = {("rfork", "ranks"): 1}
"""Where a benchmark takes less."""
LISTS = ("rank_list", "stream_list", "token_list", "hidden_list")


class Size(NamedTuple):
    """L, E, P, R of one placement."""

    layers: int
    experts: int
    slots: int
    ranks: int


@dataclass
class BenchConfig:
    """One benchmark. Keys whose meaning starts with names are of these benchmarks only."""

    name: str = setting("balance", "the benchmark: bench=NAME sets it, with its defaults")
    seed: int = setting(0, "of everything random")
    repeats: int = setting(
        5,
        "measurements of which a median is taken, after one or more that are not counted; gpu_recovery, rejoin: kills",
    )
    plot: str = setting("", "balance, rebalance: write a PNG here (needs matplotlib); empty: none")
    traces: str = setting("", 'balance: folder of {"logical_count": [L][E]} JSON files; empty: seeded Zipf-like loads')
    sizes: str = setting("58x256x288x32", "balance: comma list of LAYERSxEXPERTSxSLOTSxRANKS")
    ranks_per_node: int = setting(8, "balance: ranks in a fault domain")
    device: str = setting("cpu", f"rebalance, sources, r*: one of {', '.join(DEVICES)} (cuda: ranks may share one)")
    model: str = setting(
        "demo", f"rebalance, gpu_recovery: one of {', '.join(MODELS)} (random: on cuda of bench.shape)"
    )
    ranks: int = setting(4, "rebalance, gpu_recovery, rfork, rejoin: ranks of each server, all on this machine")
    streams: int = setting(12, "rebalance, gpu_recovery, rfork: streams at once")
    tokens: int = setting(
        100,
        "rebalance, gpu_serve, front_end, rfork: tokens of a stream; rebalance: twice as many streams",
    )
    redundant_slots: int = setting(1, "rebalance, gpu_recovery, rejoin: elastic.redundant_slots of the servers")
    interval_s: float = setting(1.0, "rebalance: eplb.interval_s of the servers")
    threshold: float = setting(1.05, "rebalance: eplb.threshold of the servers")
    half_life_steps: int = setting(20, "rebalance: eplb.half_life_steps of the servers")

    shape: str = setting("small", f"r* on cuda, gpu_*, sources: random model, one of {', '.join(SHAPES)}")
    rank_list: str = setting("1,2,4", "exchange, gpu_serve, scale: comma list of numbers of ranks; rfork: of forks")
    stream_list: str = setting("1,8,32", "gpu_serve, front_end: comma list of numbers of streams at once")
    dtype: str = setting("bfloat16", "rebalance, gpu_serve, gpu_recovery, rfork, rejoin: model.dtype of the servers")
    attention: str = setting("auto", "gpu_serve: serving.attention of the servers")
    words: int = setting(0, "gpu_serve: words of a prompt, at least")
    eplb_mode: str = setting("off", "gpu_recovery: eplb.mode of the server")

    token_list: str = setting("1,16,64,128,256,4096", "exchange: comma list of numbers of tokens of each rank")
    hidden_list: str = setting("2048,4096,7168", "exchange: comma list of sizes of a token")
    experts: int = setting(128, "exchange: experts, spread evenly over the ranks")
    top_k: int = setting(8, "exchange: experts of a token")
    fp8: bool = setting(False, "exchange: tokens travel to their experts in 8 bits")

    def numbers(self, key: str) -> tuple[int, ...]:
        """The comma list of one of `LISTS`; ValueError when one is not a whole number."""
        return tuple(int(number) for number in getattr(self, key).split(","))

    def size_list(self) -> tuple[Size, ...]:
        """The sizes; ValueError when one is not four whole numbers."""
        return tuple(Size(*map(int, size.split("x"))) for size in self.sizes.replace(" ", "").split(","))

    def validate(self) -> None:
        """Raise ValueError, naming the key and what is allowed, when a value cannot work."""
        for key, allowed in {"name": NAMES, "model": MODELS, "shape": tuple(SHAPES), "device": DEVICES}.items():
            self._check(getattr(self, key) in allowed, key, f"must be one of {', '.join(allowed)}")
        for key, least in AT_LEAST.items():
            at_least = LEAST_OF.get((self.name, key), least)
            self._check(getattr(self, key) >= at_least, key, f"must be {at_least} or more")
        for key in LISTS:
            self._check(self._is_list(key), key, OF_LIST)
        self._check(0 < self.interval_s < math.inf, "interval_s", "must be more than 0, and finite")
        self._check(1 <= self.threshold < math.inf, "threshold", "must be 1 or more, and finite")
        folder = Path(self.traces)
        has_traces = not self.traces or (folder.is_dir() and any(folder.glob("*.json")))
        self._check(has_traces, "traces", "must be empty, or a folder that holds JSON files")
        self._check(not self.plot or Path(self.plot).parent.is_dir(), "plot", "its folder does not exist")
        self._check(self._has_sizes(), "sizes", OF_SIZE)
        if self.name == "exchange":
            even = all(self.experts % ranks == 0 for ranks in self.numbers("rank_list"))
            self._check(even, "experts", f"must be a multiple of each of bench.rank_list={self.rank_list}")
            self._check(self.top_k <= self.experts, "top_k", f"must be at most bench.experts={self.experts}")

    def _check(self, ok: bool, key: str, allowed: str) -> None:
        check(ok, f"bench.{key}", getattr(self, key), allowed)

    def _is_list(self, key: str) -> bool:
        return all(part.strip().isdecimal() and int(part) >= 1 for part in getattr(self, key).split(","))

    def _has_sizes(self) -> bool:
        try:
            sizes = self.size_list()
        except (TypeError, ValueError):
            return False
        return all(min(s) >= 1 and s.experts <= s.slots and s.slots % s.ranks == 0 for s in sizes)


@dataclass
class BenchRunConfig:
    """Everything `launch/bench.py` may be told."""

    bench: BenchConfig = field(default_factory=BenchConfig)

    def validate(self) -> None:
        """Raise ValueError with one line about the first value that cannot work."""
        self.bench.validate()
