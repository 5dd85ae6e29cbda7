"""Balance: a placement under which every rank gets the same load, from nothing or with few moves from the current one.

Pure: loads in, placement out, the same on every CPU. Shapes as in `placement.py`; N nodes, G expert groups.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from elastic_moe.errors import NotEnoughSlots
from elastic_moe.placement.balance.expert_groups import homes_of_experts
from elastic_moe.placement.balance.layer import keep_in_place
from elastic_moe.placement.balance.moves import steps_within
from elastic_moe.placement.balance.search import pack, replicate, solve
from elastic_moe.placement.placement import EMPTY, Placement
from elastic_moe.placement.repair import only_alive
from elastic_moe.placement.topology import Topology

TARGET_FROM_NOTHING = 1.005
TARGET_FROM_CURRENT = 1.02
"""max / mean rank load of a layer at which the search is content."""

SPREAD_TOLERANCE = 0.01
"""How much max / mean a layer may be over its target before two copies of an expert share a node to lower it."""

_FULL_LOAD = 1 << 32
_IDLE_LOAD = 1 << 10
"""What an expert without tokens counts, so that idle experts spread over the ranks too."""
_MILLION = 1_000_000
_ENDLESS = 1 << 60


@dataclass(frozen=True)
class Problem:
    """What an algorithm is given, checked, in integers; arrays are C-contiguous."""

    weight: np.ndarray
    """int64 [L, E]: loads relative to the heaviest expert of the layer."""
    has_load: np.ndarray
    """bool [L]: whether any expert of the layer has a token."""
    room: np.ndarray
    """int64 [R]: the first slots of each rank that may be filled; 0 for a dead one."""
    node: np.ndarray
    """int64 [R]: the fault domain of each rank, 0..N-1; all 0 when copies need not be apart."""
    domain: np.ndarray
    """int64 [R]: the domain of each rank; an expert stays in one."""
    home: np.ndarray
    """int64 [L, E]: the domain of each expert."""
    slots_per_rank: int
    current: np.ndarray | None
    """int32 [L, R, S]: what live ranks hold."""
    max_moves: int | None
    target: float


Algorithm = Callable[[Problem], np.ndarray]
"""From a problem to slots int32 [L, R, S]."""


def balance(
    loads: np.ndarray,
    topology: Topology,
    slots_per_rank: int,
    *,
    alive: Collection[int] | None = None,
    capacity: Sequence[int] | None = None,
    current: Placement | np.ndarray | None = None,
    max_moves: int | None = None,
    num_groups: int | None = None,
    target: float | None = None,
    algorithm: str = "search",
    version: int = 0,
    epoch: int = 0,
) -> Placement:
    """A placement for these loads, an expert's load being shared evenly by its copies.

    No rank holds two copies of an expert. Copies are put on different nodes, as evenly as can be, unless max / mean
    would exceed the target by more than SPREAD_TOLERANCE. Slots of dead ranks are -1, and so are slots for which no
    expert is left that its rank does not hold, or, with `current`, that need not be filled.

    With `current`, only what lowers max / mean to the target moves, the most gain per moved expert first, and no
    layer's maximum gets larger. A move is a slot of a live rank that holds an expert which its rank did not
    hold; what a rank keeps stays in its slot. Experts that no live rank holds are placed first, whatever `max_moves`.

    Args:
        loads: [L, E], tokens per logical expert in any unit, the same numbers on every rank.
        topology: the node of each of the R seats.
        slots_per_rank: S.
        alive: EP ranks that may hold experts; None means all seats.
        capacity: [R], usable slots of each rank, 0..S, the first ones of its block; None means S each.
        current: int [L, P], what every seat holds, or a placement; entries of dead ranks are ignored.
        max_moves: the most moves, over all layers; those with the most gain are made.
        num_groups: G; when G divides by the number of nodes, whole groups of experts stay on one node as in the
            hierarchical policy of DeepSeek's EPLB, otherwise this changes nothing.
        target: max / mean of a layer at which the search stops; None means TARGET_FROM_CURRENT with `current`,
            else TARGET_FROM_NOTHING.
        algorithm: a name in ALGORITHMS. `deepseek` is a reference: it places anew whatever is held, and may put two
            copies of an expert on one rank.
        version: version of the new placement.
        epoch: epoch of the new placement.

    Raises:
        NotEnoughSlots: the live ranks have fewer usable slots than E; the message says how many are short.
        ValueError: shapes, expert numbers, ranks, loads, groups, bounds or the algorithm do not fit.
    """
    target = _checked_options(algorithm, max_moves, target, current is not None)
    loads = _checked_loads(loads)
    room = _room(topology, slots_per_rank, alive, capacity)
    held = None if current is None else _held(current, loads, room, slots_per_rank)
    _check_room(loads.shape[1], room)
    problem = _problem(loads, topology, room, num_groups, slots_per_rank, held, max_moves, target)
    slots = ALGORITHMS[algorithm](problem)
    return Placement(slots.reshape(len(loads), -1), loads.shape[1], slots_per_rank, version=version, epoch=epoch)


def _problem(
    loads: np.ndarray,
    topology: Topology,
    room: np.ndarray,
    num_groups: int | None,
    slots_per_rank: int,
    held: np.ndarray | None,
    max_moves: int | None,
    target: float,
) -> Problem:
    weight = _weights(loads)
    # nodes are numbered anew, so that those without a live rank do not count; a dead rank goes with the first live one
    _, node = np.unique(np.where(room > 0, topology.nodes, np.array(topology.nodes)[room > 0][0]), return_inverse=True)
    node = node.astype(np.int64)
    domain, home = np.zeros_like(node), np.zeros_like(weight)
    homes = None if num_groups is None else homes_of_experts(weight, num_groups, room, node, held)
    if homes is not None:
        domain, node, home = node, domain, homes  # a group's copies share a node, so none need be apart
    return Problem(weight, loads.max(axis=1) > 0, room, node, domain, home, slots_per_rank, held, max_moves, target)


def warm_up() -> None:
    """Compile what `balance` calls, or read it from numba's cache: seconds the first time on a machine."""
    for algorithm in ALGORITHMS:
        start = balance(np.ones((1, 2)), Topology.uniform(2), 2, algorithm=algorithm)
        balance(np.array([[1.0, 9.0]]), Topology.uniform(2), 2, current=start, algorithm=algorithm)


def _search(problem: Problem) -> np.ndarray:
    """Greedy start unless something is held, then the local search of `search.py`."""
    slots, trail, steps = _solve(problem, None)
    if problem.max_moves is not None:
        budget = problem.max_moves
        gain_unit = np.where(problem.has_load, 1.0 / problem.weight.sum(axis=1), 0.0)
        allowed = steps_within(budget, trail, steps, gain_unit)
        if (allowed < steps).any():
            slots, _, _ = _solve(problem, allowed)
    return slots


def _solve(problem: Problem, max_steps: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    num_layers, num_ranks = len(problem.weight), len(problem.room)
    shape = (num_layers, num_ranks, problem.slots_per_rank)
    slots = np.full(shape, EMPTY, np.int32) if problem.current is None else problem.current.copy()
    most = 2 * num_ranks * problem.slots_per_rank
    if max_steps is None:
        max_steps = np.full(num_layers, most)
    trail = np.zeros((num_layers, most + 1, 2), np.int64)
    steps = solve(
        slots,
        problem.weight,
        problem.room,
        problem.node,
        problem.domain,
        problem.home,
        _limits(problem, problem.target),
        _limits(problem, problem.target + SPREAD_TOLERANCE),
        max_steps,
        problem.current is None,
        trail,
    )
    return slots, trail, steps


def _deepseek(problem: Problem) -> np.ndarray:
    """The greedy of DeepSeek's EPLB (github.com/deepseek-ai/EPLB, its README): replicate, then pack.

    Unlike it, no expert gets more copies than there are ranks; the published code is defined for equal ranks only.
    """
    slots = np.full((len(problem.weight), len(problem.room), problem.slots_per_rank), EMPTY, np.int32)
    for layer, (weight, home) in enumerate(zip(problem.weight, problem.home, strict=True)):
        copies = replicate(weight, problem.room, problem.domain, home)
        pack(slots[layer], copies, weight, problem.room, problem.node, problem.domain, home, False)
        if problem.current is not None:
            keep_in_place(slots[layer], problem.current[layer])
    return slots


ALGORITHMS: dict[str, Algorithm] = {"search": _search, "deepseek": _deepseek}


def _limits(problem: Problem, target: float) -> np.ndarray:
    """int64 [L, R]: `target` times the mean load of the live ranks of each rank's domain; endless without any load."""
    domains = np.arange(problem.domain.max() + 1)
    num_live = ((problem.domain == domains[:, None]) & (problem.room > 0)).sum(axis=1)
    total = np.stack([np.where(problem.home == d, problem.weight, 0).sum(axis=1) for d in domains], axis=1)
    mean = total // num_live
    limit = mean + mean // _MILLION * round((target - 1) * _MILLION)
    return np.where(problem.has_load[:, None], limit, _ENDLESS)[:, problem.domain]


def _checked_options(algorithm: str, max_moves: int | None, target: float | None, has_current: bool) -> float:
    """The target to search for."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {algorithm!r} must be one of {', '.join(ALGORITHMS)}")
    if max_moves is not None and (max_moves < 0 or not has_current or algorithm != "search"):
        raise ValueError(f"max_moves={max_moves} must be 0 or more, with current and the algorithm search")
    if target is None:
        target = TARGET_FROM_CURRENT if has_current else TARGET_FROM_NOTHING
    if not 1 <= target <= 1000:
        raise ValueError(f"target={target} must be 1 to 1000 (max / mean)")
    return target


def _checked_loads(loads: np.ndarray) -> np.ndarray:
    loads = np.asarray(loads, dtype=np.float64)
    if loads.ndim != 2 or not loads.size:
        raise ValueError(f"loads of shape {loads.shape} are not [L, E]")
    if not np.isfinite(loads).all() or (loads < 0).any():
        raise ValueError("loads must be finite and >= 0")
    return loads


def _weights(loads: np.ndarray) -> np.ndarray:
    heaviest = loads.max(axis=1, keepdims=True)
    return _IDLE_LOAD + (loads / np.where(heaviest > 0, heaviest, 1.0) * _FULL_LOAD).astype(np.int64)


def _room(
    topology: Topology, slots_per_rank: int, alive: Collection[int] | None, capacity: Sequence[int] | None
) -> np.ndarray:
    """int64 [R]: usable slots of each rank."""
    num_ranks = topology.num_ranks
    if slots_per_rank < 1:
        raise ValueError(f"slots_per_rank={slots_per_rank} must be 1 or more")
    live = range(num_ranks) if alive is None else set(alive)
    strangers = sorted(set(live) - set(range(num_ranks)))
    if strangers:
        raise ValueError(f"alive names ranks {strangers}, but the seats are 0..{num_ranks - 1}")
    room = np.full(num_ranks, slots_per_rank) if capacity is None else np.array(capacity, dtype=np.int64)
    if room.shape != (num_ranks,) or (room < 0).any() or (room > slots_per_rank).any():
        raise ValueError(f"capacity must be {num_ranks} numbers of slots, 0..{slots_per_rank} each")
    return np.where(np.isin(np.arange(num_ranks), list(live)), room, 0)


def _held(current: Placement | np.ndarray, loads: np.ndarray, room: np.ndarray, slots_per_rank: int) -> np.ndarray:
    """int32 [L, R, S]: what the usable slots of live ranks hold."""
    slots = current.slots if isinstance(current, Placement) else np.asarray(current)
    num_layers, num_experts = loads.shape
    shape = (num_layers, len(room) * slots_per_rank)
    if slots.shape != shape:
        raise ValueError(f"current of shape {slots.shape} is not [L, R * S] = {list(shape)}")
    held = only_alive(slots, slots_per_rank, np.flatnonzero(room).tolist())
    if held.min() < EMPTY or held.max() >= num_experts:
        raise ValueError(f"current names experts outside -1..{num_experts - 1}")
    held = held.reshape(num_layers, len(room), slots_per_rank)
    return np.where(np.arange(slots_per_rank) < room[:, None], held, np.int32(EMPTY))


def _check_room(num_experts: int, room: np.ndarray) -> None:
    num_alive, usable = int((room > 0).sum()), int(room.sum())
    if not num_alive:
        raise NotEnoughSlots(f"no live rank is left to hold {num_experts} experts")
    if usable < num_experts:
        raise NotEnoughSlots(
            f"{num_alive} live ranks with {usable} usable slots hold {usable} of {num_experts} experts, "
            f"{num_experts - usable} slots short in every layer"
        )
