"""The object a process builds, and what it is made of.

Owns: `ElasticRuntime`, the loop around a forward, the forward of an idle rank, hooks.
Uses: every room above; no module state, so one process may build several.
Never: sockets, processes, randomness. A layer and an engine ask the runtime, it does not know them.
"""

from elastic_moe.runtime.runtime import ElasticRuntime

__all__ = ["ElasticRuntime"]
