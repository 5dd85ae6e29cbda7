"""Break a server on purpose while it streams, and compare every token with an undisturbed run.

    python launch/chaos.py chaos.seed=7 chaos.faults=3 chaos.kinds=kill,kill_two
    python launch/chaos.py chaos.url=http://127.0.0.1:8000
    python launch/chaos.py chaos.nodes=2 chaos.kinds=kill,corrupt,kill_node elastic.redundant_slots=1

Kinds: kill, kill_two, kill_in_recovery (SIGKILL of an engine, of two at once, of a second while the first loss is
mended), stop (SIGSTOP), term (SIGTERM), corrupt (all experts on the last node's disk have wrong bits while an engine is
killed: they have to be refused, and read on the other node), kill_node (all processes of the last node; it cannot come
back, so it is the last fault, and healed means that the others serve), calm (nothing is done: what the same server and
this client show by themselves, to compare with).

Its last line of output is one JSON object; progress goes to standard error. Exit code 1: something was lost, changed
or repeated, a fault did not come, or a rank did not return. 2: it could not start.
"""

import asyncio
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
import psutil
from rich.console import Console

from launch.config import help_text, load
from launch.faults.config import ChaosConfig, ChaosRunConfig, server_overrides
from launch.faults.disk import flip_experts
from launch.faults.kinds import Fault, Fired, fire, schedule
from launch.faults.load import Answer, Ask, Load, Verdict, compare, make_asks
from launch.faults.server import START_TIMEOUT_S, OwnServer, Target
from launch.faults.summary import Round, is_good, longest_wait, placement_fault, summary

USAGE = "usage: python launch/chaos.py [chaos.KEY=VALUE ...] [what launch/serve.py takes ...]"
POLL_S = 0.1
LAG_TOLD_S = 0.1
"""A client that was not run for longer says so: then the machine is too busy for its gaps to mean much."""


class Chaos:
    """Drives one server through all rounds."""

    def __init__(self, config: ChaosConfig, own: OwnServer | None, console: Console) -> None:
        """`own` is the server when it was started here: only then can a node be killed."""
        self._config = config
        self._own = own
        self._console = console

    async def run(self) -> dict[str, Any]:
        """All rounds; the summary. RuntimeError when the server does not come up or fails undisturbed."""
        target = Target(await self._own.url() if self._own else self._config.url)
        try:
            return await self._run(target)
        finally:
            await target.close()

    async def _run(self, target: Target) -> dict[str, Any]:
        begin = time.monotonic()
        status = await healed(target, self._config.ranks if self._own else None, frozenset(), START_TIMEOUT_S)
        if status is None:
            raise RuntimeError(f"not all ranks serve at {target.url} after {START_TIMEOUT_S:.0f} s")
        nodes = [m["node"] for m in sorted(status["members"], key=lambda m: m["rank"])]
        self._console.print(f"{len(nodes)} ranks serve at {target.url} after {time.monotonic() - begin:.1f} s")
        config = self._config
        asks, model = make_asks(config.seed, config.requests), await target.model()
        undisturbed = Load(target.url, model, asks)
        await undisturbed.run()
        wanted = undisturbed.answers
        failed = next((answer.error or "cut off" for answer in wanted if not answer.finish), "")
        if failed:
            raise RuntimeError(f"the undisturbed run failed: {failed}")
        self._console.print(f"undisturbed: {sum(a.num_tokens for a in wanted)} tokens, {_largest(wanted)}")
        rounds: list[Round] = []
        faults = schedule(config.seed, config.faults, config.kind_names(), nodes)
        for fault in faults:
            self._console.print(f"[bold]{len(rounds) + 1}/{len(faults)} {fault.kind}[/] of ranks {fault.ranks}")
            rounds.append(await self._round(target, fault, Load(target.url, model, asks), wanted, len(nodes)))
            self._tell(rounds[-1], asks, wanted)
            if rounds[-1].healed_s is None:
                break  # a group that is not whole tells nothing of the next fault
        return summary(rounds, wanted, len(faults)) | {"seed": config.seed, "kinds": list(config.kind_names())}

    async def _round(
        self, target: Target, fault: Fault, disturbed: Load, wanted: Sequence[Answer], num_ranks: int
    ) -> Round:
        before = await target.status()
        engines = {m["rank"]: psutil.Process(m["pid"]) for m in before["members"]}
        node = self._own.processes(1) if self._own and fault.kind == "kill_node" else []
        disk = self._own.disk if self._own and fault.kind == "corrupt" else None
        pieces = fault.after * sum(len(answer.arrivals) for answer in wanted)
        running = asyncio.create_task(disturbed.run())
        try:
            while disturbed.num_pieces < pieces and not running.done():
                await asyncio.sleep(0.001)
            if disk:
                await asyncio.to_thread(flip_experts, disk)
            fired = Fired(0.0, ()) if running.done() else await fire(fault, engines, node)
            await running
            dead = frozenset(engines[rank].pid for rank in fault.ranks) if fired.victims else frozenset()
            alive = num_ranks - len(dead) if node else num_ranks
            status = await healed(target, alive, dead, self._config.rejoin_timeout_s)
        finally:
            running.cancel()
            if disk:
                await asyncio.to_thread(flip_experts, disk)
        healed_s = time.time() - fired.at if status is not None else None
        return Round(
            fault=fault,
            at=fired.at,
            fired=len(fired.victims) >= len(fault.ranks) and fired.gone(),
            answers=tuple(disturbed.answers),
            reports=_since(await _events(target), before["epoch"]),
            healed_s=healed_s,
            placement_fault=placement_fault(status) if status is not None else "",
            client_lag_s=disturbed.lag_s,
        )

    def _tell(self, one: Round, asks: Sequence[Ask], wanted: Sequence[Answer]) -> None:
        healed = "[red]not healed[/]" if one.healed_s is None else f"healed after {one.healed_s:.1f} s"
        missed = "" if one.counted else f", [red]{'in no recovery' if one.fired else 'did not come'}[/]"
        _, begin, num_streams = longest_wait(one.answers)
        where = f"of {num_streams} streams, from {begin - one.at:.2f} s after the fault" if one.at else ""
        lag = f", this client was kept waiting {one.client_lag_s * 1e3:.0f} ms" if one.client_lag_s > LAG_TOLD_S else ""
        self._console.print(f"  {_largest(one.answers)} {where}{lag}, {healed}{missed}")
        for event in one.reports:
            report = event["report"]
            if event["rank"] in report["joined"]:
                continue
            changes = [f"{what} {report[what]}" for what in ("lost", "joined") if report[what]]
            if report["rejected"]:
                changes.append(f"{report['rejected']} copies refused")
            phases = ", ".join(f"{phase} {seconds * 1e3:.0f}" for phase, seconds in report["phase_s"].items())
            self._console.print(
                f"  rank {event['rank']} epoch {report['epoch']}: {', '.join(changes)} after"
                f" {(report['noticed_at'] - one.at) * 1e3:.0f} ms; {phases} ms, attempts {report['attempts']}"
            )
        if one.placement_fault:
            self._console.print(f"  [red]{one.placement_fault}[/]")
        for i, (ask, want, got) in enumerate(zip(asks, wanted, one.answers, strict=True)):
            if (verdict := compare(want, got)) is not Verdict.SAME:
                self._console.print(f"  [red]stream {i} {verdict.value}[/] {got.error}", markup=True)
                self._console.print(f"    {ask}\n    wanted {want.text!r}\n    got    {got.text!r}", markup=False)


async def healed(target: Target, num_ranks: int | None, dead: frozenset[int], within_s: float) -> dict[str, Any] | None:
    """The status once all ranks serve, without the processes `dead`; None when they do not in time.

    A placement that is still wrong then gets until the deadline to become right.
    """
    deadline, found = time.monotonic() + within_s, None
    while time.monotonic() < deadline:
        try:
            status = await target.status()
        except httpx.HTTPError:
            status = {"members": []}
        members = status["members"]
        serving = members and all(m["phase"] == "serving" and m["pid"] not in dead for m in members)
        if serving and len(members) == (num_ranks or len(members)):
            found = status
            if not placement_fault(status):
                break
        await asyncio.sleep(POLL_S)
    return found


async def _events(target: Target) -> list[dict[str, Any]]:
    try:
        return await target.events()
    except httpx.HTTPError:
        return []  # then no fault counts as seen


def _since(events: Sequence[dict[str, Any]], epoch: int) -> tuple[dict[str, Any], ...]:
    recoveries = (event for event in events if event["report"]["type"] == "recovery")
    return tuple(event for event in recoveries if event["report"]["epoch"] > epoch)


def _largest(answers: Sequence[Answer]) -> str:
    return f"largest gap {longest_wait(answers)[0] * 1e3:.0f} ms"


def main() -> int:
    """Start the server if none is given, run, stop it, print the result."""
    overrides, console = sys.argv[1:], Console(stderr=True, highlight=False)
    if "--help" in overrides or "-h" in overrides:
        print(help_text(ChaosRunConfig, USAGE))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        config = load(ChaosRunConfig, "chaos", overrides)
        chaos = config.chaos
        with ExitStack() as stack:
            own = None
            if not chaos.url:
                model = config.model.path if "corrupt" in chaos.kind_names() else ""
                told = server_overrides(config, overrides)
                own = stack.enter_context(OwnServer(chaos.ranks, chaos.nodes, told, model))
            found = asyncio.run(Chaos(chaos, own, console).run())
    except (ValueError, RuntimeError, httpx.HTTPError) as error:
        print(f"elastic_moe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    good = is_good(found, chaos.max_gap_ms or math.inf)
    if own is not None and good:
        own.forget_output()
    elif own is not None:
        console.print(f"what the server said: {own.folder}")
    print(json.dumps(found))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
