"""The processes of a seat: the one that must not die, and how it talks to the one that may.

Owns: children and their channel, the supervisor of a rank, a child's side of it, ports, the lighthouse's process.
Uses: processes, sockets, clock, threads. It speaks no word of serving.
Never: torch. The lighthouse is a process of its own, for torchft loads it; nothing here imports that file.
"""
