"""bench=layer: the experts of one MoE layer on one GPU, beside the limits of the chip and transformers' own.

`limit_us` is max(bytes / bandwidth, FLOPs / rate) with the weights of each expert that has a token read once, and the
rates of launch/gpus.py; null, as what is compared with it, on a card that it does not know. Every figure is the median
of Triton's do_bench, which empties the L2 cache before each call; ours is taken before and after the peers.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # peers that want kernels from the hub do not run

import torch
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from elastic_moe.experts.grouped import FusedExperts, fused_experts
from launch.benchmarks.config import BenchConfig
from launch.gpus import Rates, gpus_for, rates_of

MOST_GATHERED_BYTES = 40e9
"""batched_mm copies the weights of every pair; larger copies are not tried."""

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """One layer's experts on one rank; every token goes to K of these E experts."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int = 8


SHAPES = (
    Shape("qwen3-30b-a3b", 2048, 768, 128),
    Shape("qwen3-235b-a22b", 4096, 1536, 128),
    Shape("deepseek-v3-ep8", 7168, 2048, 32),
    Shape("deepseek-v3-ep32", 7168, 2048, 8),
)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Result:
    """Microseconds for one forward; `_graph_us` are replays of a captured CUDA graph, without launch overheads.

    `error` is the norm of the difference to transformers' grouped_mm over the norm of the result.
    """

    shape: str
    tokens: int
    active: int
    limit_us: float | None
    bound: str
    ours_us: float
    ours_graph_us: float
    peers_us: dict[str, float]
    peers_graph_us: dict[str, float]
    share_of_limit: float | None
    share_of_limit_graph: float | None
    speedup: float
    speedup_graph: float
    error: float


def limit_us(shape: Shape, num_tokens: int, active: int, rates: Rates) -> tuple[float, str]:
    """The least time for T tokens whose experts are `active` different ones, and what sets it: memory or matrix."""
    weights = 3 * shape.hidden * shape.inner
    memory = active * weights * 2 / rates.memory_bytes_per_s
    matrix = num_tokens * shape.top_k * weights * 2 / rates.bf16_flop_per_s
    return max(memory, matrix) * 1e6, "memory" if memory > matrix else "matrix"


def build(shape: Shape) -> tuple[Any, FusedExperts]:
    """Random weights on the GPU, as transformers' module and as ours: the same tensors."""
    with torch.device("meta"):
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden, moe_intermediate_size=shape.inner, num_experts=shape.experts, hidden_act="silu"
        )
        module: Any = Qwen3MoeExperts(config)
    for name, parameter in list(module.named_parameters()):
        weight = torch.randn(parameter.shape, dtype=torch.bfloat16, device="cuda").mul_(parameter.shape[-1] ** -0.5)
        setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    fused = fused_experts(module, module.gate_up_proj, module.down_proj)
    if fused is None:
        raise ValueError("bench=layer needs a Hopper GPU and Triton")
    return module, fused


def measure(shape: Shape, module: Any, fused: FusedExperts, num_tokens: int, rates: Rates | None) -> Result:
    """All implementations on the same random tokens and routing."""
    hidden = torch.randn((num_tokens, shape.hidden), dtype=torch.bfloat16, device="cuda")
    index = torch.rand((num_tokens, shape.experts), device="cuda").topk(shape.top_k).indices.contiguous()
    weights = torch.rand((num_tokens, shape.top_k), device="cuda").softmax(-1).bfloat16()
    active = int(index.unique().numel())
    limit, bound = limit_us(shape, num_tokens, active, rates) if rates else (None, "")

    def ours() -> torch.Tensor:
        return fused.compute_routed(hidden, index, weights)

    first, first_graph = time_us(ours), time_us(captured(ours))
    peers: dict[str, float] = {}
    peers_graph: dict[str, float] = {}
    for name in ("eager", *ALL_EXPERTS_FUNCTIONS.keys()):
        gathered = 3 * shape.hidden * shape.inner * 2 * num_tokens * shape.top_k
        if name == "batched_mm" and gathered > MOST_GATHERED_BYTES:
            continue

        def peer(name: str = name) -> torch.Tensor:
            module.config._experts_implementation = name
            return module(hidden, index, weights)

        try:
            peers[name] = time_us(peer)
        except Exception as error:  # noqa: BLE001 - whatever a peer says that lacks its kernels
            print(f"{name} does not run here: {error}"[:200], file=sys.stderr)
            continue
        if name != "eager":  # it asks the host which experts have tokens
            peers_graph[name] = time_us(captured(peer))
            torch.cuda.empty_cache()
    module.config._experts_implementation = "grouped_mm"
    wanted = module(hidden, index, weights).double()
    mine, mine_graph = (first + time_us(ours)) / 2, (first_graph + time_us(captured(ours))) / 2
    return Result(
        shape=shape.name,
        tokens=num_tokens,
        active=active,
        limit_us=limit,
        bound=bound,
        ours_us=mine,
        ours_graph_us=mine_graph,
        peers_us=peers,
        peers_graph_us=peers_graph,
        share_of_limit=limit / mine if limit else None,
        share_of_limit_graph=limit / mine_graph if limit else None,
        speedup=min(peers.values()) / mine,
        speedup_graph=min(peers_graph.values()) / mine_graph,
        error=float((ours().double() - wanted).norm() / wanted.norm()),
    )


def captured(call: Call) -> Call:
    """The same work as one CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def time_us(call: Call) -> float:
    """Median over about 50 ms, after 10 ms of warming up."""
    import triton.testing  # pyright: ignore[reportMissingImports]

    milliseconds: Any = triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")
    return milliseconds * 1e3


def run(config: BenchConfig) -> Iterator[dict[str, Any]]:
    """Every result, as it is measured, figures rounded."""
    gpus_for(config.name)
    rates = rates_of(torch.cuda.get_device_name())
    torch.manual_seed(config.seed)
    for shape in SHAPES:
        module, fused = build(shape)
        for num_tokens in TOKENS:
            with torch.no_grad():
                yield _rounded(asdict(measure(shape, module, fused, num_tokens, rates)))
        del module, fused
        torch.cuda.empty_cache()


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
