"""Which tensors make one expert of one layer."""

from dataclasses import dataclass
from math import prod

import torch
from torch import nn


@dataclass(frozen=True)
class ExpertLayout:
    """The tensors of one expert of one layer; they always move together.

    Attributes:
        names: relative to the experts module, e.g. `("gate_up_proj", "down_proj")`, in the module's own order.
        shapes: of one expert each, without the leading expert dimension.
        dtypes: as they are kept in memory.
        num_experts: E, logical experts of the layer.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    num_experts: int

    @classmethod
    def of_module(cls, module: nn.Module, dtype: torch.dtype | None = None) -> "ExpertLayout":
        """The layout of a transformers experts module, which may be on the meta device.

        Args:
            module: has `num_experts`; every parameter and persistent buffer of the module itself (not of its
                submodules) with a leading dimension of that size belongs to the experts.
            dtype: replaces the floating dtypes of the module, when given.

        Raises:
            ValueError: there is no `num_experts`, or no such tensor.
        """
        num_experts = getattr(module, "num_experts", None)
        if num_experts is None:
            raise ValueError(f"{type(module).__name__} has no num_experts, so it cannot be read as an experts module")
        persistent = {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }
        stacked = {
            name: tensor
            for name, tensor in (dict(module.named_parameters(recurse=False)) | persistent).items()
            if tensor.ndim > 0 and tensor.shape[0] == num_experts
        }
        if not stacked:
            raise ValueError(f"{type(module).__name__} has no tensor with a leading dimension of {num_experts} experts")
        return cls(
            names=tuple(stacked),
            shapes=tuple(tuple(tensor.shape[1:]) for tensor in stacked.values()),
            dtypes=tuple(dtype if dtype and t.is_floating_point() else t.dtype for t in stacked.values()),
            num_experts=num_experts,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of one expert in memory."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in zip(self.shapes, self.dtypes, strict=True))
