"""The faults of launch/chaos.py: which, when, at whom - a function of the seed - and how they are done."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from launch.faults.config import PAIRS

AFTER = (0.1, 0.7)
"""Fraction of the pieces of all answers that has arrived when a fault comes."""
DELAY_S = (0.03, 0.3)
"""From the first victim of kill_in_recovery to the second: as long as detection and recovery take."""
SIGNALS = {"stop": signal.SIGSTOP, "term": signal.SIGTERM}
"""Of the kinds that do not send SIGKILL."""


@dataclass(frozen=True)
class Fault:
    """One fault to come."""

    kind: str
    ranks: tuple[int, ...]
    """The victims, in their order."""
    after: float
    delay_s: float
    """Before the second victim of kill_in_recovery."""


@dataclass(frozen=True)
class Fired:
    """A fault that came."""

    at: float
    """Wall-clock time of the first signal."""
    victims: tuple[psutil.Process, ...]
    """Those that got the signal."""

    def died(self) -> bool:
        """Whether all of them have died."""
        return not any(is_alive(process) for process in self.victims)


def schedule(seed: int, count: int, kinds: Sequence[str], node_of_rank: Sequence[int]) -> list[Fault]:
    """`count` faults; each kind comes once before any comes again.

    kill_node takes the last node, and comes last, once: a node that is lost does not come back, so a run of nothing
    else has one fault.
    """
    rng = random.Random(f"faults {seed}")
    again = [kind for kind in kinds if kind != "kill_node"]
    end = ["kill_node"] if len(again) < len(kinds) else []
    count -= len(end)
    order = [kind for _ in range(-(-count // max(1, len(again)))) for kind in rng.sample(again, len(again))]
    ranks = range(len(node_of_rank))
    faults = []
    for kind in order[:count] + end:
        victims = rng.sample(ranks, 2 if kind in PAIRS else 1)
        if kind == "calm":
            victims = []
        if kind == "kill_node":
            victims = [rank for rank in ranks if node_of_rank[rank] == max(node_of_rank)]
        after, delay_s = rng.uniform(*AFTER), rng.uniform(*DELAY_S)
        faults.append(Fault(kind, tuple(victims), after, delay_s if kind == "kill_in_recovery" else 0.0))
    return faults


async def fire(fault: Fault, engines: Mapping[int, psutil.Process], node: Sequence[psutil.Process]) -> Fired:
    """Do it. Who has died before the signal is no victim.

    Args:
        fault: what to do.
        engines: the engine processes by rank.
        node: the process tree that kill_node kills.
    """
    number = SIGNALS.get(fault.kind, signal.SIGKILL)  # calm has nobody to send it to
    targets = list(node) if fault.kind == "kill_node" else [engines[rank] for rank in fault.ranks]
    victims, at = [], time.time()
    for i, process in enumerate(targets):
        if i and fault.kind == "kill_in_recovery":
            await asyncio.sleep(fault.delay_s)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            victims.append(process)
    return Fired(at, tuple(victims))


def is_alive(process: psutil.Process) -> bool:
    """Whether it has not died; one that nobody has waited for has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
