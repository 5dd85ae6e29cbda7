"""The members of an epoch and how they talk: view, process groups with deadlines, their store, the step barrier.

Owns sockets and torch's process groups of one epoch, to be thrown away with it. Uses errors, background, deadlines.
Never decides who is a member, and never touches torch.distributed's global group. `view` loads no torch.
"""
