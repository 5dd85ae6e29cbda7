"""What transformers' paged cache needs of a model: attention layers it knows, with keys and values of one width.

Multi-head latent attention (DeepSeek) has keys wider than its values, and a `head_dim` that is the width of their
rotated part alone. The cache is made as wide as the keys; values are padded on their way in and cut on their way out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


@contextmanager
def cache_sizes(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's config tells the width that its paged cache must have.

    Raises:
        ValueError: the paged cache cannot hold the model's layers (linear attention and the like), or its attention
            cannot run them.
    """
    config = model.config.get_text_config()
    width = getattr(config, "qk_head_dim", None)
    own = getattr(config, "head_dim", None)
    try:
        if width is not None:
            config.head_dim = width
        _check_sinks(model)
        yield
    except ValueError as error:
        raise ValueError(f"{type(model).__name__} cannot be served by continuous batching: {error}") from error
    finally:
        if width is not None:
            config.head_dim = own


def _check_sinks(model: PreTrainedModel) -> None:
    """transformers' paged attention takes `sinks` for a tensor wherever an attention module has the name."""
    for name, module in model.named_modules():
        if getattr(module, "sinks", ...) is None:
            raise ValueError(f"{name} has no attention sinks while other layers have")


def pad_values(cache: Any, model: PreTrainedModel) -> None:
    """Let `cache` (a `PagedAttentionCache`) take values narrower than the keys, when `model` has such."""
    width = getattr(model.config.get_text_config(), "qk_head_dim", None)
    if width is None:
        return
    update = cache.update

    def padded(
        key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = value_states.shape[-1]
        keys, values = update(key_states, F.pad(value_states, (0, width - own)), layer_idx, kwargs)
        return keys, values[..., :own]

    cache.update = padded
