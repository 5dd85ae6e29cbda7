"""WHERE experts live: which slot holds which, which replica a token goes to, what a change has to move.

Owns: `Placement` and its maps, the registry of the committed one, repair, transfer plans, chunks, topology, loads.
Uses: numpy, and torch for tables and counts on the device. Functions of their arguments, the same on every rank.
Never: torch.distributed, sockets, clock, threads, files, randomness.
"""
