"""Ranks of `support.elastic` on GPUs: each keeps its MoE layers in one CUDA graph, for all its life."""

from collections.abc import Sequence
from pathlib import Path

import torch
from support.deaths import Death, die
from support.elastic import STEPS, begin_life, end_life, rebalance, result_path, tell_views
from support.ranks import write_whole
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from elastic_moe.config import EplbConfig, ExchangeConfig
from elastic_moe.integrations.transformers import elasticize, meta_model
from elastic_moe.layer import ElasticMoELayer
from elastic_moe.runtime import ElasticRuntime

TOKENS, HIDDEN, EXPERTS, TOP_K = 16, 128, 8, 2
IN_REPLAY = "in a replay"
"""A `point` of a `Death`: the kernels of the `nth` step have been queued, and have not ended."""


def make_checkpoint(folder: Path) -> Path:
    """As `support.elastic.make_checkpoint`, in sizes that the kernels take."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=HIDDEN, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=EXPERTS, num_experts_per_tok=TOP_K, initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def inputs_of(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, chosen experts, weights of one rank's one step; some experts are chosen often."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    hidden = torch.randn((TOKENS, HIDDEN), generator=generator)
    scores = torch.rand((TOKENS, EXPERTS), generator=generator) + torch.linspace(1, 0, EXPERTS)
    weights = torch.rand((TOKENS, TOP_K), generator=generator)
    return hidden, scores.topk(TOP_K).indices, weights


def wanted(checkpoint: Path, ranks: Sequence[int], steps: Sequence[int]) -> dict[tuple[int, int], torch.Tensor]:
    """Of every rank's every step, in float64 on one CPU."""
    model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float64, experts_implementation="eager")
    found = {}
    with torch.no_grad():
        for rank in ranks:
            for step in steps:
                hidden, experts, weights = inputs_of(rank, step)
                out = hidden.double()
                for layer in model.model.layers:
                    out = layer.mlp.experts(out, experts, weights.double())  # pyright: ignore[reportCallIssue]
                found[rank, step] = out
    return found


class Graph:
    """Both MoE layers of one rank, captured at the first call."""

    def __init__(self, runtime: ElasticRuntime, layers: Sequence[ElasticMoELayer]) -> None:
        self._runtime = runtime
        self._moe_layers = layers
        self._inputs = [x.to(runtime.device) for x in inputs_of(runtime.rank, 0)]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.replays = 0

    def __call__(self, step: int) -> torch.Tensor:
        for mine, new in zip(self._inputs, inputs_of(self._runtime.rank, step), strict=True):
            mine.copy_(new)
        if self.graph is not None:
            self.graph.replay()
            self.replays += 1
            return self._out
        out = self._layers().clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads use the GPU too
            self._out = self._layers()
        self.graph = graph
        return out

    def _layers(self) -> torch.Tensor:
        hidden, experts, weights = self._inputs
        for layer in self._moe_layers:
            hidden = layer(hidden, experts, weights)
        return hidden


def work(
    start: bytes, life: int, folder: Path, checkpoint: Path, deaths: Sequence[Death], redundant_slots: int, rounds: int
) -> None:
    """What a rank does; see `support.elastic.run_cluster`."""
    seat, mine = begin_life(start, life, deaths)
    rank = seat.launch.rank
    dies_at = {death.nth for death in mine if death.point == IN_REPLAY}
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    runtime = ElasticRuntime.join(
        seat,
        device=device,
        exchange_timeout_s=30,
        eplb=EplbConfig(mode="async" if rounds else "off", half_life_steps=2, interval_s=0.2, staging_mb=1),
        exchange=ExchangeConfig(kind="symmetric", max_tokens=TOKENS),
    )
    tell_views(runtime, folder, lambda: None)
    model = meta_model(checkpoint, torch.float32)
    elasticize(model, runtime, checkpoint=checkpoint, redundant_slots=redundant_slots)
    layers = [module for module in model.modules() if isinstance(module, ElasticMoELayer)]
    graph, graphs, moved, addresses = Graph(runtime, layers), set(), 0, set()

    def forward(step: int) -> torch.Tensor:
        out = graph(step)
        if step in dies_at:
            die()
        graphs.add(id(graph.graph))
        addresses.add(tuple(t.data_ptr() for t in runtime.pool.store.tensors(0, 0)))
        return out

    with torch.inference_mode():
        for step in range(STEPS):
            out = runtime.run(lambda step=step: forward(step))
            if not result_path(folder, rank, step).exists():
                write_whole(result_path(folder, rank, step), lambda part, out=out: torch.save(out.cpu(), part))
            for number in range(rounds):
                moved += rebalance(runtime, lambda at=step * rounds + number: forward(STEPS + at))
    last = runtime.run(lambda: forward(STEPS)).cpu()
    end_life(
        runtime, folder, graphs=len(graphs), replays=graph.replays, moved=moved, addresses=len(addresses), last=last
    )
