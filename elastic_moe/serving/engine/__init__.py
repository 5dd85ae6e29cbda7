"""The engine's process: one rank's model and its requests.

Owns: the step loop that keeps ranks together, continuous batching, the paged cache, sampling, the mailbox.
Uses: torch, transformers, the runtime, clock, threads. It may die at any moment.
Never: torch.distributed, processes. No word of HTTP.
"""
