"""Parts of transformers models that are many small kernels, as one each: norms, rotary embeddings and the choice of
experts, on a GPU.

Whether a part may be replaced is found out by trying: the replacement has to give what the model's own code gives for
random inputs. So it holds for families that nobody thought of, and leaves alone those that do something else.
"""

import importlib
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

ROTARY = "apply_rotary_pos_emb"
"""What the function is called in transformers' modeling files."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of one rounding more or less, relative and absolute."""

TOKENS_TRIED = 16
"""By a router."""
OURS = "of_elastic_moe"
"""An attribute of a function that has been put in its place."""

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def fuse(model: PreTrainedModel) -> None:
    """Replace what can be, in place; `model` is on a GPU with its weights, on any other device nothing is done."""
    if model.device.type != "cuda":
        return
    norms = sum(fuse_norm(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm"))
    routers = sum(fuse_router(module) for module in model.modules() if type(module).__name__.endswith("Router"))
    rotary = fuse_rotary(model)
    log.info("one kernel each: %d norms, %d routers%s", norms, routers, ", rotary embeddings" if rotary else "")


@torch.no_grad()
def fuse_norm(norm: nn.Module) -> bool:
    """Have torch's fused kernel do what this RMSNorm does, if that is the same."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return False
    own = norm.forward
    tried = _random(weight, 3, len(weight))
    if not _is_same(lambda: [own(tried)], lambda: [F.rms_norm(tried, weight.shape, weight, eps)], weight.dtype):
        return False

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, norm.weight.shape, norm.weight, eps)  # pyright: ignore[reportArgumentType]

    norm.forward = forward
    return True


@torch.no_grad()
def fuse_router(router: nn.Module) -> bool:
    """Have one kernel choose the experts, if this router takes the `top_k` largest of a softmax, normalized or not.
    Equal scores may change places; which experts are chosen stays the same."""
    weight, top_k = getattr(router, "weight", None), getattr(router, "top_k", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not isinstance(top_k, int) or _kernels() is None:
        return False
    own, width = router.forward, weight.shape[1]
    tried = _random(weight, TOKENS_TRIED, width)

    def forward(hidden_states: torch.Tensor, *, normalized: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden_states.reshape(-1, width), router.weight)  # pyright: ignore[reportArgumentType]
        return logits, *route(logits, top_k, normalized=normalized)

    def by_expert(logits: torch.Tensor, scores: torch.Tensor, chosen: torch.Tensor) -> list[torch.Tensor]:
        return [logits, chosen.sort().values, torch.zeros_like(logits).scatter(1, chosen, scores)]

    for normalized in (True, False):
        ours = partial(forward, normalized=normalized)
        if _is_same(lambda: by_expert(*own(tried)), lambda ours=ours: by_expert(*ours(tried)), weight.dtype):
            router.forward = ours
            return True
    return False


def route(logits: torch.Tensor, top_k: int, *, normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits [T, E]: the softmax of the `top_k` largest in falling order, [T, top_k] of the same dtype, and whose
    they are, int64 [T, top_k]."""
    num_tokens, num_experts = logits.shape
    scores = logits.new_empty(num_tokens, top_k)
    chosen = logits.new_empty(num_tokens, top_k, dtype=torch.int64)
    if num_tokens:
        _kernels().route[(num_tokens,)](
            logits.contiguous(), scores, chosen, num_experts,
            top_k, normalized, _power_of_2(num_experts), _power_of_2(top_k), num_warps=1 if num_experts <= 512 else 4,
        )  # fmt: skip
    return scores, chosen


def fuse_rotary(model: PreTrainedModel) -> bool:
    """Have one kernel turn queries and keys, if the model's family turns halves of them; for all its models."""
    family = sys.modules[type(model).__module__]
    own: Rotate | None = getattr(family, ROTARY, None)
    kernels = _kernels()
    if own is None or kernels is None or hasattr(own, OURS):
        return own is not None and hasattr(own, OURS)
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    like = next(model.parameters())
    query, key = (_random(like, 1, 3, n, head_dim).transpose(1, 2) for n in (4, 2))
    cos, sin = _random(like, 1, 3, head_dim), _random(like, 1, 3, head_dim)
    if not _is_same(lambda: own(query, key, cos, sin), lambda: rotate(query, key, cos, sin), like.dtype):
        return False

    def of_family(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *more: Any, **named: Any
    ) -> Any:
        whole = q.shape[-1] == cos.shape[-1] and cos.dim() == 3
        plain = q.is_cuda and not more and not named and len(q) == 1 and whole
        return rotate(q, k, cos, sin) if plain else own(q, k, cos, sin, *more, **named)

    setattr(of_family, OURS, True)
    setattr(family, ROTARY, of_family)
    return True


def rotate(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [1, heads, T, head_dim] turned by cos and sin [1, T, head_dim]."""
    _, heads, num_tokens, head_dim = query.shape
    kv_heads, at_once = key.shape[1], 4
    turned, turned_keys = (one.new_empty(num_tokens, one.shape[1], head_dim) for one in (query, key))
    blocks = -(-heads // at_once) + -(-kv_heads // at_once)
    half = head_dim // 2
    _kernels().rotate[(num_tokens, blocks)](
        query, key, turned, turned_keys, cos.contiguous(), sin.contiguous(),
        query.stride(2), query.stride(1), key.stride(2), key.stride(1),
        heads, kv_heads, half, _power_of_2(half), at_once,
    )  # fmt: skip
    return turned.transpose(0, 1).unsqueeze(0), turned_keys.transpose(0, 1).unsqueeze(0)


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _random(like: torch.Tensor, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _is_same(own: Callable[[], Any], ours: Callable[[], Any], dtype: torch.dtype) -> bool:
    """Whether both give the same; not if either cannot run."""
    within = TOLERANCE.get(dtype, 0.0)
    try:
        pairs = list(zip(own(), ours(), strict=True))
        return all(a.shape == b.shape and a.dtype == b.dtype and _are_close(a, b, within) for a, b in pairs)
    except (RuntimeError, TypeError, ValueError) as error:
        log.debug("not replaced: %s", error)
        return False


def _are_close(one: torch.Tensor, other: torch.Tensor, within: float) -> bool:
    within = within if one.is_floating_point() else 0.0
    return torch.allclose(one, other, rtol=within, atol=within)


def _kernels() -> Any:
    """None where Triton is not installed."""
    try:
        return importlib.import_module("elastic_moe.serving.engine.fused_kernels")
    except ImportError:
        return None
