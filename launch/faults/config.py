"""What launch/chaos.py may be told: its own keys, and everything that launch/serve.py takes."""

from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from elastic_moe.config import ServeConfig, check, describe, setting
from launch.config import load

KINDS = (
    *("kill", "stop", "hang", "term", "kill_two", "kill_in_recovery", "hang_in_recovery"),
    *("corrupt", "kill_node", "kill_daemon", "cut", "partition", "slow", "poison", "fork", "calm"),
)
PAIRS = ("kill_two", "kill_in_recovery", "hang_in_recovery", "cut")
"""Kinds with two victims."""
MIN_NODES = {"corrupt": 2, "kill_node": 2, "partition": 2, "cut": 3}
"""Kinds that need so many nodes started here."""
OF_NETWORK = ("cut", "partition")
"""Kinds that need nodes with a network of their own."""
FORK = "fork starts another instance from this one, and kills a rank of this one while that loads (no url)"
OF_KIND = f"must be a comma list of {', '.join(KINDS)}"


@dataclass
class ChaosConfig:
    """Which faults, under which load, of which server."""

    seed: int = setting(0, "of everything random: prompts, lengths, sampling, kinds, victims, moments")
    faults: int = setting(5, "faults in a row; each waits until the one before has healed; kill_node is the last")
    kinds: str = setting("kill,stop,term,kill_two,kill_in_recovery", f"comma list of {', '.join(KINDS)}; {FORK}")
    requests: int = setting(24, "streams that run at once in each round")
    url: str = setting("", "drive this running server, on this machine; empty: start one")
    ranks: int = setting(4, "ranks of the server to start, over all its nodes")
    nodes: int = setting(1, "torchrun commands on this machine, each with as many ranks")
    max_gap_ms: float | None = setting(None, "longest wait of a stream allowed where processes were killed; null: any")
    rejoin_timeout_s: float = setting(60.0, "how long all ranks may take to serve again after a fault, in seconds")

    def kind_names(self) -> tuple[str, ...]:
        """The kinds to choose from."""
        return tuple(kind.strip() for kind in self.kinds.split(",") if kind.strip())

    def validate(self) -> None:
        """Raise ValueError, naming the key and what is allowed, when a value cannot work."""
        kinds, ranks, gap = self.kind_names(), self.ranks, self.max_gap_ms
        of_nodes = [kind for kind in kinds if kind in MIN_NODES]
        wanted = max((MIN_NODES[kind] for kind in of_nodes), default=1)
        few = ranks < 3 and any(kind in PAIRS for kind in kinds)
        for ok, key, allowed in (
            (bool(kinds) and set(kinds) <= set(KINDS), "kinds", OF_KIND),
            (self.faults >= 1, "faults", "must be 1 or more"),
            (self.requests >= 1, "requests", "must be 1 or more"),
            (self.nodes >= 1 and ranks % max(1, self.nodes) == 0, "nodes", "must be 1 or more, and divide chaos.ranks"),
            (ranks >= 2, "ranks", "must be 2 or more"),
            (not few, "ranks", f"must be 3 or more for {' and '.join(PAIRS)}: one has to survive"),
            (not self.url or self.url.startswith("http://"), "url", "must be empty, or http://HOST:PORT"),
            (
                not of_nodes or (self.nodes >= wanted and not self.url),
                "kinds",
                f"{' and '.join(of_nodes)} needs chaos.nodes={wanted} or more, and no url",
            ),
            ("fork" not in kinds or not self.url, "kinds", "fork needs a server that is started here: no url"),
            (
                "fork" not in kinds or not set(OF_NETWORK) & set(kinds),
                "kinds",
                f"fork does not go with {' and '.join(OF_NETWORK)}: a server with a network of its own is not forked",
            ),
            (gap is None or gap > 0, "max_gap_ms", "must be null, or more than 0 ms"),
            (self.rejoin_timeout_s > 0, "rejoin_timeout_s", "must be more than 0 seconds"),
        ):
            check(ok, f"chaos.{key}", getattr(self, key), allowed)


@dataclass
class ChaosRunConfig(ServeConfig):
    """Everything `launch/chaos.py` may be told."""

    chaos: ChaosConfig = field(default_factory=ChaosConfig)

    def validate(self) -> None:
        """Raise ValueError with one line about the first value that cannot work."""
        super().validate()
        self.chaos.validate()
        off = "kill_daemon" in self.chaos.kind_names() and self.backup.mode == "off"
        check(not off, "chaos.kinds", self.chaos.kinds, "kill_daemon needs backup.mode=on")


def server_overrides(config: ChaosRunConfig, overrides: list[str]) -> list[str]:
    """What launch/serve.py has to be told to run with `config`, which was loaded with `overrides`."""
    passed = [override for override in overrides if not override.startswith("chaos.")]
    plain = load(ServeConfig, "config", passed)
    keys = [key for key, _, _ in describe(ServeConfig)]
    return passed + [f"{key}={_value(config, key)}" for key in keys if _value(config, key) != _value(plain, key)]


def _value(config: ServeConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)
