"""What an expert is, and how one rank computes those in its slots.

Owns: the layout of an expert's tensors, `SlotExperts` (weights with a leading slot dimension), grouped GEMM, kernels.
Uses: torch; Triton and Gluon on a Hopper GPU, loaded when they are needed. No count is read on the host.
Never: torch.distributed, sockets, clock, threads, files. It does not know which expert is in which slot.
"""
