"""Continuous batching on one rank: transformers' scheduler and paged cache, cut where ranks must keep step.

transformers' manager runs its own loop; ours needs the loop's three parts apart, so that ranks can agree between
them and a forward can be repeated: `prepare` (schedule), `forward` (model, sample), `commit` (publish). The private
parts used are named here and held by tests/unit/test_transformers_contract.py: `_create_batch_processor` of the
manager, `_generation_step` of the processor, and the scheduler's request tables; see also `seeded_runner.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from elastic_moe.config import ServingConfig
from elastic_moe.serving.engine.paged_cache import cache_sizes, pad_values
from elastic_moe.serving.engine.seeded_runner import SeededRunner
from elastic_moe.serving.protocol import Finish, Sampling, Submit

GRAPH_CACHE_TOKENS = 4096
"""A graph reads the cache in multiples of so many tokens: few graphs, against reading what no request has."""

Deliver = Callable[[str, int, list[int], Finish, str], None]
"""Called with (request id, output position of the first token, tokens, finish, error)."""


class _Request:
    def __init__(self, submit: Submit) -> None:
        self.request_id = submit.request_id
        self.sampling = submit.sampling
        self.num_generated = submit.num_generated
        self.prompt_len = len(submit.tokens) - submit.num_generated
        self.delivered = 0


class _Outbox(OutputRouter):
    """Hands outputs to the batcher, in the thread that made them."""

    def __init__(self, deliver: Callable[[GenerationOutput], None]) -> None:
        super().__init__()
        self._deliver = deliver

    def deliver(self, output: GenerationOutput) -> None:
        self._deliver(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self._deliver(output)


class Batcher:
    """The requests of one rank. All calls come from one thread, the one that runs the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: ServingConfig,
        eos_token_ids: Sequence[int],
        deliver: Deliver,
        *,
        cuda_graphs: bool = False,
    ) -> None:
        """`deliver` is called in `commit` for every new token and for the end of every request. With `cuda_graphs` the
        forward is captured, one graph for each shape, batches being padded to multiples of `serving.graph_tokens`.

        Raises:
            ValueError: the model has layers that continuous batching cannot cache.
        """
        self._model = model
        self._config = config
        self._eos = list(eos_token_ids)
        self._deliver = deliver
        self._requests: dict[str, _Request] = {}
        """By the name transformers knows them under, a new one for each submission."""
        self._names: dict[str, str] = {}
        """Request id -> that name."""
        self._submissions = 0
        self.tokens_generated = 0
        batching = ContinuousBatchingConfig(
            page_size=config.page_size,
            num_blocks=config.kv_cache_tokens // config.page_size,
            max_batch_tokens=config.max_batch_tokens,
            max_requests_per_batch=config.max_requests,
            allow_block_sharing=config.prefix_caching,
            use_async_batching=False,
            use_cuda_graph=(cuda_graphs, False),  # the second is a path that only flash attention has
            q_padding_interval_size=config.graph_tokens if cuda_graphs else 0,
            kv_padding_interval_size=GRAPH_CACHE_TOKENS if cuda_graphs else 0,
            auto_switch_to_flash=False,
            disable_nccl_graph_mixing=False,
            seed=0,
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=self._eos or -1)
        with cache_sizes(model):
            self._manager = ContinuousBatchingManager(cast("Any", model), greedy, batching)
            self._manager.output_router = _Outbox(self._on_output)
            self._processor = self._manager._create_batch_processor()
        pad_values(self._processor.cache, model)
        self._runner = SeededRunner(self._processor.model_runner, self._rule)
        self._processor.model_runner = self._runner

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._processor.scheduler.active_requests)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in the batch."""
        return len(self._processor.scheduler.waiting_requests) + self._manager.input_queue.qsize()

    @property
    def has_requests(self) -> bool:
        """Whether anything runs, waits, or is to be cancelled."""
        manager = self._manager
        return self._processor.has_pending_requests() or not (
            manager.input_queue.empty() and manager.cancel_queue.empty()
        )

    def submit(self, submit: Submit) -> None:
        """Queue a request; one that is here already under its id is replaced.

        Raises:
            ValueError: it cannot fit into the KV cache.
        """
        length = len(submit.tokens) + submit.max_new_tokens
        if not submit.tokens or submit.max_new_tokens < 1 or length > self._config.kv_cache_tokens:
            raise ValueError(
                f"{len(submit.tokens)} tokens + {submit.max_new_tokens} new ones: at least 1 of each, and together "
                f"at most serving.kv_cache_tokens={self._config.kv_cache_tokens}"
            )
        self.cancel(submit.request_id)
        self._submissions += 1
        name = self._names[submit.request_id] = f"{submit.request_id}/{self._submissions}"
        self._requests[name] = _Request(submit)
        self._manager.add_request(
            submit.tokens,
            request_id=name,
            max_new_tokens=submit.max_new_tokens,
            streaming=True,
            eos_token_id=self._eos,
        )

    def cancel(self, request_id: str) -> None:
        """Forget a request; the next `prepare` frees its cache. An unknown id is ignored."""
        name = self._names.pop(request_id, None)
        if name is not None:
            del self._requests[name]
            self._manager.cancel_request(name)

    def prepare(self) -> bool:
        """Take in new and cancelled requests and schedule the next batch. False when there is nothing to compute."""
        return self._processor.prepare_next_batch()

    def forward(self) -> None:
        """Run the model on the prepared batch and pick tokens. May be repeated: it writes the same cache slots.

        Raises:
            PeerLost: a peer was lost in a MoE layer; nothing is published.
        """
        self._processor._generation_step(self._model)

    def commit(self) -> None:
        """Publish the tokens of the last forward."""
        self._processor.update_batch()

    def warm_up(self) -> None:
        """Run the model on tokens of nobody, in each padded size that decoding has and in doubled ones up to the
        largest batch: kernels are loaded and, with CUDA graphs, captured, so that no stream waits for it later."""
        step = self._config.graph_tokens
        sizes = [*range(step, self._config.max_requests + step, step)]
        while sizes[-1] < self._config.max_batch_tokens:
            sizes.append(2 * sizes[-1])
        for size in sizes:
            self._runner.rehearse(self._model, min(size, self._config.max_batch_tokens))
        self._processor.cache.reset()

    @property
    def num_captures(self) -> int:
        """CUDA graphs captured since the start, those that were captured anew included."""
        return self._runner.num_captures

    def forget_graphs(self) -> None:
        """Capture anew: weights or buffers have moved."""
        self._runner.forget_graphs()

    def _rule(self, state: Any) -> tuple[Sampling, int]:
        request = self._requests.get(state.request_id)
        if request is None:  # cancelled after its batch was prepared: nobody will see the token
            return Sampling(), 0
        return request.sampling, len(state.initial_tokens) + len(state.generated_tokens) - request.prompt_len

    def _on_output(self, output: GenerationOutput) -> None:
        request = self._requests.get(output.request_id)
        if request is None:
            return
        tokens = output.generated_tokens[request.delivered :]
        start = request.num_generated + request.delivered
        request.delivered += len(tokens)
        self.tokens_generated += len(tokens)
        finish, error = Finish.NOT_YET, ""
        if output.status == RequestStatus.FAILED:
            finish, error = Finish.ERROR, output.error or "generation failed"
        elif output.is_finished():
            is_end = bool(output.generated_tokens) and output.generated_tokens[-1] in self._eos
            finish = Finish.STOP if is_end else Finish.LENGTH
        if finish:
            del self._requests[output.request_id], self._names[request.request_id]
        self._deliver(request.request_id, start, tokens, finish, error)
