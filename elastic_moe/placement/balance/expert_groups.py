"""Expert groups that stay together on a node, for routers that pick groups first (DeepSeek-V3)."""

import numpy as np

from elastic_moe.placement.placement import EMPTY

STAY_TOLERANCE = 1.05
"""Groups stay on the nodes where they are unless the heaviest node gets this many times the load it could have."""


def homes_of_experts(
    weight: np.ndarray, num_groups: int, room: np.ndarray, node: np.ndarray, current: np.ndarray | None
) -> np.ndarray | None:
    """The node of each expert, equally many groups on each: heaviest group first, into the lightest node with room.

    This is the first step of the hierarchical policy of DeepSeek's EPLB (github.com/deepseek-ai/EPLB).

    Args:
        weight: int64 [L, E].
        num_groups: G; group g has the experts [g * E / G, (g + 1) * E / G).
        room: int64 [R], usable slots of each rank.
        node: int64 [R], 0..N-1; those with room only count.
        current: int32 [L, R, S] or None; a layer keeps the homes of its groups while they are good enough.

    Returns:
        int64 [L, E], or None where G is not a multiple of N, or a node has no room for its share of the experts.

    Raises:
        ValueError: E is not a multiple of G.
    """
    num_layers, num_experts = weight.shape
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups={num_groups} must divide the {num_experts} experts")
    room_of_node = np.bincount(node, weights=room)
    num_nodes = len(room_of_node)
    if num_groups % num_nodes or room_of_node.min() < num_experts // num_nodes:
        return None
    in_group = num_experts // num_groups
    load = weight.reshape(num_layers, num_groups, in_group).sum(axis=2)
    homes = _pack_groups(load, num_nodes)
    if current is not None:
        kept = _majority(current // in_group, num_groups, num_nodes, node)
        kept_load, kept_groups = _per_node(kept, load, num_nodes)
        best_load, _ = _per_node(homes, load, num_nodes)
        stays = (kept_groups == num_groups // num_nodes).all(axis=1)
        stays &= kept_load.max(axis=1) <= best_load.max(axis=1) * STAY_TOLERANCE
        homes = np.where(stays[:, None], kept, homes)
    return homes.repeat(in_group, axis=1)


def _pack_groups(load: np.ndarray, num_nodes: int) -> np.ndarray:
    """int64 [L, G]: the node of each group."""
    num_layers, num_groups = load.shape
    row = np.arange(num_layers)
    homes = np.zeros((num_layers, num_groups), np.int64)
    on_node = np.zeros((num_layers, num_nodes), np.int64)
    groups = np.zeros_like(on_node)
    for group in np.argsort(-load, axis=1, kind="stable").T:
        full = groups == num_groups // num_nodes
        best = np.where(full, np.iinfo(np.int64).max, on_node).argmin(axis=1)
        homes[row, group] = best
        on_node[row, best] += load[row, group]
        groups[row, best] += 1
    return homes


def _majority(group: np.ndarray, num_groups: int, num_nodes: int, node: np.ndarray) -> np.ndarray:
    """int64 [L, G]: the node that holds most of each group; `group` int [L, R, S] is that of each slot, -1 if empty."""
    layer, rank, slot = np.nonzero(group != EMPTY)
    counts = np.zeros((len(group), num_groups, num_nodes), np.int64)
    np.add.at(counts, (layer, group[layer, rank, slot], node[rank]), 1)
    return counts.argmax(axis=2)


def _per_node(homes: np.ndarray, load: np.ndarray, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [L, N] each: load and number of groups of every node."""
    is_home = homes[:, :, None] == np.arange(num_nodes)
    return (is_home * load[:, :, None]).sum(axis=1), is_home.sum(axis=1)
