"""The placement of a start, by past loads if `eplb.initial_loads` names a file of them."""

from pathlib import Path

import numpy as np

from elastic_moe.config import EplbConfig
from elastic_moe.control.rebalance import load_balancer
from elastic_moe.placement.loads import parse_loads
from elastic_moe.placement.placement import Placement, fewest_slots, initial_placement
from elastic_moe.placement.topology import Topology


def choose_placement(
    num_layers: int,
    num_experts: int,
    topology: Topology,
    eplb: EplbConfig,
    *,
    slots_per_rank: int | None,
    redundant_slots: int,
) -> Placement:
    """The placement of L layers x E experts at the start. Every rank computes the same.

    `slots_per_rank` S is ceil(E / R) + `redundant_slots` unless given. Spare slots hold replicas if any were asked for
    (by either argument); the remainder of E / R alone makes none. With `eplb.initial_loads` experts are placed by these
    loads.

    Raises:
        NotEnoughSlots: R * S < E; the message says how many are needed.
        ValueError: the file of initial loads cannot be read or does not fit.
    """
    replicate = slots_per_rank is not None or redundant_slots > 0
    if slots_per_rank is None:
        slots_per_rank = fewest_slots(num_experts, topology.num_ranks) + redundant_slots
    if not eplb.initial_loads:
        return initial_placement(num_layers, num_experts, topology, slots_per_rank, replicate=replicate)
    loads = read_loads(eplb.initial_loads, num_layers, num_experts)
    return load_balancer()(loads, topology, slots_per_rank, algorithm=eplb.algorithm)


def read_loads(path: str | Path, num_layers: int, num_experts: int) -> np.ndarray:
    """float64 [L, E] from a file with what GET /elastic/loads answers; see `parse_loads`.

    Raises:
        ValueError: it cannot be read, or does not fit; one line that names the file and what is wrong.
    """
    try:
        return parse_loads(Path(path).read_text(), num_layers, num_experts)
    except (OSError, ValueError) as error:
        raise ValueError(f"initial loads {path}: {error}") from error
