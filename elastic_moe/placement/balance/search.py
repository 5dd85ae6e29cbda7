"""How one layer is balanced, compiled by numba: replicate, pack, then a local search that counts its moves.

`replicate` and `pack` are the greedy of DeepSeek's EPLB (github.com/deepseek-ai/EPLB, its README). The search is our
own: while the heaviest rank is over its limit, take the step that lessens the excess of all ranks over their limits
most per expert moved. A step lets an expert of the heaviest rank change places with one of a lighter rank, or turns
a slot whose expert has other copies (or an empty one) into a copy of an expert of the heaviest rank.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from elastic_moe.placement.balance.layer import NONE, Layer, keep_in_place, new_layer, put, swap


class _Step(NamedTuple):
    """What is in (rank, slot) gives way to a copy of `expert`, or, that being -1, swaps with (other, other_slot)."""

    gain: int
    moves: int
    rank: int
    slot: int
    other: int
    other_slot: int
    expert: int


@njit(cache=True, nogil=True)
def solve(
    slots: np.ndarray,
    weight: np.ndarray,
    room: np.ndarray,
    node: np.ndarray,
    domain: np.ndarray,
    home: np.ndarray,
    limit: np.ndarray,
    loose_limit: np.ndarray,
    max_steps: np.ndarray,
    is_new: bool,
    trail: np.ndarray,
) -> np.ndarray:
    """Balance every layer of `slots` int32 [L, R, S] in place: from nothing if `is_new`, else from what it holds.

    Copies are kept on different nodes unless a rank would be over its `loose_limit` for it. `trail` int64
    [L, steps, 2] gets the moves so far and the heaviest load before the first step and after each.

    Returns:
        int64 [L]: how many steps were taken.
    """
    steps = np.zeros(len(slots), np.int64)
    for i in range(len(slots)):
        before = slots[i].copy()
        if is_new:
            copies = replicate(weight[i], room, domain, home[i])
            pack(slots[i], copies, weight[i], room, node, domain, home[i], True)
        layer = new_layer(slots[i], room, node, domain, home[i], weight[i], limit[i].copy())
        if is_new:
            layer.held[:] = True  # nothing is moved, so the steps are chosen by their gain alone
        trail[i, 0, 0] = _cover(layer)
        trail[i, 0, 1] = layer.load.max()
        steps[i] = _search(layer, True, 0, max_steps[i], trail[i])
        layer.limit[:] = loose_limit[i]
        steps[i] = _search(layer, False, steps[i], max_steps[i], trail[i])
        keep_in_place(slots[i], before)
    return steps


@njit(cache=True, nogil=True)
def replicate(weight: np.ndarray, room: np.ndarray, domain: np.ndarray, home: np.ndarray) -> np.ndarray:
    """int64 [E]: copies of each expert; every further slot of a domain goes to its expert with most load per copy."""
    copies = np.ones(len(weight), np.int64)
    for this in range(domain.max() + 1):
        share = np.where(home == this, weight, NONE)
        in_domain = np.where(domain == this, room, 0)
        num_ranks = (in_domain > 0).sum()
        for _ in range(in_domain.sum() - (home == this).sum()):
            expert = share.argmax()
            if share[expert] == NONE:
                break
            copies[expert] += 1
            share[expert] = weight[expert] // copies[expert] if copies[expert] < num_ranks else NONE
        for expert in np.flatnonzero(home == this):
            copies[expert] = min(copies[expert], num_ranks)
    return copies


@njit(cache=True, nogil=True)
def pack(
    slots: np.ndarray,
    copies: np.ndarray,
    weight: np.ndarray,
    room: np.ndarray,
    node: np.ndarray,
    domain: np.ndarray,
    home: np.ndarray,
    apart: bool,
) -> None:
    """Fill `slots` int32 [R, S]: the heaviest copy first, into the least loaded rank that has a free slot.

    With `apart`, no rank gets two copies of an expert (a copy without such a rank is left out), and copies go to
    different nodes while a slot is free there.
    """
    num_ranks, num_nodes = len(room), node.max() + 1
    share = weight // copies
    used, load = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    on_node = np.empty(num_nodes, np.int64)
    on_rank = np.empty(num_ranks, np.bool_)
    for expert in np.argsort(-share, kind="mergesort"):
        on_node[:] = 0
        on_rank[:] = False
        for _ in range(copies[expert]):
            best, apart_best = NONE, NONE
            for rank in range(num_ranks):
                if used[rank] >= room[rank] or home[expert] != domain[rank] or (apart and on_rank[rank]):
                    continue
                if best == NONE or load[rank] < load[best]:
                    best = rank
                is_apart = on_node[node[rank]] * num_nodes < copies[expert]
                if is_apart and (apart_best == NONE or load[rank] < load[apart_best]):
                    apart_best = rank
            if apart and apart_best != NONE:
                best = apart_best
            if best == NONE:
                break
            slots[best, used[best]] = expert
            used[best] += 1
            load[best] += share[expert]
            on_rank[best] = True
            on_node[node[best]] += 1


@njit(cache=True, nogil=True)
def _cover(layer: Layer) -> int:
    """Give every expert without a copy, heaviest first, a slot that is empty or whose expert has other copies.

    It is the one for which the heaviest load among the ranks that it concerns is least.
    """
    moves = 0
    lost = np.flatnonzero(layer.copies == 0)
    for expert in lost[np.argsort(-layer.weight[lost], kind="mergesort")]:
        best, least, best_slot = NONE, 0, NONE
        for rank in range(len(layer.room)):
            if layer.home[expert] != layer.domain[rank]:
                continue
            for slot in range(layer.room[rank]):
                old = layer.slots[rank, slot]
                if old != NONE and layer.copies[old] < 2:
                    continue
                load = layer.load[rank] + layer.weight[expert]
                if old != NONE:
                    load -= layer.share[old, 1]
                    for i in range(layer.copies[old]):
                        other = layer.holders[old, i]
                        if other != rank:
                            load = max(load, layer.load[other] + layer.share[old, 0] - layer.share[old, 1])
                if best == NONE or load < least:
                    best, least, best_slot = rank, load, slot
        moves += _moves(layer, best, layer.slots[best, best_slot], expert)
        put(layer, best, best_slot, expert)
    return moves


@njit(cache=True, nogil=True)
def _moves(layer: Layer, rank: int, old: int, new: int) -> int:
    """Moves more when `new` takes the place of `old` on `rank`; less than 0 when an earlier move is taken back."""
    moves = 0
    if new != NONE and not layer.held[new, rank]:
        moves += 1
    if old != NONE and not layer.held[old, rank]:
        moves -= 1
    return moves


@njit(cache=True, nogil=True)
def _search(layer: Layer, spread: bool, step: int, max_steps: int, trail: np.ndarray) -> int:
    """Steps until no rank is over its limit or none helps, `max_steps` at most; how many there were.

    The heaviest load never grows. With `spread`, no step puts more copies on a node than an even spread needs.
    """
    load = layer.load
    while step < max_steps:
        heavy, above = 0, load[0] - layer.limit[0]
        for rank in range(1, len(load)):
            if load[rank] - layer.limit[rank] > above:
                heavy, above = rank, load[rank] - layer.limit[rank]
        if above <= 0:
            break
        best = _best_copy(layer, heavy, spread, _Step(0, 1, NONE, NONE, NONE, NONE, NONE))
        best = _best_swap(layer, heavy, spread, best)
        if best.gain == 0:
            break
        if best.expert == NONE:
            swap(layer, best.rank, best.slot, best.other, best.other_slot)
        else:
            put(layer, best.rank, best.slot, best.expert)
        step += 1
        trail[step, 0] = trail[step - 1, 0] + best.moves
        trail[step, 1] = load.max()
    return step


@njit(cache=True, nogil=True)
def _more_excess(above: int, more: int) -> int:
    """How much the excess grows of a rank that is `above` its limit and gets `more` load."""
    return max(above + more, 0) - max(above, 0)


@njit(cache=True, nogil=True)
def _is_better(gain: int, moves: int, best: _Step) -> bool:
    """Whether it gains more per move; no move counts as half a one."""
    return gain * max(2 * best.moves, 1) > best.gain * max(2 * moves, 1)


@njit(cache=True, nogil=True)
def _best_swap(layer: Layer, heavy: int, spread: bool, best: _Step) -> _Step:
    """`best`, or a better exchange of an expert of `heavy` with a lighter one, or an empty slot, of another rank."""
    slots, load, limit, share, copies = layer.slots, layer.load, layer.limit, layer.share, layer.copies
    held, on_rank, on_node, node, room, domain = (
        layer.held,
        layer.on_rank,
        layer.on_node,
        layer.node,
        layer.room,
        layer.domain,
    )
    num_nodes = on_node.shape[1]
    has_new = np.zeros(len(load), np.int64)  # whether a rank has an expert that it could give back at no move
    for rank in range(len(load)):
        for slot in range(room[rank]):
            if slots[rank, slot] != NONE and not held[slots[rank, slot], rank]:
                has_new[rank] = 1
    for slot in range(room[heavy]):
        given = slots[heavy, slot]
        if given == NONE:
            continue
        for rank in range(len(load)):
            above = load[rank] - limit[rank]
            if above >= 0 or on_rank[given, rank] or domain[rank] != domain[heavy]:
                continue
            crowds = spread and node[rank] != node[heavy]
            if crowds and on_node[given, node[rank]] * num_nodes >= copies[given]:
                continue
            moves_given = (not held[given, rank]) - (not held[given, heavy])
            most_gain = min(load[heavy] - limit[heavy], -above, share[given, 1])
            if not _is_better(most_gain, moves_given - has_new[rank], best):
                continue
            for other_slot in range(room[rank]):
                taken = slots[rank, other_slot]
                shift = share[given, 1] - (share[taken, 1] if taken != NONE else 0)
                if shift <= 0 or load[rank] + shift >= load[heavy]:
                    continue
                gain = -_more_excess(load[heavy] - limit[heavy], -shift) - _more_excess(above, shift)
                moves = moves_given
                if taken != NONE:
                    moves += (not held[taken, heavy]) - (not held[taken, rank])
                if not _is_better(gain, moves, best):
                    continue
                if taken != NONE and on_rank[taken, heavy]:
                    continue
                if taken != NONE and crowds and on_node[taken, node[heavy]] * num_nodes >= copies[taken]:
                    continue
                best = _Step(gain, moves, heavy, slot, rank, other_slot, NONE)
    return best


@njit(cache=True, nogil=True)
def _best_copy(layer: Layer, heavy: int, spread: bool, best: _Step) -> _Step:
    """`best`, or a better replacement of a slot that may be given up: by any expert on `heavy`, elsewhere by its own.

    The parts of a gain are added up as if they hit different ranks. Excess is convex, so that is never too much.
    """
    slots, load, limit, share, copies = layer.slots, layer.load, layer.limit, layer.share, layer.copies
    held, on_rank, on_node, node, room, domain, home = (
        layer.held,
        layer.on_rank,
        layer.on_node,
        layer.node,
        layer.room,
        layer.domain,
        layer.home,
    )
    num_experts, num_nodes = on_node.shape
    relief = np.full(num_experts, NONE, np.int64)
    most_relief = 0
    for slot in range(room[heavy]):
        expert = slots[heavy, slot]
        if expert != NONE:
            relief[expert] = _relief_by_copy(layer, expert)
            most_relief = max(most_relief, relief[expert])
    for rank in range(len(load)):
        above = load[rank] - limit[rank]
        for slot in range(room[rank]):
            old = slots[rank, slot]
            if old != NONE and copies[old] < 2:
                continue
            if old != NONE and spread and on_node[old, node[rank]] * num_nodes < copies[old]:
                continue
            loss = _loss_without(layer, old, rank, load[heavy])
            if loss == NONE:
                continue
            freed = share[old, 1] if old != NONE else 0
            back = 0 if old == NONE or held[old, rank] else 1
            if rank != heavy and not _is_better(most_relief - loss + max(min(above, freed), 0), 1 - back, best):
                continue
            for i in range(num_experts if rank == heavy else room[heavy]):
                expert = i if rank == heavy else slots[heavy, i]
                if expert == NONE or load[rank] + share[expert, 2] - freed >= load[heavy]:
                    continue
                if on_rank[expert, rank] or home[expert] != domain[rank]:
                    continue
                if spread and on_node[expert, node[rank]] * num_nodes > copies[expert]:
                    continue
                if relief[expert] == NONE:
                    relief[expert] = _relief_by_copy(layer, expert)
                gain = relief[expert] - loss - _more_excess(above, share[expert, 2] - freed)
                moves = (not held[expert, rank]) - back
                if _is_better(gain, moves, best):
                    best = _Step(gain, moves, rank, slot, NONE, NONE, expert)
    return best


@njit(cache=True, nogil=True)
def _loss_without(layer: Layer, expert: int, rank: int, most: int) -> int:
    """The excess that the other copies add without the one on `rank`; -1 if one of them would get to `most`."""
    if expert == NONE:
        return 0
    loss, more = 0, layer.share[expert, 0] - layer.share[expert, 1]
    for i in range(layer.copies[expert]):
        other = layer.holders[expert, i]
        if other != rank:
            if layer.load[other] + more >= most:
                return NONE
            loss += _more_excess(int(layer.load[other] - layer.limit[other]), more)
    return loss


@njit(cache=True, nogil=True)
def _relief_by_copy(layer: Layer, expert: int) -> int:
    """The excess that the ranks of an expert lose if it gets one more copy."""
    relief, less = 0, layer.share[expert, 2] - layer.share[expert, 1]
    for i in range(layer.copies[expert]):
        other = layer.holders[expert, i]
        relief -= _more_excess(int(layer.load[other] - layer.limit[other]), less)
    return relief
