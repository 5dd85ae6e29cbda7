"""What launch/chaos.py may be told: its own keys, and everything that launch/serve.py takes."""

from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from elastic_moe.config import ServeConfig, describe
from launch.config import load

KINDS = ("kill", "stop", "term", "kill_two", "kill_in_recovery", "corrupt", "kill_node", "calm")
PAIRS = ("kill_two", "kill_in_recovery")
"""Kinds with two victims."""
OF_NODES = ("corrupt", "kill_node")
"""Kinds that need two nodes started here."""
OF_KIND = f"must be a comma list of {', '.join(KINDS)}"


def _key(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


def _check(ok: bool, key: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"chaos.{key}={value!r}: {allowed}")


@dataclass
class ChaosConfig:
    """Which faults, under which load, of which server."""

    seed: int = _key(0, "of everything random: prompts, lengths, sampling, kinds, victims, moments")
    faults: int = _key(5, "faults in a row; each waits until the one before has healed; kill_node is the last")
    kinds: str = _key("kill,stop,term,kill_two,kill_in_recovery", f"comma list of {', '.join(KINDS)}")
    requests: int = _key(24, "streams that run at once in each round")
    url: str = _key("", "drive this running server, on this machine; empty: start one")
    ranks: int = _key(4, "ranks of the server to start, over all its nodes")
    nodes: int = _key(1, "1, or 2: two torchrun commands on this machine")
    max_gap_ms: float | None = _key(None, "longest wait of a stream allowed where processes were killed; null: any")
    rejoin_timeout_s: float = _key(60.0, "how long all ranks may take to serve again after a fault, in seconds")

    def kind_names(self) -> tuple[str, ...]:
        """The kinds to choose from."""
        return tuple(kind.strip() for kind in self.kinds.split(",") if kind.strip())

    def validate(self) -> None:
        """Raise ValueError, naming the key and what is allowed, when a value cannot work."""
        kinds = self.kind_names()
        _check(bool(kinds) and set(kinds) <= set(KINDS), "kinds", self.kinds, OF_KIND)
        for key in ("faults", "requests"):
            _check(getattr(self, key) >= 1, key, getattr(self, key), "must be 1 or more")
        _check(self.nodes in (1, 2), "nodes", self.nodes, "must be 1 or 2")
        _check(
            self.ranks >= 2 and self.ranks % self.nodes == 0, "ranks", self.ranks, "must be 2 or more, equal by node"
        )
        few = self.ranks < 3 and any(kind in PAIRS for kind in kinds)
        _check(not few, "ranks", self.ranks, f"must be 3 or more for {' and '.join(PAIRS)}: one has to survive")
        _check(not self.url or self.url.startswith("http://"), "url", self.url, "must be empty, or http://HOST:PORT")
        own_nodes = not self.url and self.nodes == 2
        found = [kind for kind in kinds if kind in OF_NODES]
        _check(not found or own_nodes, "kinds", self.kinds, f"{' and '.join(found)} needs chaos.nodes=2 and no url")
        gap = self.max_gap_ms
        _check(gap is None or gap > 0, "max_gap_ms", gap, "must be null, or more than 0 ms")
        _check(self.rejoin_timeout_s > 0, "rejoin_timeout_s", self.rejoin_timeout_s, "must be more than 0 seconds")


@dataclass
class ChaosRunConfig(ServeConfig):
    """Everything `launch/chaos.py` may be told."""

    chaos: ChaosConfig = field(default_factory=ChaosConfig)

    def validate(self) -> None:
        """Raise ValueError with one line about the first value that cannot work."""
        super().validate()
        self.chaos.validate()


def server_overrides(config: ChaosRunConfig, overrides: list[str]) -> list[str]:
    """What launch/serve.py has to be told to run with `config`, which was loaded with `overrides`."""
    passed = [override for override in overrides if not override.startswith("chaos.")]
    plain = load(ServeConfig, "config", passed)
    keys = [key for key, _, _ in describe(ServeConfig)]
    return passed + [f"{key}={_value(config, key)}" for key in keys if _value(config, key) != _value(plain, key)]


def _value(config: ServeConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)
