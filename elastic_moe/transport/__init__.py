"""HOW BYTES MOVE: experts from rank to rank, and where they wait until they count.

Owns: transfers over a group, staging by collectives or by copy engines.
Uses: torch, the groups and peer memory of an epoch; plans of `placement`.
Never: torch.distributed, sockets, clock, threads, files. It verifies nothing: what came is judged in `weights`.
"""
