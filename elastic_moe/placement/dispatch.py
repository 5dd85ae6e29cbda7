"""Which replica of an expert a rank sends its tokens to."""

import numpy as np

from elastic_moe.placement.placement import EMPTY, Placement
from elastic_moe.placement.topology import Topology


def dispatch_tables(placement: Placement, rank: int, topology: Topology) -> tuple[np.ndarray, np.ndarray]:
    """The slots that `rank` may use for each expert, and how many they are.

    A replica on the own rank is the only choice; else those on the own node; else all of them, and tokens take
    turns (token t uses choice (t + rank) % n, so ranks start at different replicas).

    Returns:
        (choices int32 [L, E, R], num_choices int32 [L, E]). `choices` is rotated by `rank` already and repeats
        cyclically, so every entry is a valid slot; its width R is fixed, whatever the number of replicas.
    """
    num_layers, num_experts = placement.num_layers, placement.num_experts
    owner = np.arange(placement.slots.shape[1]) // placement.slots_per_rank
    nodes = np.array(topology.nodes)
    distance = np.where(owner == rank, 0, np.where(nodes[owner] == nodes[rank], 1, 2))
    layer, slot = np.nonzero(placement.slots != EMPTY)
    expert = placement.slots[layer, slot]
    order = np.lexsort((slot, distance[slot], expert, layer))
    key = (layer * num_experts + expert)[order]
    slot = slot[order]
    first = np.searchsorted(key, np.arange(num_layers * num_experts))
    nearest = distance[slot[first]]
    is_choice = distance[slot] == nearest[key]
    counts = np.bincount(key[is_choice], minlength=num_layers * num_experts).clip(max=topology.num_ranks)
    turn = (np.arange(topology.num_ranks)[None, :] + rank) % counts[:, None]
    choices = slot[first[:, None] + turn]
    shape = (num_layers, num_experts)
    return choices.astype(np.int32).reshape(*shape, -1), counts.astype(np.int32).reshape(shape)
