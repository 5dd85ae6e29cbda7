"""The part of transformers' continuous batching that runs the model: here it samples by each request's own rules.

On a GPU the forward may be a CUDA graph, one for each padded shape. Sampling stays outside of it: what a request asks
for is not known when the graph is made.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import RequestStatus, create_warmup_future_states

from elastic_moe.serving.engine.sampling import pick
from elastic_moe.serving.protocol import Sampling

log = logging.getLogger(__name__)

Rule = Callable[[Any], tuple[Sampling, int]]
"""From the state of a request in the batch to how its next token is picked, and that token's output position."""


class SeededRunner(ModelRunner):
    """Samples each request by its own parameters, seed and position."""

    def __init__(self, like: ModelRunner, rule: Rule, sizes: Sequence[int]) -> None:
        """`like` is the runner that transformers made; its settings are kept. If it pads batches, then to one of the
        `sizes`, which rise: the graphs of `rehearse` are all that there will be."""
        super().__init__(
            logit_processor=like.logit_processor,
            cb_config=like.cb_config,
            inputs_and_outputs=like.inputs_and_outputs,
            cache=like.cache,
            do_sample=False,
            return_logprobs=False,
        )
        self._rule, self._sizes = rule, sizes
        self._ios = cast("ContinuousBatchingIOs", like.inputs_and_outputs)  # synchronous: set by the Batcher
        self._scores: torch.Tensor | None = None
        self._captured: torch.Tensor | None = None
        self._scores_of_graph: dict[Any, torch.Tensor] = {}
        self.num_captures = 0
        """Graphs made since the start."""

    def maybe_pad_inputs(self, num_q_tokens: int, max_kv_read: int, use_decode_fast_path: bool) -> tuple[int, int]:
        """See the base."""
        padded, max_kv_read = super().maybe_pad_inputs(num_q_tokens, max_kv_read, use_decode_fast_path)
        if self.pad_inputs:
            padded = next(size for size in self._sizes if size >= num_q_tokens)
        return padded, max_kv_read

    @property
    def requests_in_batch(self) -> list[Any]:
        """What the batch that was prepared last is made of."""
        return self._ios.requests_in_batch

    def compute_batch(self, model: nn.Module, batch_data: dict[str, Any]) -> None:
        """Run the model, by a graph if there is one for this shape, and pick the tokens."""
        self._scores = self._captured = None
        super().compute_batch(model, batch_data)
        if self._captured is not None:
            self._scores_of_graph[self._ios.get_graph()] = self._captured
            self.num_captures += 1
            log.info("captured graph number %d, of %d tokens", self.num_captures, self._ios.num_q_tokens)
        scores = self._scores if self._scores is not None else self._scores_of_graph[self._ios.get_graph()]
        stream = self._ios.compute_stream
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            rules = [self._rule(future.state) for future in self._ios.requests_in_batch if future.has_new_token]
            _, _, output_ids = self._ios.get_cb_kwargs()
            output_ids[0, : len(rules)].copy_(pick(scores[0, : len(rules)], rules))

    @torch.no_grad()
    def rehearse(self, model: nn.Module, num_tokens: int) -> None:
        """Run a batch of so many tokens of nobody, if the empty cache can hold them; makes its graph."""
        page, cache = self.cb_config.page_size, self.cache
        states = create_warmup_future_states(1, RequestStatus.PREFILLING, num_tokens, page, cache)
        if not states:
            return
        try:
            shape = self.maybe_pad_inputs(num_tokens, page, False)
            self._ios.prepare_batch_tensors(states, self.logit_processor, False, *shape, use_padding=self.pad_inputs)
            self.compute_batch(model, cast("Any", self._ios.get_model_kwargs(use_padding=self.pad_inputs)))
        finally:
            for state in states:
                cache.free_blocks(state.state.request_id)

    def forget_graphs(self) -> None:
        """Make graphs anew: something that they point to has moved."""
        self._scores_of_graph = {}
        self._ios.graphs = type(self._ios.graphs)()

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """Called at the end of the forward. While a graph is made the forward runs twice: once, then to be captured."""
        if scores.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured = scores
        else:
            self._scores = scores
