"""How even a placement makes the load, and whether a more even one is worth its moves. Pure numpy."""

from dataclasses import dataclass

import numpy as np

from elastic_moe.placement.placement import EMPTY, count_experts


def rank_loads(slots: np.ndarray, loads: np.ndarray, slots_per_rank: int) -> np.ndarray:
    """The load of every rank, an expert's load being shared evenly by its copies.

    Args:
        slots: int [L, P], the logical expert in each slot, -1 where empty.
        loads: [L, E], tokens per logical expert.
        slots_per_rank: S.

    Returns:
        float64 [L, R], in the unit of `loads`.
    """
    loads = np.asarray(loads, dtype=np.float64)
    share = loads / count_experts(slots, loads.shape[1]).clip(min=1)
    of_slot = np.where(slots == EMPTY, 0.0, np.take_along_axis(share, slots.clip(min=0), axis=1))
    return of_slot.reshape(len(slots), -1, slots_per_rank).sum(axis=2)


def max_over_mean(of_rank: np.ndarray, alive: np.ndarray | None = None) -> np.ndarray:
    """float64 [L]: the heaviest load over the mean of the ranks (of those `alive`, bool [R]); 1 without any load."""
    live = of_rank if alive is None else of_rank[:, alive]
    mean = live.mean(axis=1)
    return np.where(mean > 0, live.max(axis=1) / np.where(mean > 0, mean, 1.0), 1.0)


def balancedness(slots: np.ndarray, loads: np.ndarray, slots_per_rank: int) -> np.ndarray:
    """float64 [L]: mean load over the heaviest, 1 being even; over the ranks that hold anything. Shapes as above."""
    alive = (slots.reshape(len(slots), -1, slots_per_rank) != EMPTY).any(axis=(0, 2))
    return 1.0 / max_over_mean(rank_loads(slots, loads, slots_per_rank), alive)


@dataclass(frozen=True)
class MoveCost:
    """What a rebalance costs and how long it can pay: the cost model of `worth_moving`.

    The time of the experts of a layer grows with its heaviest rank, and the layers run one after the other. So the
    step gets shorter by `expert_share` times the relative drop of max / mean, averaged over the layers. While bytes
    move, the steps get longer by `slowdown`.
    """

    link_bytes_per_s: float
    """What the busiest link carries."""
    horizon_s: float
    """How long the loads are expected to stay as they are; a rebalance interval."""
    expert_share: float = 0.5
    """Part of a step that is spent in experts, 0..1."""
    slowdown: float = 0.05
    """How much longer steps take during the transfer, 0..1; 1 when serving pauses for it."""

    def __post_init__(self) -> None:
        if not self.link_bytes_per_s > 0 or not self.horizon_s >= 0:
            raise ValueError("link_bytes_per_s must be more than 0, and horizon_s 0 or more")
        if not (0 <= self.expert_share <= 1 and 0 <= self.slowdown <= 1):
            raise ValueError("expert_share and slowdown must be 0..1")


def worth_moving(old: np.ndarray, new: np.ndarray, bytes_on_busiest_link: float, cost: MoveCost) -> tuple[bool, str]:
    """Whether a rebalance gains more time than it costs, and why: what keeps a cluster from moving to and fro.

    Args:
        old: float [L], max / mean of each layer now.
        new: float [L], the same after the rebalance.
        bytes_on_busiest_link: what the busiest link has to carry.
        cost: the cost model.
    """
    if bytes_on_busiest_link <= 0:
        return False, "nothing moves"
    faster = cost.expert_share * float(1 - np.sum(new) / np.sum(old))
    transfer_s = bytes_on_busiest_link / cost.link_bytes_per_s
    gained_s, lost_s = faster * max(cost.horizon_s - transfer_s, 0.0), cost.slowdown * transfer_s
    reason = (
        f"steps {faster:+.2%} faster for {cost.horizon_s:.3g} s gain {gained_s:.3g} s; "
        f"{transfer_s:.3g} s of transfer cost {lost_s:.3g} s"
    )
    return gained_s > lost_s, reason
