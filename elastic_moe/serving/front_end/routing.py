"""Which rank gets a request: the one function every path goes through, new requests and moved ones alike."""

from collections.abc import Iterable
from typing import NamedTuple

from elastic_moe.serving.protocol import Phase

STATUS_MAX_AGE_S = 5.0
"""An engine reports once a second: after five missed reports it gets no new requests."""


class RankLoad(NamedTuple):
    """What is known of one rank when a request is placed."""

    rank: int
    phase: Phase
    load: int
    """Requests running and waiting there, with those given to it since it reported."""

    @property
    def healthy(self) -> bool:
        """Whether the rank can be given requests."""
        return self.phase is Phase.SERVING


def choose_rank(ranks: Iterable[RankLoad]) -> int | None:
    """The healthy rank with the least load, the lowest of equals; None when no rank is healthy."""
    healthy = (r for r in ranks if r.healthy)
    best = min(healthy, key=lambda r: (r.load, r.rank), default=None)
    return None if best is None else best.rank
