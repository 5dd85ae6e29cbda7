"""A batcher under test: what it delivered, checked to be without gaps, and how each request ended."""

import torch

from elastic_moe.config import ServingConfig
from elastic_moe.errors import BatchFailed
from elastic_moe.serving.engine.batching import Batcher
from elastic_moe.serving.protocol import Submit

PAGE = 8
PROMPTS = {"a": [5, 6, 7], "b": list(range(10, 41)), "c": [9] * 17, "d": [40, 3, 40]}
NEW_TOKENS = {"a": 12, "b": 5, "c": 20, "d": 1}


class Harness:
    """A batcher, with what it delivered: tokens by request, checked to be without gaps, and how each one ended."""

    def __init__(self, model: torch.nn.Module, eos: tuple[int, ...] = (), **settings: object) -> None:
        config = ServingConfig(**({"page_size": PAGE, "kv_cache_tokens": 512, "max_batch_tokens": 16} | settings))
        self.batcher = Batcher(model, config, eos, self._deliver)
        self.tokens: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self.num_batches = 0

    def submit(self, name: str, **settings: object) -> None:
        self.batcher.submit(Submit(**({
            "request_id": name, "tokens": PROMPTS.get(name), "num_generated": 0, "max_new_tokens": NEW_TOKENS.get(name),
        } | settings)))  # fmt: skip

    def step(self, num_forwards: int = 1) -> bool:
        if not self.batcher.prepare():
            return False
        self.num_batches += 1
        try:
            for _ in range(num_forwards):
                self.batcher.forward()
        except BatchFailed:
            return True
        self.batcher.commit()
        return True

    def run(self, num_forwards: int = 1) -> dict[str, list[int]]:
        for _ in range(1000):
            if not self.batcher.has_requests:
                return self.tokens
            self.step(num_forwards)
        raise AssertionError("requests are left")

    def _deliver(self, request_id: str, start: int, tokens: list[int], finish: str, error: str) -> None:
        if error:
            self.errors[request_id] = error
        known = self.tokens.setdefault(request_id, [None] * start)
        assert start == len(known)
        known += tokens
        if finish:
            assert request_id not in self.finish
            self.finish[request_id] = finish
        assert bool(error) == (finish == "error")
