"""The recoveries and rebalances a front end has heard of: the last 1000 for /elastic/events, and their metrics."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from elastic_moe.control.report import RebalanceReport, Report
from elastic_moe.serving.front_end.metrics import Metrics
from elastic_moe.serving.protocol import Event

KEPT = 1000


class EventLog:
    """Keeps what each rank told; counts each fault once, however many ranks tell of it."""

    def __init__(self, metrics: Metrics) -> None:
        """An empty log."""
        self._metrics = metrics
        self._events: deque[Event] = deque(maxlen=KEPT)
        self._counted_epoch = 0
        self._counted_round = (0, 0)
        self._followers: set[asyncio.Queue[Event]] = set()

    def add(self, event: Event) -> None:
        """Record one rank's report. Of the load balancer's rounds, which every rank tells of, one report is kept, and
        none of those that nobody asked for and that moved nothing."""
        report = event.report
        if isinstance(report, RebalanceReport):
            if (report.epoch, report.number) <= self._counted_round:
                return
            self._counted_round = (report.epoch, report.number)
            self._metrics.count_rebalance(report)
            if report.outcome == "kept" and not report.ops:
                return
        self._keep(event)
        if isinstance(report, Report) and report.epoch > self._counted_epoch:
            self._counted_epoch = report.epoch
            self._metrics.faults.inc(len(report.lost))
            for source, num_bytes in report.bytes_by_source.items():
                self._metrics.transfer_bytes.labels(source).inc(num_bytes)
            for phase, seconds in report.phase_s.items():
                self._metrics.recovery_seconds.labels(phase).observe(seconds)

    def _keep(self, event: Event) -> None:
        self._events.append(event)
        for follower in self._followers:
            follower.put_nowait(event)

    def all(self) -> Sequence[Event]:
        """The events kept, oldest first."""
        return tuple(self._events)

    async def follow(self) -> AsyncIterator[Event]:
        """Every event from now on."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self._followers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._followers.discard(queue)
