"""What launch/chaos.py found: each round's part, and the JSON object of the whole run. Functions of their arguments."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from launch.faults.kinds import Fault
from launch.faults.verdict import Verdict, compare
from launch.figures import percentile
from launch.streams import Answer, Streamed

KILLS = ("kill", "kill_two", "kill_in_recovery", "corrupt", "fork")
"""Kinds whose victims die at once."""
INTERNAL_ERROR = 500
PHASES = ("detect", "view", "groups", "repair", "commit", "repeat")


@dataclass(frozen=True)
class Round(Streamed):
    """One fault and what came of it. Of a load that was asked again and again it has all answers, in turn."""

    fault: Fault
    at: float
    """Wall-clock time of the first signal; 0 when none was sent."""
    fired: bool
    """It came to all its victims, and those of a kind that kills have died."""
    reports: tuple[Mapping[str, Any], ...]
    """The events of /elastic/events since the round's start: `rank` and `report`."""
    healed_s: float | None
    """Until all ranks served again, from the end of the fault; None: not in time."""
    placement_fault: str
    """What is wrong with the placements of the healed group; empty: nothing."""
    poison_status: int | None = None
    """HTTP status of the answer to a poisonous request."""
    fork_fault: str = ""
    """What is wrong with the instance that was forked; empty: nothing."""
    in_load: bool = False
    """Whether the fork was loading when the fault came."""

    @property
    def counted(self) -> bool:
        """Whether each victim is among the lost of a recovery, and wrong bytes among what was refused. Of two with a
        cut wire between them one is enough; nobody may be lost because he is slow; poison is refused as an error."""
        lost = {rank for event in self.reports for rank in event["report"]["lost"]}
        victims, kind = set(self.fault.ranks), self.fault.kind
        seen = {"cut": bool(victims & lost), "slow": not lost}.get(kind, victims <= lost)
        was_refused = self.poison_status == INTERNAL_ERROR or kind != "poison"
        return self.fired and seen and was_refused and (self.rejected > 0 or kind != "corrupt")

    @property
    def in_recovery(self) -> bool:
        """Whether one of two victims was lost in the recovery from the other: a survivor tells of both at once."""
        lost = [set(event["report"]["lost"]) for event in self.reports]
        return self.fault.kind == "kill_in_recovery" and any(set(self.fault.ranks) <= ranks for ranks in lost)

    @property
    def rejected(self) -> int:
        """Copies of experts that were refused for their digest, on all ranks."""
        return sum(event["report"]["rejected"] for event in self.reports)


def placement_fault(status: Mapping[str, Any]) -> str:
    """What is wrong with the placement that the members of /elastic/status report; empty: nothing."""
    members = status["members"]
    if len({(m["placement_version"], m["placement_hash"]) for m in members}) != 1:
        return "the ranks' placements differ"
    for layer, rows in enumerate(zip(*(m["slots"] for m in members), strict=True)):
        missing = set(range(members[0]["num_experts"])) - {expert for row in rows for expert in row}
        if missing:
            return f"layer {layer} has no slot with experts {sorted(missing)}"
    return ""


def phases_ms(one: Round) -> dict[str, list[float]]:
    """Milliseconds in each phase, of each survivor, for the recoveries of this round in which a rank was lost.

    `detect` is of kinds whose victims die at once; `repeat` is from the end of the last of these recoveries to
    the first piece of any answer, so it includes the way to the client.
    """
    reports = [e["report"] for e in one.reports if e["report"]["lost"] and e["rank"] not in e["report"]["joined"]]
    found: dict[str, list[float]] = defaultdict(list)
    if not reports:
        return found
    first, last = min(r["epoch"] for r in reports), max(r["epoch"] for r in reports)
    for report in reports:
        if report["epoch"] == first and one.fault.kind in (*KILLS, "kill_node"):
            found["detect"].append((report["noticed_at"] - one.at) * 1e3)
        for phase, seconds in report["phase_s"].items():
            found[phase].append(seconds * 1e3)
    end = min(r["noticed_at"] + sum(r["phase_s"].values()) for r in reports if r["epoch"] == last)
    later = [arrival for answer in one.answers for arrival in answer.arrivals if arrival > end]
    if later:
        found["repeat"].append((min(later) - end) * 1e3)
    return found


def longest_wait(answers: Sequence[Answer]) -> tuple[float, float, int]:
    """The longest gap of all streams in seconds, the wall-clock time of its begin, and how many streams waited at least
    half as long at the same time."""
    gaps = [gap for answer in answers for gap in zip(answer.arrivals, answer.arrivals[1:], strict=False)]
    begin, end = max(gaps, key=lambda gap: gap[1] - gap[0], default=(0.0, 0.0))
    half = (end - begin) / 2
    return end - begin, begin, sum(min(b, end) - max(a, begin) >= half for a, b in gaps)


def summary(rounds: Sequence[Round], wanted: Sequence[Answer], planned: int) -> dict[str, Any]:
    """The JSON object of a run, without what the user gave.

    Args:
        rounds: those that were run.
        wanted: the answers of the undisturbed run.
        planned: faults that were to come.
    """
    kinds = sorted({one.fault.kind for one in rounds})
    judged = [
        (one.fault.kind, compare(w, a)) for one in rounds for w, a in zip(cycle(wanted), one.answers, strict=False)
    ]
    verdicts = Counter(verdict for _, verdict in judged)
    gaps = [gap for one in rounds for gap in one.gaps_ms]
    phases: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for one in rounds:
        for phase, values in phases_ms(one).items():
            phases[phase].extend(values)
    by_epoch = {event["report"]["epoch"]: event["report"] for one in rounds for event in one.reports}
    num_bytes: Counter[str] = Counter()
    for report in by_epoch.values():
        num_bytes.update(report["bytes_by_source"])
    return {
        "requests": verdicts.total(),
        "finished": verdicts.total() - verdicts[Verdict.UNFINISHED],
        "mismatched": verdicts[Verdict.MISMATCHED],
        "mismatched_by_kind": {kind: judged.count((kind, Verdict.MISMATCHED)) for kind in kinds},
        "duplicated": verdicts[Verdict.DUPLICATED],
        "lost": verdicts[Verdict.LOST],
        "faults": {
            "planned": planned,
            "fired": sum(one.fired for one in rounds),
            "counted": sum(one.counted for one in rounds),
        },
        "killed_in_recovery": sum(one.in_recovery for one in rounds),
        "killed_in_load": sum(one.in_load for one in rounds),
        "rejected": sum(one.rejected for one in rounds),
        "not_rejoined": sum(one.healed_s is None for one in rounds),
        "placements_wrong": sum(bool(one.placement_fault) for one in rounds),
        "forks_wrong": sum(bool(one.fork_fault) for one in rounds),
        "gap_ms": _spread_and_max(gaps),
        "gap_ms_by_kind": {
            kind: _spread_and_max([gap for one in rounds if one.fault.kind == kind for gap in one.gaps_ms])
            for kind in kinds
        },
        "client_lag_ms": _rounded(max((one.client_lag_s * 1e3 for one in rounds), default=None)),
        "phase_ms": {phase: _spread(values) for phase, values in phases.items() if values},
        "bytes_by_source": dict(num_bytes),
        "bytes_lower_bound": sum(report["bytes_lower_bound"] for report in by_epoch.values()),
    }


def is_good(found: Mapping[str, Any], max_gap_ms: float = math.inf) -> bool:
    """Whether nothing was lost, changed or repeated, every fault came, was seen and healed, no more bytes were moved
    than needed, every fork was right, and no stream waited longer than `max_gap_ms` where processes were killed."""
    zeros = ("mismatched", "duplicated", "lost", "not_rejoined", "placements_wrong", "forks_wrong")
    faults = found["faults"]
    longest = max((gap["max"] or 0.0 for kind, gap in found["gap_ms_by_kind"].items() if kind in KILLS), default=0.0)
    return (
        found["finished"] == found["requests"]
        and not any(found[key] for key in zeros)
        and faults["fired"] == faults["counted"] == faults["planned"]
        and sum(found["bytes_by_source"].values()) <= found["bytes_lower_bound"]
        and longest <= max_gap_ms
    )


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"p50": _rounded(percentile(values, 50)), "p99": _rounded(percentile(values, 99))}


def _spread_and_max(values: Sequence[float]) -> dict[str, float | None]:
    return {**_spread(values), "max": _rounded(max(values, default=None))}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
