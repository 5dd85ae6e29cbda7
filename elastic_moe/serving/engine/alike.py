"""What all ranks of a launch must have the same, or they serve wrong tokens without a word."""

import hashlib
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from elastic_moe.config import ServeConfig
from elastic_moe.weights.shards import Shards, has_weights

ELASTIC = ("redundant_slots", "slots_per_rank", "grow_slots", "min_members")
OF_THE_DIGEST = 12


def alike(config: ServeConfig, dtype: torch.dtype) -> dict[str, str]:
    """By the key by which it is set, as a user would say it; `dtype` is that of the model.

    Raises:
        CheckpointError: the weights' headers cannot be read.
    """
    folder = Path(config.model.path)
    eplb = asdict(config.eplb)
    loads = eplb.pop("initial_loads")
    elastic = asdict(config.elastic)
    found = {
        "elastic_moe's version": _version(),
        "torch's version": ".".join(torch.__version__.split(".")[:2]),
        "model.dtype": str(dtype).removeprefix("torch."),
        "model.path: config.json": _digest(folder / "config.json"),
        "model.path: names, sizes and shapes of its weights": _weights(folder),
        "model.load_from": config.model.load_from or "none",
        "eplb.initial_loads: the file": _digest(Path(loads)) if loads else "none",
    }
    found |= {f"elastic.{key}": str(elastic[key]) for key in ELASTIC}
    found |= {f"exchange.{key}": str(value) for key, value in asdict(config.exchange).items()}
    return found | {f"eplb.{key}": str(value) for key, value in eplb.items()}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:OF_THE_DIGEST] if path.is_file() else "none"


def _weights(folder: Path) -> str:
    return Shards(folder).fingerprint[:OF_THE_DIGEST] if has_weights(folder) else "none"


def _version() -> str:
    try:
        return version("elastic-moe")
    except PackageNotFoundError:  # it runs from a folder
        return "of its folder"
