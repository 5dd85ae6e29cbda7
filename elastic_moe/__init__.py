"""Elastic expert parallelism for Mixture-of-Experts models on PyTorch.

Names are imported on first use, so that processes which need no torch (the supervisor) never load it.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from elastic_moe.integrations.transformers import elasticize
    from elastic_moe.layer import ElasticMoELayer
    from elastic_moe.membership.launch import Launch
    from elastic_moe.placement.placement import Placement
    from elastic_moe.placement.registry import PlacementRegistry
    from elastic_moe.runtime import ElasticRuntime

__all__ = ["ElasticMoELayer", "ElasticRuntime", "Launch", "Placement", "PlacementRegistry", "elasticize"]

_HOMES = {
    "ElasticMoELayer": "elastic_moe.layer",
    "ElasticRuntime": "elastic_moe.runtime",
    "Placement": "elastic_moe.placement.placement",
    "PlacementRegistry": "elastic_moe.placement.registry",
    "Launch": "elastic_moe.membership.launch",
    "elasticize": "elastic_moe.integrations.transformers",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'elastic_moe' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
