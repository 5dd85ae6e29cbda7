"""The backup of experts in host memory: a daemon for each node, and the ways of engines to it.

Owns: the node's shared segment, who keeps what, the daemon, and the sources that read from it.
Uses: the words and servers of `weights`, the line to a supervisor.
Never: decides where experts live, or touches a slot.
The daemon's process is small: only `source.py`, which engines use, needs tensors.
"""
