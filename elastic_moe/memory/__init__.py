"""GPU memory that other processes of this host map.

Owns: the driver's calls for it (`device_memory`), and one buffer a rank that all members of a view see (`PeerMemory`).
Uses: torch, `cuda.bindings`, a local socket and a thread that hand out a file descriptor, waits with a deadline.
Never: torch.distributed, files, processes. What lies in the memory is its user's business.
"""
