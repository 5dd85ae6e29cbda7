"""The load balancer's planner: which expert gets how many copies, and where.

Owns: `balance` and its algorithms. Integers inside, so that every CPU finds the same placement.
Uses: numpy and numba, which compiles the search once a machine (`warm_up`).
Never: torch, sockets, clock, threads, files, randomness.
"""

from elastic_moe.placement.balance.planner import ALGORITHMS, balance, warm_up

__all__ = ["ALGORITHMS", "balance", "warm_up"]
