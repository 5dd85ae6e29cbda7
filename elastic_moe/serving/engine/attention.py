"""Attention straight from the paged cache of transformers' continuous batching: what a step costs goes by the tokens
that its requests have. On a GPU with Triton, for models whose layers attend to everything before them; others keep
transformers' own (`supports`).

`PagedInputs` takes the place of transformers' inputs and outputs of a batch: a table of pages and a list of tiles
instead of masks and of an index for every cached token. `attend` is registered with transformers as attention `NAME`.
"""

import importlib
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import TMP_TOKEN_ID

NAME = "elastic_moe_paged"
SEGMENT = 512
"""Keys whose part is added up by itself."""
AT_ONCE = 64
"""Keys of one step of a program's loop."""
SHARES = 8
"""Programs that share the segments of a query in a batch of few tokens."""
ROWS, MANY_ROWS = 16, 64
"""Queries times heads of a tile, in batches of few and of many tokens."""
NOT_DONE = ("sliding_window", "softcap", "s_aux", "position_bias")
"""Arguments of attention functions that `supports` has not seen in a config, if a layer gives them all the same."""


class Plan(NamedTuple):
    """What the kernels need to know of a batch of T tokens, padding included."""

    tiles: torch.Tensor
    """int32 [number, 4], see `attention_kernels.attend`."""
    table: torch.Tensor
    """int32 [requests, pages]: the cache row of the first token of each page."""
    rows: torch.Tensor
    """int32 [T]: where the keys and values of each token go."""
    ends: torch.Tensor
    """int32 [T]: how many keys each token sees."""
    tile_rows: int
    is_split: bool
    page: int


def wanted(model: PreTrainedModel, attention: str) -> bool:
    """Whether `attend` is to be used, with `serving.attention`.

    Raises:
        ValueError: it is asked for, and cannot be.
    """
    able = attention != "sdpa" and supports(model)
    if attention == "paged" and not able:
        raise ValueError(
            "serving.attention=paged needs a GPU, Triton, and layers that all attend to everything before them; "
            "auto takes sdpa for others"
        )
    return able


def supports(model: PreTrainedModel) -> bool:
    """Whether `attend` computes what the model's own attention does, on its device."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    own = ("sliding_window", "attn_logit_softcapping", "qk_head_dim", "attention_chunk_size")
    plain = kinds == {"full_attention"} and not any(getattr(config, key, None) for key in own)
    plain = plain and not any(hasattr(module, "sinks") for module in model.modules())
    return (
        model.device.type == "cuda" and plain and model.config._attn_implementation == "sdpa" and _kernels() is not None
    )


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    cache: Any,
    block_table: Plan,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Write keys and values [1, heads, T, head_dim] to the cache, and attend to all before them. An attention function
    of transformers: returns [1, T, heads, head_dim].

    Raises:
        ValueError: the layer asks for something that is not done here.
    """
    asked = [name for name in NOT_DONE if others.get(name) is not None]
    if asked or attention_mask is not None or value.shape[-1] != query.shape[-1]:
        raise ValueError(f"serving.attention=sdpa is needed: layer {module.layer_idx} asks for {asked or 'a mask'}")
    keys, values = cache.layer_to_allocator[module.layer_idx]._kv_token_views[module.layer_idx]
    kernels, plan, (_, heads, num_tokens, head_dim) = _kernels(), block_table, query.shape
    kv_heads = key.shape[1]
    dim = max(16, 1 << (head_dim - 1).bit_length())
    width = 1 << (kv_heads * head_dim - 1).bit_length()
    kernels.store[(num_tokens,)](
        key, value, keys, values, plan.rows,
        key.stride(2), key.stride(1), value.stride(2), value.stride(1), width, kv_heads, head_dim,
    )  # fmt: skip
    out = query.new_zeros(1, num_tokens, heads, head_dim)
    segments = -(-plan.table.shape[1] * plan.page // SEGMENT)
    shape = (num_tokens, heads, segments if plan.is_split else 0)
    parts = query.new_empty(*shape, dim, dtype=torch.float32)
    bests, totals = query.new_empty(2, *shape, dtype=torch.float32)
    scale = head_dim**-0.5 if scaling is None else scaling
    grid = (len(plan.tiles), kv_heads, min(SHARES, segments) if plan.is_split else 1)
    kernels.attend[grid](
        query, keys, values, out, parts, bests, totals, plan.tiles, plan.table,
        query.stride(2), query.stride(1), plan.table.stride(0), scale,
        heads, kv_heads, head_dim, dim, plan.tile_rows, plan.page, AT_ONCE, SEGMENT, segments, plan.is_split,
    )  # fmt: skip
    if plan.is_split:
        group = min(8, heads & -heads)
        kernels.join[(num_tokens, heads // group)](
            out, parts, bests, totals, plan.ends, heads, head_dim, dim, group, SEGMENT, segments
        )
    return out, None


class PagedInputs(ContinuousBatchingIOs):
    """The tensors of a batch, made on the host in one piece and sent at once."""

    def __init__(self, like: ContinuousBatchingIOs, processor: Any, max_len: int, group: int) -> None:
        """In the place of `like`, which `processor` made.

        Args:
            like: its settings are kept, and its stream.
            processor: of the batches.
            max_len: of any request, in tokens.
            group: heads that share keys.
        """
        super().__init__(
            like.cache, like.config, processor.cb_config, like.device, like.model_dtype, processor.logit_processor
        )
        self.compute_stream = like.compute_stream
        (self._allocator,) = self.cache.cache_allocators.values()
        self._page, self._group = int(self._allocator.tokens_per_page), group
        tokens, requests = self.cache.max_batch_tokens, int(processor.cb_config.max_requests_per_batch)
        self._requests = requests
        tiles = 4 * max(self._num_tiles(tokens), self._num_tiles(min(tokens, requests)))
        self._small = _Twin({"tokens": tokens, "positions": tokens, "rows": tokens, "ends": tokens,
                             "logits": requests, "tiles": tiles}, self.device)  # fmt: skip
        self._table = _Twin({"table": requests * -(-max_len // self._page)}, self.device)
        self._known: list[list[int]] = [[] for _ in range(requests)]
        """The pages in each row of the table."""

    @torch.no_grad()
    def prepare_batch_tensors(
        self,
        requests_in_batch: list[Any],
        logits_processors: Any,
        use_decode_fast_path: bool,
        num_q_tokens: int,
        max_kv_read: int,
        use_padding: bool,
    ) -> None:
        """See the base."""
        self.num_q_tokens, self.max_kv_read, self.use_block_table = num_q_tokens, 0, False
        self.requests_in_batch, self.num_request_in_batch = list(requests_in_batch), len(requests_in_batch)
        self.req_id_to_new_token_position = {}
        self._small.wait()
        self._table.wait()
        tokens: list[int] = []
        pasts, lengths, logits = [], [], []
        for number, future in enumerate(requests_in_batch):
            state, length = future.state, future.query_length
            pasts.append(state.position_offset)
            lengths.append(length)
            tokens += state.tokens_to_process
            state.position_offset += length
            self._put_pages(number, state.request_id)
            if future.has_new_token:
                logits.append(len(tokens) - 1)
                self.req_id_to_new_token_position[state.request_id] = logits[-1]
                state.tokens_to_process = [TMP_TOKEN_ID]
        self._lay_out(np.array(tokens), np.array(pasts), np.array(lengths), np.array(logits, dtype=np.int32))
        self.total_seqlen_q = len(tokens)
        with nullcontext() if self.compute_stream is None else torch.cuda.stream(self.compute_stream):
            self._small.has_changed = True
            self._small.send()
            self._table.send()

    def _lay_out(self, tokens: np.ndarray, pasts: np.ndarray, lengths: np.ndarray, logits: np.ndarray) -> None:
        """Fill the host's arrays. Each request has `lengths` of the `tokens` in turn, after `pasts` of them."""
        here, most, total = self._small.host, self._of_a_tile(self.num_q_tokens), len(tokens)
        starts = np.cumsum(lengths) - lengths
        owners = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.arange(total) - (starts - pasts)[owners]
        here["tokens"][:total] = tokens
        here["positions"][:total] = positions
        here["ends"][:total] = positions + 1
        pages = self._table.host["table"].reshape(self._requests, -1)[owners, positions // self._page]
        here["rows"][:total] = pages + positions % self._page
        for name in ("tokens", "positions", "ends"):
            here[name][total : self.num_q_tokens] = 0
        here["rows"][total : self.num_q_tokens] = self._allocator.write_trash_index
        here["logits"][: len(logits)] = logits
        here["logits"][len(logits) :] = 0
        counts = -(-lengths // most)
        of_tile = np.repeat(np.arange(len(lengths)), counts)
        begins = most * (np.arange(len(of_tile)) - (np.cumsum(counts) - counts)[of_tile])
        sizes = np.minimum(most, lengths[of_tile] - begins)
        tiles = here["tiles"].reshape(-1, 4)
        tiles[: len(of_tile)] = np.stack([of_tile, starts[of_tile] + begins, sizes, pasts[of_tile] + begins], axis=1)
        tiles[len(of_tile) :] = -1

    def get_model_kwargs(self, use_padding: bool = False) -> Any:
        """See the base."""
        num_tokens, here, requests = self.num_q_tokens, self._small.device, self._requests
        plan = Plan(
            tiles=here["tiles"].view(-1, 4)[: self._num_tiles(num_tokens)],
            table=self._table.device["table"].view(requests, -1),
            rows=here["rows"][:num_tokens],
            ends=here["ends"][:num_tokens],
            tile_rows=self._tile_rows(num_tokens),
            is_split=num_tokens <= requests,
            page=self._page,
        )
        return {
            "input_ids": here["tokens"][:num_tokens].unsqueeze(0),
            "position_ids": here["positions"][:num_tokens].unsqueeze(0),
            "logits_indices": here["logits"][: min(num_tokens, requests) if use_padding else self.num_request_in_batch],
            "logits_processor_args": None,
            "attention_mask": None,
            "cache": self.cache,
            "block_table": plan,
            "use_cache": False,
        }

    def reset(self) -> None:
        """See the base."""
        super().reset()
        self._known = [[] for _ in self._known]

    def _get_graph_key(self) -> tuple[int, ...]:
        return (self.num_q_tokens,)

    def _put_pages(self, number: int, request_id: str) -> None:
        """Write a request's row of the table, if it has changed: sharing prefixes replaces pages, too."""
        pages = self._allocator.block_table[request_id]
        if pages != self._known[number]:
            self._known[number] = pages.copy()
            row = self._table.host["table"].reshape(self._requests, -1)[number]
            row[: len(pages)] = np.array(pages) * self._allocator.block_physical_stride
            self._table.has_changed = True

    def _tile_rows(self, num_tokens: int) -> int:
        """Few tokens are decoded: many programs; many are of prompts: fewer reads of the same keys."""
        rows = ROWS if num_tokens <= self._requests else MANY_ROWS
        return max(rows, 1 << (self._group - 1).bit_length())

    def _of_a_tile(self, num_tokens: int) -> int:
        return self._tile_rows(num_tokens) // self._group

    def _num_tiles(self, num_tokens: int) -> int:
        """At most, in a batch of so many tokens."""
        return num_tokens // self._of_a_tile(num_tokens) + min(num_tokens, self._requests)


class _Twin:
    """int32 arrays on the host, and the same on a device, in one piece."""

    def __init__(self, sizes: Mapping[str, int], device: torch.device) -> None:
        self._host = torch.zeros(sum(sizes.values()), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros_like(self._host, device=device)
        parts = list(sizes.values())
        self.host = dict(zip(sizes, (part.numpy() for part in self._host.split(parts)), strict=True))
        self.device = dict(zip(sizes, self._device.split(parts), strict=True))
        self.has_changed = True
        self._sent = torch.cuda.Event() if device.type == "cuda" else None

    def wait(self) -> None:
        """Until the host's may be written again."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Bring the device up to date, if `has_changed`, on the current stream."""
        if self.has_changed:
            self._device.copy_(self._host, non_blocking=True)
            self.has_changed = False
            if self._sent is not None:
                self._sent.record()


def switch(model: PreTrainedModel, processor: Any, max_len: int) -> None:
    """Have `processor`, the batch processor of `model`, attend by `attend`."""
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)
    config = model.config.get_text_config()
    group = config.num_attention_heads // config.num_key_value_heads
    like = processor.inputs_and_outputs
    processor.inputs_and_outputs = PagedInputs(like, processor, max_len, group)
    processor.model_runner.inputs_and_outputs = processor.inputs_and_outputs


@cache
def _kernels() -> Any:
    """None where Triton is not installed."""
    try:
        return importlib.import_module("elastic_moe.serving.engine.attention_kernels")
    except ImportError:
        return None
