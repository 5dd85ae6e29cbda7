"""The digests of a checkpoint's weights as an earlier start has found them: a file that goes bad later is found by it.

Beside the checkpoint, or in the user's cache where that folder cannot be written. It is of a checkpoint by its headers
(names, sizes, shapes) and of the form that weights have in memory. Values may have been changed on purpose: so it has
a single vote, see `truth`.
"""

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

FILE = "elastic_moe_digests.json"
CACHE = Path("~/.cache/elastic_moe")


class DigestFile:
    """Of one checkpoint, in one form."""

    def __init__(self, folder: Path, fingerprint: str, form: str) -> None:
        """`fingerprint` names the checkpoint by its headers, `form` how its weights lie in memory."""
        self._fingerprint = f"{fingerprint}-{form}"
        self._places = [folder / FILE]
        with contextlib.suppress(RuntimeError):  # there is no home
            self._places.append(CACHE.expanduser() / f"{self._fingerprint}.json")

    def load(self) -> np.ndarray | None:
        """int64 [N] as they were saved; None if there are none that can be read."""
        for path in self._places:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return np.array(json.loads(path.read_text())[self._fingerprint], dtype=np.int64)
        return None

    def save(self, digests: Iterable[int]) -> None:
        """Keep them where that is possible; a file that is there appears or changes in one instant."""
        for path in self._places:
            with contextlib.suppress(OSError):
                known = {}
                with contextlib.suppress(OSError, ValueError, TypeError):
                    known = dict(json.loads(path.read_text()))
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{FILE}", delete=False) as file:
                    json.dump(known | {self._fingerprint: list(digests)}, file)
                Path(file.name).chmod(0o644)
                os.replace(file.name, path)
                log.info("digests of the weights are kept in %s", path)
                return
