"""What a recovery has to tell: for the log, the metrics and /elastic/events."""

import enum

import msgspec


class Outcome(enum.StrEnum):
    """How a round of the load balancer has ended."""

    MOVED = "moved"
    KEPT = "kept"
    """The placement is good enough."""
    FAILED = "failed"
    """Of its chunks those in `num_chunks` were swapped in, and the placement that they led to stays in use."""


class Report(msgspec.Struct, tag="recovery", frozen=True):
    """One recovery as one rank saw it. Times are seconds; `noticed_at` is wall-clock (Unix) time."""

    epoch: int
    ranks: tuple[int, ...]
    lost: tuple[int, ...]
    joined: tuple[int, ...]
    reason: str
    noticed_at: float
    phase_s: dict[str, float]
    bytes_by_source: dict[str, int]
    """Bytes that came into slots in the whole group, by `weights.sources.Origin`, as they are in memory; of
    the attempt that succeeded."""
    bytes_lower_bound: int
    """Bytes of the copies newly needed in the whole group."""
    rejected: int
    """Copies refused because their digest was wrong."""
    attempts: int


class RebalanceReport(msgspec.Struct, tag="rebalance", frozen=True):
    """One round of the load balancer, the same on every rank but for `ops` and the times.

    Times are seconds, bytes those of the whole group.
    """

    epoch: int
    number: int
    """Of the round in its epoch, from 1; every rank tells of each."""
    version: int
    """Of the placement in use after the round."""
    ops: tuple[str, ...]
    """Names of the requests that this round has answered."""
    outcome: Outcome
    reason: str
    max_mean_before: float = 0.0
    """Load of the fullest rank over the mean, averaged over the layers."""
    max_mean_after: float = 0.0
    """The same, expected of the new placement under the same loads."""
    balancedness: list[float] = []
    """Mean load of the ranks over that of the fullest, before, by layer: 1 is perfect."""
    num_moves: int = 0
    """Experts that came into slots."""
    num_chunks: int = 0
    phase_s: dict[str, float] = {}
    bytes_by_source: dict[str, int] = {}
    bytes_lower_bound: int = 0
    """Bytes of the experts that came to ranks which did not hold them."""
    ended_at: float = 0.0
    """Wall-clock (Unix) time."""
