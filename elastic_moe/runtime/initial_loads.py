"""The file of `eplb.initial_loads`: past loads by which the experts are placed at the start."""

from pathlib import Path

import numpy as np

from elastic_moe.placement.loads import parse_loads


def read_loads(path: str | Path, num_layers: int, num_experts: int) -> np.ndarray:
    """float64 [L, E] from a file with what GET /elastic/loads answers; see `parse_loads`.

    Raises:
        ValueError: it cannot be read, or does not fit; one line that names the file and what is wrong.
    """
    try:
        return parse_loads(Path(path).read_text(), num_layers, num_experts)
    except (OSError, ValueError) as error:
        raise ValueError(f"initial loads {path}: {error}") from error
