"""Continuous batching on one rank: transformers' scheduler and paged cache, cut where ranks must keep step.

transformers' manager runs its own loop; ours needs the loop's three parts apart, so that ranks can agree between
them and a forward can be repeated: `prepare` (schedule), `forward` (model, sample), `commit` (publish). The private
parts used are named here and held by tests/unit/test_transformers_contract.py: `_create_batch_processor` of the
manager, `_generation_step` of the processor, and the scheduler's request tables; see also `seeded_runner.py`.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast

import msgspec
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from elastic_moe.config import ServingConfig
from elastic_moe.errors import BatchFailed, PeerLost
from elastic_moe.serving.engine import attention
from elastic_moe.serving.engine.paged_cache import cache_sizes, pad_values
from elastic_moe.serving.engine.seeded_runner import SeededRunner
from elastic_moe.serving.protocol import Finish, Sampling, Submit

GRAPH_CACHE_TOKENS = 4096
"""A graph reads the cache in multiples of so many tokens: few graphs, against reading what no request has."""

BROKEN_AFTER = 8
"""So many requests in a row that fail alone, and no batch between them that does not, are the rank's fault."""
log = logging.getLogger(__name__)

Deliver = Callable[[str, int, list[int], Finish, str], None]
"""Called with (request id, output position of the first token, tokens, finish, error)."""


class _Request:
    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        self.prompt_len = len(submit.tokens) - submit.num_generated
        self.name = ""
        """Under which transformers knows it, a new one for each time that it begins; empty while it is held."""
        self.tokens: list[int] = []
        """Delivered since then."""

    @property
    def num_generated(self) -> int:
        """Output position of the next token."""
        return self.submit.num_generated + len(self.tokens)

    def hold(self) -> None:
        """It will begin again with the tokens it has."""
        submit, tokens = self.submit, self.tokens
        self.submit = msgspec.structs.replace(
            submit,
            tokens=submit.tokens + tokens,
            num_generated=self.num_generated,
            max_new_tokens=submit.max_new_tokens - len(tokens),
        )
        self.name, self.tokens = "", []


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
    """The requests of one rank. All calls come from one thread, the one that runs the model.

    A batch that fails is the fault of its requests: each is tried alone until it has its next token, while the others
    are held; one that fails alone ends with the error. So does not the rank, unless it fails whatever it runs.
    """

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
        forward is captured, one graph for each size of a batch: multiples of `serving.graph_tokens` as far as decoding
        goes, and doubled ones up to the largest.

        Raises:
            ValueError: the model has layers that continuous batching cannot cache.
        """
        self._model = model
        self._config = config
        self._eos = list(eos_token_ids)
        self._deliver = deliver
        self._requests: dict[str, _Request] = {}
        """By their ids."""
        self._trials: deque[str] = deque()
        """Requests that run alone, one after the other; the first may have begun."""
        self._sizes = _sizes(config)
        self._num_begun = 0
        self._num_failed = 0
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
        of_model = getattr(model.config.get_text_config(), "max_position_embeddings", config.cache_capacity)
        self._longest = min(config.cache_capacity, config.max_model_len or of_model)
        if attention.wanted(model, config.attention):
            of_warm_up = config.max_batch_tokens + config.page_size  # of one request, however long those are
            attention.switch(model, self._processor, max(self._longest, of_warm_up))
        self._runner = SeededRunner(self._processor.model_runner, self._rule, self._sizes)
        self._processor.model_runner = self._runner

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._processor.scheduler.active_requests)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place in the batch."""
        held = sum(not request.name for request in self._requests.values())
        return len(self._processor.scheduler.waiting_requests) + self._manager.input_queue.qsize() + held

    @property
    def has_requests(self) -> bool:
        """Whether anything runs, waits, or is to be cancelled."""
        manager = self._manager
        idle = not self._requests and manager.input_queue.empty() and manager.cancel_queue.empty()
        return not idle or self._processor.has_pending_requests()

    def submit(self, submit: Submit) -> None:
        """Queue a request; one that is here already under its id is replaced.

        Raises:
            ValueError: it cannot fit into the KV cache.
        """
        length, room = len(submit.tokens) + submit.max_new_tokens, self._config.cache_capacity
        asked = f"{len(submit.tokens)} tokens + {submit.max_new_tokens} new ones"
        if not submit.tokens or submit.max_new_tokens < 1 or length > room:
            raise ValueError(
                f"{asked}: at least 1 of each, and together at most {room}, the whole pages of "
                f"serving.kv_cache_tokens={self._config.kv_cache_tokens}"
            )
        if length > self._longest:
            raise ValueError(f"{asked}: together at most {self._longest}, serving.max_model_len or the model's limit")
        self.cancel(submit.request_id)
        self._requests[submit.request_id] = _Request(submit)
        if submit.alone:
            self._try_alone([submit.request_id])
        elif not self._trials:
            self._begin(submit.request_id)

    def cancel(self, request_id: str) -> None:
        """Forget a request; the next `prepare` frees its cache. An unknown id is ignored."""
        request = self._requests.pop(request_id, None)
        if request is not None and request.name:
            self._manager.cancel_request(request.name)

    def prepare(self) -> bool:
        """Take in new and cancelled requests and schedule the next batch. False when there is nothing to compute."""
        while True:
            self._next_trial()
            self._processor.max_batch_tokens = self._budget()
            try:
                return self._processor.prepare_next_batch()
            except Exception as error:  # noqa: BLE001 - of any kind; see the class
                scheduler = self._processor.scheduler
                self._blame([*scheduler.active_requests, *scheduler.waiting_requests], error)

    def forward(self) -> None:
        """Run the model on the prepared batch and pick tokens. May be repeated: it writes the same cache slots.

        Raises:
            PeerLost: a peer was lost in a MoE layer; nothing is published.
            BatchFailed: of the requests in it; nothing is published, and another batch has to be prepared.
        """
        try:
            self._processor._generation_step(self._model)
        except PeerLost:
            raise
        except Exception as error:
            self._blame([future.state.request_id for future in self._runner.requests_in_batch], error)
            raise BatchFailed(f"a batch failed: {_first_line(error)}") from error

    def commit(self) -> None:
        """Publish the tokens of the last forward."""
        self._num_failed = 0
        self._processor.update_batch()

    def warm_up(self) -> None:
        """Run the model on tokens of nobody, in each size that a batch is padded to: kernels are loaded and, with CUDA
        graphs, captured, so that no stream waits for it later."""
        for size in self._sizes:
            self._runner.rehearse(self._model, size)
        self._processor.cache.reset()

    @property
    def num_captures(self) -> int:
        """CUDA graphs captured since the start, those that were captured anew included."""
        return self._runner.num_captures

    def forget_graphs(self) -> None:
        """Capture anew: weights or buffers have moved."""
        self._runner.forget_graphs()

    def _budget(self) -> int:
        """Tokens of the next batch."""
        most, of_prompts = self._config.max_batch_tokens, self._config.prefill_tokens
        states = self._processor.scheduler.active_requests.values()
        decoding = sum(state.status == RequestStatus.DECODING for state in states) if of_prompts else 0
        return min(most, decoding + (of_prompts or 0)) if decoding else most

    def _begin(self, request_id: str) -> None:
        request = self._requests[request_id]
        self._num_begun += 1
        request.name = f"{request_id}/{self._num_begun}"
        self._manager.add_request(
            request.submit.tokens,
            request_id=request.name,
            max_new_tokens=request.submit.max_new_tokens,
            streaming=True,
            eos_token_id=self._eos,
        )

    def _hold(self, request: _Request) -> None:
        if request.name:
            self._manager.cancel_request(request.name)
            request.hold()

    def _try_alone(self, request_ids: Sequence[str]) -> None:
        """Hold all, and try these one by one from the next `prepare` on."""
        for request in self._requests.values():
            self._hold(request)
        self._trials.extend(request_ids)

    def _next_trial(self) -> None:
        """Begin the next trial, unless one is under way; after the last one all who are held begin again."""
        if not self._trials:
            return
        while self._trials:
            request = self._requests.get(self._trials[0])
            if request is not None and not request.name:
                self._begin(self._trials[0])
            if request is not None and not request.tokens:
                return
            self._trials.popleft()  # it has passed, or has gone
            if request is not None and self._trials:
                self._hold(request)
        for request_id in [i for i, request in self._requests.items() if not request.name]:
            self._begin(request_id)

    def _blame(self, names: Sequence[str], error: Exception) -> None:
        """A batch with the requests `names` has failed: the only one ends, several are tried alone.

        Raises:
            Exception: `error` itself, when it is the rank that has failed.
        """
        request_ids = [i for name in names if (i := name.rpartition("/")[0]) in self._requests]
        log.error("a batch of %d requests failed: %s", len(names), _first_line(error), exc_info=error)
        self._num_failed += len(names) == 1
        if isinstance(error, torch.AcceleratorError) or not names or self._num_failed > BROKEN_AFTER:
            raise error
        if len(names) > 1:
            self._try_alone(request_ids)
            return
        for request_id in request_ids:  # unless it was cancelled meanwhile
            position = self._requests[request_id].num_generated
            self.cancel(request_id)
            self._deliver(request_id, position, [], Finish.ERROR, f"the model failed: {_first_line(error)}")

    def _known(self, name: str) -> _Request | None:
        request = self._requests.get(name.rpartition("/")[0])
        return request if request is not None and request.name == name else None

    def _rule(self, state: Any) -> tuple[Sampling, int]:
        request = self._known(state.request_id)
        if request is None:  # cancelled after its batch was prepared: nobody will see the token
            return Sampling(), 0
        return request.submit.sampling, len(state.initial_tokens) + len(state.generated_tokens) - request.prompt_len

    def _on_output(self, output: GenerationOutput) -> None:
        request = self._known(output.request_id)
        if request is None:
            return
        tokens, start = output.generated_tokens[len(request.tokens) :], request.num_generated
        request.tokens += tokens
        self.tokens_generated += len(tokens)
        finish, error = Finish.NOT_YET, ""
        if output.status == RequestStatus.FAILED:
            finish, error = Finish.ERROR, output.error or "generation failed"
        elif output.is_finished():
            is_end = bool(output.generated_tokens) and output.generated_tokens[-1] in self._eos
            finish = Finish.STOP if is_end else Finish.LENGTH
        if finish:
            del self._requests[request.submit.request_id]
        self._deliver(request.submit.request_id, start, tokens, finish, error)


def _sizes(config: ServingConfig) -> list[int]:
    """Of batches, in tokens, with padding."""
    step, most = config.graph_tokens, config.max_batch_tokens
    sizes = [*range(step, config.max_requests + step, step)]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return [*(size for size in sizes if size < most), most]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
