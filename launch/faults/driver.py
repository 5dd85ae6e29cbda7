"""Drives a server through faults under load, one after the other."""

import asyncio
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console

from launch.faults.config import OF_NETWORK, ChaosConfig, ChaosRunConfig, server_overrides
from launch.faults.disk import flip_experts
from launch.faults.fork import Fork, fork_overrides, fork_within_s
from launch.faults.kinds import LASTS_S, Cuts, Fault, Fired, fire, schedule
from launch.faults.progress import largest, tell
from launch.faults.sabotage.sitecustomize import DIES
from launch.faults.summary import Round, is_good, placement_fault, summary
from launch.fork import without_weights
from launch.network import Network
from launch.server import POLL_S, START_TIMEOUT_S, OwnServer, ServerFailed, Target
from launch.streams import Answer, Load, make_asks

SABOTAGE = str(Path(__file__).parent / "sabotage")


def run(config: ChaosRunConfig, overrides: list[str]) -> int:
    """Start the server if none is given, break it, stop it, print the result: 0 when it is good, else 1."""
    chaos, console = config.chaos, Console(stderr=True, highlight=False)
    with ExitStack() as stack:
        own = network = make_fork = None
        if not chaos.url:
            model = config.model.path if "corrupt" in chaos.kind_names() else ""
            told = server_overrides(config, overrides)
            if set(OF_NETWORK) & set(chaos.kind_names()):
                network = stack.enter_context(Network(chaos.nodes))
            if "poison" in chaos.kind_names():
                stack.enter_context(in_environment("PYTHONPATH", SABOTAGE))
            if "fork" in chaos.kind_names():
                passed = fork_overrides(told, stack.enter_context(without_weights(Path(config.model.path))))
                make_fork = partial(Fork, chaos.ranks - 1, passed, fork_within_s(chaos.rejoin_timeout_s))
            own = stack.enter_context(OwnServer(chaos.ranks, chaos.nodes, told, model, network))
        found = break_server(chaos, own, console, network, make_fork)
    good = is_good(found, chaos.max_gap_ms or math.inf)
    if own is not None and good:
        own.forget_output()
    elif own is not None:
        console.print(f"what the server said: {own.folder}")
    print(json.dumps(found))
    return 0 if good else 1


def break_server(
    config: ChaosConfig,
    own: OwnServer | None,
    console: Console,
    network: Network | None = None,
    make_fork: Callable[[Target], Fork] | None = None,
) -> dict[str, Any]:
    """All rounds; the summary.

    Args:
        config: which faults.
        own: the server, if it was started here: only then can a node be killed.
        console: where progress is told.
        network: that of the server's nodes, if they are hosts of one.
        make_fork: how it can be forked.

    Raises:
        ServerFailed: the server does not come up, or fails undisturbed.
    """
    return asyncio.run(_Chaos(config, own, console, network, make_fork).run(own.url if own else config.url))


@contextlib.contextmanager
def in_environment(name: str, value: str) -> Iterator[None]:
    """What is started inside has the variable `name`."""
    before = os.environ.get(name)
    os.environ[name] = value if before is None else os.pathsep.join((value, before))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class _Chaos:
    def __init__(
        self,
        config: ChaosConfig,
        own: OwnServer | None,
        console: Console,
        network: Network | None,
        make_fork: Callable[[Target], Fork] | None,
    ) -> None:
        self._config = config
        self._network = network
        self._cuts: Cuts | None = None
        self._own = own
        self._make_fork = make_fork
        self._console = console

    async def run(self, url: str) -> dict[str, Any]:
        async with Target(url) as target:
            return await self._run(target)

    async def _run(self, target: Target) -> dict[str, Any]:
        begin = time.monotonic()
        status = await healed(target, self._config.ranks if self._own else None, frozenset(), START_TIMEOUT_S)
        if status is None:
            raise ServerFailed(f"not all ranks serve at {target.url} after {START_TIMEOUT_S:.0f} s")
        nodes = [m["node"] for m in sorted(status["members"], key=lambda m: m["rank"])]
        self._cuts = Cuts(self._network, nodes) if self._network else None
        self._console.print(f"{len(nodes)} ranks serve at {target.url} after {time.monotonic() - begin:.1f} s")
        config = self._config
        asks, model = make_asks(config.seed, config.requests), await target.model()
        undisturbed = Load(target.url, model, asks)
        await undisturbed.run()
        wanted = undisturbed.answers
        failed = next((answer.error or "cut off" for answer in wanted if not answer.finish), "")
        if failed:
            raise ServerFailed(f"the undisturbed run failed: {failed}")
        self._console.print(f"undisturbed: {sum(a.num_tokens for a in wanted)} tokens, {largest(wanted)}")
        rounds: list[Round] = []
        faults = schedule(config.seed, config.faults, config.kind_names(), nodes)
        for fault in faults:
            self._console.print(f"[bold]{len(rounds) + 1}/{len(faults)} {fault.kind}[/] of ranks {fault.ranks}")
            rounds.append(await self._round(target, fault, Load(target.url, model, asks), wanted, len(nodes)))
            tell(self._console, rounds[-1], asks, wanted)
            if rounds[-1].healed_s is None:
                break  # a group that is not whole tells nothing of the next fault
        return summary(rounds, wanted, len(faults)) | {"seed": config.seed, "kinds": list(config.kind_names())}

    async def _round(
        self, target: Target, fault: Fault, disturbed: Load, wanted: Sequence[Answer], num_ranks: int
    ) -> Round:
        before = await target.status()
        engines = {m["rank"]: psutil.Process(m["pid"]) for m in before["members"]}
        node = self._own.nodes[1].processes() if self._own and fault.kind == "kill_node" else []
        disk = self._own.disk if self._own and fault.kind == "corrupt" else None
        pieces = fault.after * sum(len(answer.arrivals) for answer in wanted)
        fork = self._make_fork(target) if self._make_fork and fault.kind == "fork" else None
        running = asyncio.create_task(disturbed.run(lambda: fork is not None and fork.is_starting))
        try:
            while disturbed.num_pieces < pieces and not running.done():
                await asyncio.sleep(0.001)
            if disk:
                await asyncio.to_thread(flip_experts, disk)
            poison = asyncio.create_task(target.complete([*DIES, 5])) if fault.kind == "poison" else None
            if fork:
                await fork.begin(fault.delay_s)
            fired = Fired(0.0, 0.0, ()) if running.done() else await fire(fault, engines, node, self._cuts)
            if fork:
                await fork.finish()
            await running
            refused = (await poison) if poison else None
            victims = frozenset[int]()
            if fired.victims and fault.kind not in LASTS_S:
                victims = frozenset(engines[rank].pid for rank in fault.ranks)
            survivors = num_ranks - len(victims) if node else num_ranks
            status = await healed(target, survivors, victims, self._config.rejoin_timeout_s)
            healed_s = time.time() - fired.over_at if status is not None else None
            if fork:
                await fork.compare()
        finally:
            running.cancel()
            if fork:
                fork.close()
            if disk:
                await asyncio.to_thread(flip_experts, disk)
        return Round(
            fault=fault,
            at=fired.at,
            fired=len(fired.victims) >= len(fault.ranks) and (fault.kind in LASTS_S or fired.died()),
            answers=tuple(disturbed.answers),
            reports=_since(await _events(target), before["epoch"]),
            healed_s=healed_s,
            placement_fault=placement_fault(status) if status is not None else "",
            client_lag_s=disturbed.lag_s,
            poison_status=refused,
            fork_fault=fork.fault if fork else "",
            in_load=fork.was_loading if fork else False,
        )


async def healed(
    target: Target, num_ranks: int | None, victims: frozenset[int], within_s: float
) -> dict[str, Any] | None:
    """The status once all ranks serve, without the processes `victims`; None when they do not in time.

    A placement that is still wrong then gets until the deadline to become right.
    """
    deadline, found = time.monotonic() + within_s, None
    while time.monotonic() < deadline:
        try:
            status = await target.status()
        except httpx.HTTPError:
            status = {"members": []}
        members = status["members"]
        serving = members and all(m["phase"] == "serving" and m["pid"] not in victims for m in members)
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
