"""What launch/chaos.py tells people of each round."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from rich.console import Console
from rich.markup import escape

from launch.faults.summary import Round, longest_wait
from launch.faults.verdict import Verdict, compare
from launch.streams import Answer, Ask

LAG_TOLD_S = 0.1
"""A client that was not run for longer says so: then the machine is too busy for its gaps to mean much."""


def largest(answers: Sequence[Answer]) -> str:
    """The largest gap of all streams."""
    return f"largest gap {longest_wait(answers)[0] * 1e3:.0f} ms"


def tell(console: Console, one: Round, asks: Sequence[Ask], wanted: Sequence[Answer]) -> None:
    """Print a round: its longest gap, each recovery, and each answer that is not as `wanted`."""
    healed = "[red]not healed[/]" if one.healed_s is None else f"healed after {one.healed_s:.1f} s"
    missed = "" if one.counted else f", [red]{'in no recovery' if one.fired else 'did not come'}[/]"
    _, begin, num_streams = longest_wait(one.answers)
    where = f"of {num_streams} streams, from {begin - one.at:.2f} s after the fault" if one.at else ""
    lag = f", this client was kept waiting {one.client_lag_s * 1e3:.0f} ms" if one.client_lag_s > LAG_TOLD_S else ""
    console.print(f"  {largest(one.answers)} {where}{lag}, {healed}{missed}")
    for event in one.reports:
        if event["rank"] not in event["report"]["joined"]:
            console.print(f"  rank {event['rank']} {_recovery(event['report'], one.at)}")
    for fault in filter(None, (one.placement_fault, one.fork_fault)):
        console.print(f"  [red]{escape(fault)}[/]")
    for i, (ask, want, got) in enumerate(zip(cycle(asks), cycle(wanted), one.answers, strict=False)):
        if (verdict := compare(want, got)) is not Verdict.SAME:
            console.print(f"  [red]stream {i} {verdict.value}[/] {got.error}", markup=True)
            console.print(f"    {ask}\n    wanted {want.text!r}\n    got    {got.text!r}", markup=False)


def _recovery(report: Mapping[str, Any], fault_at: float) -> str:
    changes = [f"{what} {report[what]}" for what in ("lost", "joined") if report[what]]
    if report["rejected"]:
        changes.append(f"{report['rejected']} copies refused")
    phases = ", ".join(f"{phase} {seconds * 1e3:.0f}" for phase, seconds in report["phase_s"].items())
    noticed_ms = (report["noticed_at"] - fault_at) * 1e3
    told = f"epoch {report['epoch']}: {', '.join(changes)} after {noticed_ms:.0f} ms; {phases} ms"
    return f"{told}, attempts {report['attempts']}"
