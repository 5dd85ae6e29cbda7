"""Processes: a child and its channel, the supervisor of a rank, the lighthouse beside it, ports that last.

Uses membership's launch and signals, and group's view. Never loads torch (but for `lighthouse`, a process of its own),
and knows nothing of what its children do. What it decides is in `watch`, without a clock.
"""
