"""The members of an epoch, and how they talk.

Owns: `View` and `Member`, the process groups of an epoch and their end, the store they meet at, the step barrier.
Uses: torch.distributed, sockets, clock, threads. `view` alone loads no torch: supervisors read it.
Never: files, processes. Who is a member is decided in `membership`, what is sent by whoever sends it.
"""
