"""A change of placement cut into small ones, each of which leaves every expert covered.

What arrives waits in staging until all of a chunk is there, so a chunk bounds the staging. Shapes as in `placement.py`.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from elastic_moe.placement.placement import EMPTY, Placement


def chunks(current: np.ndarray, goal: Placement, max_received: int, max_layers: int) -> Iterator[np.ndarray]:
    """The slots after each chunk, int32 [L, P], from `current` (excluded) to those of `goal` (the last).

    Layers change in rising order. A layer's moves are cut into closed sets (see `closed_sets`) and packed into chunks
    in which no rank receives more than `max_received` experts and no more than `max_layers` layers change. Only a
    closed set that asks for more on its own makes a larger chunk, of at most one layer.

    Args:
        current: int [L, P], what is committed now; it covers what `goal` covers.
        goal: the placement to reach.
        max_received: experts that a rank may receive in a chunk, at least 1.
        max_layers: layers that may change in a chunk, at least 1.

    Raises:
        ValueError: shapes or bounds do not fit.
    """
    if current.shape != goal.slots.shape:
        raise ValueError(f"slots {current.shape} cannot become slots {goal.slots.shape}")
    if max_received < 1 or max_layers < 1:
        raise ValueError(f"max_received={max_received} and max_layers={max_layers}: both must be 1 or more")
    slots = np.array(current, dtype=np.int32)
    received: Counter[int] = Counter()
    layers: set[int] = set()
    for layer in np.flatnonzero((slots != goal.slots).any(axis=1)).tolist():
        for targets in closed_sets(slots[layer], goal.slots[layer], goal.num_experts):
            arrivals = Counter(
                target // goal.slots_per_rank for target in targets if goal.slots[layer, target] != EMPTY
            )
            full = len(layers | {layer}) > max_layers
            full |= any(received[rank] + count > max_received for rank, count in arrivals.items())
            if full and layers:
                yield slots.copy()
                received, layers = Counter(), set()
            slots[layer, targets] = goal.slots[layer, targets]
            received += arrivals
            layers.add(layer)
    if layers:
        yield slots.copy()


def closed_sets(slots: np.ndarray, goal: np.ndarray, num_experts: int) -> list[list[int]]:
    """The changed slots of one layer, in sets that can be changed one after another: none takes an expert's last copy.

    A set is a chain: the slot that gives up the last copy of an expert comes with a slot that receives it. Where no
    expert has a replica these are the cycles of a permutation; with replicas most sets are single slots.

    Args:
        slots: int [P], covering.
        goal: int [P], covering the same experts.
        num_experts: E.
    """
    copies = np.bincount(slots[slots != EMPTY], minlength=num_experts).tolist()
    changed = np.flatnonzero(slots != goal).tolist()
    waiting: dict[int, list[int]] = {}  # by expert, the slots still to receive it
    for target in reversed(changed):
        waiting.setdefault(int(goal[target]), []).append(target)
    done: set[int] = set()
    sets = []
    for first in sorted(changed, key=lambda target: slots[target] != EMPTY):  # empty slots first: they make replicas
        chain: list[int] = []
        target = first
        while target not in done:
            done.add(target)
            chain.append(target)
            lost, gained = int(slots[target]), int(goal[target])
            waiting[gained].remove(target)
            if gained != EMPTY:
                copies[gained] += 1
            if lost == EMPTY:
                break
            copies[lost] -= 1
            if copies[lost] > 0:
                break
            target = waiting[lost][-1]  # there is one: the goal covers it, and no slot that stays holds it
        if chain:
            sets.append(chain)
    return sets
