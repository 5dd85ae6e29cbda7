"""SlotExperts: the experts in one rank's slots of one layer, computed by grouped GEMM."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from elastic_moe.experts.grouped import FusedExperts, fused_experts, has_post_expert_norm
from elastic_moe.experts.layout import ExpertLayout


class SlotExperts(nn.Module):
    """All tensors of an expert stand in one list with a leading slot dimension [S, ...] and move together.

    Activation, gate, bias and orientation are those of the transformers experts module it is made from, which
    stays inside as `template`, stripped of its expert tensors.
    """

    def __init__(self, template: nn.Module, layout: ExpertLayout, num_slots: int, device: torch.device) -> None:
        """`template` loses its expert parameters: they belong to the slots from now on."""
        super().__init__()
        self.layout = layout
        self.num_slots = num_slots
        trainable = any(getattr(template, name).requires_grad for name in layout.names)
        for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes, strict=True):
            delattr(template, name)
            slots = torch.zeros((num_slots, *shape), dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(slots, requires_grad=trainable))
        self.template: Any = template
        self._first = "gate_up_proj" if template.has_gate else "up_proj"
        self._views: tuple[list[int], list[list[torch.Tensor]]] = ([], [])
        """Addresses of the parameters, and the tensors of each slot there: slots are asked for again and again."""

    @property
    def hidden_size(self) -> int:
        """D."""
        return getattr(self, self._first).shape[1 if self.template.is_transposed else 2]

    def resize(self, num_slots: int) -> None:
        """Have `num_slots` slots, at new addresses; those that stay keep their content, new ones hold zeros.

        Raises:
            RuntimeError: there is no memory for more; some tensors may have them already, `num_slots` is as before.
                Fewer slots take no memory, though where there is none it is not given back either.
        """
        with torch.inference_mode(False):  # a recovery in a caller's inference mode; slots are written outside it too
            for name in self.layout.names:
                old = getattr(self, name)
                setattr(self, name, nn.Parameter(_resized(old.detach(), num_slots), requires_grad=old.requires_grad))
        self.num_slots = num_slots

    def slot_tensors(self, slot: int) -> Sequence[torch.Tensor]:
        """Views of the tensors of one slot, in the order of `layout.names`."""
        parameters = [self.get_parameter(name) for name in self.layout.names]
        addresses = [parameter.data_ptr() for parameter in parameters]
        if self._views[0] != addresses or len(self._views[1]) != self.num_slots:
            whole = [parameter.detach() for parameter in parameters]
            self._views = (addresses, [[tensor[at] for tensor in whole] for at in range(self.num_slots)])
        return self._views[1][slot]

    def forward(self, rows: torch.Tensor, offsets: torch.Tensor, expected_rows: int | None = None) -> torch.Tensor:
        """Compute each row by the expert of its slot, without the routing weight.

        Args:
            rows: [M, D], grouped by slot.
            offsets: int32 [S], the end of each slot's rows; rows past the last are padding.
            expected_rows: how many are likely no padding; None: all. It changes the speed only.

        Returns:
            [M, D].
        """
        fused = self.fused(rows)
        if fused is not None:
            return fused.compute(rows, offsets, expected_rows)
        template = self.template
        up = self._linear(rows, self._first, offsets)
        hidden = template._apply_gate(up) if template.has_gate else template.act_fn(up)
        out = self._linear(hidden, "down_proj", offsets)
        return template.post_expert_norm(out) if has_post_expert_norm(template) else out

    def fused(self, rows: torch.Tensor) -> FusedExperts | None:
        """The kernels that compute these experts for rows like `rows` without gradients, where there are such."""
        trains = torch.is_grad_enabled() and (rows.requires_grad or any(p.requires_grad for p in self.parameters()))
        return None if trains or rows.dtype != self.get_parameter("down_proj").dtype else self._fused()

    @property
    def is_capturable(self) -> bool:
        """Whether `forward` never waits for the GPU, so that a CUDA graph may hold it."""
        first = self.get_parameter(self._first)
        return self._fused() is not None or (first.is_cuda and _has_kernel(first, first))

    def _fused(self) -> FusedExperts | None:
        if not self.template.has_gate or not self.get_parameter("down_proj").is_cuda:
            return None
        return fused_experts(self.template, self.get_parameter("gate_up_proj"), self.get_parameter("down_proj"))

    def _linear(self, rows: torch.Tensor, name: str, offsets: torch.Tensor) -> torch.Tensor:
        weight = getattr(self, name)
        out = grouped_mm(rows, weight if self.template.is_transposed else weight.transpose(-2, -1), offsets)
        if self.template.has_bias:
            bias = getattr(self, f"{name}_bias")
            slot = torch.searchsorted(offsets, torch.arange(rows.shape[0], device=rows.device), right=True)
            out = out + bias[slot.clamp(max=self.num_slots - 1)]
        return out


def _resized(old: torch.Tensor, num_slots: int) -> torch.Tensor:
    if num_slots <= len(old):
        with contextlib.suppress(RuntimeError):
            return old[:num_slots].clone()
        return old[:num_slots]
    new = old.new_zeros((num_slots, *old.shape[1:]))
    new[: len(old)].copy_(old)
    return new


def grouped_mm(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`rows[offsets[s-1]:offsets[s]] @ weight[s]` for every s, in one kernel where torch has one for it.

    Args:
        rows: [M, in], grouped.
        weight: [S, in, out].
        offsets: int32 [S], ends of the groups.

    Returns:
        [M, out]; rows past the last offset are undefined.
    """
    if not rows.shape[0]:
        return rows @ weight[0]  # no rows, but part of the graph: all ranks must take part in the backward too
    if _has_kernel(rows, weight):
        return F.grouped_mm(rows, weight, offs=offsets)
    parts, begin = [], 0
    for expert, end in zip(weight, offsets.tolist(), strict=True):
        if end > begin:
            parts.append(rows[begin:end] @ expert)
        begin = end
    parts.append(rows.new_zeros((rows.shape[0] - begin, weight.shape[-1])))
    return torch.cat(parts)


def _has_kernel(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `F.grouped_mm` takes these: dtype by device, and 16-byte rows on a GPU (torch 2.11 to 2.13)."""
    if rows.device.type == "cpu":
        return rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    aligned = all(n * rows.element_size() % 16 == 0 for n in weight.shape[-2:])
    return rows.dtype == torch.bfloat16 and aligned and torch.cuda.get_device_capability(rows.device) >= (8, 0)
