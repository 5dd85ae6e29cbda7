"""WHICH BYTES, and whence.

Owns: the checkpoint reader, digests, the store of what a rank holds, the sources an expert can come from.
Uses: torch, safetensors, transformers' conversion mapping; files, and sockets and threads to ask peers.
Never: torch.distributed, processes. When something is fetched is decided in `control`.
"""
