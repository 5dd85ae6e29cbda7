"""Experts of one layer on a Hopper GPU: fused grouped GEMMs that leave every count on the device.

Shapes are static and nothing waits for the device, so all of it can be captured in a CUDA graph and replayed with
other rows, offsets, routing or weights at the same addresses. Kernels: `triton_kernels`, `hopper_kernels`.
"""

import functools
import importlib
from dataclasses import dataclass
from math import ceil
from types import ModuleType
from typing import Any

import torch

_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh"}
"""By the class of `act_fn`; of torch and transformers."""


_MULTIPLES = {torch.bfloat16: 128, torch.float32: 64}
"""What D and I have to be multiples of."""

_MOSTLY_PADDING = 4
"""With more rows than so many times those that are expected."""

_ROW_TILES_TOGETHER = 16
"""Row tiles of a slot that go through its columns together: what they read then stays in the L2 cache."""

_TRITON_BELOW = (3, 8)
"""Gluon, in which `hopper_kernels` is written, renames things: compiled with Triton 3.6 and 3.7, run with 3.6."""


@dataclass(frozen=True)
class Tile:
    """What one program computes: `rows` of a slot by `columns` of its weights, `depth` of the inner dimension a step.

    `specialized` tiles belong to `hopper_kernels`, the others to `triton_kernels`.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    specialized: bool


@dataclass(frozen=True)
class FusedExperts:
    """Gated experts without bias: down(act(gate(x)) * up(x)).

    Attributes:
        gate_up: [S, 2 * I, D] bfloat16 or float32, the gate's rows before the up projection's.
        down: [S, D, I], the same.
        activation: of the gate, "silu" or "gelu_tanh".
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    activation: str

    def compute(self, rows: torch.Tensor, offsets: torch.Tensor, expected_rows: int | None = None) -> torch.Tensor:
        """Each row by the expert of its slot.

        Args:
            rows: [M, D] in the dtype of the weights, grouped by slot.
            offsets: int32 [S], the end of each slot's rows; rows past the last are neither read nor written.
            expected_rows: how many of them are likely to be there; None: all.

        Returns:
            [M, D].
        """
        rows = rows.contiguous()
        expected_rows = rows.shape[0] if expected_rows is None else expected_rows
        inner = rows.new_empty((rows.shape[0], self.down.shape[2]))
        out = torch.empty_like(rows)
        _grouped_gemm(rows, self.gate_up, inner, offsets, expected_rows, activation=self.activation)
        _grouped_gemm(inner, self.down, out, offsets, expected_rows)
        return out

    def compute_routed(self, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The whole layer of one rank: sort by slot, experts, weighted sum in float32 in the order of K.

        Args:
            hidden: [T, D] tokens in the dtype of the weights.
            slots: integer [T, K]; anything outside 0..S-1 means "none" and adds nothing.
            weights: [T, K], any floating dtype.

        Returns:
            [T, D].
        """
        hidden, slots, weights = hidden.contiguous(), slots.contiguous(), weights.contiguous()
        num_slots, _, size = self.gate_up.shape
        num_tokens, top_k = slots.shape
        out = torch.empty_like(hidden)
        if not slots.numel():
            return out.zero_()
        order, row_of_pair, offsets = sort_by_slot(slots, num_slots)
        inner = hidden.new_empty((slots.numel(), self.down.shape[2]))
        results = hidden.new_empty((slots.numel(), size))
        pairs = slots.numel()
        _grouped_gemm(
            hidden, self.gate_up, inner, offsets, pairs, activation=self.activation, gather=order, top_k=top_k
        )
        _grouped_gemm(inner, self.down, results, offsets, pairs)
        block = max(256, min(2048, _power_of_2(size))) if num_tokens >= 64 else 256
        _kernels().small.combine_pairs[(num_tokens, ceil(size / block))](
            results,
            row_of_pair,
            offsets,
            weights,
            out,
            num_slots,
            size,
            TOP_K=top_k,
            BLOCK=block,
            num_warps=block // 256,
        )
        return out


def fused_experts(template: Any, gate_up: torch.Tensor, down: torch.Tensor) -> FusedExperts | None:
    """The fused form of a transformers experts module, or None where it has none here.

    It has one for gated experts with the default gate, [S, 2 * I, D] and [S, D, I] weights, no bias and no norm, on a
    Hopper GPU with Triton: in bfloat16 with D and I multiples of 128, in float32 (for tests of the rest: not fast, no
    tf32) of 64.

    Args:
        template: the module, for its flags and activation.
        gate_up: its `gate_up_proj`.
        down: its `down_proj`.
    """
    plain = template.has_gate and template.is_concatenated
    plain = plain and not (template.has_bias or template.is_transposed or has_post_expert_norm(template))
    gate = getattr(type(template), "_apply_gate", None)
    activation = _ACTIVATIONS.get(type(getattr(template, "act_fn", None)).__name__)
    if not plain or activation is None or getattr(gate, "__name__", "") != "_default_apply_gate":
        return None
    if not (_fits(gate_up) and _fits(down) and _is_hopper(gate_up.device)) or _kernels() is None:
        return None
    return FusedExperts(gate_up.detach(), down.detach(), activation)


def has_post_expert_norm(template: Any) -> bool:
    """Whether each expert's result is normalised; transformers 5.17 has no such experts and no such flag."""
    return getattr(template, "has_post_expert_norm", False)


def choose_tile(
    num_rows: int, num_slots: int, columns: int, expected_rows: int, dtype: torch.dtype = torch.bfloat16
) -> Tile:
    """The tile for M rows over S slots, of which `expected_rows` are likely no padding, measured on an H200:
    docs/performance.md.

    Few rows per slot leave the reading of weights as the only cost: narrow tiles, many programs. From about 8 rows
    on the specialized kernel is as fast or faster, and pays nothing for rows that are padding; the other has a program
    for each tile that there could be.
    """
    rows_per_slot = expected_rows / num_slots
    if dtype == torch.float32:
        return Tile(16, 64, 64, 2, specialized=False)
    if rows_per_slot <= 8 and num_rows <= _MOSTLY_PADDING * expected_rows:
        return Tile(16, 128, 128, 3, specialized=False)
    if rows_per_slot <= 128 or columns % 256:
        return Tile(128, 128, 64, 6, specialized=True)
    return Tile(128, 256, 64, 4, specialized=True)


def sort_by_slot(slots: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Group the pairs (t, k), numbered t * K + k, by their slot; stable.

    Args:
        slots: integer [T, K]; what lies outside 0..S-1 comes last.
        num_slots: S.

    Returns:
        int32: [T * K], the pair of each row; [T * K], the row of each pair; [S], the ends of the slots' rows.
    """
    num_pairs = slots.numel()
    block = 128 if num_pairs <= 16384 else 256 if num_pairs <= 65536 else 512
    num_blocks = ceil(num_pairs / block)
    padded = max(32, _power_of_2(num_slots + 1))
    order, row_of_pair = slots.new_empty((2, num_pairs), dtype=torch.int32)
    offsets = slots.new_empty((num_slots,), dtype=torch.int32)
    counts = None
    small = _kernels().small
    if num_blocks > 1:
        counts = slots.new_empty((num_blocks, padded), dtype=torch.int32)
        small.count_pairs[(num_blocks,)](slots, counts, num_pairs, num_slots, BLOCK=block, S_PAD=padded)
    small.place_pairs[(num_blocks,)](
        slots,
        counts,
        order,
        row_of_pair,
        offsets,
        num_pairs,
        num_slots,
        num_blocks,
        BLOCK=block,
        CHUNK=128,
        AT_ONCE=max(8, 8192 // padded),
        S_PAD=padded,
        num_warps=8,
    )
    return order, row_of_pair, offsets


def _grouped_gemm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    offsets: torch.Tensor,
    expected_rows: int,
    *,
    activation: str | None = None,
    gather: torch.Tensor | None = None,
    top_k: int = 1,
) -> None:
    """out = rows @ weight[slot].T, gated if there is an `activation`; see `triton_kernels.grouped_gemm`."""
    num_slots, columns, depth = weight.shape
    num_rows = out.shape[0]
    if not num_rows:
        return
    tile = choose_tile(num_rows, num_slots, columns, expected_rows, weight.dtype)
    num_tiles = min(num_rows, num_rows // tile.rows + num_slots) * (columns // tile.columns)
    kernels = _kernels()
    settings: dict[str, Any] = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "STAGES": tile.stages}
    if tile.specialized:
        kernel = kernels.large.grouped_gemm
        num_tiles = min(num_tiles, torch.cuda.get_device_properties(rows.device).multi_processor_count)
        box = tile.columns if activation is None else tile.columns // 2
        of_rows = kernels.describe(rows, [tile.rows // 2, tile.depth]) if gather is None else None
        operands = (rows, of_rows, kernels.describe(weight.view(-1, depth), [box, tile.depth]))
        settings["GROUP"] = _ROW_TILES_TOGETHER
        settings["next_ptr"] = offsets.new_zeros(1)
    else:
        kernel, operands = kernels.small.grouped_gemm, (rows, weight)
    kernel[(num_tiles,)](
        *operands,
        out_ptr=out,
        offsets_ptr=offsets,
        order_ptr=gather,
        num_slots=num_slots,
        N=columns,
        K=depth,
        TOP_K=top_k,
        ACTIVATION=activation,
        GATHER=gather is not None,
        S_PAD=max(32, _power_of_2(num_slots)),
        num_warps=4,
        **settings,
    )


@dataclass(frozen=True)
class _Kernels:
    small: ModuleType
    large: ModuleType
    descriptor: Any
    layout: Any

    def describe(self, matrix: torch.Tensor, box: list[int]) -> Any:
        """The tensor map by which TMA reads boxes of `matrix`."""
        return self.descriptor.from_tensor(matrix, box, self.layout)


@functools.cache
def _kernels() -> Any:
    """The kernels, or None where Triton is not installed or not one they are written for."""
    try:
        version = importlib.import_module("triton").__version__
        if tuple(int(part) for part in version.split(".")[:2]) >= _TRITON_BELOW:
            return None
        small = importlib.import_module("elastic_moe.experts.triton_kernels")
        large = importlib.import_module("elastic_moe.experts.hopper_kernels")
        hopper = importlib.import_module("triton.experimental.gluon.nvidia.hopper")
    except ImportError:
        return None
    layout = large.gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return _Kernels(small, large, hopper.TensorDescriptor, layout)


def _fits(weight: torch.Tensor) -> bool:
    multiple = _MULTIPLES.get(weight.dtype)
    aligned = weight.data_ptr() % 16 == 0 and weight.is_contiguous()
    return multiple is not None and aligned and all(size % multiple == 0 for size in weight.shape[1:])


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
