"""Gives a model that transformers built on the meta device real memory, without initialising what is loaded anyway."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import nn

from elastic_moe.weights.conversion import target_dtypes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def set_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put `tensor` in the place of the parameter or buffer `name` of `model`, whatever device that is on.

    Raises:
        AttributeError: there is no such parameter or buffer.
    """
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    if (old := parent._parameters.get(leaf)) is not None:
        setattr(parent, leaf, nn.Parameter(tensor.detach(), requires_grad=old.requires_grad))
    elif leaf in parent._buffers:
        setattr(parent, leaf, tensor.detach())
    else:
        raise AttributeError(f"{type(parent).__name__} at {path!r} has no parameter or buffer {leaf!r}")


@torch.no_grad()
def materialize(model: "PreTrainedModel", device: torch.device | str, init: Collection[str] = ()) -> None:
    """Move what is still on the meta device to `device`, compute non-persistent buffers as `from_pretrained` does
    (rotary frequencies and the like), and tie the weights that the model ties.

    What is on a real device already stays as it is, so call it before or after loading: parameters that it moves hold
    no particular values until they are loaded.

    Args:
        model: built on the meta device; some modules may have been replaced by others with real tensors.
        device: where to.
        init: names (of the state dict) to initialise as transformers does for a tensor that no checkpoint has.

    Raises:
        RuntimeError: something is left on the meta device.
    """
    state = model.state_dict(keep_vars=True)
    dtypes = target_dtypes(model)
    absent = _absent(model, {name for name, tensor in state.items() if tensor.is_meta})
    tied = model.all_tied_weights_keys.keys() | model.all_tied_weights_keys.values()
    for name, tensor in state.items():
        if tensor.is_meta and not (name in tied and name in absent):
            set_tensor(model, name, torch.empty_like(tensor, dtype=dtypes[name], device=device))
    unset = [(name, buffer) for name, buffer in model.named_non_persistent_buffers() if buffer.is_meta]
    for name, buffer in unset:
        set_tensor(model, name, torch.empty_like(buffer, device=device))
    _initialize(model, {*init, *(name for name, _ in unset)})
    model.tie_weights(missing_keys=absent, recompute_mapping=False)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"{len(left)} tensors are still on the meta device: {', '.join(left[:4])}")


def untied(model: "PreTrainedModel") -> set[str]:
    """Names of what is still on the meta device, but for what shares another tensor's memory."""
    tied = model.all_tied_weights_keys.keys() | model.all_tied_weights_keys.values()
    return {name for name, tensor in model.state_dict().items() if tensor.is_meta} - tied


def _absent(model: "PreTrainedModel", on_meta: set[str]) -> set[str]:
    """Names without data, as `tie_weights` wants them: of a tied group that has none at all, the source counts as
    there, for it gets the memory that the others share."""
    absent = set(on_meta)
    for source in set(model.all_tied_weights_keys.values()):
        targets = {target for target, of in model.all_tied_weights_keys.items() if of == source}
        if targets <= on_meta:
            absent.discard(source)
    return absent


def _initialize(model: "PreTrainedModel", names: Collection[str]) -> None:
    """Run transformers' own initialisation for the named tensors alone: it leaves alone what bears its mark."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor._is_hf_initialized = name not in names  # pyright: ignore[reportAttributeAccessIssue]
    model.initialize_weights()
