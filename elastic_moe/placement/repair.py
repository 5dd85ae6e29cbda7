"""Repair: the fewest moves after which every logical expert has a live slot again.

Input is what the members say they hold, `held` int32 [L, P]: no Placement yet, for it may leave experts uncovered.
Everything is counted in integers, so that ranks on different CPUs compute the same placement.
Shapes as in `placement.py`; N lost experts of the layer that lost most, C spare slots of the layer that has most.
"""

from collections.abc import Collection

import numpy as np

from elastic_moe.errors import NotEnoughSlots
from elastic_moe.placement.placement import EMPTY, Placement, count_experts, fewest_slots
from elastic_moe.placement.topology import Topology

_ENDLESS = np.iinfo(np.int64).max // 2
_FULL_LOAD = 1 << 32


def only_alive(held: np.ndarray, slots_per_rank: int, alive: Collection[int]) -> np.ndarray:
    """`held` int [L, P] with the slots of all ranks but the `alive` ones emptied: int32 [L, P], a copy.

    Raises:
        ValueError: `held` is not [L, R * slots_per_rank], or a rank in `alive` is none of its R seats.
    """
    if held.ndim != 2 or slots_per_rank < 1 or held.shape[1] % slots_per_rank:
        raise ValueError(f"held of shape {held.shape} is not [L, R * {slots_per_rank}]")
    num_ranks = held.shape[1] // slots_per_rank
    strangers = sorted(set(alive) - set(range(num_ranks)))
    if strangers:
        raise ValueError(f"alive names ranks {strangers}, but the seats are 0..{num_ranks - 1}")
    live = np.isin(np.arange(num_ranks), list(alive)).repeat(slots_per_rank)
    return np.where(live, held, EMPTY).astype(np.int32)


def grow(held: np.ndarray, slots_per_rank: int, new_slots_per_rank: int) -> np.ndarray:
    """`held` [L, R * slots_per_rank] with empty slots added at the end of every rank's block: [L, R * new].

    Raises:
        ValueError: `new_slots_per_rank` is less than `slots_per_rank`.
    """
    if new_slots_per_rank < slots_per_rank:
        raise ValueError(f"{slots_per_rank} slots per rank cannot grow to {new_slots_per_rank}")
    blocks = held.reshape(held.shape[0], held.shape[1] // slots_per_rank, slots_per_rank)
    room = ((0, 0), (0, 0), (0, new_slots_per_rank - slots_per_rank))
    return np.pad(blocks, room, constant_values=EMPTY).reshape(held.shape[0], -1)


def shrink(held: np.ndarray, slots_per_rank: int, new_slots_per_rank: int) -> np.ndarray:
    """`held` [L, R * slots_per_rank] with the first slots of every rank's block alone: [L, R * new]."""
    blocks = held.reshape(held.shape[0], held.shape[1] // slots_per_rank, slots_per_rank)
    return blocks[:, :, :new_slots_per_rank].reshape(held.shape[0], -1)


def lower_bound_moves(held: np.ndarray, num_experts: int, slots_per_rank: int, alive: Collection[int]) -> int:
    """The (layer, expert) pairs that no live slot holds: no repair can do with fewer moves."""
    return int((count_experts(only_alive(held, slots_per_rank, alive), num_experts) == 0).sum())


def repair(
    held: np.ndarray,
    num_experts: int,
    slots_per_rank: int,
    alive: Collection[int],
    topology: Topology,
    *,
    version: int,
    epoch: int,
    loads: np.ndarray | None = None,
) -> Placement:
    """The placement nearest to `held` in which live slots cover every expert.

    Slots of dead ranks become -1. Each uncovered (layer, expert) is put into exactly one slot and no other live slot
    changes, so a sole live copy is never overwritten. Within a layer the heaviest lost expert goes first. It takes
    an empty slot; if there is none, a slot of the expert with most copies, and of these one on the node that has
    most of them, so that the copies left stay in different fault domains. Among such slots it takes the one
    on the least loaded rank (replicas share a load evenly), then the lowest.

    Args:
        held: int [L, P], what every seat holds; -1 is empty. Entries of dead ranks are ignored.
        num_experts: E.
        slots_per_rank: S.
        alive: EP ranks of the live members.
        topology: the node of each of the R seats.
        version: version of the new placement.
        epoch: epoch of the new placement.
        loads: [L, E], tokens per expert in any unit, the same numbers on every rank; None means that all are equal.

    Raises:
        NotEnoughSlots: the live ranks have fewer slots than E; the message says how many would do.
        ValueError: shapes, expert numbers, ranks or loads do not fit.
    """
    slots = only_alive(held, slots_per_rank, alive)
    if slots.shape[1] != topology.num_ranks * slots_per_rank:
        raise ValueError(f"held has {slots.shape[1] // slots_per_rank} seats, but the topology {topology.num_ranks}")
    if slots.size and (slots.min() < EMPTY or slots.max() >= num_experts):
        raise ValueError(f"held names experts outside -1..{num_experts - 1}")
    _check_room(num_experts, slots_per_rank, len(set(alive)))
    weights = _weights(loads, (slots.shape[0], num_experts))
    lost = _lost_experts(count_experts(slots, num_experts), weights)
    if lost.size:
        filling = _Filling(slots, weights, slots_per_rank, alive, topology)
        for experts in lost.T:
            layers = np.flatnonzero(experts != EMPTY)
            filling.put(layers, filling.choose(layers), experts[layers])
    return Placement(slots, num_experts, slots_per_rank, version=version, epoch=epoch)


def _check_room(num_experts: int, slots_per_rank: int, num_alive: int) -> None:
    room = num_alive * slots_per_rank
    if not num_alive:
        raise NotEnoughSlots(f"no live rank is left to hold {num_experts} experts")
    if room < num_experts:
        raise NotEnoughSlots(
            f"{num_alive} live ranks x {slots_per_rank} slots hold {room} of {num_experts} experts, "
            f"{num_experts - room} slots short in every layer: "
            f"{fewest_slots(num_experts, num_alive)} slots per rank or more are needed"
        )


def _weights(loads: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """int64 [L, E]: `loads` relative to the heaviest of the layer; at least 1, so that idle experts spread too."""
    if loads is None:
        return np.full(shape, _FULL_LOAD, dtype=np.int64)
    loads = np.asarray(loads, dtype=np.float64)
    if loads.shape != shape:
        raise ValueError(f"loads of shape {loads.shape} are not [L, E] = {list(shape)}")
    if not np.isfinite(loads).all() or (loads < 0).any():
        raise ValueError("loads must be finite and >= 0")
    heaviest = loads.max(axis=1, keepdims=True, initial=0.0)
    return 1 + (loads / np.where(heaviest > 0, heaviest, 1.0) * _FULL_LOAD).astype(np.int64)


def _lost_experts(copies: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """int64 [L, N]: the experts without a copy, heaviest first, then lowest; -1 behind a layer's last."""
    key = np.where(copies == 0, -weights, 0)
    order = np.argsort(key, axis=1, kind="stable")[:, : (key < 0).sum(axis=1).max(initial=0)]
    return np.where(np.take_along_axis(key, order, axis=1) < 0, order, EMPTY)


class _Filling:
    """`slots` [L, P] while it is being filled in place, with the counts that the choice of a target needs.

    A step fills one slot in each of some layers. In every table the last column, which index -1 reads, is that of
    the empty slot: a slot of which there are endlessly many copies, with no load.
    """

    def __init__(
        self, slots: np.ndarray, weights: np.ndarray, slots_per_rank: int, alive: Collection[int], topology: Topology
    ) -> None:
        self._slots = slots
        num_layers, num_slots = slots.shape
        width = weights.shape[1] + 1
        self._owner = np.arange(num_slots) // slots_per_rank
        nodes, node_of_rank = np.unique(topology.nodes, return_inverse=True)
        self._node = node_of_rank[self._owner]
        row = np.arange(num_layers)[:, None]
        flat = ((row * len(nodes) + self._node) * width + slots % width).ravel()
        counts = np.bincount(flat, minlength=num_layers * len(nodes) * width)
        self._on_node = counts.reshape(num_layers, len(nodes), width)
        self._copies = self._on_node.sum(axis=1)
        self._copies[:, EMPTY] = _ENDLESS
        self._weights = np.pad(weights, ((0, 0), (0, 1)))
        self._share = self._weights // self._copies.clip(min=1)
        self._load = self._share[row, slots].reshape(num_layers, topology.num_ranks, slots_per_rank).sum(axis=2)
        self._spare = self._spare_slots(np.isin(self._owner, list(alive)))

    def _spare_slots(self, live: np.ndarray) -> np.ndarray:
        """int64 [L, C]: live slots that may be filled, rising; the first is repeated behind a layer's last."""
        copies = np.take_along_axis(self._copies, self._slots % self._copies.shape[1], axis=1)
        is_spare = live & (copies > 1)
        order = np.argsort(~is_spare, axis=1, kind="stable")[:, : is_spare.sum(axis=1).max()]
        return np.where(np.take_along_axis(is_spare, order, axis=1), order, order[:, :1])

    def choose(self, layers: np.ndarray) -> np.ndarray:
        """int64 [len(layers)]: the slot that each of `layers` can best give away."""
        row, spare = layers[:, None], self._spare[layers]
        expert = self._slots[row, spare]
        copies = self._copies[row, expert]
        on_node = np.where(expert == EMPTY, 0, self._on_node[row, self._node[spare], expert])
        load = self._load[row, self._owner[spare]] - self._share[row, expert]
        best = copies > 1
        for key in (-copies, -on_node, load):
            least = np.where(best, key, _ENDLESS).min(axis=1, keepdims=True)
            best &= key == least
        return spare[np.arange(len(layers)), best.argmax(axis=1)]

    def put(self, layers: np.ndarray, targets: np.ndarray, experts: np.ndarray) -> None:
        """Put an expert that has no copy into one target slot of each of `layers`."""
        rank, node = self._owner[targets], self._node[targets]
        victims = self._slots[layers, targets]
        self._slots[layers, targets] = experts
        for by, table in ((1, experts), (-1, victims)):
            self._copies[layers, table] += by
            self._on_node[layers, node, table] += by
        self._load[layers, rank] += self._weights[layers, experts] - self._share[layers, victims]
        self._share[layers, experts] = self._weights[layers, experts]
        self._raise_shares(layers[victims != EMPTY], victims[victims != EMPTY])

    def _raise_shares(self, layers: np.ndarray, experts: np.ndarray) -> None:
        """Share the load of an expert of each of `layers` over the copies it has left."""
        share = self._weights[layers, experts] // self._copies[layers, experts]
        more = share - self._share[layers, experts]
        index, holders = np.nonzero(self._slots[layers] == experts[:, None])
        np.add.at(self._load, (layers[index], self._owner[holders]), more[index])
        self._share[layers, experts] = share
