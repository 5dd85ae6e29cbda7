"""The load balancer's planner: which expert gets how many copies, and where. Pure; compiled by numba."""

from elastic_moe.placement.balance.planner import ALGORITHMS, balance, warm_up

__all__ = ["ALGORITHMS", "balance", "warm_up"]
