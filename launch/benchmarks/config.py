"""What launch/bench.py may be told: which benchmark, and the keys of all of them; conf/bench/NAME.yaml sets its own."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from launch.config import CONF
from launch.random_model import SHAPES

NAMES = tuple(sorted(file.stem for file in (CONF / "bench").glob("*.yaml")))
MODELS = ("demo", "random")
DEVICES = ("cpu", "cuda")
OF_SIZE = "must be a comma list of LAYERSxEXPERTSxSLOTSxRANKS, with EXPERTS <= SLOTS, and SLOTS a multiple of RANKS"


class Size(NamedTuple):
    """L, E, P, R of one placement."""

    layers: int
    experts: int
    slots: int
    ranks: int


def _key(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


def _check(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"bench.{key}={value!r}: {allowed}")


@dataclass
class BenchConfig:
    """One benchmark. Keys whose meaning starts with a name are of that benchmark only."""

    name: str = _key("balance", "the benchmark: bench=NAME sets it, with its defaults")
    repeats: int = _key(5, "measurements of which a median is taken, after one that is not counted")
    seed: int = _key(0, "of everything random")
    plot: str = _key("", "write a PNG here, for benchmarks that draw one (needs matplotlib); empty: none")
    traces: str = _key("", 'balance: folder of {"logical_count": [L][E]} JSON files; empty: seeded Zipf-like loads')
    sizes: str = _key("58x256x288x32", "balance: comma list of LAYERSxEXPERTSxSLOTSxRANKS")
    ranks_per_node: int = _key(8, "balance: ranks in a fault domain")
    device: str = _key("cpu", f"rebalance: one of {', '.join(DEVICES)} (cuda: ranks may share a GPU)")
    model: str = _key("demo", f"rebalance: one of {', '.join(MODELS)} (random: some hundred MB of random experts)")
    ranks: int = _key(4, "rebalance: ranks of each server, all on this machine")
    streams: int = _key(12, "rebalance: streams at once")
    tokens: int = _key(100, "rebalance: tokens of a stream; twice as many streams, as the domain shifts in the middle")
    redundant_slots: int = _key(1, "rebalance: elastic.redundant_slots of the servers")
    interval_s: float = _key(1.0, "rebalance: eplb.interval_s of the servers")
    threshold: float = _key(1.05, "rebalance: eplb.threshold of the servers")
    half_life_steps: int = _key(20, "rebalance: eplb.half_life_steps of the servers")

    shape: str = _key("small", f"rebalance on cuda, gpu_*: random model, one of {', '.join(SHAPES)}")
    rank_list: str = _key("1,2,4", "gpu_serve: comma list of numbers of ranks")
    stream_list: str = _key("1,8,32", "gpu_serve: comma list of numbers of streams at once")
    dtype: str = _key("bfloat16", "rebalance, gpu_serve, gpu_recovery: model.dtype of the servers")
    eplb_mode: str = _key("off", "gpu_recovery: eplb.mode of the server")

    def rank_counts(self) -> tuple[int, ...]:
        """`rank_list`; ValueError when one is not a whole number."""
        return tuple(int(count) for count in self.rank_list.split(","))

    def stream_counts(self) -> tuple[int, ...]:
        """`stream_list`; ValueError when one is not a whole number."""
        return tuple(int(count) for count in self.stream_list.split(","))

    def size_list(self) -> tuple[Size, ...]:
        """The sizes; ValueError when one is not four whole numbers."""
        return tuple(Size(*map(int, size.split("x"))) for size in self.sizes.replace(" ", "").split(","))

    def validate(self) -> None:
        """Raise ValueError, naming the key and what is allowed, when a value cannot work."""
        _check(self.name in NAMES, "name", self.name, f"must be one of {', '.join(NAMES)}")
        _check(self.model in MODELS, "model", self.model, f"must be one of {', '.join(MODELS)}")
        _check(self.shape in SHAPES, "shape", self.shape, f"must be one of {', '.join(SHAPES)}")
        _check(self.device in DEVICES, "device", self.device, f"must be one of {', '.join(DEVICES)}")
        for key in ("repeats", "ranks_per_node", "streams", "half_life_steps"):
            _check(getattr(self, key) >= 1, key, getattr(self, key), "must be 1 or more")
        for key in ("ranks", "tokens"):
            _check(getattr(self, key) >= 2, key, getattr(self, key), "must be 2 or more")
        _check(self.redundant_slots >= 0, "redundant_slots", self.redundant_slots, "must be 0 or more")
        _check(0 < self.interval_s < math.inf, "interval_s", self.interval_s, "must be more than 0, and finite")
        _check(1 <= self.threshold < math.inf, "threshold", self.threshold, "must be 1 or more, and finite")
        _check(self.seed >= 0, "seed", self.seed, "must be 0 or more")
        folder = Path(self.traces)
        has_traces = not self.traces or (folder.is_dir() and any(folder.glob("*.json")))
        _check(has_traces, "traces", self.traces, "must be empty, or a folder that holds JSON files")
        _check(not self.plot or Path(self.plot).parent.is_dir(), "plot", self.plot, "its folder does not exist")
        for key in ("rank_list", "stream_list"):
            counts = getattr(self, key).split(",")
            ok = all(count.strip().isdecimal() and int(count) >= 1 for count in counts)
            _check(ok, key, getattr(self, key), "must be a comma list of whole numbers, 1 or more")
        try:
            sizes = self.size_list()
        except (TypeError, ValueError):
            sizes = ()
        fits = [min(s) >= 1 and s.experts <= s.slots and s.slots % s.ranks == 0 for s in sizes]
        _check(bool(fits) and all(fits), "sizes", self.sizes, OF_SIZE)


@dataclass
class BenchRunConfig:
    """Everything `launch/bench.py` may be told."""

    bench: BenchConfig = field(default_factory=BenchConfig)

    def validate(self) -> None:
        """Raise ValueError with one line about the first value that cannot work."""
        self.bench.validate()
