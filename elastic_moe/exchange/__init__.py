"""HOW TOKENS MOVE to the slots that compute them, and the results back.

Owns: the interface `TokenExchange`, a file for each way (collectives, memory that all ranks have mapped), kernels.
Uses: torch, the groups and peer memory of an epoch; every wait has their deadline.
Never: torch.distributed, sockets, clock, threads, files. Which slot a token goes to is said by `placement`.
"""
