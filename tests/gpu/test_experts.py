"""SlotExperts and the one-rank layer on a GPU against the module they replace, in float64."""

import copy

import pytest
import torch
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from elastic_moe.experts.grouped import choose_tile, sort_by_slot
from elastic_moe.experts.layout import ExpertLayout
from elastic_moe.experts.slots import SlotExperts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
CUDA = torch.device("cuda")
TOLERANCE = 6e-3  # of the norm: bfloat16 operands and one bfloat16 rounding in between


class Ungated(torch.nn.Module):
    """No family of transformers has experts without a gate that can be built alone: a minimal one."""

    has_gate = has_bias = is_transposed = has_post_expert_norm = False
    is_concatenated = True

    def __init__(self, hidden: int, inner: int, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.up_proj = torch.nn.Parameter(torch.empty(num_experts, inner, hidden))
        self.down_proj = torch.nn.Parameter(torch.empty(num_experts, hidden, inner))
        self.act_fn = torch.nn.SiLU()

    def forward(self, hidden, index, weights):
        up = torch.einsum("td,tid->ti", hidden, self.up_proj[index[:, 0]])
        return torch.einsum("ti,tdi->td", self.act_fn(up), self.down_proj[index[:, 0]]) * weights


def build(kind: str, hidden: int, inner: int, num_experts: int) -> torch.nn.Module:
    if kind == "gpt_oss":
        module = GptOssExperts(GptOssConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=num_experts))
    elif kind == "ungated":
        module = Ungated(hidden, inner, num_experts)
    else:
        act = "gelu_pytorch_tanh" if kind == "gelu" else "silu"
        module = Qwen3MoeExperts(
            Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=num_experts, hidden_act=act)
        )
    if kind != "ungated":
        module.config._experts_implementation = "eager"
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        parameter.data = torch.randn(parameter.shape, device=CUDA).div_(parameter.shape[-1] ** 0.5).bfloat16()
    return module


def with_slots(module: torch.nn.Module) -> SlotExperts:
    layout = ExpertLayout.of_module(module)
    experts = SlotExperts(copy.deepcopy(module), layout, layout.num_experts, CUDA)
    for name in layout.names:
        getattr(experts, name).copy_(getattr(module, name))
    return experts


def reference(module: torch.nn.Module, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Each row by the expert of its slot, in float64."""
    return copy.deepcopy(module).double()(rows.double(), slots[:, None], rows.new_ones((len(rows), 1)).double())


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert got.isfinite().all()
    assert (got.double() - wanted).norm() <= TOLERANCE * wanted.norm()


COUNTS = {
    "one row each": [1] * 8,
    "empty slots": [0, 3, 0, 0, 40, 1, 0, 0],
    "all rows in one slot": [0, 0, 0, 0, 0, 500, 0, 0],
    "all rows in the last slot": [0, 0, 0, 0, 0, 0, 0, 9],
    "ends of tiles": [128, 127, 129, 64, 65, 63, 192, 256],
    "many rows": [700, 0, 1, 1000, 33, 300, 130, 2000],
    "no rows": [0] * 8,
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("kind", ["qwen3_moe", "gelu", "gpt_oss", "ungated"])
@pytest.mark.parametrize("padding", [0, 100])
def test_rows_grouped_by_slot(kind, counts, padding):
    """Padding rows hold NaN: neither they nor a neighbouring group may leak into a result."""
    torch.manual_seed(0)
    module = build(kind, 256, 384, 8)
    counted = torch.tensor(counts, device=CUDA)
    rows = torch.randn((sum(counts) + padding, 256), device=CUDA).bfloat16()
    rows[sum(counts) :] = float("nan")
    slots = torch.repeat_interleave(torch.arange(8, device=CUDA), counted)
    got = with_slots(module)(rows, counted.cumsum(0).int())
    assert got.shape == rows.shape
    if sum(counts):
        assert_close(got[: sum(counts)], reference(module, rows[: sum(counts)], slots))


SHAPES = [(2048, 768, 128, 8), (7168, 2048, 8, 8), (128, 128, 3, 2), (384, 640, 40, 5)]


@hopper
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 64, 300, 3000])
@pytest.mark.parametrize(("hidden", "inner", "num_experts", "top_k"), SHAPES)
def test_layer_of_one_rank(hidden, inner, num_experts, top_k, num_tokens):
    """Slots -1 and S mean none; weights are float32 as routers give them."""
    torch.manual_seed(1)
    module = build("qwen3_moe", hidden, inner, num_experts)
    tokens = torch.randn((num_tokens, hidden), device=CUDA).bfloat16()
    slots = torch.randint(-1, num_experts + 1, (num_tokens, top_k), device=CUDA)
    weights = torch.rand((num_tokens, top_k), device=CUDA)
    fused = with_slots(module).fused(tokens)
    assert fused is not None
    got = fused.compute_routed(tokens, slots, weights)
    assert torch.equal(got, fused.compute_routed(tokens, slots, weights))
    if num_tokens:
        here = (slots >= 0) & (slots < num_experts)
        token, _ = here.nonzero(as_tuple=True)
        results = reference(module, tokens[token], slots[here]) * weights[here][:, None].double()
        wanted = torch.zeros_like(tokens, dtype=torch.float64).index_add_(0, token, results)
        assert_close(got, wanted)


@hopper
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_float32_is_exact_and_leaves_its_counts_on_the_device(num_tokens):
    torch.manual_seed(6)
    module = build("qwen3_moe", 192, 128, 16).float()
    experts = with_slots(module)
    assert experts.is_capturable
    tokens = torch.randn((num_tokens, 192), device=CUDA)
    slots = torch.randint(16, (num_tokens, 1), device=CUDA)
    fused = experts.fused(tokens)
    assert fused is not None
    graph = torch.cuda.CUDAGraph()
    one = torch.ones((num_tokens, 1), device=CUDA)
    fused.compute_routed(tokens, slots, one)
    with torch.cuda.graph(graph):
        got = fused.compute_routed(tokens, slots, one)
    graph.replay()
    wanted = reference(module, tokens, slots[:, 0])
    assert (got.double() - wanted).norm() <= 1e-6 * wanted.norm()


@hopper
@pytest.mark.parametrize("rows_per_slot", [2, 10, 40, 200])
def test_graph_replays_with_other_groups_tokens_and_weights(rows_per_slot):
    torch.manual_seed(2)
    module = build("qwen3_moe", 256, 384, 16)
    experts = with_slots(module)
    num_tokens = 16 * rows_per_slot // 4
    tokens = torch.empty((num_tokens, 256), dtype=torch.bfloat16, device=CUDA)
    slots = torch.empty((num_tokens, 4), dtype=torch.int64, device=CUDA)
    weights = torch.empty((num_tokens, 4), device=CUDA)
    fused = experts.fused(tokens)
    assert fused is not None

    def draw() -> None:
        tokens.normal_()
        slots.random_(-1, 17)
        weights.uniform_()

    draw()
    fused.compute_routed(tokens, slots, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused.compute_routed(tokens, slots, weights)
    for _ in range(3):
        draw()
        for name in experts.layout.names:
            getattr(experts, name).mul_(-0.5)
        graph.replay()
        assert torch.equal(out, fused.compute_routed(tokens, slots, weights))


@hopper
@pytest.mark.parametrize(("capacity", "expected"), [(64, None), (64, 64), (4096, None), (4096, 64), (4096, 4096)])
def test_graph_of_the_experts_alone_replays_with_other_offsets(capacity, expected):
    """Whatever was expected."""
    torch.manual_seed(3)
    module = build("qwen3_moe", 256, 384, 16)
    experts = with_slots(module)
    rows = torch.randn((capacity, 256), device=CUDA).bfloat16()
    offsets = torch.zeros(16, dtype=torch.int32, device=CUDA)
    experts(rows, offsets, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(rows, offsets, expected)
    for total in (capacity, 0, 1, capacity // 2):
        slots = torch.randint(16, (total,), device=CUDA).sort().values
        offsets.copy_(torch.bincount(slots, minlength=16).cumsum(0))
        graph.replay()
        if total:
            assert_close(out[:total], reference(module, rows[:total], slots))


@hopper
@pytest.mark.parametrize(
    ("num_pairs", "num_slots"), [(1, 1), (8, 128), (129, 8), (4096, 300), (40000, 32), (131072, 128)]
)
def test_sort_by_slot(num_pairs, num_slots):
    torch.manual_seed(4)
    slots = torch.randint(-1, num_slots + 2, (num_pairs, 1), device=CUDA)
    order, row_of_pair, offsets = sort_by_slot(slots, num_slots)
    flat = slots.flatten()
    flat = flat.where((flat >= 0) & (flat < num_slots), num_slots)
    assert torch.equal(order.long(), flat.argsort(stable=True))
    assert torch.equal(row_of_pair[order.long()].long(), torch.arange(num_pairs, device=CUDA))
    assert torch.equal(offsets.long(), flat.bincount(minlength=num_slots + 1)[:-1].cumsum(0))


@hopper
def test_gradients_go_the_other_way():
    module = build("qwen3_moe", 128, 128, 4)
    experts = with_slots(module)
    rows = torch.randn((8, 128), device=CUDA).bfloat16().requires_grad_()
    assert experts.fused(rows) is None
    experts(rows, torch.tensor([2, 4, 6, 8], dtype=torch.int32, device=CUDA)).square().sum().backward()
    assert rows.grad is not None
    with torch.no_grad():
        assert experts.fused(rows) is not None


def test_tiles_divide_the_weights():
    for columns in (128, 384, 512, 1536, 7168):
        for rows in (1, 100, 10_000, 1_000_000):
            assert columns % choose_tile(rows, 32, columns, rows).columns == 0
            assert columns % choose_tile(rows, 32, columns, 8).columns == 0
