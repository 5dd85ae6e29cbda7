"""How long anybody waits for what another process has to do: one value with an order in it, checked when it is made.

A constant belongs here if another one must be larger or smaller for it to make sense. What only paces a loop (how often
to look, how long to hold a thing) stays beside its code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

SHARE_OF_HANG = 0.75
"""An exchange may take this part of the time after which a rank is taken for hung, unless a user says otherwise: the
rest is for what the rank itself does in that step."""
BEATS_LEFT = 2
"""From a rank's giving up an exchange to its supervisor's knowing of it, in beats: one is on its way, one is late."""
BUILD_S, BUILD_PER_RANK_S = 5.0, 0.05
"""Connecting to one peer takes a rank 2 ms of CPU time in both groups (gloo; 64 ranks on 2 cores: 4.0 s); NCCL and slow
networks take more, and a rank may be late by what it does besides."""
_ROUNDING_S = 1e-9

CONF_KEYS: Mapping[str, str] = {
    "exchange_s": "elastic.exchange_timeout_s",
    "start_s": "elastic.start_timeout_s",
    "hang_s": "elastic.hang_timeout_s",
    "progress_s": "elastic.progress_timeout_s",
}
"""Field -> the key by which a user sets it."""


class Rule(NamedTuple):
    """The sum of the fields `smaller` must not be more than the field `larger`."""

    smaller: tuple[str, ...]
    larger: str
    reason: str


RULES = (
    Rule(("beat_s",) * 4, "progress_s", "an engine that is a beat late would be taken for hung"),
    Rule(("progress_s",), "hang_s", "an engine that is busy would be killed before one that stands still"),
    Rule(
        ("exchange_s", *["beat_s"] * BEATS_LEFT),
        "hang_s",
        "a rank that waits for a peer on a GPU shows no progress: its supervisor would kill it with the one that hangs",
    ),
    Rule(("ping_s",) * 4, "progress_s", "a neighbour that is a ping late would be taken for lost"),
    Rule(
        ("heartbeat_timeout_s",),
        "progress_s",
        "a lighthouse would still count a neighbour that is lost, and put it into the next view",
    ),
    Rule(("heartbeat_s",) * 3, "heartbeat_timeout_s", "a lighthouse would leave out a member that is a heartbeat late"),
    Rule(("heartbeat_s",) * 2, "settle_s", "a lighthouse would be asked before it knows who lives"),
    Rule(
        ("heartbeat_timeout_s",),
        "death_vote_s",
        "the last heartbeat of a process that died would count longer than others vote for it",
    ),
    Rule(("connect_s", "settle_s"), "view_call_s", "no lighthouse could answer in time"),
    Rule(
        ("view_call_s",),
        "lighthouse_wait_s",
        "a newcomer that asks again and again would be given a view of its own while members live",
    ),
    Rule(
        ("hang_s",),
        "lighthouse_wait_s",
        "a member that is slow but lives would be left out before its supervisor has judged it",
    ),
    Rule(
        ("exchange_s", "view_call_s", "build_s"),
        "recovery_s",
        "a recovery would be given up before its first attempt is over",
    ),
    Rule(("greeting_s",), "weights_s", "peers that answer at once would be asked no more"),
)


@dataclass(frozen=True)
class Deadlines:
    """All of them, in seconds. Made once, by `ElasticConfig.deadlines` or by `of`; any value obeys `RULES`."""

    exchange_s: float = 15.0
    """One call between ranks, on a CPU or inside a kernel."""
    start_s: float = 120.0
    """How long ranks wait for each other at start, and then for those that load slowly."""
    hang_s: float | None = None
    """A process is killed that sends no beat, or shows no progress while it works, for so long, however busy it is.
    None: never."""
    progress_s: float = 1.5
    """A process that stands still for so long, though it waits for nobody, is killed: while it serves, and in a
    recovery. It is also how long a neighbour in the ring may be silent before it is taken for lost: a supervisor finds
    a stopped process as soon; that finds a host without power, in a group that sleeps."""
    beat_s: float = 0.25
    """From one beat of a process to its supervisor to the next."""
    ping_s: float = 0.25
    """From one ping of a member to its neighbours in the ring to the next."""

    heartbeat_s: float = 0.1
    """From one heartbeat of a member to the lighthouses to the next."""
    heartbeat_timeout_s: float = 1.0
    """A lighthouse counts a process for so long after its last heartbeat. All that a loss of a whole node waits for."""
    settle_s: float = 0.5
    """A lighthouse that has just begun knows only some of the members; it is not asked before all have sent it
    heartbeats."""
    connect_s: float = 1.0
    """To reach a lighthouse. The next one is asked after that."""
    view_call_s: float = 25.0
    """One call for a view. It is answered when all who live have asked, so it waits for the slowest of them."""
    death_vote_s: float = 3.0
    """For so long after the death of a process the others vote for it, so that no lighthouse waits for it."""
    lighthouse_wait_s: float = 60.0
    """How long a lighthouse waits for a process that sends heartbeats but does not ask for the view. One outside of the
    launch (`elastic.lighthouse`) has its own."""

    build_s: float = BUILD_S + BUILD_PER_RANK_S
    """Building the groups of a view. Its members come at once, for they got the same answer; then each connects to all
    others. `of` scales it with their number."""
    recovery_s: float = 60.0
    """From a loss to the next epoch, all attempts together. Then it is told as unavailable, and tried on."""
    rebalance_grace_s: float = 60.0
    """How long a call of the balancer waits beyond its interval: all ranks come to it by themselves within one."""
    weights_s: float = 5.0
    """One answer of a peer that gives weights; who does not answer in time is asked no more."""
    greeting_s: float = 0.2
    """How much later than the first a peer may answer a newcomer's greeting; who does not is taken for lost."""

    @property
    def wait_s(self) -> float:
        """How long a process may stand still that waits for others: each wait has its own deadline before that."""
        return self.hang_s or self.exchange_s + self.progress_s

    def __post_init__(self) -> None:
        for rule in RULES:
            total, limit = sum(map(self._seconds, rule.smaller)), getattr(self, rule.larger)
            if limit is not None and total > limit + _ROUNDING_S:
                raise ValueError(self._complaint(rule))

    @classmethod
    def of(
        cls,
        num_ranks: int,
        *,
        exchange_s: float = 15.0,
        start_s: float = 120.0,
        progress_s: float = 1.5,
        hang_s: float | None = None,
    ) -> "Deadlines":
        """Those of a launch of `num_ranks` ranks; what has to be longer than these or grows with the ranks does.

        Raises:
            ValueError: they contradict each other; the message says which, why, and what is allowed.
        """
        build_s = BUILD_S + BUILD_PER_RANK_S * num_ranks
        attempt_s = cls.view_call_s + build_s + exchange_s
        return cls(
            exchange_s=exchange_s,
            start_s=start_s,
            hang_s=hang_s,
            progress_s=progress_s,
            build_s=build_s,
            recovery_s=max(cls.recovery_s, 1.25 * attempt_s),
            lighthouse_wait_s=max(cls.lighthouse_wait_s, cls.view_call_s + (hang_s or 0.0)),
        )

    @classmethod
    def exchange_below(cls, hang_s: float) -> float:
        """How long an exchange may take, in seconds, when a rank is taken for hung after `hang_s`."""
        return min(SHARE_OF_HANG * hang_s, hang_s - BEATS_LEFT * cls.beat_s)

    def _seconds(self, name: str) -> float:
        return getattr(self, name) or 0.0

    def _complaint(self, rule: Rule) -> str:
        """About the field that a user sets, if the rule has one, else about the first."""
        total, limit = sum(map(self._seconds, rule.smaller)), self._seconds(rule.larger)
        subject, key = rule.smaller[0], _key(rule.larger)
        if subject not in CONF_KEYS and rule.larger in CONF_KEYS:
            return f"{key}={limit:g}: must be {total:g} s or more: {rule.reason}"
        value, times = self._seconds(subject), rule.smaller.count(subject)
        allowed = (limit - (total - times * value)) / times
        return f"{_key(subject)}={value:g}: must be {allowed:g} s or less with {key}={limit:g}: {rule.reason}"


def _key(name: str) -> str:
    return CONF_KEYS.get(name, name)
