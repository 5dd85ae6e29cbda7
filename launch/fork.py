"""What a user does for R-Fork: a model folder without weights, for a server that takes them from one that runs."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_WEIGHTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@contextmanager
def without_weights(model: Path) -> Iterator[Path]:
    """A folder with those files of the folder `model` that hold no weights; it is there meanwhile."""
    with tempfile.TemporaryDirectory(prefix="fork-") as folder:
        for name in NO_WEIGHTS:
            if (model / name).exists():
                shutil.copy(model / name, folder)
        yield Path(folder)
