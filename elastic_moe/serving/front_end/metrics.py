"""The metrics of one front end, in the text format of Prometheus."""

from collections import Counter as Tally

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from elastic_moe.control.report import RebalanceReport
from elastic_moe.serving.front_end.cluster_status import ClusterStatus

FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
INTER_TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
RECOVERY_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 30.0)


class Metrics:
    """Counters and histograms as things happen, gauges from the cluster's status when they are asked for."""

    def __init__(self) -> None:
        """A registry of its own, all counts at zero."""
        self.registry = CollectorRegistry()

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"elastic_moe_{name}", meaning, labels, registry=self.registry)

        def gauge(name: str, meaning: str, *labels: str) -> Gauge:
            return Gauge(f"elastic_moe_{name}", meaning, labels, registry=self.registry)

        def histogram(name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"elastic_moe_{name}", meaning, labels, buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "Requests ended: stop, length, error, cancelled, rejected", "outcome")
        self.resubmitted = counter(
            "requests_resubmitted",
            "Times that a request was given to a rank again: its rank was lost, or had dropped it",
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of accepted requests")
        self.generated_tokens = counter("generated_tokens", "Tokens received from the engines, each counted once")
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", FIRST_TOKEN_BUCKETS_S
        )
        self.inter_token = histogram(
            "inter_token_seconds", "Between two arrivals of tokens of one request", INTER_TOKEN_BUCKETS_S
        )
        self.faults = counter("faults", "Ranks lost")
        self.transfer_bytes = counter("transfer_bytes", "Expert bytes brought into slots", "source")
        self.recovery_seconds = histogram("recovery_seconds", "Time of each phase", RECOVERY_BUCKETS_S, "phase")
        self._rebalances = counter("rebalances", "Rounds of the load balancer: moved, kept, failed", "outcome")
        self._rebalance_seconds = histogram("rebalance_seconds", "Time of each phase", RECOVERY_BUCKETS_S, "phase")
        self._balancedness = gauge("balancedness", "Mean over largest load of a rank, before the last round", "layer")
        self._in_flight = gauge("requests_in_flight", "Requests of this front end: running or waiting", "state")
        self._rank_running = gauge("rank_running", "Requests a rank is running, as it reports", "rank")
        self._rank_waiting = gauge("rank_waiting", "Requests waiting at a rank, as it reports", "rank")
        self._ranks = gauge("ranks", "Ranks in the view, by phase", "phase")
        self._epoch = gauge("epoch", "Number of the current view")
        self._placement_version = gauge("placement_version", "Newest placement version a rank reports")

    def count_rebalance(self, report: RebalanceReport) -> None:
        """One round of the load balancer."""
        self._rebalances.labels(report.outcome).inc()
        for layer, value in enumerate(report.balancedness):
            self._balancedness.labels(layer).set(value)
        for source, num_bytes in report.bytes_by_source.items():
            self.transfer_bytes.labels(source).inc(num_bytes)
        for phase, seconds in report.phase_s.items():
            self._rebalance_seconds.labels(phase).observe(seconds)

    def render(self, cluster: ClusterStatus) -> bytes:
        """The exposition: what was counted so far, and `cluster` as gauges."""
        for by_rank in (self._rank_running, self._rank_waiting, self._ranks):
            by_rank.clear()  # ranks that left the view leave the gauges too
        for member in cluster.members:
            self._rank_running.labels(member.rank).set(member.running)
            self._rank_waiting.labels(member.rank).set(member.waiting)
        for phase, num_ranks in Tally(m.phase for m in cluster.members).items():
            self._ranks.labels(phase).set(num_ranks)
        self._in_flight.labels("running").set(cluster.requests.running)
        self._in_flight.labels("waiting").set(cluster.requests.waiting)
        self._epoch.set(cluster.epoch)
        self._placement_version.set(cluster.placement.version)
        return generate_latest(self.registry)
