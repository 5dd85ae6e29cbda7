"""One layer while it is being balanced: a slot grid with the counts that follow it, compiled by numba.

All numbers are integers, so every CPU computes the same placement. Loops take arrays out of the `Layer` first: numba
counts references whenever a field is read.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

NONE = -1


class Layer(NamedTuple):
    """R ranks, S slots each, E experts, N nodes. Only the functions of this file change it.

    An expert may only be in its `home`, a domain of ranks: all ranks are one domain, or those of each node are.
    """

    slots: np.ndarray  # int32 [R, S], -1 is empty
    room: np.ndarray  # int64 [R]: slots that may be filled, the first ones; 0 for a dead rank
    node: np.ndarray  # int64 [R], 0..N-1
    domain: np.ndarray  # int64 [R]
    home: np.ndarray  # int64 [E]
    weight: np.ndarray  # int64 [E]
    limit: np.ndarray  # int64 [R]: a load that is good enough
    held: np.ndarray  # bool [E, R]: to put an expert where it was at first is no move
    load: np.ndarray  # int64 [R]
    copies: np.ndarray  # int64 [E]
    share: np.ndarray  # int64 [E, 3]: what each copy carries with one copy less, as it is, with one more
    holders: np.ndarray  # int32 [E, R]: the ranks that hold a copy, first `copies` entries
    on_rank: np.ndarray  # bool [E, R]
    on_node: np.ndarray  # int64 [E, N]


@njit(cache=True, nogil=True)
def new_layer(
    slots: np.ndarray,
    room: np.ndarray,
    node: np.ndarray,
    domain: np.ndarray,
    home: np.ndarray,
    weight: np.ndarray,
    limit: np.ndarray,
) -> Layer:
    """The counts of `slots`; a second copy of an expert on a rank is emptied first, and so is one away from home."""
    num_ranks, num_experts = len(room), len(weight)
    holders = np.empty((num_experts, num_ranks), np.int32)
    copies = np.zeros(num_experts, np.int64)
    on_rank = np.zeros((num_experts, num_ranks), np.bool_)
    on_node = np.zeros((num_experts, node.max() + 1), np.int64)
    for rank in range(num_ranks):
        for slot in range(slots.shape[1]):
            expert = slots[rank, slot]
            if expert == NONE:
                continue
            if on_rank[expert, rank] or home[expert] != domain[rank]:
                slots[rank, slot] = NONE
                continue
            holders[expert, copies[expert]] = rank
            copies[expert] += 1
            on_rank[expert, rank] = True
            on_node[expert, node[rank]] += 1
    share = np.empty((num_experts, 3), np.int64)
    load = np.zeros(num_ranks, np.int64)
    for expert in range(num_experts):
        for i in range(3):
            share[expert, i] = weight[expert] // max(copies[expert] - 1 + i, 1)
        for i in range(copies[expert]):
            load[holders[expert, i]] += share[expert, 1]
    held = on_rank.copy()
    return Layer(slots, room, node, domain, home, weight, limit, held, load, copies, share, holders, on_rank, on_node)


@njit(cache=True, nogil=True)
def put(layer: Layer, rank: int, slot: int, expert: int) -> None:
    """Replace what is in a slot by a copy of `expert`; what was there leaves its load to its other copies."""
    old = layer.slots[rank, slot]
    if old != NONE:
        _leave(layer, old, rank)
        layer.copies[old] -= 1
        layer.load[rank] -= layer.share[old, 1]
        _share_anew(layer, old)
    _enter(layer, expert, rank, int(layer.copies[expert]))
    layer.copies[expert] += 1
    layer.load[rank] += layer.share[expert, 1]
    _share_anew(layer, expert)
    layer.slots[rank, slot] = expert


@njit(cache=True, nogil=True)
def swap(layer: Layer, rank: int, slot: int, other: int, other_slot: int) -> None:
    """Exchange the contents of two slots of different ranks."""
    first, second = layer.slots[rank, slot], layer.slots[other, other_slot]
    for expert, here, there in ((first, rank, other), (second, other, rank)):
        if expert != NONE:
            _leave(layer, expert, here)
            _enter(layer, expert, there, int(layer.copies[expert] - 1))
            layer.load[here] -= layer.share[expert, 1]
            layer.load[there] += layer.share[expert, 1]
    layer.slots[rank, slot], layer.slots[other, other_slot] = second, first


@njit(cache=True, nogil=True)
def _leave(layer: Layer, expert: int, rank: int) -> None:
    """Take `rank` out of the holders, leaving the last of their entries free."""
    holders, last = layer.holders[expert], layer.copies[expert] - 1
    for i in range(last):
        if holders[i] == rank:
            holders[i] = holders[last]
            break
    layer.on_rank[expert, rank] = False
    layer.on_node[expert, layer.node[rank]] -= 1


@njit(cache=True, nogil=True)
def _enter(layer: Layer, expert: int, rank: int, entry: int) -> None:
    layer.holders[expert, entry] = rank
    layer.on_rank[expert, rank] = True
    layer.on_node[expert, layer.node[rank]] += 1


@njit(cache=True, nogil=True)
def _share_anew(layer: Layer, expert: int) -> None:
    old = layer.share[expert, 1]
    for i in range(3):
        layer.share[expert, i] = layer.weight[expert] // max(layer.copies[expert] - 1 + i, 1)
    for i in range(layer.copies[expert]):
        layer.load[layer.holders[expert, i]] += layer.share[expert, 1] - old


@njit(cache=True, nogil=True)
def keep_in_place(slots: np.ndarray, current: np.ndarray) -> None:
    """Reorder each rank's slots (both int32 [R, S]) so that an expert that stays on its rank stays in its slot."""
    num_ranks, num_slots = slots.shape
    for rank in range(num_ranks):
        for slot in range(num_slots):
            expert = current[rank, slot]
            if expert == NONE or slots[rank, slot] == expert:
                continue
            for other in range(num_slots):
                if slots[rank, other] == expert and current[rank, other] != expert:
                    slots[rank, other] = slots[rank, slot]
                    slots[rank, slot] = expert
                    break
