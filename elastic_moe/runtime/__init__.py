"""The object a process builds, and what it is made of."""

from elastic_moe.runtime.runtime import ElasticRuntime

__all__ = ["ElasticRuntime"]
