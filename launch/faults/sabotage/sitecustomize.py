"""A model that some prompts kill. Python runs this file first wherever its folder is in PYTHONPATH; nothing imports it.

A request whose prompt begins with `DIES` kills the process in whose batch it runs; with `RAISES` its forward raises.
Nothing of the product knows of it: `Batcher` is wrapped when it is imported.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

DIES = [7, 6, 7, 6, 7, 6, 7]
RAISES = [6, 7, 6, 7, 6, 7, 6]
SABOTAGED = "elastic_moe.serving.engine.batching"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the one module as anybody else would, and changes it when it has been loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, _target: ModuleType | None = None) -> Any:
        if name != SABOTAGED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sabotage(module.Batcher)

        spec.loader.exec_module = exec_module
        return spec


def sabotage(batcher: Any) -> None:
    """Have the model of a `Batcher` look for poison among the requests that run."""
    make, submit = batcher.__init__, batcher.submit
    poisonous: dict[str, list[int]] = {}

    def watched_submit(self: Any, message: Any) -> None:
        if (head := list(message.tokens[: len(DIES)])) in (DIES, RAISES):
            poisonous[message.request_id] = head
        submit(self, message)

    def watched_make(self: Any, *arguments: Any, **keywords: Any) -> None:
        make(self, *arguments, **keywords)
        processor = self._processor
        generate = processor._generation_step

        def watched_generate(model: Any) -> None:
            running = {name.rpartition("/")[0] for name in processor.scheduler.active_requests}
            kinds = [poisonous[request] for request in running & poisonous.keys()]
            if DIES in kinds:
                os.kill(os.getpid(), signal.SIGKILL)
            if RAISES in kinds:
                raise ValueError("this prompt is poison")
            generate(model)

        processor._generation_step = watched_generate

    batcher.__init__, batcher.submit = watched_make, watched_submit


sys.meta_path.insert(0, _Finder())
