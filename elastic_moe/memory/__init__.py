"""GPU memory that other processes of this host map.

Owns: the driver's calls for it (`device_memory`), one buffer a rank that all members of a view see (`PeerMemory`), and
how much memory is left (`free`).
Uses: torch, `cuda.bindings`, psutil, the kernel's files about memory, a local socket and a thread that hand out a file
descriptor, waits with a deadline.
Never: torch.distributed, processes. What lies in the memory is its user's business.
"""
