"""Which replica of an expert a rank sends its tokens to."""

import numpy as np

from elastic_moe.placement.placement import EMPTY, Placement
from elastic_moe.placement.topology import Topology


def dispatch_tables(placement: Placement, rank: int, topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """The slots that `rank` may use for each expert, and how many they are.

    Where every node that holds an expert holds equally many copies for its number of seats, a replica on the own rank
    is the only choice; else those on the own node; else all of them. Where they hold unequally many, near replicas
    would get more tokens than far ones: there all ranks use all replicas. So with equal tokens from every seat, each
    replica gets an even share, which is what `balance` counts on. Of several choices tokens take turns (token t
    uses choice (t + rank) % n, so ranks start at different replicas).

    The placement of the example in `Placement`, ranks 0 and 1 on one node, rank 2 on another. Expert 0 of layer 0 is in
    slots 0 and 4, one on each node: uneven, as node 0 has two seats, so all ranks use both in turn. In layer 1 it is
    in slots 0, 3 and 5, one for each seat, so a rank uses its own. The others have one copy:

    >>> placement = Placement(np.array([[0, 1, 2, 3, 0, -1], [0, 1, 2, 0, 3, 0]]), num_experts=4, slots_per_rank=2)
    >>> choices, num_choices = dispatch_tables(placement, rank=1, topology=Topology((0, 0, 1)))
    >>> num_choices.tolist()
    [[2, 1, 1, 1], [1, 1, 1, 1]]
    >>> choices[0].tolist()  # token t of rank 1 takes column t % num_choices: slot 4 first, rank 0 starts with slot 0
    [[4, 0, 4], [1, 1, 1], [2, 2, 2], [3, 3, 3]]
    >>> choices[1].tolist()
    [[3, 3, 3], [1, 1, 1], [2, 2, 2], [4, 4, 4]]

    Returns:
        (choices int32 [L, E, R], num_choices int32 [L, E]). `choices` is rotated by `rank` already and repeats
        cyclically, so every entry is a valid slot; its width R is fixed, whatever the number of replicas.
    """
    num_layers, num_experts, num_ranks = placement.num_layers, placement.num_experts, topology.num_ranks
    node_of_rank = np.unique(topology.nodes, return_inverse=True)[1]
    owner = np.arange(placement.slots.shape[1]) // placement.slots_per_rank
    layer, slot = np.nonzero(placement.slots != EMPTY)
    key = layer * num_experts + placement.slots[layer, slot]
    near_first = np.where(owner == rank, 0, np.where(node_of_rank[owner] == node_of_rank[rank], 1, 2))
    distance = np.where(_is_even(key, owner[slot], node_of_rank, num_layers * num_experts)[key], near_first[slot], 0)
    order = np.argsort(key * 3 + distance, kind="stable")
    key, slot, distance = key[order], slot[order], distance[order]
    copies = np.bincount(key, minlength=num_layers * num_experts)
    first = np.cumsum(copies) - copies
    counts = np.bincount(key[distance == distance[first][key]], minlength=num_layers * num_experts).clip(max=num_ranks)
    turns = (np.arange(num_ranks) + rank) % np.arange(1, num_ranks + 1)[:, None]
    choices = slot.astype(np.int32)[first[:, None] + turns[counts - 1]]
    shape = (num_layers, num_experts)
    return choices.reshape(*shape, -1), counts.astype(np.int32).reshape(shape)


def _is_even(key: np.ndarray, owner: np.ndarray, node_of_rank: np.ndarray, num_keys: int) -> np.ndarray:
    """bool [num_keys]: whether the nodes that hold copies of an expert hold equally many for their number of seats.

    `key` (layer and expert) and `owner` (rank) are those of each copy.
    """
    seats = np.bincount(node_of_rank)
    on_node = np.bincount(key * len(seats) + node_of_rank[owner], minlength=num_keys * len(seats))
    on_node = on_node.reshape(num_keys, len(seats))
    holds = on_node > 0
    seats_of_holders = holds @ seats
    return (on_node * seats_of_holders[:, None] == on_node.sum(axis=1, keepdims=True) * (holds * seats)).all(axis=1)
