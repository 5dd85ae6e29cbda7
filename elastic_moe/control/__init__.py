"""WHEN something is done: after a loss, and by the balancer.

Owns: recovery and its phases, rounds of the balancer, the gate by which they act in the step loop, reports.
Uses: every room above, clock, threads.
Never: sockets, processes. It plans nothing (`placement`) and moves nothing itself (`transport`, `weights`).
"""
