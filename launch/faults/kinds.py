"""The faults of launch/chaos.py: which, when, at whom - a function of the seed - and how they are done."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import psutil

from launch.faults.config import OF_NETWORK, PAIRS
from launch.faults.hang import hang_main_thread
from launch.network import Network

AFTER = (0.1, 0.7)
"""Fraction of the pieces of all answers that has arrived when a fault comes."""
DELAY_S = {"kill_in_recovery": (0.03, 0.12), "hang_in_recovery": (0.03, 0.3), "fork": (0.0, 0.4)}
"""From the first victim to the second: as long as detection and recovery take. From the moment that a fork begins to
load to the victim: as long as the demo model takes."""
DAEMON = "elastic_moe.backup.daemon"
SIGNALS = {"stop": signal.SIGSTOP, "term": signal.SIGTERM}
"""Of the kinds that do not send SIGKILL."""
IN_RECOVERY = ("kill_in_recovery", "hang_in_recovery")
LASTS_S = {"cut": 6.0, "partition": 8.0, "slow": 3.0}
"""Kinds that end by themselves, nobody being killed, and after how many seconds."""
SLOW_S = (0.09, 0.01)
"""A slow process stands still for the first, and runs for the second, again and again."""


@dataclass(frozen=True)
class Fault:
    """One fault to come."""

    kind: str
    ranks: tuple[int, ...]
    """The victims, in their order."""
    after: float
    delay_s: float
    """Before the second victim of IN_RECOVERY, or the one of a fork."""


@dataclass(frozen=True)
class Fired:
    """A fault that came."""

    at: float
    """Wall-clock time of its begin."""
    over_at: float
    """Wall-clock time of its end: from then on all could be well again."""
    victims: tuple[psutil.Process, ...]
    """Those that it came to."""

    def died(self) -> bool:
        """Whether all of them have died."""
        return not any(is_alive(process) for process in self.victims)


def schedule(seed: int, count: int, kinds: Sequence[str], node_of_rank: Sequence[int]) -> list[Fault]:
    """`count` faults; each kind comes once before any comes again.

    kill_node takes the last node, and comes last, once: a node that is lost does not come back, so a run of nothing
    else has one fault.
    """
    rng = random.Random(f"faults {seed}")
    ranks = range(len(node_of_rank))
    again = [kind for kind in kinds if kind != "kill_node"]
    end = ["kill_node"] if len(again) < len(kinds) else []
    count -= len(end)
    order = [kind for _ in range(-(-count // max(1, len(again)))) for kind in rng.sample(again, len(again))]
    faults = []
    for kind in order[:count] + end:
        victims = rng.sample(ranks, 2 if kind in PAIRS else 1)
        if kind in ("calm", "poison"):
            victims = []
        if kind == "cut":
            victims = [node_of_rank.index(node) for node in rng.sample(sorted(set(node_of_rank)), 2)]
        if kind == "kill_node":
            victims = [rank for rank in ranks if node_of_rank[rank] == max(node_of_rank)]
        if kind == "partition":
            victims = [rank for rank in ranks if node_of_rank[rank] > max(node_of_rank) // 2]
        after, delay_s = rng.uniform(*AFTER), rng.uniform(*DELAY_S.get(kind, (0.0, 0.0)))
        faults.append(Fault(kind, tuple(victims), after, delay_s))
    return faults


async def fire(
    fault: Fault, engines: Mapping[int, psutil.Process], node: Sequence[psutil.Process], cuts: "Cuts | None" = None
) -> Fired:
    """Do it, to its end if it has one. Who has died before a signal is no victim.

    Args:
        fault: what to do.
        engines: the engine processes by rank.
        node: the process tree that kill_node kills.
        cuts: the wires between the ranks' hosts.
    """
    targets = list(node) if fault.kind == "kill_node" else [engines[rank] for rank in fault.ranks]
    if fault.kind == "kill_daemon":
        targets = [*backup_daemons(engines.values()), *targets]
    at = time.time()
    if fault.kind in OF_NETWORK and cuts is not None:
        await cuts.last(fault, LASTS_S[fault.kind])
        victims = targets
    elif fault.kind == "slow":
        victims = [process for process in targets if await _slow_down(process, LASTS_S["slow"])]
    else:
        victims = await _signal(fault, targets)
    return Fired(at, time.time() if fault.kind in LASTS_S else at, tuple(victims))


def backup_daemons(engines: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that stand beside these engines."""
    found = []
    for engine in engines:
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor = engine.parent()
            beside = supervisor.children() if supervisor else []
            found += [process for process in beside if DAEMON in process.cmdline()]
    return found


class Cuts:
    """The network of a server whose nodes are hosts of it."""

    def __init__(self, network: Network, node_of_rank: Sequence[int]) -> None:
        self._network = network
        self._node_of_rank = node_of_rank

    async def last(self, fault: Fault, seconds: float) -> None:
        """Cut what `fault` names, and connect it again: for a cut the nodes of its two victims from each other, for a
        partition those of its victims from all others."""
        nodes = {self._node_of_rank[rank] for rank in fault.ranks}
        others = set(self._node_of_rank) - nodes
        if fault.kind == "cut":
            nodes, others = {min(nodes)}, {max(nodes)}
        self._network.cut(nodes, others)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._network.heal()


async def _signal(fault: Fault, targets: Sequence[psutil.Process]) -> list[psutil.Process]:
    number = SIGNALS.get(fault.kind, signal.SIGKILL)  # calm has nobody to send it to
    victims = []
    for i, process in enumerate(targets):
        if i and fault.kind in IN_RECOVERY:
            await asyncio.sleep(fault.delay_s)
        with contextlib.suppress(psutil.NoSuchProcess):
            if fault.kind == "hang" or (i and fault.kind == "hang_in_recovery"):
                hang_main_thread(process.pid)
            else:
                process.send_signal(number)
            victims.append(process)
    return victims


async def _slow_down(process: psutil.Process, seconds: float) -> bool:
    """Let it run a tenth of the time. Whether it lived to the end."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(SLOW_S[0])
            process.send_signal(signal.SIGCONT)
            await asyncio.sleep(SLOW_S[1])
    except psutil.NoSuchProcess:
        return False
    return is_alive(process)


def is_alive(process: psutil.Process) -> bool:
    """Whether it has not died; one that nobody has waited for has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
