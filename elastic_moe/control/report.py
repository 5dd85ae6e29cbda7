"""What a recovery has to tell: for the log, the metrics and /elastic/events."""

import msgspec


class Report(msgspec.Struct, frozen=True):
    """One recovery as one rank saw it. Times are seconds; `noticed_at` is wall-clock (Unix) time."""

    epoch: int
    ranks: tuple[int, ...]
    lost: tuple[int, ...]
    joined: tuple[int, ...]
    reason: str
    noticed_at: float
    phase_s: dict[str, float]
    bytes_by_source: dict[str, int]
    """Bytes that came into slots in the whole group, by distance (own, node, remote, disk), as they are in memory; of
    the attempt that succeeded."""
    bytes_lower_bound: int
    """Bytes of the copies newly needed in the whole group."""
    rejected: int
    """Copies refused because their digest was wrong."""
    attempts: int
