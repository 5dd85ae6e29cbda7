"""What bench=rebalance finds: one result for each mode, from its windows. Functions of their arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from launch.figures import percentile
from launch.streams import Streamed

MODES = ("off", "sync", "async")
CLAIM = 1.05
"""The p99 of a mode is as good as that of off when it is not more than this many times as long."""
FEWEST = 3
"""Rounds from which anything is said about the claim."""
BIN_S = 0.25
"""Width of a point of the timeline."""


@dataclass(frozen=True)
class Window(Streamed):
    """One server's one round: streams of one domain to their end, then streams of another. Times are wall-clock."""

    began_at: float
    shifted_at: float
    """The first request of the second domain was sent."""
    ended_at: float
    reports: tuple[Mapping[str, Any], ...]
    """Of the balancer's rounds that moved something in this time, oldest first."""
    max_mean: float
    """Load of the fullest rank over the mean at the end, averaged over the layers: the placement of then, under the
    loads of the balancer's window of then."""

    @property
    def tokens_per_s(self) -> float:
        """Of all streams."""
        return sum(answer.num_tokens for answer in self.answers) / (self.ended_at - self.began_at)

    def itl_ms(self) -> dict[str, float]:
        """Milliseconds between two pieces of a stream, over all streams."""
        gaps = self.gaps_ms
        return {name: round(percentile(gaps, at) or 0.0, 1) for name, at in {"p50": 50, "p99": 99, "max": 100}.items()}

    def seconds_to_balance(self, threshold: float) -> float | None:
        """From the shift of the domain to the end of the last round of the balancer that found max/mean over
        `threshold` and brought it to `threshold` or less, both under the loads that the round saw. None: no round did.

        After it every look at the loads found them even enough, until the end. The way there is one round where the
        window of loads follows the shift at once, and several where it follows slowly.
        """
        crossings = [
            report["ended_at"] - self.shifted_at
            for report in self.reports
            if report["max_mean_before"] > threshold >= report["max_mean_after"]
        ]
        return max((seconds for seconds in crossings if seconds > 0), default=None)

    def bytes_moved(self) -> int:
        """Bytes of experts that came to a rank from another one or from disk. Copies within a rank do not count."""
        sources = [report["bytes_by_source"] for report in self.reports]
        return sum(num for source in sources for name, num in source.items() if name != "own")

    def timeline(self) -> list[tuple[float, float]]:
        """(seconds since the beginning, the longest wait in milliseconds that ended in this quarter of a second)."""
        longest: dict[int, float] = {}
        for answer in self.answers:
            for before, after in zip(answer.arrivals, answer.arrivals[1:], strict=False):
                place = int((after - self.began_at) / BIN_S)
                longest[place] = max(longest.get(place, 0.0), after - before)
        return [(place * BIN_S, round(gap * 1e3, 1)) for place, gap in sorted(longest.items())]


def summary(windows: Mapping[str, Sequence[Window]], threshold: float, count_us: float) -> list[dict[str, Any]]:
    """One result a mode: medians over its windows; the timeline is that of the last. All modes have as many windows,
    and the n-th of each were measured one after the other: `p99_over_off` compares these. That of off compares each of
    its windows with the one before: what the machine's noise alone makes."""
    wanted = [answer.text for answer in windows["off"][0].answers]
    return [_of_mode(mode, windows[mode], windows["off"], wanted, threshold, count_us) for mode in MODES]


def _of_mode(
    mode: str, own: Sequence[Window], off: Sequence[Window], wanted: Sequence[str], threshold: float, count_us: float
) -> dict[str, Any]:
    itl = [window.itl_ms() for window in own]
    p99 = [figures["p99"] for figures in itl]
    ratios = _ratios(p99, [window.itl_ms()["p99"] for window in off]) if mode != "off" else _ratios(p99[1:], p99[:-1])
    found = [s for window in own if (s := window.seconds_to_balance(threshold)) is not None]
    different = sum(answer.text != text for window in own for answer, text in zip(window.answers, wanted, strict=True))
    before = [r["max_mean_before"] for w in own for r in w.reports if r["ended_at"] > w.shifted_at]
    last = own[-1]
    return {
        "mode": mode,
        "tokens_per_s": round(median(window.tokens_per_s for window in own), 1),
        "itl_ms": {key: round(median(figures[key] for figures in itl), 1) for key in ("p50", "p99", "max")},
        "seconds_to_balance": round(median(found), 2) if found else None,
        "bytes_moved": round(median(window.bytes_moved() for window in own)),
        "bytes_lower_bound": round(median(sum(r["bytes_lower_bound"] for r in window.reports) for window in own)),
        "tokens_equal": different == 0,
        "different_texts": different,
        "rounds": len(own),
        "rebalances": round(median(len(window.reports) for window in own), 1),
        "max_mean_before": round(max(before), 3) if before else None,
        "max_mean_end": round(median(window.max_mean for window in own), 3),
        "p99_ms_spread": {"min": min(p99), "max": max(p99)},
        "p99_over_off": round(median(ratios), 3) if ratios else None,
        "p99_over_off_spread": {"min": round(min(ratios), 3), "max": round(max(ratios), 3)} if ratios else None,
        "client_lag_ms": round(max(window.client_lag_s for window in own) * 1e3, 1),
        "verdict": verdict(ratios) if mode != "off" else "noise",
        "count_us_per_layer": round(count_us, 2),
        "timeline": last.timeline(),
        "moved_at_s": [round(report["ended_at"] - last.began_at, 2) for report in last.reports],
        "shift_at_s": [round(last.shifted_at - last.began_at, 2)],
    }


def verdict(ratios: Sequence[float]) -> str:
    """Whether the p99 of a mode is within `CLAIM` times that of off, as far as its ratios in all rounds tell."""
    if len(ratios) < FEWEST:
        return f"too few rounds to tell: {len(ratios)}"
    if max(ratios) <= CLAIM:
        return f"within {CLAIM} x in every round"
    if min(ratios) > CLAIM:
        return f"over {CLAIM} x in every round"
    return f"hidden by noise: on both sides of {CLAIM} x"


def _ratios(values: Sequence[float], bases: Sequence[float]) -> list[float]:
    return [value / base for value, base in zip(values, bases, strict=True)]
